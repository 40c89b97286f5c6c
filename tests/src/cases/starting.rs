//! Before a VM runs, and how one ends that nobody asked politely: files whose opening waits, file
//! servers that do not answer, signals, directories that go away.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use cloudlet_resources::GUEST_READY;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::fuse::SilentServer;
use crate::host::{Host, Lane, pid_of};
use crate::process::{self, Finished, Process};
use crate::{ensure, ensure_eq, namespace, qcow2};

/// What happens outside of KVM is seen in one lane as well as in both.
const LANE_1: Needs = Needs {
    only_lane: Some((Lane::One, "the lanes differ in KVM only")),
    ..Needs::GUEST
};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "what_is_no_file_is_refused_by_name",
        run: no_files,
        needs: LANE_1,
    },
    Case {
        name: "a_vm_that_waits_for_a_silent_file_server_can_be_ended",
        run: silent_server,
        needs: LANE_1.as_root().with_devices(&["/dev/fuse"]),
    },
    Case {
        name: "stop_ends_a_conversion_and_its_process_at_once",
        run: conversion,
        needs: LANE_1,
    },
    Case {
        name: "stop_kills_a_vm_that_does_not_answer",
        run: no_answer,
        needs: LANE_1,
    },
    Case {
        name: "a_signal_to_its_process_ends_a_vm_in_order",
        run: signals,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_vm_whose_directory_is_gone_ends_and_says_so",
        run: directory_gone,
        needs: LANE_1,
    },
    Case {
        name: "a_runtime_directory_may_have_a_long_path",
        run: long_path,
        needs: LANE_1,
    },
    Case {
        name: "a_memory_file_that_is_cut_is_named",
        run: cut_memory,
        needs: Needs::GUEST,
    },
    Case {
        name: "names_that_are_not_utf_8_are_said_to_be_so",
        run: not_utf_8,
        needs: LANE_1,
    },
];

/// How long a command may take that waits for nothing.
const SOON: Duration = Duration::from_secs(15);

fn no_files(host: &Host) -> Outcome {
    let pipe = host.path("pipe");
    make_pipe(&pipe)?;
    let disk = host.path("disk");
    fs::File::create(&disk)?.set_len(1 << 20)?;
    let layer = format!("{},layer={}", disk.display(), pipe.display());
    let pipe = pipe.to_string_lossy();
    let kinds: [(&[&str], &str); 9] = [
        (&["run", "--kernel", &pipe], "is a pipe"),
        (&["run", "--kernel", "/dev/null"], "is a character device"),
        (&["run", "--kernel", "/proc"], "is a directory"),
        (&["run", "--initrd", &pipe, "--kernel", "disk"], "is a pipe"),
        (&["run", "--disk", &pipe], "is a pipe"),
        (&["run", "--disk", "/dev/zero"], "is a character device"),
        (&["overlay", "show", &pipe], "is a pipe"),
        (&["synthesize", &pipe], "it is a pipe"),
        (
            &[
                "serve",
                ".",
                "--tls",
                &pipe,
                &pipe,
                "--listen",
                "127.0.0.1:0",
            ],
            "is a pipe",
        ),
    ];
    for (args, what) in kinds {
        let finished = host.spawn(args)?.wait(host.limit(SOON))?;
        let stderr = finished.expect_code(1)?.stderr;
        ensure!(stderr.contains(what), "{args:?}: {stderr}");
        let path = args.iter().find(|arg| arg.starts_with('/'));
        let count = path.map_or(0, |path| stderr.matches(path).count());
        ensure_eq!(count, 1, "names of the file in {stderr:?}");
    }
    let stderr = host.fails(&["run", "--disk", &layer], 1)?;
    ensure!(stderr.contains("is no file"), "{stderr}");
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs that are left");
    Ok(())
}

fn make_pipe(path: &Path) -> Outcome {
    let mode = rustix::fs::Mode::from(0o600);
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0)?;
    Ok(())
}

