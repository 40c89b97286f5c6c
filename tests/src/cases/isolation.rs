//! The seccomp filters as they are in a running VMM, and what happens to one that goes astray.

use std::fs;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::Host;
use crate::{ensure, ensure_eq, inject, process};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "every_thread_has_its_filter",
        run: filters_are_on,
        needs: Needs::GUEST,
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
