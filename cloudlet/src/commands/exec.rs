//! `exec`: a command in a Linux guest.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::{Context, Result, bail};
use cloudlet::agent::{self, Control, Error, Streams};
use cloudlet_agent::protocol::{End, Exec as Request};
use signal_hook::consts::{SIGPIPE, SIGWINCH};
use signal_hook::iterator::Signals;

use super::output::tell;
use super::terminal::{self, RawTerminal};
use super::{Host, stdio};
use crate::cli::Exec;

/// This command failed, not the one in the guest.
const FAILED: u8 = 125;

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
        terminal: args.tty.then(|| terminal::size().unwrap_or_default()),
    };
    let stream = host.agent_of(&args.name, args.patience.limit())?;
    let (control, raw) = watch_signals(args.tty).context("cannot watch for signals")?;
    let input: Box<dyn io::Read + Send> = if args.no_stdin {
        Box::new(io::empty())
    } else {
        Box::new(stdio::stdin())
    };
    let streams = Streams {
        input,
        output: Box::new(stdio::stdout()),
        error: Box::new(stdio::stderr()),
        control,
    };
    let result = agent::exec(stream, &request, streams);
    raw.restore();
    match result {
        Ok((end, why)) => {
            if matches!(end, End::NotFound | End::NotRun) {
                tell(&format!("cloudlet: {}: {why}", args.name));
            }
            Ok(end.code())
        }
        // Whoever read the output has had enough, as with a command on this machine.
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(terminal::code_of_signal(SIGPIPE))
        }
        Err(error) => Err(error).with_context(|| args.name.clone()),
    }
}

/// Signals of this process, as they come, from a thread that ends with the process. Those that are to
/// end a command are passed on to it, but for one whose terminal is `raw`: its keys are signals enough,
/// and whoever signals this process wants that to end. The agent ends the command then.
fn watch_signals(tty: bool) -> io::Result<(Receiver<Control>, Arc<RawTerminal>)> {
    let window = tty.then_some(SIGWINCH);
    // Watched before the terminal is raw, so that none leaves it so.
    let mut signals = Signals::new(terminal::ending_signals().into_iter().chain(window))?;
    let raw = Arc::new(match tty {
        true => RawTerminal::enter(),
        false => RawTerminal::default(),
    });
    let of_thread = Arc::clone(&raw);
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for signal in signals.forever() {
            let control = match u32::try_from(signal) {
                _ if signal == SIGWINCH => Control::Resize(terminal::size().unwrap_or_default()),
                _ if of_thread.is_terminal() => {
                    of_thread.restore();
                    process::exit(terminal::code_of_signal(signal).into());
                }
                Ok(number) => Control::Signal(number),
                Err(_) => continue,
            };
            if sender.send(control).is_err() {
                return;
            }
        }
    });
    Ok((receiver, raw))
}
