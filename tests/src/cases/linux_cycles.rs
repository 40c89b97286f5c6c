//! Linux guests under load that are saved and restored, again and again, and many at once.

use std::time::Duration;

use super::{Case, Needs, is_long};
use crate::ensure;
use crate::failure::Outcome;
use crate::host::Host;
use crate::linux::LinuxGuest;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "linux_outlives_cycles_under_load",
        run: cycles,
        needs: Needs::linux(&["6.1"]).with_memory_mib(1024).within(150),
    },
    Case {
        name: "linux_clones_run_8_at_once",
        run: clones,
        needs: Needs::linux(&["6.1"]).with_memory_mib(2048).within(120),
    },
];

const MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "virtio_balloon", "virtio_rng"];
const MACHINE: [&str; 6] = ["--memory", "128", "--cpus", "2", "--disk", "empty:16"];

/// One process fills memory and checks it, another the disk, past the page cache; both vCPUs have
/// something to do all the time. A line a round, and one for everything that is wrong.
const LOAD: &str = "
    wrong() { echo \"wrong: $*\"; }
    seq 200000 | head -c 1048576 >/tmp/pattern
    right=$(md5sum </tmp/pattern)
    while :; do
        cp /tmp/pattern /tmp/copy
        [ \"$(md5sum </tmp/copy)\" = \"$right\" ] || wrong memory
    done &
    round=0
    while :; do
        at=$((round % 16))
        dd if=/tmp/pattern of=/dev/vda bs=1M seek=$at conv=fsync 2>/dev/null || wrong write
        echo 3 >/proc/sys/vm/drop_caches
        now=$(dd if=/dev/vda bs=1M skip=$at count=1 2>/dev/null | md5sum)
        [ \"$now\" = \"$right\" ] || wrong disk
        dmesg -r | grep '^<[0-3]>' | grep -v 'PCI: Fatal: No config space' | sed 's/^/wrong: /'
        [ \"$(nproc)\" = 2 ] || wrong vCPUs
        round=$((round + 1))
        echo \"round $round\"
    done
";

/// Waits until `vm` has said that it was through with `rounds` rounds; the number of the last.
fn rounds(host: &Host, vm: &str, rounds: usize) -> Outcome<u64> {
    let mut numbers = Vec::new();
    host.wait_until(&format!("{rounds} rounds of {vm}"), PATIENCE, || {
        let console = host.console(vm);
        let whole = &console[..=console.rfind('\n')?];
        let round = |line: &str| line.trim_end().strip_prefix("round ")?.parse::<u64>().ok();
        numbers = whole.lines().filter_map(round).collect();
        (numbers.len() >= rounds).then_some(())
    })?;
    let console = host.console(vm);
    ensure!(!console.contains("wrong: "), "{vm}: {console}");
    Ok(numbers.last().copied().unwrap_or_default())
}

/// Saved and restored so often: in a long run, and else.
const CYCLES_LONG: u32 = 20;
const CYCLES: u32 = 6;
const PATIENCE: Duration = Duration::from_secs(40);

fn cycles(host: &Host) -> Outcome {
    let guest = LinuxGuest::new(host, "6.1", MODULES, LOAD)?;
    guest.boot(host, "vm-0", &MACHINE)?;
    let mut last = rounds(host, "vm-0", 1)?;
    let cycles = if is_long() { CYCLES_LONG } else { CYCLES };
    for cycle in 1..=cycles {
        let (before, vm) = (format!("vm-{}", cycle - 1), format!("vm-{cycle}"));
        let snapshot = host.path("snapshot");
        host.ok(&["snapshot", &before, &snapshot.to_string_lossy()])?;
        host.ok(&["stop", &before])?;
        host.ok(&["restore", &snapshot.to_string_lossy(), "--name", &vm])?;
        let now = rounds(host, &vm, 1)?;
        ensure!(now > last, "cycle {cycle}: round {now} after {last}");
        last = now;
        // The VM goes on with the memory file that it has open.
        std::fs::remove_dir_all(snapshot)?;
    }
    Ok(())
}

fn clones(host: &Host) -> Outcome {
    let guest = LinuxGuest::new(host, "6.1", MODULES, LOAD)?;
    guest.boot(host, "vm", &MACHINE)?;
    let last = rounds(host, "vm", 1)?;
    host.ok(&["snapshot", "vm", "snapshot"])?;
    host.ok(&["stop", "vm"])?;
    host.ok(&["restore", "snapshot", "--name", "c", "--clones", "8"])?;
    for number in 1..=8 {
        let now = rounds(host, &format!("c-{number}"), 2)?;
        ensure!(now > last, "clone {number}: round {now} after {last}");
    }
    Ok(())
}
