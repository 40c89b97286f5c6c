//! The serial console from the user's side: every byte arrives, whoever is slow costs nobody else
//! anything, and the terminal is afterwards what it was before.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use cloudlet_resources::GUEST_READY;
use rustix::fs::OFlags;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, pid_of};
use crate::process::{self, Process};
use crate::terminal::Terminal;
use crate::{ensure, ensure_eq, guest};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "an_attached_run_shows_every_byte",
        run: every_byte,
        needs: Needs::GUEST,
    },
    Case {
        name: "last_words_are_shown_whatever_their_bytes",
        run: last_words,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_console_that_is_not_read_keeps_nobody",
        run: not_read,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_reader_that_leaves_ends_its_vm",
        run: reader_leaves,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_terminal_is_afterwards_what_it_was",
        run: terminals,
        needs: Needs::GUEST,
    },
];

/// A time that everything here fits in.
const LIMIT: Duration = Duration::from_secs(30);
/// A line of 64 bytes, and how often it is written: 256 KiB in one go.
const LINE: &[u8; 64] = b"0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWX\r\n";
const LINES: u32 = 4096;

/// `run` of a kernel that writes `text` so many times.
fn run_writer(host: &Host, name: &str, text: &[u8], times: u32) -> Outcome<Command> {
    let file = host.path(name);
    fs::write(&file, guest::writer(text, times))?;
    let mut command = host.command(&["run", "--name", name, "--kernel"]);
    command.arg(file).stdin(Stdio::null());
    Ok(command)
}

/// Whether a VM's directory, or any process, is left.
fn nothing_is_left(host: &Host, name: &str) -> Outcome {
    host.wait_until("the end of all processes", LIMIT, || {
        host.processes().is_empty().then_some(())
    })?;
    ensure!(!host.vm_dir(name).exists(), "the directory of {name} stays");
    Ok(())
}

fn every_byte(host: &Host) -> Outcome {
    let all = LINE.repeat(usize::try_from(LINES)?);
    let out = host.path("out");
    let mut command = run_writer(host, "burst", LINE, LINES)?;
    let status = command.stdout(File::create(&out)?).status()?;
    ensure_eq!(status.code(), Some(10), "exit code, into a file");
    let seen = fs::read(&out)?;
    ensure!(seen == all, "{} bytes in a file", seen.len());
    // A reader that pauses, of a pipe that is not to be waited for: it is all the same.
    let (mut reader, writer) = io::pipe()?;
    let flags = rustix::fs::fcntl_getfl(&writer)?;
    rustix::fs::fcntl_setfl(&writer, flags | OFlags::NONBLOCK)?;
    let mut child = run_writer(host, "burst", LINE, LINES)?
        .stdout(writer)
        .spawn()?;
    thread::sleep(Duration::from_secs(3));
    let mut seen = Vec::new();
    reader.read_to_end(&mut seen)?;
    ensure_eq!(child.wait()?.code(), Some(10), "exit code, a slow reader");
    ensure!(seen == all, "{} bytes for a slow reader", seen.len());
    nothing_is_left(host, "burst")
}

fn last_words(host: &Host) -> Outcome {
    let words = b"caf\xe9: no root\r\n";
    for round in 0..8 {
        let output = run_writer(host, "latin", words, 1)?.output()?;
        ensure_eq!(output.status.code(), Some(10), "exit code");
        ensure!(
            output.stdout == words,
            "round {round}: {:?}",
            output.stdout.escape_ascii().to_string()
        );
    }
    Ok(())
}

fn not_read(host: &Host) -> Outcome {
    let all = LINE.repeat(usize::try_from(LINES)?);
    let file = host.path("kernel");
    fs::write(&file, guest::writer(LINE, LINES))?;
    let kernel = file.to_string_lossy();
    let run = ["run", "--detach", "--paused", "--name", "flood", "--kernel"];
    let pid = pid_of(&host.json(&[&run[..], &[&kernel]].concat())?)?;
    let connect = || UnixStream::connect(host.vm_dir("flood").join("console.sock"));
    let (stopped, slow, quick) = (connect()?, connect()?, connect()?);
    let read_all = |mut stream: UnixStream, pause| {
        thread::spawn(move || {
            thread::sleep(pause);
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).map(|_| bytes)
        })
    };
    let quick = read_all(quick, Duration::ZERO);
    host.ok(&["resume", "flood"])?;
    let slow = read_all(slow, Duration::from_secs(2));
    // The client that never reads keeps neither the guest nor the VM from its end.
    host.wait_until("the VM's end", LIMIT, || {
        (!process::is_alive(pid)).then_some(())
    })?;
    let panicked = || Failure::new("a reader panicked");
    for reader in [quick, slow] {
        let seen = reader.join().map_err(|_| panicked())??;
        ensure!(seen == all, "{} bytes for another client", seen.len());
    }
    drop(stopped);
    let ended = &host.json_lines(&["ps"])?[0]["report"];
    ensure_eq!(ended, "the guest asked for a reset", "how it ended");
    Ok(())
}

