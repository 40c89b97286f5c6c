//! From boot to end: what a user sees of a VM that lives, is held, ends or is killed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use cloudlet_resources::GUEST_READY;

use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::{Host, pid_of};
use crate::process::{self, Process};
use crate::{ensure, ensure_eq, guest};

const BOOT: Duration = Duration::from_secs(20);

pub(super) const CASES: &[Case] = &[
    Case {
        name: "run_shows_the_guests_serial_output",
        run: serial,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "run_takes_memory_sizes_up_to_4_gib",
        run: memory_sizes,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "run_takes_8_cpus_and_cpu_models",
        run: cpus_and_models,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "run_detached_lives_on_until_stopped",
        run: detached,
        needs: Needs::GUEST,
    },
    Case {
        name: "pause_and_resume_show_in_status",
        run: pause_resume,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "sockets_are_the_owners_only",
        run: socket_modes,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_killed_vm_leaves_nothing_that_confuses",
        run: killed,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_name_is_taken_once",
        run: name_taken,
        needs: Needs::GUEST,
    },
    Case {
        name: "an_attached_vm_ends_with_its_command",
        run: attached_end,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_reset_by_the_guest_exits_10",
        run: guest_reset,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "a_triple_fault_exits_11",
        run: triple_fault,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "a_halted_guest_can_be_stopped",
        run: halted,
        needs: Needs::GUEST.in_both_lanes(),
    },
    Case {
        name: "kernels_that_are_none_are_refused",
        run: bad_kernels,
        needs: Needs::GUEST,
    },
    Case {
        name: "wrong_numbers_are_refused",
        run: wrong_numbers,
        needs: Needs::GUEST,
    },
];

fn serial(host: &Host) -> Outcome {
    let vm = Process::spawn(&mut host.command(&["run"]), Stdio::piped())?;
    vm.wait_for_output(GUEST_READY, host.limit(BOOT))
}

fn memory_sizes(host: &Host) -> Outcome {
    for mib in ["32", "128", "3072", "4096"] {
        let name = format!("m{mib}");
        host.boot(&name, &["--memory", mib])?;
        ensure_eq!(
            host.status(&name)?["memory_mib"].to_string(),
            mib,
            "memory of {name}"
        );
        host.ok(&["stop", &name])?;
    }
    Ok(())
}

fn cpus_and_models(host: &Host) -> Outcome {
    host.boot("eight", &["--cpus", "8"])?;
    ensure_eq!(host.status("eight")?["cpus"].to_string(), "8", "vCPUs");
    // A KVM without hardware underneath (PVM) does not offer the second level's instructions.
    if std::path::Path::new("/sys/module/kvm_pvm").exists() {
        let stderr = host.fails(&["run", "--detach", "--cpu", "x86-64-v2"], 1)?;
        ensure!(
            stderr.contains("ssse3"),
            "the missing features are not named: {stderr}"
        );
    } else {
        host.boot("v2", &["--cpu", "x86-64-v2"])?;
    }
    Ok(())
}

fn detached(host: &Host) -> Outcome {
    let pid = host.boot("web", &[])?;
    let listed = host.json_lines(&["ps"])?;
    ensure_eq!(listed.len(), 1, "VMs in ps");
    ensure_eq!(listed[0]["name"], "web", "the name in ps");
    ensure_eq!(pid_of(&listed[0])?, pid, "the pid in ps");
    ensure!(process::is_alive(pid), "the VMM process is not there");
    let comm = fs::read_to_string(format!("/proc/{pid}/comm"))?;
    ensure_eq!(comm, "vm-web\n", "the process' name");
    ensure!(
        host.ok(&["ps"])?.contains("web"),
        "ps for people does not list it"
    );

    host.ok(&["stop", "web"])?;
    host.wait_for_end(pid)?;
    ensure!(!host.vm_dir("web").exists(), "its directory stays");
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs after stop");
    let stderr = host.fails(&["stop", "web"], 1)?;
    ensure!(stderr.contains("no VM named web"), "not said so: {stderr}");
    Ok(())
}

fn pause_resume(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    ensure_eq!(host.state("web")?, "running", "after boot");
    host.ok(&["pause", "web"])?;
    ensure_eq!(host.state("web")?, "paused", "after pause");
    host.ok(&["pause", "web"])?;
    ensure_eq!(host.state("web")?, "paused", "after a second pause");
    host.ok(&["resume", "web"])?;
    ensure_eq!(host.state("web")?, "running", "after resume");
    host.boot("held", &["--memory", "32"])?;
    host.ok(&["stop", "held"])?;
    host.json(&["run", "--detach", "--paused", "--name", "held"])?;
    ensure_eq!(host.state("held")?, "paused", "started with --paused");
    ensure_eq!(
        host.console("held"),
        "",
        "a guest that has not run has said nothing"
    );
    host.ok(&["resume", "held"])?;
    host.wait_for_console("held", GUEST_READY)
}

fn socket_modes(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    let dir_mode = fs::metadata(host.vm_dir("web"))?.permissions().mode() & 0o777;
    ensure_eq!(dir_mode, 0o700, "mode of the VM's directory");
    let socket = host.vm_dir("web").join("control.sock");
    ensure_eq!(
        fs::metadata(socket)?.permissions().mode() & 0o777,
        0o600,
        "control socket"
    );
    Ok(())
}

