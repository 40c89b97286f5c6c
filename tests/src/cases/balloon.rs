//! The memory balloon with Linux' driver: memory goes and comes back.
//!
//! The guests run a shell on their console, which is told what to do; the words that a case waits for
//! are put together by the shell, so that the echo of a command is not taken for them.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::linux::LinuxGuest;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "balloon_takes_memory_and_gives_it_back",
        run: inflates,
        needs: Needs::linux(&["6.1"]),
    },
    Case {
        name: "balloon_deflates_before_the_guest_runs_out_of_memory",
        run: out_of_memory,
        needs: Needs::linux(&["6.1"]),
    },
];

const MODULES: &[&str] = &["virtio_mmio", "virtio_balloon"];
/// Does what comes over the console.
const SHELL: &str = "
    mkdir -p /m
    mount -t tmpfs -o size=100% none /m
    while read -r line; do eval \"$line\"; done
";
/// How long the guest may take for one line, in lane 1's time.
const PATIENCE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

fn boot(host: &Host, memory_mib: &str) -> Outcome {
    let guest = LinuxGuest::new(host, "6.1", MODULES, SHELL)?;
    guest.boot(host, "vm", &["--memory", memory_mib])?;
    Ok(())
}

/// Gives the shell in `vm` a line, and waits until it is carried out.
fn tell(host: &Host, vm: &str, line: &str) -> Outcome<String> {
    let before = host.console(vm).len();
    let mut console = UnixStream::connect(host.vm_dir(vm).join("console.sock"))?;
    console.write_all(format!("{line}; echo \"end:$?:\"\n").as_bytes())?;
    let said = || host.console(vm).get(before..).map(str::to_owned);
    let answer = host.wait_until(&format!("{line:?} in {vm}"), PATIENCE, || {
        // The echo has `$?` there, the answer a number.
        said().filter(|text| text.contains("end:0:") || text.contains("end:1:"))
    });
    answer.map_err(|failure| {
        let console = host.console(vm);
        Failure::new(format!("{failure}; the console:\n{console}"))
    })
}

/// As [`tell`], and it must succeed.
fn tell_ok(host: &Host, vm: &str, line: &str) -> Outcome {
    let said = tell(host, vm, line)?;
    ensure!(said.contains("end:0:"), "{line}: {said}");
    Ok(())
}

/// Writes a file of text, so that no page of it is zero.
fn write_file(name: &str, mib: u64) -> String {
    format!("yes {name}-some-text | head -c {} >/m/{name}", mib * MIB)
}

fn balloon(host: &Host) -> Outcome<Value> {
    host.json(&["balloon", "vm"])
}

fn number(value: &Value, name: &str) -> Outcome<u64> {
    let found = name.split('.').fold(value, |value, part| &value[part]);
    found
        .as_u64()
        .ok_or_else(|| Failure::new(format!("no {name} in {value}")))
}

/// Waits until a figure of the balloon is as wanted.
fn await_balloon(host: &Host, name: &str, wanted: impl Fn(u64) -> bool) -> Outcome<u64> {
    let mut last = Value::Null;
    let found = host.wait_until(&format!("balloon: {name}"), PATIENCE, || {
        last = balloon(host).ok()?;
        number(&last, name).ok().filter(|value| wanted(*value))
    });
    found.map_err(|failure| Failure::new(format!("{failure}: {last}")))
}

fn inflates(host: &Host) -> Outcome {
    boot(host, "256")?;
    let before = balloon(host)?;
    let features = before["features"].to_string();
    for feature in ["statistics", "deflate-on-oom", "hinting", "reporting"] {
        ensure!(features.contains(feature), "{before}");
    }
    let free = number(&before, "statistics.free_bytes")?;
    ensure!(
        number(&before, "statistics.total_bytes")? > 128 * MIB,
        "{before}"
    );
    host.fails(&["balloon", "vm", "--target", "257"], 1)?;
    let set = host.json(&["balloon", "vm", "--target", "160"])?;
    ensure_eq!(number(&set, "target_mib")?, 160, "the target");
    await_balloon(host, "actual_mib", |mib| mib == 160)?;
    await_balloon(host, "statistics.free_bytes", |now| now < free - 64 * MIB)?;
    ensure_eq!(
        number(&balloon(host)?, "inflated_bytes")?,
        96 * MIB,
        "inflated"
    );

    // It goes on where it was after a restore.
    let dir = host.path("small");
    host.ok(&["snapshot", "vm", &dir.to_string_lossy()])?;
    host.ok(&["stop", "vm"])?;
    host.ok(&["restore", &dir.to_string_lossy(), "--name", "vm"])?;
    ensure_eq!(
        number(&balloon(host)?, "actual_mib")?,
        160,
        "after the restore"
    );
    host.json(&["balloon", "vm", "--target", "256"])?;
    await_balloon(host, "actual_mib", |mib| mib == 256)?;
    await_balloon(host, "statistics.free_bytes", |now| now > free - 16 * MIB)?;
    let status = host.status("vm")?;
    ensure!(
        number(&status, "balloon.statistics.free_bytes")? > 0,
        "{status}"
    );
    Ok(())
}

fn out_of_memory(host: &Host) -> Outcome {
    boot(host, "192")?;
    host.json(&["balloon", "vm", "--target", "96"])?;
    await_balloon(host, "actual_mib", |mib| mib == 96)?;
    // More than is left without the balloon's pages.
    tell_ok(host, "vm", &write_file("big", 72))?;
    await_balloon(host, "actual_mib", |mib| mib > 110)?;
    let line = "test $(wc -c </m/big) = 75497472 && ! dmesg | grep -q 'Killed process'";
    tell_ok(host, "vm", line)?;
    Ok(())
}
