//! The memory balloon with Linux' driver: memory goes and comes back, and what the guest does not
//! use is in neither the host's memory nor snapshots nor overlays.
//!
//! The guests run a shell on their console, which is told what to do; the words that a case waits for
//! are put together by the shell, so that the echo of a command is not taken for them.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::linux::LinuxGuest;
use crate::{ensure, ensure_eq, process};

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
    Case {
        name: "balloon_reports_leave_the_hosts_memory_and_snapshots",
        run: reports,
        needs: Needs::linux(&["6.1"]).within(90),
    },
    Case {
        name: "balloon_hints_leave_overlays",
        run: hints,
        needs: Needs::linux(&["6.1"]).within(120),
    },
    Case {
        name: "balloon_reports_spare_the_transfer",
        run: given_up,
        needs: Needs::linux(&["6.1"]).within(120),
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

fn boot(host: &Host, memory_mib: &str, more: &str) -> Outcome<u32> {
    let guest = LinuxGuest::new(host, "6.1", MODULES, SHELL)?;
    let cmdline = format!("console=ttyS0 quiet panic=-1 {more}");
    guest.boot(host, "vm", &["--memory", memory_mib, "--cmdline", &cmdline])
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

/// The command that writes a file of `mib` MiB, none of whose pages is zero. `head` and `yes` would
/// take a minute for that in lane 2.
fn write_file(name: &str, mib: u64) -> String {
    format!(
        "dd if=/dev/urandom of=/m/{name} bs=64k count={} 2>/dev/null",
        mib * 16
    )
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
    boot(host, "256", "")?;
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
    boot(host, "192", "")?;
    host.json(&["balloon", "vm", "--target", "96"])?;
    await_balloon(host, "actual_mib", |mib| mib == 96)?;
    // More than is left without the balloon's pages.
    tell_ok(host, "vm", &write_file("big", 72))?;
    await_balloon(host, "actual_mib", |mib| mib > 110)?;
    let line = "test $(wc -c </m/big) = 75497472 && ! dmesg | grep -q 'Killed process'";
    tell_ok(host, "vm", line)?;
    Ok(())
}

/// The guest makes work for the memory management while the files of `/m/sum` stay as they are.
const CHURN: &str = "for i in 1 2 3; do dd if=/dev/urandom of=/m/churn bs=64k count=320 2>/dev/null; \
                     rm /m/churn; sleep 3; md5sum -c /m/sum >/dev/null || break; done; \
                     md5sum -c /m/sum";

fn reports(host: &Host) -> Outcome {
    let pid = boot(host, "256", "")?;
    tell_ok(
        host,
        "vm",
        &format!("{}; md5sum /m/keep >/m/sum", write_file("keep", 8)),
    )?;
    tell_ok(host, "vm", &write_file("big", 96))?;
    let full = process::memory_kib(pid, "Rss")?;
    let reported = number(&balloon(host)?, "reported_bytes")?;
    tell_ok(host, "vm", "rm /m/big")?;
    await_balloon(host, "reported_bytes", |now| now > reported + 80 * MIB)?;
    let now = process::memory_kib(pid, "Rss")?;
    ensure!(now + 80 * 1024 < full, "{full} KiB before, {now} KiB after");
    tell_ok(host, "vm", CHURN)?;
    let dir = host.path("snapshot");
    host.ok(&["snapshot", "vm", &dir.to_string_lossy()])?;
    let image_bytes = dir.join("memory").metadata()?.blocks() * 512;
    println!("reports: Rss {full} KiB before, {now} KiB after; image {image_bytes} bytes");
    ensure!(image_bytes < 128 * MIB, "the image has {image_bytes} bytes");
    host.ok(&["stop", "vm"])?;

    host.ok(&["restore", &dir.to_string_lossy(), "--name", "again"])?;
    tell_ok(host, "again", "md5sum -c /m/sum")?;
    tell_ok(host, "again", CHURN)?;
    Ok(())
}

fn hints(host: &Host) -> Outcome {
    // Otherwise Debian's kernel clears each page that it hints, which takes this lane too long.
    boot(host, "256", "init_on_alloc=0")?;
    tell_ok(
        host,
        "vm",
        &format!("{}; md5sum /m/keep >/m/sum", write_file("keep", 8)),
    )?;
    host.ok(&["base", "create", "linux", "--from", "vm"])?;
    host.ok(&["stop", "vm"])?;
    host.ok(&["restore", "linux", "--name", "vm"])?;
    tell_ok(
        host,
        "vm",
        &format!("{}; md5sum /m/more >>/m/sum", write_file("more", 4)),
    )?;
    tell_ok(host, "vm", &write_file("big", 96))?;
    // At once: what was freed a moment ago has not been reported yet.
    tell_ok(host, "vm", "rm /m/big")?;
    let out = host.path("vm.overlay");
    let out = out.to_string_lossy();
    let made = host.json(&["overlay", "create", &out, "--from", "vm"])?;
    println!("hints: {made}");
    ensure!(
        number(&made, "discarded_pages")? * 4096 > 64 * MIB,
        "{made}"
    );
    let literal = number(&made, "literal_pages")? * 4096;
    ensure!(
        literal < 48 * MIB,
        "{} MiB in the overlay: {made}",
        literal / MIB
    );
    tell_ok(host, "vm", "md5sum -c /m/sum")?;
    host.ok(&["stop", "vm"])?;

    host.ok(&["synthesize", &out, "--name", "vm", "--wait"])?;
    tell_ok(host, "vm", "md5sum -c /m/sum")?;
    tell_ok(host, "vm", CHURN)?;
    Ok(())
}

/// Slow enough for the guest to free its file meanwhile, Mbit/s: all of it would take 200 s.
const RATE: &str = "2";
/// Bytes of the 48 MiB that are freed which must not come.
const SPARED: u64 = 24_000_000;

/// What the guest frees while its overlay is on the way need not come any more.
fn given_up(host: &Host) -> Outcome {
    boot(host, "192", "")?;
    host.ok(&["base", "create", "linux", "--from", "vm"])?;
    host.ok(&["stop", "vm"])?;
    host.ok(&["restore", "linux", "--name", "vm"])?;
    tell_ok(host, "vm", &write_file("big", 48))?;
    tell_ok(
        host,
        "vm",
        &format!("{}; md5sum /m/keep >/m/sum", write_file("keep", 2)),
    )?;
    let out = host.path("vm.overlay");
    let out = out.to_string_lossy();
    host.ok(&["overlay", "create", &out, "--from", "vm"])?;
    host.ok(&["stop", "vm"])?;

    host.ok(&["synthesize", &out, "--name", "vm", "--rate", RATE])?;
    tell_ok(host, "vm", "rm /m/big")?;
    let limit = Duration::from_secs(60);
    let status = host.wait_until("the end of the transfer", limit, || {
        let status = host.status("vm").ok()?;
        (status["synthesis"]["complete"] == true).then_some(status)
    })?;
    let figure = |name| number(&status["synthesis"], name);
    let came = figure("stream_bytes")? + figure("demand_bytes")?;
    let total = figure("total_bytes")?;
    println!("given up: {came} of {total} bytes came");
    ensure!(came + SPARED < total, "{came} of {total} bytes came");
    tell_ok(host, "vm", "md5sum -c /m/sum")?;
    tell_ok(host, "vm", CHURN)?;
    Ok(())
}
