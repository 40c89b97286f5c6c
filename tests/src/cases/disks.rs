//! Disks that outlast their VM.

use std::fs;
use std::time::Duration;

use cloudlet_resources::client::ClientError;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::{ensure, ensure_eq, process};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_disks_layer_outlasts_a_killed_vm",
        run: outlasts,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_vm_killed_while_it_writes_leaves_a_sound_disk",
        run: killed_while_writing,
        needs: Needs::GUEST.within(120),
    },
    Case {
        name: "a_layer_is_for_one_vm_and_one_base",
        run: one_vm_one_base,
        needs: Needs::GUEST,
    },
];

/// The disk that the cases use, with its layer in the host's directory.
fn disk(host: &Host) -> String {
    format!("empty:64,layer={}", host.path("layer").display())
}

/// Asks the guest to start the application on its disk. `None` if it says that there is none; what
/// is there is checked by the guest against its hash, and afterwards by the application itself.
fn load(host: &Host, name: &str) -> Outcome<Option<String>> {
    let mut client = cloudlet::guest::connect(&host.vm_dir(name).join("vsock.sock"))?;
    match client.load() {
        Ok(text) => {
            host.ok(&["call", name, "verify"])?;
            Ok(Some(text))
        }
        Err(ClientError::Refused(why)) if why.contains("holds no application") => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn kill(host: &Host, pid: u32) -> Outcome {
    process::signal_pid(pid, libc::SIGKILL)?;
    host.wait_for_end(pid)
}

fn outlasts(host: &Host) -> Outcome {
    let disk = disk(host);
    let pid = host.boot("web", &["--disk", &disk])?;
    ensure_eq!(load(host, "web")?, None, "the application on a new disk");
    host.install_fluid("web")?;
    kill(host, pid)?;
    for end in ["stopped", "killed"] {
        let pid = host.boot("web", &["--disk", &disk])?;
        let loaded = load(host, "web")?;
        ensure!(loaded.is_some(), "nothing is left of what was flushed");
        match end {
            "stopped" => drop(host.ok(&["stop", "web"])?),
            _ => kill(host, pid)?,
        }
    }
    Ok(())
}

fn killed_while_writing(host: &Host) -> Outcome {
    let disk = disk(host);
    let mut interrupted = 0;
    for round in 0..10_u64 {
        let pid = host.boot("web", &["--disk", &disk])?;
        load(host, "web")?;
        let params = "tanks=16 particles=3000 warmup=0 rate_hz=1";
        let install = host.spawn(&["app", "install", "web", "fluid", "--params", params])?;
        // An installation takes some tens of milliseconds: from before its first write to after its
        // last.
        std::thread::sleep(host.limit(Duration::from_millis(7 * round)));
        kill(host, pid)?;
        let ended = install.wait(host.limit(Duration::from_secs(30)))?;
        interrupted += u32::from(ended.code() != 0);
    }
    ensure!(interrupted > 0, "no installation was interrupted");
    host.boot("web", &["--disk", &disk])?;
    load(host, "web")?;
    host.install_fluid("web")?;
    Ok(())
}

fn one_vm_one_base(host: &Host) -> Outcome {
    let disk = disk(host);
    host.boot("web", &["--disk", &disk])?;
    let refused = |disk: &str, why: &str| {
        let stderr = host.fails(&["run", "--detach", "--disk", disk], 1)?;
        ensure_eq!(stderr.lines().count(), 1, "sentences in {stderr:?}");
        ensure!(stderr.contains(why), "{disk}: {stderr}");
        Ok::<_, Failure>(())
    };
    refused(&disk, "in use by another VM")?;
    host.ok(&["stop", "web"])?;
    refused(&disk.replace("empty:64", "empty:65"), "67108864 bytes")?;
    let image = host.path("image");
    fs::File::create(&image)?.set_len(64 << 20)?;
    let image = image.display().to_string();
    refused(&disk.replace("empty:64", &image), "another base image")?;
    host.boot("web", &["--disk", &disk])?;
    Ok(())
}