fn killed(host: &Host) -> Outcome {
    let pid = host.boot("web", &[])?;
    process::signal_pid(pid, libc::SIGKILL)?;
    host.wait_for_end(pid)?;
    ensure_eq!(
        host.json_lines(&["ps"])?[0]["state"],
        "ended",
        "state in ps"
    );
    let stderr = host.fails(&["pause", "web"], 1)?;
    ensure!(stderr.contains("has ended"), "not said so: {stderr}");
    let next = host.boot("web", &[])?;
    ensure!(next != pid, "the same process");
    ensure_eq!(host.state("web")?, "running", "the next of the name");
    host.ok(&["stop", "web"])?;

    // One that was killed and is not wanted any more is forgotten by stop.
    let pid = host.boot("web", &[])?;
    process::signal_pid(pid, libc::SIGKILL)?;
    host.wait_for_end(pid)?;
    host.ok(&["stop", "web"])?;
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs after stop");
    Ok(())
}

fn name_taken(host: &Host) -> Outcome {
    let pid = host.boot("web", &[])?;
    let stderr = host.fails(&["run", "--detach", "--name", "web"], 1)?;
    ensure!(
        stderr.contains("web is running already"),
        "not said so: {stderr}"
    );
    ensure!(process::is_alive(pid), "the first was harmed");
    ensure_eq!(host.state("web")?, "running", "the first");
    for bad in ["../web", "a b", ""] {
        host.fails(&["run", "--detach", "--name", bad], 1)?;
    }
    Ok(())
}

/// However the command ends: its VM must not live on.
fn attached_end(host: &Host) -> Outcome {
    let command = host.spawn(&["run", "--name", "web"])?;
    command.wait_for_output(GUEST_READY, host.limit(BOOT))?;
    let pid = pid_of(&host.json_lines(&["ps"])?[0])?;
    command.signal(libc::SIGKILL)?;
    host.wait_for_end(pid)?;
    ensure!(!host.vm_dir("web").exists(), "its directory is still there");
    Ok(())
}

/// Runs a kernel of ours to its own end.
fn run_kernel(host: &Host, code: &[u8], exit_code: i32) -> Outcome<String> {
    let file = host.path("kernel");
    fs::write(&file, guest::kernel(code))?;
    let finished = host.run(&["run", "--kernel", &file.to_string_lossy()])?;
    let finished = finished.expect_code(exit_code)?;
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs after the end");
    Ok(finished.stderr)
}

fn guest_reset(host: &Host) -> Outcome {
    run_kernel(host, guest::code::RESET, 10).map(drop)
}

fn triple_fault(host: &Host) -> Outcome {
    let stderr = run_kernel(host, guest::code::TRIPLE_FAULT, 11)?;
    ensure!(stderr.contains("triple fault"), "not said so: {stderr}");
    Ok(())
}

fn halted(host: &Host) -> Outcome {
    let file = host.path("kernel");
    fs::write(&file, guest::kernel(guest::code::PRINT_AND_HALT))?;
    let kernel = file.to_string_lossy();
    let started = host.json(&["run", "--detach", "--name", "web", "--kernel", &kernel])?;
    host.wait_for_console("web", "ok")?;
    host.ok(&["stop", "web"])?;
    host.wait_for_end(pid_of(&started)?)
}

fn bad_kernels(host: &Host) -> Outcome {
    let good = guest::kernel(guest::code::RESET);
    let bads: [(&str, &[u8]); 4] = [
        ("empty", b""),
        ("text", b"no kernel"),
        ("head", &good[..64]),
        ("cut", &good[..0x1002]),
    ];
    for (name, bytes) in bads {
        let file = host.path(name);
        fs::write(&file, bytes)?;
        let stderr = host.fails(&["run", "--kernel", &file.to_string_lossy()], 1)?;
        ensure!(
            stderr.lines().count() == 1,
            "more than one sentence for {name}: {stderr}"
        );
        ensure!(
            stderr.contains("kernel"),
            "{name}: does not say what is wrong: {stderr}"
        );
    }
    let stderr = host.fails(&["run", "--kernel", "no-such-file"], 1)?;
    ensure!(
        stderr.contains("no-such-file"),
        "the file is not named: {stderr}"
    );
    Ok(())
}

fn wrong_numbers(host: &Host) -> Outcome {
    for wrong in [
        ["--cpus", "0"],
        ["--cpus", "9"],
        ["--memory", "1"],
        ["--memory", "99999999999"],
        ["--cpu", "z80"],
        ["--disk", "empty:0"],
    ] {
        let finished = host.run(&[&["run"], &wrong[..]].concat())?;
        ensure!(
            matches!(finished.code(), 1 | 2),
            "{wrong:?}: exit code {}: {}",
            finished.code(),
            finished.stderr
        );
        ensure!(
            !finished.stderr.contains("panicked"),
            "{wrong:?}: {}",
            finished.stderr
        );
    }
    Ok(())
}
