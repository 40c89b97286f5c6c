//! Overlay files: made, shown, verified, damaged. And what the synthesis cases start from.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "an_overlay_is_made_shown_and_verified",
        run: made,
        needs: Needs::GUEST.in_both_lanes().within(90),
    },
    Case {
        name: "overlay_verify_finds_every_damage",
        run: damage,
        needs: Needs::GUEST.within(90),
    },
    Case {
        name: "an_overlay_needs_a_vm_of_a_base",
        run: needs_a_base,
        needs: Needs::GUEST,
    },
    Case {
        name: "an_interrupted_rehearsal_leaves_nothing",
        run: interrupted,
        needs: Needs::GUEST.within(90),
    },
    Case {
        name: "a_full_disk_leaves_no_overlay",
        run: full_disk,
        needs: Needs::GUEST.as_root().within(90),
    },
];

/// The name of the base that [`customised_vm`] makes.
pub(super) const BASE: &str = "unikernel";

/// A base, and a VM of it called `dev` with `fluid` in it.
pub(super) fn customised_vm(host: &Host) -> Outcome {
    host.ok(&["base", "create", BASE, "--builtin", "--memory", "128"])?;
    host.ok(&["restore", BASE, "--name", "dev"])?;
    host.install_fluid("dev")?;
    Ok(())
}

/// As [`customised_vm`], and an overlay of it; the VM is paused since, so that more of the same
/// moment can be made.
pub(super) fn overlay(host: &Host) -> Outcome<PathBuf> {
    customised_vm(host)?;
    host.ok(&["pause", "dev"])?;
    let file = host.path("dev.overlay");
    host.ok(&[
        "overlay",
        "create",
        &file.to_string_lossy(),
        "--from",
        "dev",
    ])?;
    Ok(file)
}

fn made(host: &Host) -> Outcome {
    let file = overlay(host)?;
    let file = file.to_string_lossy();
    let shown = host.json(&["overlay", "show", &file])?;
    let base = host.json(&["base", "show", BASE])?;
    ensure_eq!(shown["base"], base["id"], "the base that the overlay names");
    ensure!(
        !host.ok(&["overlay", "show", &file])?.is_empty(),
        "nothing for people"
    );
    host.ok(&["overlay", "verify", &file])?;
    let stderr = host.fails(&["overlay", "create", &file, "--from", "dev"], 1)?;
    ensure!(
        stderr.contains("exists"),
        "an overlay was written over: {stderr}"
    );
    host.ok(&["overlay", "create", &file, "--from", "dev", "--force"])?;

    let trained = host.path("trained.overlay");
    let trained = trained.to_string_lossy();
    let made = host.json(&[
        "overlay", "create", &trained, "--from", "dev", "--train", "stats",
    ])?;
    ensure!(
        made["first_touch_pages"]
            .as_u64()
            .is_some_and(|pages| pages > 0),
        "no pages: {made}"
    );
    host.ok(&["overlay", "verify", &trained])?;
    ensure_eq!(
        host.json_lines(&["ps"])?.len(),
        1,
        "VMs after the rehearsal"
    );
    Ok(())
}

fn damage(host: &Host) -> Outcome {
    let file = overlay(host)?;
    let whole = fs::read(&file)?;
    let name = file.to_string_lossy().into_owned();
    let len = whole.len();
    let refuse = |what: String, bytes: &[u8]| {
        fs::write(&file, bytes)?;
        let finished = host.run(&["overlay", "verify", &name])?;
        ensure!(
            finished.code() == 1 && finished.stderr.lines().count() == 1,
            "{what}: exit code {}, {}",
            finished.code(),
            finished.stderr
        );
        Ok::<(), Failure>(())
    };
    // The first bytes, steps through the whole, the last bytes.
    let steps = (0..len).step_by(len / 24 + 1);
    for at in (0..16).chain(steps).chain(len - 16..len) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        refuse(format!("flipped at {at} of {len}"), &flipped)?;
    }
    for cut in [0, 1, 100, len / 2, len - 1] {
        refuse(format!("cut to {cut}"), &whole[..cut])?;
    }
    refuse("more behind it".to_owned(), &[&whole[..], b"more"].concat())?;
    fs::write(&file, &whole)?;
    host.ok(&["overlay", "verify", &name])?;
    Ok(())
}

fn needs_a_base(host: &Host) -> Outcome {
    host.boot("web", &["--memory", "32"])?;
    let stderr = host.fails(&["overlay", "create", "out.overlay", "--from", "web"], 1)?;
    ensure!(
        stderr.contains("base"),
        "does not say what is missing: {stderr}"
    );
    ensure!(
        !host.path("out.overlay").exists(),
        "a file is there all the same"
    );
    Ok(())
}

fn interrupted(host: &Host) -> Outcome {
    customised_vm(host)?;
    let room = host.path("room");
    fs::create_dir(&room)?;
    let file = room.join("dev.overlay");
    let file = file.to_string_lossy();
    let command = [
        "overlay", "create", &file, "--from", "dev", "--train", "verify",
    ];
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let create = host.spawn(&command)?;
        host.wait_until("a rehearsal", Duration::from_secs(10), || {
            let vms = host.json_lines(&["ps"]).ok()?;
            (vms.len() > 1).then_some(())
        })?;
        create.signal(signal)?;
        host.wait_until("the original alone", Duration::from_secs(10), || {
            (host.processes().len() == 1).then_some(())
        })?;
        ensure_eq!(host.json_lines(&["ps"])?.len(), 1, "VMs after the end");
        ensure_eq!(
            fs::read_dir(&room)?.count(),
            0,
            "files left beside the overlay"
        );
        ensure_eq!(host.state("dev")?, "running", "the original");
    }
    Ok(())
}

fn full_disk(host: &Host) -> Outcome {
    crate::namespace::private_mounts()?;
    let small = host.path("small");
    fs::create_dir(&small)?;
    crate::namespace::mount_tmpfs(&small, 256 << 10)?;
    customised_vm(host)?;
    let out = small.join("out.overlay");
    let stderr = host.fails(
        &["overlay", "create", &out.to_string_lossy(), "--from", "dev"],
        1,
    )?;
    ensure!(stderr.contains("No space left"), "not said so: {stderr}");
    ensure_eq!(fs::read_dir(&small)?.count(), 0, "files left behind");
    host.ok(&["call", "dev", "verify"])?;
    Ok(())
}