/// A VM that waits for a file server is seen, and ends when it is stopped, when its command is
/// killed, and on a signal, though the thread that waits cannot.
fn silent_server(host: &Host) -> Outcome {
    namespace::private_mounts()?;
    let at = host.path("mnt");
    fs::create_dir(&at)?;
    let server = SilentServer::mount(&at)?;
    let file = at.join("file").to_string_lossy().into_owned();
    let mut stuck = Vec::new();
    let ends: [(&str, &[&str]); 3] = [
        (
            "stop",
            &["run", "--detach", "--name", "web", "--kernel", &file],
        ),
        ("kill", &["run", "--name", "web", "--disk", &file]),
        (
            "signal",
            &["run", "--detach", "--name", "web", "--disk", &file],
        ),
    ];
    for (count, (end, args)) in (1..).zip(ends) {
        let command = host.spawn(args)?;
        host.wait_until("a VM that opens the file", SOON, || {
            (server.opens() >= count).then_some(())
        })?;
        let status = host.status("web")?;
        ensure_eq!(
            status["state"],
            "starting",
            "the state, to be ended by {end}"
        );
        let waits_for = status["waits_for"].as_str().unwrap_or_default();
        ensure!(waits_for.ends_with(&file), "what it waits for: {status}");
        let listed = host.json_lines(&["ps"])?;
        ensure_eq!(listed.len(), 1, "VMs in ps");
        let pid = pid_of(&listed[0])?;
        stuck.push(pid);
        match end {
            "stop" => {
                let stopped = host.run(&["stop", "web"])?.expect_code(0)?;
                let said = stopped.stderr;
                ensure!(said.contains("cannot end before the file server"), "{said}");
                ensure!(
                    said.contains(&pid.to_string()),
                    "the process is not named: {said}"
                );
                let finished = command.wait(host.limit(SOON))?.expect_code(1)?;
                let said = finished.stderr;
                ensure!(said.contains("it was stopped before the VM ran"), "{said}");
                ensure!(
                    said.contains(&file),
                    "what it waited for is not named: {said}"
                );
            }
            "kill" => command.signal(libc::SIGKILL)?,
            _ => process::signal_pid(pid, libc::SIGTERM)?,
        }
        host.wait_until("a free name", SOON, || {
            let listed = host.json_lines(&["ps"]).ok()?;
            listed.is_empty().then_some(())
        })?;
    }
    // Nothing can end the threads before the server goes.
    drop(server);
    stuck
        .into_iter()
        .try_for_each(|pid| host.wait_for_end(pid))?;
    let stderr = host.fails(&["stop", "web"], 1)?;
    ensure!(stderr.contains("no VM named web"), "{stderr}");
    Ok(())
}

/// Bytes of the disk whose conversion is interrupted: enough to last until it is.
const LONG_BYTES: usize = 128 << 20;

fn conversion(host: &Host) -> Outcome {
    let image = host.path("long.qcow2");
    fs::File::create(&image)?.write_all(&qcow2::image(&vec![7; LONG_BYTES]))?;
    let image = image.to_string_lossy().into_owned();
    let args = ["run", "--detach", "--name", "web", "--disk", &image];

    // What is asked meanwhile is done when the VM runs.
    let command = host.spawn(&args)?;
    let (_, child) = hold_conversion(host)?;
    ensure_eq!(host.state("web")?, "starting", "the state meanwhile");
    let pause = host.spawn(&["pause", "web"])?;
    host.wait_until("the request to pause", SOON, || {
        is_connected(host).ok()?.then_some(())
    })?;
    process::signal_pid(child, libc::SIGCONT)?;
    command.wait(host.limit(SOON))?.expect_code(0)?;
    pause.wait(host.limit(SOON))?.expect_code(0)?;
    ensure_eq!(host.state("web")?, "paused", "the state afterwards");
    host.ok(&["stop", "web"])?;

    let command = host.spawn(&args)?;
    let (vmm, child) = hold_conversion(host)?;
    host.ok(&["stop", "web"])?;
    let said = command.wait(host.limit(SOON))?.expect_code(1)?.stderr;
    ensure!(said.contains("it was stopped before the VM ran"), "{said}");
    for pid in [vmm, child] {
        host.wait_for_end(pid)?;
    }
    Ok(())
}

/// Stops the process that converts a disk of the only VM; returns the VM's and that.
fn hold_conversion(host: &Host) -> Outcome<(u32, u32)> {
    host.wait_until("the process that converts", SOON, || {
        let vms = host.json_lines(&["ps"]).ok()?;
        let vmm = pid_of(vms.first()?).ok()?;
        let child = *process::children_of(vmm).first()?;
        process::signal_pid(child, libc::SIGSTOP).ok()?;
        Some((vmm, child))
    })
}

