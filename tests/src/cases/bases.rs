//! The store of base VMs.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_base_is_created_listed_shown_removed",
        run: life_of_a_base,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_base_can_come_from_a_vm",
        run: from_a_vm,
        needs: Needs::GUEST,
    },
    Case {
        name: "base_verify_finds_a_changed_byte",
        run: changed_byte,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_base_that_is_in_use_stays",
        run: in_use,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_base_creation_that_is_killed_leaves_none",
        run: killed,
        needs: Needs::GUEST,
    },
];

fn life_of_a_base(host: &Host) -> Outcome {
    ensure_eq!(
        host.json_lines(&["base", "ls"])?.len(),
        0,
        "bases on a new host"
    );
    let made = host.json(&["base", "create", "one", "--builtin", "--memory", "64"])?;
    let id = made["id"].as_str().unwrap_or_default().to_owned();
    ensure!(id.len() >= 32, "no id: {made}");
    ensure!(
        host.ok(&["base", "ls"])?.contains("one"),
        "ls does not list it"
    );
    let shown = host.json(&["base", "show", "one"])?;
    ensure_eq!(shown["id"], id.as_str(), "id of the tag");
    ensure_eq!(
        host.json(&["base", "show", &id[..12]])?["id"],
        id.as_str(),
        "id by its first digits"
    );
    host.ok(&["base", "verify", "one"])?;

    host.ok(&["restore", "one", "--name", "web"])?;
    ensure_eq!(host.state("web")?, "running", "a VM of the base");
    host.ok(&["stop", "web"])?;

    host.ok(&["base", "rm", "one", "--all"])?;
    ensure_eq!(host.json_lines(&["base", "ls"])?.len(), 0, "bases after rm");
    let stderr = host.fails(&["base", "show", "one"], 1)?;
    ensure!(stderr.contains("one"), "the tag is not named: {stderr}");
    Ok(())
}

fn from_a_vm(host: &Host) -> Outcome {
    host.boot("web", &["--memory", "64"])?;
    host.ok(&["base", "create", "mine", "--from", "web"])?;
    ensure_eq!(host.state("web")?, "running", "the VM that was published");
    host.ok(&["base", "verify", "mine"])?;
    host.ok(&["restore", "mine", "--name", "copy"])?;
    ensure_eq!(host.state("copy")?, "running", "a VM of the base");
    Ok(())
}

/// The files of the one base in the host's store.
pub(super) fn base_files(host: &Host) -> Outcome<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut dirs = vec![host.path("data/cloudlet/bases")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if fs::symlink_metadata(&path)?.is_dir() {
                dirs.push(path)
            } else {
                files.push(path)
            }
        }
    }
    files.sort();
    Ok(files)
}

fn changed_byte(host: &Host) -> Outcome {
    host.ok(&["base", "create", "one", "--builtin", "--memory", "64"])?;
    for name in ["memory", "state"] {
        let files = base_files(host)?;
        let file = files
            .iter()
            .find(|path| path.file_name().is_some_and(|last| last == name));
        let file = file.ok_or_else(|| Failure::new(format!("no {name} in {files:?}")))?;
        let whole = fs::read(file)?;
        let mut changed = whole.clone();
        let at = changed.len() / 3;
        changed[at] ^= 1;
        // Files of a base are read-only for good reason.
        fs::remove_file(file)?;
        fs::write(file, &changed)?;
        let stderr = host.fails(&["base", "verify", "one"], 1)?;
        ensure!(stderr.contains(name), "{name} is not named: {stderr}");
        fs::write(file, &whole)?;
        host.ok(&["base", "verify", "one"])?;
    }
    Ok(())
}

fn in_use(host: &Host) -> Outcome {
    host.ok(&["base", "create", "one", "--builtin", "--memory", "64"])?;
    let refused = |who: &str| -> Outcome {
        let stderr = host.fails(&["base", "rm", "one", "--all"], 1)?;
        let told = stderr.contains(who) && stderr.contains("--force");
        ensure!(told, "{who} is not named: {stderr}");
        host.ok(&["base", "verify", "one"]).map(drop)
    };
    host.ok(&["restore", "one", "--name", "restored", "--paused"])?;
    refused("restored")?;
    let overlay = host.path("x.overlay");
    let overlay = overlay.to_string_lossy();
    host.ok(&["overlay", "create", &overlay, "--from", "restored"])?;
    host.ok(&["synthesize", &overlay, "--name", "made", "--wait"])?;
    refused("made, restored")?;
    host.ok(&["stop", "restored"])?;
    refused("in use by made (")?;
    host.ok(&["stop", "made"])?;
    // By its directory, as a snapshot's.
    let dir = host.json(&["base", "show", "one"])?["dir"].clone();
    let dir = dir.as_str().unwrap_or_default();
    host.ok(&["restore", dir, "--name", "by-path"])?;
    refused("restored from its directory")?;
    host.ok(&["base", "rm", "one", "--all", "--force"])?;
    ensure_eq!(host.state("by-path")?, "running", "a VM that lost its base");
    ensure!(!Path::new(dir).exists(), "it is still there");
    Ok(())
}

fn killed(host: &Host) -> Outcome {
    for pause_ms in [5, 20, 60, 120] {
        let create = host.spawn(&["base", "create", "one", "--builtin", "--memory", "64"])?;
        std::thread::sleep(std::time::Duration::from_millis(pause_ms));
        create.signal(libc::SIGKILL)?;
        drop(create);
        for base in host.json_lines(&["base", "ls"])? {
            // It was quick enough to finish: then it must be whole.
            host.ok(&["base", "verify", base["id"].as_str().unwrap_or_default()])?;
        }
    }
    host.ok(&["base", "create", "two", "--builtin", "--memory", "64"])?;
    host.ok(&["base", "verify", "two"])?;
    ensure!(
        host.ok(&["base", "ls"])?.contains("two"),
        "ls does not list it"
    );
    Ok(())
}