fn reader_leaves(host: &Host) -> Outcome {
    // One that says more and more, and one that says two letters and is silent.
    let silent = host.path("silent");
    fs::write(&silent, guest::kernel(guest::code::PRINT_AND_HALT))?;
    let endless = host.path("endless");
    fs::write(&endless, guest::writer(LINE, u32::MAX))?;
    for kernel in [endless, silent] {
        let mut command = host.command(&["run", "--name", "vm", "--kernel"]);
        command.arg(kernel).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let mut stdout = child.stdout.take().ok_or_else(|| Failure::new("no pipe"))?;
        stdout.read_exact(&mut [0; 2])?;
        drop(stdout);
        let output = child.wait_with_output()?;
        ensure_eq!(output.status.code(), Some(141), "exit code");
        ensure_eq!(String::from_utf8(output.stderr)?, "", "what it said");
        nothing_is_left(host, "vm")?;
    }
    let full = File::options().write(true).open("/dev/full")?;
    let output = run_writer(host, "vm", LINE, 1)?.stdout(full).output()?;
    ensure_eq!(output.status.code(), Some(1), "exit code, /dev/full");
    let said = String::from_utf8(output.stderr)?;
    ensure!(said.contains("cannot write to standard output"), "{said}");
    nothing_is_left(host, "vm")
}

/// Runs the program at a terminal until the guest is there and its keys are raw, does `what` ends that,
/// and expects the exit code and a terminal that is what it was before.
fn at_terminal(
    host: &Host,
    args: &[&str],
    what: impl FnOnce(&Process, &Terminal) -> Outcome,
    code: i32,
) -> Outcome {
    let terminal = Terminal::new()?;
    let modes = || -> Outcome<_> {
        let modes = terminal.modes()?;
        Ok((modes.local_modes, modes.input_modes, modes.output_modes))
    };
    let before = modes()?;
    let process = terminal.spawn(&mut host.command(args))?;
    process.wait_for_output(GUEST_READY, host.limit(LIMIT))?;
    ensure!(terminal.is_raw()?, "{args:?}: the terminal handles keys");
    what(&process, &terminal)?;
    process.wait(host.limit(LIMIT))?.expect_code(code)?;
    ensure_eq!(modes()?, before, "the terminal after {args:?}, code {code}");
    Ok(())
}

fn terminals(host: &Host) -> Outcome {
    let detach = |_: &Process, terminal: &Terminal| Ok(terminal.type_keys(b"\x1d")?);
    let signals = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
    let run = ["run", "--name", "vm"];
    for signal in signals {
        let send = |process: &Process, _: &Terminal| Ok(process.signal(signal)?);
        at_terminal(host, &run, send, 128 + signal)?;
        nothing_is_left(host, "vm")?;
    }
    at_terminal(host, &run, detach, 0)?;
    nothing_is_left(host, "vm")?;

    host.boot("vm", &[])?;
    let console = ["console", "vm"];
    for signal in signals {
        let send = |process: &Process, _: &Terminal| Ok(process.signal(signal)?);
        at_terminal(host, &console, send, 128 + signal)?;
    }
    at_terminal(host, &console, detach, 0)?;
    ensure_eq!(host.state("vm")?, "running", "the VM, all along");
    let stop = |_: &Process, _: &Terminal| host.ok(&["stop", "vm"]).map(drop);
    at_terminal(host, &console, stop, 0)?;

    // The terminal goes away, and no signal tells.
    let terminal = Terminal::new()?;
    let process = Process::spawn(&mut host.command(&run), terminal.stdin()?)?;
    process.wait_for_output(GUEST_READY, host.limit(LIMIT))?;
    drop(terminal);
    process.wait(host.limit(LIMIT))?.expect_code(129)?;
    nothing_is_left(host, "vm")
}