/// Whether somebody is connected to the VM's control socket: proc_net_unix(5) has sockets that are
/// connected, state 03, with the path that they were accepted at.
fn is_connected(host: &Host) -> Outcome<bool> {
    let table = fs::read_to_string("/proc/net/unix")?;
    let path = host.vm_dir("web").join("control.sock");
    let is_ours = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(5) == Some(&"03") && fields.get(7).map(Path::new) == Some(&path)
    };
    Ok(table.lines().any(is_ours))
}

fn no_answer(host: &Host) -> Outcome {
    for (args, is_told) in [(["--timeout", "1"].as_slice(), true), (&["--force"], false)] {
        let pid = host.boot("web", &[])?;
        process::signal_pid(pid, libc::SIGSTOP)?;
        let listed = host.json_lines(&["ps"])?;
        ensure_eq!(listed[0]["state"], "busy", "the state in ps");
        ensure_eq!(pid_of(&listed[0])?, pid, "the pid in ps");
        let stopped = host.run(&[&["stop", "web"], args].concat())?;
        let said = stopped.expect_code(0)?.stderr;
        ensure_eq!(
            said.contains("was killed"),
            is_told,
            "a word about it: {said}"
        );
        host.wait_for_end(pid)?;
        ensure_eq!(
            host.json_lines(&["ps"])?.len(),
            0,
            "VMs after stop {args:?}"
        );
    }
    Ok(())
}

fn signals(host: &Host) -> Outcome {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let pid = host.boot("web", &["--disk", "empty:8"])?;
        process::signal_pid(pid, signal)?;
        host.wait_for_end(pid)?;
        ensure!(
            !host.vm_dir("web").exists(),
            "signal {signal}: it has left its directory, as a killed one does"
        );
    }
    // Paused guests and attached ones too.
    let run = host.spawn(&["run", "--name", "web", "--paused"])?;
    let pid = host.wait_until("the VM", SOON, || {
        let vms = host.json_lines(&["ps"]).ok()?;
        let paused = vms.iter().find(|vm| vm["state"] == "paused")?;
        pid_of(paused).ok()
    })?;
    process::signal_pid(pid, libc::SIGTERM)?;
    run.wait(host.limit(SOON))?.expect_code(0)?;
    Ok(())
}

fn directory_gone(host: &Host) -> Outcome {
    let detached = host.boot("web", &[])?;
    let run = Process::spawn(&mut host.command(&["run", "--name", "own"]), Stdio::piped())?;
    run.wait_for_output(GUEST_READY, host.limit(SOON))?;
    let vms = host.vm_dir("web");
    let vms = vms.parent().ok_or_else(|| Failure::new("no parent"))?;
    fs::rename(vms, host.path("elsewhere"))?;
    host.wait_for_end(detached)?;
    let finished = run.wait(host.limit(SOON))?.expect_code(15)?;
    let said = finished.stderr;
    ensure!(
        said.contains("directory") && said.contains("is gone"),
        "{said}"
    );
    let report = fs::read_to_string(host.path("elsewhere/web/report"))?;
    ensure!(report.contains("is gone"), "the report: {report}");
    host.boot("web", &[])?;
    Ok(())
}

