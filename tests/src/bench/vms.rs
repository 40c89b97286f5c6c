//! `start` and `restore`: how long until a guest says its first word, and until a restored one
//! answers; what a VM costs in memory.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use cloudlet_resources::client::Client;
use cloudlet_resources::{APP_FLUID, GUEST_BANNER, protocol};

use super::firecracker::Firecracker;
use super::{Figure, Sheet};
use crate::ensure;
use crate::failure::{Failure, Outcome};
use crate::host::{Host, Lane, pid_of};
use crate::process::Process;

/// Runs of each figure; they are short.
const RUNS: usize = 11;
const LIMIT: Duration = Duration::from_secs(20);
/// What is asked of a restored guest: the smallest of pictures, since the guest paints for 12 ms on
/// one of the usual size.
const REQUEST: &str = "frame 0 64 64";

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// `start`
pub(super) fn run_start(sheet: &mut Sheet) -> Outcome {
    let host = Host::new(Lane::One)?;
    let peer = Firecracker::from_env(&host)?;
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let ours = first_output(&host)?;
        alone.push(ours);
        if let Some(peer) = &peer {
            beside.push((ours, peer.first_output()?));
        }
    }
    let name = "start.first_output";
    sheet.put(&match &peer {
        Some(_) => Figure::beside(name, "ms", &beside, "Firecracker")?,
        None => Figure::from_runs(name, "ms", &alone)?,
    })?;
    let overheads = (0..RUNS)
        .map(|_| overhead_mib(&host))
        .collect::<Outcome<Vec<_>>>()?;
    sheet.put(&Figure::from_runs("start.overhead", "MiB", &overheads)?)
}

/// From the start of the command to the first word of the guest on its output, milliseconds.
fn first_output(host: &Host) -> Outcome<f64> {
    let started = Instant::now();
    let vm = host.spawn(&["run", "--memory", "128"])?;
    vm.wait_for_output(GUEST_BANNER, LIMIT)?;
    Ok(milliseconds(started.elapsed()))
}

/// Resident memory of a VMM process beyond its guest's RAM.
fn overhead_mib(host: &Host) -> Outcome<f64> {
    let pid = host.boot("vm", &["--memory", "128"])?;
    let overhead = overhead_kib(pid, 128 << 10)?;
    host.ok(&["stop", "vm"])?;
    // Far below 2^53.
    Ok(overhead as f64 / 1024.0)
}

/// Resident KiB of all mappings but the one of guest RAM, which is the one as large as RAM.
fn overhead_kib(pid: u32, ram_kib: u64) -> Outcome<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut overhead, mut ram_seen, mut in_ram) = (0, false, false);
    for line in text.lines() {
        let kib = |rest: &str| {
            rest.trim()
                .strip_suffix(" kB")
                .and_then(|n| n.trim().parse::<u64>().ok())
        };
        if let Some(size) = line.strip_prefix("Size:").and_then(kib) {
            in_ram = size >= ram_kib;
            ram_seen |= in_ram;
        } else if let Some(resident) = line.strip_prefix("Rss:").and_then(kib)
            && !in_ram
        {
            overhead += resident;
        }
    }
    ensure!(ram_seen, "no mapping of {ram_kib} KiB in process {pid}");
    Ok(overhead)
}

/// `restore`
pub(super) fn run_restore(sheet: &mut Sheet) -> Outcome {
    for memory_mib in [128_u64, 512, 4096] {
        let host = Host::new(Lane::One)?;
        let snapshot = snapshot(&host, memory_mib)?;
        let mut peer = Firecracker::from_env(&host)?;
        if let Some(peer) = &mut peer {
            peer.snapshot(memory_mib)?;
        }
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let ours = first_answer(&host, &snapshot)?;
            alone.push(ours);
            if let Some(peer) = &peer {
                beside.push((ours, peer.first_answer()?));
            }
        }
        let name = format!("restore.first_answer.{memory_mib}");
        sheet.put(&match &peer {
            Some(_) => Figure::beside(name, "ms", &beside, "Firecracker")?,
            None => Figure::from_runs(name, "ms", &alone)?,
        })?;
        if memory_mib == 512 {
            let clones = (0..RUNS).map(|_| second_clone_mib(&host, &snapshot));
            let clones = clones.collect::<Outcome<Vec<_>>>()?;
            sheet.put(&Figure::from_runs(
                "restore.pss_second_clone",
                "MiB",
                &clones,
            )?)?;
        }
    }
    Ok(())
}

/// A snapshot of a VM with `fluid` in it.
fn snapshot(host: &Host, memory_mib: u64) -> Outcome<String> {
    host.boot("vm", &["--memory", &memory_mib.to_string()])?;
    host.ok(&["app", "install", "vm", "fluid"])?;
    let dir = host.path("snapshot").to_string_lossy().into_owned();
    host.ok(&["snapshot", "vm", &dir])?;
    host.ok(&["stop", "vm"])?;
    Ok(dir)
}

/// From the start of the command to the first answer of the restored guest, milliseconds.
fn first_answer(host: &Host, snapshot: &str) -> Outcome<f64> {
    let started = Instant::now();
    host.ok(&["restore", snapshot, "--name", "copy"])?;
    ask(&host.vm_dir("copy").join("vsock.sock"))?;
    let took = milliseconds(started.elapsed());
    host.ok(&["stop", "copy"])?;
    Ok(took)
}

/// Installs `fluid` in the guest behind a VM's vsock socket.
pub(super) fn install_fluid(socket: &Path) -> Outcome {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Client::connect(stream, protocol::PORT)?.install("fluid", "", APP_FLUID, &[])?;
    Ok(())
}

/// One request to the application behind a VM's vsock socket.
pub(super) fn ask(socket: &Path) -> Outcome {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    Client::connect(stream, protocol::PORT)?.call(REQUEST, &[])?;
    Ok(())
}

/// The proportional share of memory of the second of two clones, once both have answered.
fn second_clone_mib(host: &Host, snapshot: &str) -> Outcome<f64> {
    let started = host.json_lines(&["restore", snapshot, "--name", "c", "--clones", "2"])?;
    for name in ["c-1", "c-2"] {
        ask(&host.vm_dir(name).join("vsock.sock"))?;
    }
    let second = started
        .get(1)
        .ok_or_else(|| Failure::new("no second clone"))?;
    let pss_kib = crate::process::memory_kib(pid_of(second)?, "Pss")?;
    for name in ["c-1", "c-2"] {
        host.ok(&["stop", name])?;
    }
    Ok(pss_kib as f64 / 1024.0)
}

/// Waits for the first word of the embedded guest, in whatever runs it.
pub(super) fn wait_for_banner(process: &Process) -> Outcome {
    process.wait_for_output(GUEST_BANNER, LIMIT)
}
