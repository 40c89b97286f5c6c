//! Hosts that lack something: one sentence that says what to do.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::{fs, path::Path};

use super::overlays::overlay;
use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::Host;
use crate::process::{Finished, Process};
use crate::{ensure, ensure_eq, namespace};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "no_kvm_is_one_clear_sentence",
        run: no_kvm,
        needs: Needs::GUEST.as_root(),
    },
    Case {
        name: "no_permission_is_one_clear_sentence",
        run: denied,
        needs: Needs::GUEST.as_root(),
    },
    Case {
        name: "no_userfaultfd_is_one_clear_sentence",
        run: no_userfaultfd,
        needs: Needs::GUEST.as_root().within(90),
    },
];

/// Somebody with no rights: `nobody` on every distribution.
const NOBODY: u32 = 65534;

fn one_sentence(finished: Finished, needles: &[&str]) -> Outcome {
    let finished = finished.expect_code(1)?;
    ensure_eq!(
        finished.stderr.lines().count(),
        1,
        "sentences in {:?}",
        finished.stderr
    );
    for needle in needles {
        ensure!(
            finished.stderr.contains(needle),
            "no {needle:?} in {:?}",
            finished.stderr
        );
    }
    Ok(())
}

fn no_kvm(host: &Host) -> Outcome {
    namespace::private_mounts()?;
    namespace::bare_dev(&["null", "zero", "urandom"])?;
    one_sentence(host.run(&["run", "--detach"])?, &["/dev/kvm"])
}

/// Runs the program as nobody, from a copy that nobody can reach.
fn run_as_nobody(host: &Host, args: &[&str]) -> Outcome<Finished> {
    let copy = host.path("cloudlet");
    if !copy.exists() {
        fs::copy(host.program(), &copy)?;
        fs::set_permissions(host.path(""), PermissionsExt::from_mode(0o755))?;
    }
    give_away(&host.path("run"))?;
    give_away(&host.path("data"))?;
    let mut command = std::process::Command::new(copy);
    command
        .args(args)
        .current_dir("/")
        .env("XDG_RUNTIME_DIR", host.path("run"))
        .env("XDG_DATA_HOME", host.path("data"))
        .gid(NOBODY)
        .uid(NOBODY);
    Process::spawn(&mut command, Stdio::null())?
        .wait(host.limit(std::time::Duration::from_secs(30)))
}

/// Makes everything under `path` nobody's.
fn give_away(path: &Path) -> Outcome {
    chown(path, Some(NOBODY), Some(NOBODY))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            give_away(&entry?.path())?;
        }
    }
    Ok(())
}

/// Puts a `/dev/kvm` of this mode over the real one, for this case only.
fn kvm_with_mode(host: &Host, mode: u32) -> Outcome {
    namespace::private_mounts()?;
    let dir = host.path("dev");
    fs::create_dir(&dir)?;
    namespace::copy_node(Path::new("/dev/kvm"), &dir.join("kvm"), mode)?;
    namespace::bind(&dir.join("kvm"), Path::new("/dev/kvm"))
}

fn denied(host: &Host) -> Outcome {
    kvm_with_mode(host, 0o600)?;
    one_sentence(
        run_as_nobody(host, &["run", "--detach"])?,
        &["/dev/kvm", "kvm"],
    )
}

fn no_userfaultfd(host: &Host) -> Outcome {
    if fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")?.trim() == "1" {
        println!("every user may use userfaultfd here: nothing to see");
        return Ok(());
    }
    kvm_with_mode(host, 0o666)?;
    let file = overlay(host)?;
    host.ok(&["stop", "dev"])?;
    chown(&file, Some(NOBODY), None)?;
    let finished = run_as_nobody(
        host,
        &["synthesize", &file.to_string_lossy(), "--name", "web"],
    )?;
    one_sentence(finished, &["userfaultfd"])
}