/// Sockets are used by each command that has one: control, vsock, console.
fn long_path(host: &Host) -> Outcome {
    let runtime = host.path("r".repeat(150));
    fs::create_dir(&runtime)?;
    fs::set_permissions(&runtime, PermissionsExt::from_mode(0o700))?;
    let run = |args: &[&str]| {
        let mut command = host.command(args);
        command.env("XDG_RUNTIME_DIR", &runtime);
        let process = Process::spawn(&mut command, Stdio::null())?;
        process.wait(host.limit(2 * SOON))?.expect_code(0)
    };
    let elsewhere = host.path("v".repeat(150));
    fs::create_dir(&elsewhere)?;
    let elsewhere = elsewhere.join("v.sock").to_string_lossy().into_owned();
    for vsock in [&[][..], &["--vsock", &elsewhere]] {
        run(&[&["run", "--detach", "--name", "web"], vsock].concat())?;
        let params = "tanks=16 particles=3000 warmup=0 rate_hz=1";
        run(&["app", "install", "web", "fluid", "--params", params])?;
        let listed = run(&["ps"])?.stdout;
        ensure!(listed.contains("running"), "{listed}");
        let log = runtime.join("cloudlet/vms/web/console.log");
        ensure!(
            fs::read_to_string(log)?.contains(GUEST_READY),
            "nothing is in its log"
        );
        run(&["stop", "web"])?;
    }
    let attached = {
        let mut command = host.command(&["run", "--name", "own"]);
        Process::spawn(command.env("XDG_RUNTIME_DIR", &runtime), Stdio::piped())?
    };
    attached.wait_for_output(GUEST_READY, host.limit(SOON))?;
    let name = host.path("n".repeat(100)).to_string_lossy().into_owned();
    let stderr = host.fails(&["run", "--detach", "--vsock", &name], 1)?;
    ensure!(
        stderr.contains("is too long") && stderr.contains(&name),
        "{stderr}"
    );
    Ok(())
}

/// A guest that stood still while its memory was cut, and one that ran on.
fn cut_memory(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    let image = host.path("image").to_string_lossy().into_owned();
    for state in ["paused", "running"] {
        let _ = fs::remove_dir_all(&image);
        host.ok(&["snapshot", "web", &image])?;
        let mut args = vec!["restore", &image, "--name", "again"];
        if state == "paused" {
            args.push("--paused");
        }
        let pid = pid_of(&host.json(&args)?)?;
        let memory = Path::new(&image).join("memory");
        fs::File::options().write(true).open(&memory)?.set_len(0)?;
        // Whatever comes of it: the guest needs its memory for it.
        if state == "paused" {
            host.run(&["resume", "again"])?;
        } else {
            host.run(&["call", "again", "frame 1"])?;
        }
        host.wait_for_end(pid)?;
        let status = host.status("again")?;
        let report = status["report"].as_str().unwrap_or_default();
        let memory = memory.to_string_lossy();
        ensure!(
            report.contains(&*memory),
            "{state}: the file is not named: {status}"
        );
        ensure!(!report.contains("seccomp"), "{state}: {status}");
        host.ok(&["stop", "again"])?;
    }
    Ok(())
}

fn not_utf_8(host: &Host) -> Outcome {
    let name = OsStr::from_bytes(b"caf\xe9");
    let path = host.path(name);
    fs::write(&path, "no kernel")?;
    let disk = [path.as_os_str().as_bytes(), b",ro"].concat();
    let disk = OsString::from_vec(disk);
    let word = OsStr::new;
    let all: [&[&OsStr]; 10] = [
        &[word("run"), word("--name"), name],
        &[word("run"), word("--kernel"), path.as_os_str()],
        &[
            word("run"),
            word("--kernel"),
            word("/dev/null"),
            word("--initrd"),
            path.as_os_str(),
        ],
        &[word("run"), word("--disk"), &disk],
        &[
            word("run"),
            word("--detach"),
            word("--vsock"),
            path.as_os_str(),
        ],
        &[word("restore"), path.as_os_str()],
        &[word("synthesize"), path.as_os_str()],
        &[word("overlay"), word("verify"), path.as_os_str()],
        &[word("stop"), name],
        &[
            word("image"),
            word("import"),
            word("/proc"),
            path.as_os_str(),
        ],
    ];
    for args in all {
        says_utf_8(host.run(args)?, args)?;
    }
    let mut command = host.command(&["run", "--detach"]);
    command.env("XDG_RUNTIME_DIR", &path);
    let process = Process::spawn(&mut command, Stdio::null())?;
    says_utf_8(process.wait(host.limit(SOON))?, &[word("XDG_RUNTIME_DIR")])?;
    ensure_eq!(host.json_lines(&["ps"])?.len(), 0, "VMs that are left");
    Ok(())
}

fn says_utf_8(finished: Finished, args: &[&OsStr]) -> Outcome {
    let said = &finished.stderr;
    ensure!(
        matches!(finished.code(), 1 | 2),
        "{args:?}: code {}: {said}",
        finished.code()
    );
    ensure!(said.contains("UTF-8"), "{args:?}: {said}");
    ensure!(!said.contains("panicked"), "{args:?}: {said}");
    Ok(())
}
