//! The seccomp filters as they are in a running VMM, and what happens to one that goes astray.

use std::fs;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{Case, Needs, is_long};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, pid_of};
use crate::process::{self, Process};
use crate::{ensure, ensure_eq, guest, inject};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "every_thread_has_its_filter",
        run: filters_are_on,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "a_forbidden_call_in_the_control_thread_kills",
        run: |host| forbidden(host, "control"),
        needs: Needs::GUEST,
    },
    Case {
        name: "a_forbidden_call_in_a_vcpu_thread_kills",
        run: |host| forbidden(host, "vcpu0"),
        needs: Needs::GUEST,
    },
    Case {
        name: "a_guest_that_misuses_its_devices_harms_only_itself",
        run: chaos,
        needs: Needs::GUEST.in_both_lanes().within(120),
    },
];

fn filters_are_on(host: &Host) -> Outcome {
    let pid = host.boot("web", &["--cpus", "2"])?;
    let threads = process::threads(pid);
    for (tid, name) in &threads {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))?;
        // 2 is SECCOMP_MODE_FILTER, see proc_pid_status(5).
        let filtered = status.lines().any(|line| line == "Seccomp:\t2");
        ensure!(filtered, "thread {name} has no filter");
        ensure!(
            status.lines().any(|line| line == "NoNewPrivs:\t1"),
            "thread {name} may gain privileges"
        );
    }
    ensure!(
        threads.iter().any(|(_, name)| name == "vcpu1"),
        "no second vCPU: {threads:?}"
    );
    Ok(())
}

/// Makes the thread call execve, which no part of a VMM has any use for.
fn forbidden(host: &Host, thread: &str) -> Outcome {
    let pid = host.boot("web", &[])?;
    let threads = process::threads(pid);
    // The main thread may go by the program's name.
    let found = threads.iter().find(|(tid, name)| {
        if thread == "control" {
            *tid == pid
        } else {
            name == thread
        }
    });
    let (tid, _) = found.ok_or_else(|| Failure::new(format!("no {thread} in {threads:?}")))?;
    inject::replace_next_syscall(*tid, libc::SYS_execve)?;
    // Whatever it waits in, a request makes it come round.
    host.run(&["pause", "web"])?;
    host.wait_for_end(pid)?;
    let state = host.status("web")?;
    ensure_eq!(state["state"], "ended", "the VM's state");
    let report = state["report"].as_str().unwrap_or_default();
    ensure!(
        report.contains("seccomp"),
        "the report does not say so: {state}"
    );
    ensure!(report.contains(thread), "the thread is not named: {state}");
    ensure!(report.contains("execve"), "the call is not named: {state}");
    Ok(())
}

/// How long guests misuse their devices in all, real time in both lanes: in a long run, and else.
const CHAOS_LONG: Duration = Duration::from_secs(60);
const CHAOS: Duration = Duration::from_secs(15);
/// What a VMM has touched by then is what it needs, the guest's 4 MiB included.
const SETTLED: Duration = Duration::from_secs(5);
/// Most that a VMM may grow after that.
const GROWTH_KIB_MAX: u64 = 2048;
/// Ends that are the guest's own doing: power-off, reset, triple fault, and an instruction or a
/// state that KVM does not go on from. See `cloudlet run --help`.
const GUEST_ENDS: [i32; 6] = [0, 10, 11, 12, 13, 14];

/// Guests with one seed after the other until the time is up: each is ended by its own doing, or
/// lives, answers, and does not grow.
fn chaos(host: &Host) -> Outcome {
    let disk = host.path("ro.img");
    fs::write(&disk, vec![7; 1 << 20])?;
    let disk = format!("{},ro", disk.display());
    let end = Instant::now() + if is_long() { CHAOS_LONG } else { CHAOS };
    let mut seed = NonZeroU32::MIN;
    while Instant::now() < end {
        let kernel = host.path("chaos");
        fs::write(&kernel, guest::chaos(seed))?;
        let kernel = kernel.to_string_lossy();
        let run = host.spawn(&[
            "run", "--name", "chaos", "--memory", "32", "--kernel", &kernel, "--disk", "empty:16",
            "--disk", &disk,
        ])?;
        run.wait_for_output(".", host.limit(Duration::from_secs(10)))
            .and_then(|()| watch_chaos(host, &run, end))
            .and_then(|ended| end_of_chaos(host, run, ended))
            .map_err(|failure| Failure::new(format!("seed {seed}: {failure}")))?;
        seed = seed.saturating_add(1);
    }
    Ok(())
}

/// Looks after the VM until `end`; true if it has ended before.
fn watch_chaos(host: &Host, run: &Process, end: Instant) -> Outcome<bool> {
    let started = Instant::now();
    let mut settled = None;
    loop {
        let Some(vm) = host.json_lines(&["ps"])?.pop() else {
            return Ok(true);
        };
        if vm["state"] == "ended" || !process::is_alive(run.id()) {
            return Ok(true);
        }
        let pid = pid_of(&vm)?;
        call_in(host)?;
        if started.elapsed() > SETTLED
            && let Ok(now) = process::memory_kib(pid, "Rss")
        {
            let before = *settled.get_or_insert(now);
            ensure!(
                now < before + GROWTH_KIB_MAX,
                "the VMM grew from {before} to {now} KiB"
            );
        }
        if Instant::now() > end {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// A peer that comes and goes; the guest does not know what it wants. A device that the guest has
/// broken accepts nobody, which nobody waits for.
fn call_in(host: &Host) -> Outcome {
    let address = SocketAddrUnix::new(host.vm_dir("chaos").join("vsock.sock"))?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let peer = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    if net::connect(&peer, &address).is_ok() {
        let _ = rustix::io::write(&peer, b"CONNECT 5\n");
    }
    Ok(())
}

fn end_of_chaos(host: &Host, run: Process, ended: bool) -> Outcome {
    if !ended {
        host.ok(&["stop", "chaos"])?;
    }
    let finished = run.wait(host.limit(Duration::from_secs(10)))?;
    let code = finished.status.code();
    ensure!(
        code.is_some_and(|code| GUEST_ENDS.contains(&code)),
        "the VM ended with {}: {}",
        finished.status,
        finished.stderr
    );
    Ok(())
}
