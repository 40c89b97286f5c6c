//! Snapshot, restore, clones, and what a damaged snapshot comes to.

use std::fs;
use std::path::Path;

use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::{Host, Lane, pid_of};
use crate::{ensure, ensure_eq, process};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_restored_vm_goes_on_where_it_was",
        run: restore,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "a_snapshot_of_a_paused_vm_is_repeatable",
        run: repeatable,
        needs: Needs::GUEST,
    },
    Case {
        name: "clones_run_at_once_and_share_memory",
        run: clones,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "cycles_under_load_lose_nothing",
        run: cycles,
        needs: Needs {
            only_lane: Some((Lane::One, "boots and restores slowly elsewhere")),
            ..Needs::GUEST
        },
    },
    Case {
        name: "a_snapshot_overwrites_nothing",
        run: overwrites_nothing,
        needs: Needs::GUEST,
    },
    Case {
        name: "damaged_snapshots_are_refused",
        run: damaged,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_full_disk_fails_the_snapshot_only",
        run: full_disk,
        needs: Needs::GUEST.as_root(),
    },
];

/// A VM called `web` with an application installed, and a snapshot of it in `snap`.
fn with_snapshot(host: &Host) -> Outcome<String> {
    host.boot("web", &[])?;
    host.install_fluid("web")?;
    let dir = host.path("snap").to_string_lossy().into_owned();
    host.ok(&["snapshot", "web", &dir])?;
    Ok(dir)
}

fn restore(host: &Host) -> Outcome {
    let dir = with_snapshot(host)?;
    ensure_eq!(host.state("web")?, "running", "the VM after its snapshot");
    host.ok(&["call", "web", "verify"])?;
    host.ok(&["stop", "web"])?;
    host.ok(&["restore", &dir, "--name", "web"])?;
    ensure_eq!(host.state("web")?, "running", "the restored VM");
    // The application checks its whole state: a lost, stale or doubled page would show.
    host.ok(&["call", "web", "verify"])?;
    host.ok(&["call", "web", "stats"])?;
    Ok(())
}

fn repeatable(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    host.ok(&["pause", "web"])?;
    let dirs = ["a", "b", "c"].map(|name| host.path(name));
    for dir in &dirs[..2] {
        host.ok(&["snapshot", "web", &dir.to_string_lossy()])?;
    }
    ensure_eq!(
        host.state("web")?,
        "paused",
        "a paused VM after its snapshot"
    );
    host.ok(&[
        "restore",
        &dirs[0].to_string_lossy(),
        "--paused",
        "--name",
        "copy",
    ])?;
    host.ok(&["snapshot", "copy", &dirs[2].to_string_lossy()])?;
    let memory = |dir: &Path| fs::read(dir.join("memory"));
    let first = memory(&dirs[0])?;
    ensure!(
        first == memory(&dirs[1])?,
        "two snapshots of one moment differ"
    );
    ensure!(
        first == memory(&dirs[2])?,
        "a restored VM that has not run differs"
    );
    Ok(())
}

/// How many VMs of one snapshot run at once.
const CLONES: &str = "8";

fn clones(host: &Host) -> Outcome {
    let dir = with_snapshot(host)?;
    host.ok(&["stop", "web"])?;
    let started = host.json_lines(&["restore", &dir, "--name", "c", "--clones", CLONES])?;
    ensure_eq!(started.len().to_string(), CLONES, "VMs started");
    let (mut pss_kib, mut rss_kib) = (0, 0);
    for (index, vm) in started.iter().enumerate() {
        let name = format!("c-{}", index + 1);
        ensure_eq!(vm["name"], name.as_str(), "name of a clone");
        host.ok(&["call", &name, "verify"])?;
    }
    for vm in &started {
        pss_kib += process::memory_kib(pid_of(vm)?, "Pss")?;
        rss_kib += process::memory_kib(pid_of(vm)?, "Rss")?;
    }
    // Verifying reads all of the state in each: unshared, Pss and Rss would be much the same.
    ensure!(
        pss_kib * 10 < rss_kib * 9,
        "nothing is shared: Pss {pss_kib}, Rss {rss_kib} KiB"
    );
    Ok(())
}

