//! The terminal as a guest's serial console.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cloudlet::{agent, sockets};
use signal_hook::consts::{SIGHUP, SIGWINCH};
use signal_hook::iterator::Signals;

use super::terminal::{self, RawTerminal};
use super::{Host, output, stdio};

/// How long a VM may take to have room for another client.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Ctrl-], which detaches, as in telnet.
const DETACH: u8 = 0x1d;
/// Bytes read from the console at a time.
const READ_LEN: usize = 64 << 10;

/// How long an agent is looked for that takes the terminal's size: a guest may boot for that long.
const SIZE_PATIENCE: Duration = Duration::from_secs(120);
/// How far apart it is tried, at the beginning and later.
const SIZE_PAUSE_MIN: Duration = Duration::from_millis(250);
const SIZE_PAUSE_MAX: Duration = Duration::from_secs(5);

pub(super) fn console(host: &Host, name: &str) -> Result<ExitCode> {
    // Says so if the VM has ended.
    let vsock = host.vsock_of(name)?;
    host.output.say("(attached; Ctrl-] detaches)");
    Ok(match attach(&host.find(name)?.console_socket(), vsock)? {
        End::Detached | End::Console { .. } => ExitCode::SUCCESS,
        End::Signal(signal) => terminal::exit_of_signal(signal),
        End::Output(error) => output::code_of(&error),
    })
}

/// Why the terminal and a console are connected no more.
#[derive(Debug)]
pub(super) enum End {
    /// The console ended, and so does its VM, after so many bytes.
    Console {
        /// Bytes that came from it.
        received: u64,
    },
    /// The user has typed Ctrl-].
    Detached,
    /// A signal, or the terminal went away, which is as SIGHUP.
    Signal(i32),
    /// Standard output takes nothing more.
    Output(io::Error),
}

/// Relays between the terminal and the console at `socket` until one of them ends, or a signal comes.
/// The terminal is as it was before when this returns, and its size is the console's meanwhile, where
/// an agent behind the socket `vsock` sees to that.
///
/// # Errors
/// The console cannot be reached.
pub(super) fn attach(socket: &Path, vsock: PathBuf) -> Result<End> {
    let stream = sockets::connect(socket, CONNECT_TIMEOUT).context("cannot reach the console")?;
    let of_input = stream.try_clone().context("cannot use the console")?;
    let of_output = stream.try_clone().context("cannot use the console")?;
    let (events, ended) = mpsc::channel();
    let (resized, sizes) = mpsc::channel();
    // Before the terminal is raw: whatever ends this process from here on makes it what it was.
    watch_signals(events.clone(), resized).context("cannot watch for signals")?;
    let raw = RawTerminal::enter();
    let is_terminal = raw.is_terminal();
    // The threads end with the process at the latest: a read of a terminal, or a write to one that is
    // stopped, cannot be interrupted, and nothing waits for them. Whoever is first ends all.
    let send = events.clone();
    thread::spawn(move || send.send(relay_output(&of_output)));
    thread::spawn(move || relay_input(of_input, is_terminal).map(|end| events.send(end)));
    thread::spawn(move || keep_size(&vsock, &sizes));
    let end = ended.recv().context("the console broke")?;
    drop(raw);
    if !matches!(end, End::Console { .. }) {
        // The VM is not to wait for us with its last words. It may be gone already.
        let _ = stream.shutdown(Shutdown::Both);
    }
    Ok(end)
}

fn relay_output(mut stream: &UnixStream) -> End {
    let mut stdout = stdio::stdout();
    let mut bytes = vec![0; READ_LEN];
    let mut received = 0;
    loop {
        if let Err(error) = stdout.wait_beside(stream.as_fd()) {
            return End::Output(error);
        }
        match stream.read(&mut bytes) {
            Ok(length) if length > 0 => {
                received += length as u64;
                if let Err(error) = stdout.write_all(&bytes[..length]) {
                    return End::Output(error);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A VM that is gone before it let us in resets the connection.
            _ => return End::Console { received },
        }
    }
}

/// Passes on what is typed. The end of a file or pipe is not a wish to detach: the guest may have more
/// to say. A terminal ends when it is gone.
fn relay_input(mut stream: UnixStream, is_terminal: bool) -> Option<End> {
    let mut stdin = stdio::stdin();
    let mut bytes = [0; 256];
    while let Ok(length @ 1..) = stdin.read(&mut bytes) {
        let typed = &bytes[..length];
        let end = typed.iter().position(|&byte| byte == DETACH);
        let end = end.filter(|_| is_terminal);
        if stream.write_all(&typed[..end.unwrap_or(length)]).is_err() {
            // The other direction sees the console's end.
            return None;
        }
        if end.is_some() {
            return Some(End::Detached);
        }
    }
    is_terminal.then_some(End::Signal(SIGHUP))
}

/// Has signals end the relay; once it has ended, they do what they always do.
fn watch_signals(events: Sender<End>, resized: Sender<()>) -> io::Result<()> {
    let ending = terminal::ending_signals();
    let mut signals = Signals::new(ending.into_iter().chain([SIGWINCH]))?;
    thread::spawn(move || {
        for signal in signals.forever() {
            if signal == SIGWINCH {
                // Where there is no size to be kept, it does not matter.
                let _ = resized.send(());
            } else if events.send(End::Signal(signal)).is_err() {
                // Ends the process.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        }
    });
    Ok(())
}

/// Gives the guest's console the size of the terminal, now and whenever that changes. Not every guest
/// has an agent, and it does not matter much: nobody is told.
fn keep_size(vsock: &Path, changed: &Receiver<()>) {
    loop {
        let begin = Instant::now();
        while let Some(size) = terminal::size()
            && let Err(error) = agent::resize_console(vsock, size)
            && may_come(&error)
            && begin.elapsed() < SIZE_PATIENCE
        {
            let pause = (begin.elapsed() / 4).clamp(SIZE_PAUSE_MIN, SIZE_PAUSE_MAX);
            if changed.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
        if changed.recv().is_err() {
            return;
        }
    }
}

/// Whether an agent may answer later, after this error.
fn may_come(error: &agent::Error) -> bool {
    use agent::Error::{Connect, Connection, NoAgent, Silent};
    matches!(error, Connect(_) | NoAgent | Silent | Connection(_))
}
