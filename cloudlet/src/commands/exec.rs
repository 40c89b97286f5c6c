//! `exec`: a command in a Linux guest.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::{Context, Result, bail};
use cloudlet::agent::{self, Control, Error, Streams};
use cloudlet_agent::protocol::{End, Exec as Request, Size};
use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::Host;
use super::console::RawTerminal;
use super::output::tell;
use crate::cli::Exec;

/// This command failed, not the one in the guest.
const FAILED: u8 = 125;
/// Signals that are the command's.
const PASSED_ON: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// Runs the command; its exit code is ours.
pub(super) fn exec(host: &Host, args: &Exec) -> ExitCode {
    match run(host, args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tell(&format!("cloudlet: {error:#}"));
            ExitCode::from(FAILED)
        }
    }
}

fn run(host: &Host, args: &Exec) -> Result<u8> {
    for variable in &args.environment {
        if !variable.as_bytes().iter().skip(1).any(|&byte| byte == b'=') {
            bail!("{variable:?} is no variable: write NAME=VALUE");
        }
    }
    let mut environment = args.environment.clone();
    if args.tty
        && let Some(terminal) = std::env::var_os("TERM")
    {
        let mut variable = OsString::from("TERM=");
        variable.push(terminal);
        environment.insert(0, variable);
    }
    let request = Request {
        arguments: args.command.iter().map(|word| word.as_bytes()).collect(),
        environment: environment.iter().map(|word| word.as_bytes()).collect(),
        directory: args.cwd.as_bytes(),
        terminal: args.tty.then(terminal_size),
    };
    let stream = host.agent_of(&args.name, args.patience.limit())?;
    let streams = Streams {
        input: Box::new(io::stdin()),
        output: Box::new(io::stdout()),
        error: Box::new(io::stderr()),
        control: watch_signals(args.tty).context("cannot watch for signals")?,
    };
    let raw = args.tty.then(RawTerminal::enter);
    let result = agent::exec(stream, &request, streams);
    drop(raw);
    match result {
        Ok((end, why)) => {
            if matches!(end, End::NotFound | End::NotRun) {
                tell(&format!("cloudlet: {}: {why}", args.name));
            }
            Ok(end.code())
        }
        // Whoever read the output has had enough, as with a command on this machine.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(End::Signal(u8::try_from(SIGPIPE).unwrap_or(0)).code())
        }
        Err(error) => Err(error).with_context(|| args.name.clone()),
    }
}

/// The terminal's size; nothing, if there is no terminal.
fn terminal_size() -> Size {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout())
        .or_else(|_| rustix::termios::tcgetwinsize(rustix::stdio::stdin()));
    size.map_or(Size::default(), |size| Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Signals of this process, as they come, from a thread that ends with the process.
fn watch_signals(tty: bool) -> io::Result<Receiver<Control>> {
    let window = tty.then_some(SIGWINCH);
    let mut signals = Signals::new(PASSED_ON.into_iter().chain(window))?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for signal in signals.forever() {
            let control = match u32::try_from(signal) {
                _ if signal == SIGWINCH => Control::Resize(terminal_size()),
                Ok(number) => Control::Signal(number),
                Err(_) => continue,
            };
            if sender.send(control).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}