/// Snapshots and restores in a row, each in the middle of steps that change the state.
const CYCLES: usize = 20;

fn cycles(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    let params = "tanks=16 particles=3000 warmup=0 rate_hz=100";
    host.ok(&["app", "install", "web", "fluid", "--params", params])?;
    for cycle in 0..CYCLES {
        let dir = host.path(format!("cycle-{cycle}"));
        host.ok(&["snapshot", "web", &dir.to_string_lossy()])?;
        host.ok(&["stop", "web"])?;
        host.ok(&["restore", &dir.to_string_lossy(), "--name", "web"])?;
        host.ok(&["call", "web", "verify"])?;
    }
    Ok(())
}

fn overwrites_nothing(host: &Host) -> Outcome {
    host.boot("web", &["--memory", "32"])?;
    let dir = host.path("there");
    fs::create_dir(&dir)?;
    fs::write(dir.join("mine"), "mine")?;
    let stderr = host.fails(&["snapshot", "web", &dir.to_string_lossy()], 1)?;
    ensure!(
        stderr.contains("there"),
        "the directory is not named: {stderr}"
    );
    ensure_eq!(
        fs::read_to_string(dir.join("mine"))?,
        "mine",
        "the file that was there"
    );
    ensure_eq!(fs::read_dir(&dir)?.count(), 1, "files in the directory");
    ensure_eq!(host.state("web")?, "running", "the VM");
    Ok(())
}

fn damaged(host: &Host) -> Outcome {
    host.boot("web", &["--memory", "32"])?;
    let dir = host.path("snap");
    host.ok(&["snapshot", "web", &dir.to_string_lossy()])?;
    host.ok(&["stop", "web"])?;
    let state = fs::read(dir.join("state"))?;
    let restore = || host.run(&["restore", &dir.to_string_lossy(), "--name", "bad"]);
    let refuse = |what: &str, change: &dyn Fn() -> Outcome| {
        change()?;
        let finished = restore()?.expect_code(1)?;
        ensure!(
            finished.stderr.lines().count() == 1,
            "{what}: {}",
            finished.stderr
        );
        ensure!(
            !finished.stderr.contains("panicked"),
            "{what}: {}",
            finished.stderr
        );
        fs::write(dir.join("state"), &state)?;
        Ok(())
    };
    for at in [0, 8, state.len() / 2, state.len() - 1] {
        refuse(&format!("state flipped at {at}"), &|| {
            let mut flipped = state.clone();
            flipped[at] = !flipped[at];
            Ok(fs::write(dir.join("state"), flipped)?)
        })?;
    }
    refuse("state cut", &|| {
        Ok(fs::write(dir.join("state"), &state[..state.len() / 2])?)
    })?;
    refuse("state with more behind it", &|| {
        Ok(fs::write(
            dir.join("state"),
            [&state[..], b"more"].concat(),
        )?)
    })?;
    let memory = fs::File::options().write(true).open(dir.join("memory"))?;
    let len = memory.metadata()?.len();
    refuse("memory cut", &|| Ok(memory.set_len(len - 4096)?))?;
    memory.set_len(len)?;
    ensure_eq!(restore()?.code(), 0, "the snapshot as it was");
    refuse("memory gone", &|| Ok(fs::remove_file(dir.join("memory"))?))
}

fn full_disk(host: &Host) -> Outcome {
    crate::namespace::private_mounts()?;
    let small = host.path("small");
    fs::create_dir(&small)?;
    crate::namespace::mount_tmpfs(&small, 1 << 20)?;
    host.boot("web", &[])?;
    host.install_fluid("web")?;
    let stderr = host.fails(
        &["snapshot", "web", &small.join("snap").to_string_lossy()],
        1,
    )?;
    ensure!(stderr.contains("No space left"), "not said so: {stderr}");
    ensure_eq!(fs::read_dir(&small)?.count(), 0, "files left behind");
    ensure_eq!(host.state("web")?, "running", "the VM");
    host.ok(&["call", "web", "verify"])?;
    Ok(())
}
