//! The terminal as a guest's serial console.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::termios::{InputModes, LocalModes, OptionalActions, Termios};

use super::Host;

/// Ctrl-], which detaches, as in telnet.
const DETACH: u8 = 0x1d;

pub(super) fn console(host: &Host, name: &str) -> Result<()> {
    // Says so if the VM has ended.
    drop(host.connect(name)?);
    host.output.say("(attached; Ctrl-] detaches)");
    attach(&host.find(name)?.console_socket())?;
    Ok(())
}

/// Relays between the terminal and the console at `socket` until either ends.
pub(super) fn attach(socket: &Path) -> Result<()> {
    let stream = UnixStream::connect(socket).context("cannot reach the console")?;
    let input = stream.try_clone().context("cannot use the console")?;
    let raw = RawTerminal::enter();
    // The thread ends with the process at the latest: a blocking read of a terminal cannot be
    // interrupted, and nothing waits for it.
    std::thread::spawn(move || relay_input(input));
    let relayed = relay_output(stream);
    drop(raw);
    relayed.context("the console broke")
}

fn relay_output(mut stream: UnixStream) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                stdout.write_all(&bytes[..length])?;
                stdout.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn relay_input(mut stream: UnixStream) {
    let mut stdin = io::stdin().lock();
    let is_terminal = stdin.is_terminal();
    let mut bytes = [0; 256];
    while let Ok(length @ 1..) = stdin.read(&mut bytes) {
        let typed = &bytes[..length];
        let end = if is_terminal {
            typed.iter().position(|&byte| byte == DETACH)
        } else {
            None
        };
        if stream.write_all(&typed[..end.unwrap_or(length)]).is_err() {
            return;
        }
        if end.is_some() {
            // Wakes the other direction, which ends the command.
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
    // The end of a file or pipe is no wish to detach: the guest may have more to say.
}

/// The terminal on standard input, handing over each key as it is typed; as it was before when
/// dropped.
pub(super) struct RawTerminal(Option<Termios>);

impl RawTerminal {
    /// Does nothing where standard input is no terminal.
    pub(super) fn enter() -> Self {
        let stdin = rustix::stdio::stdin();
        let Ok(before) = rustix::termios::tcgetattr(stdin) else {
            return Self(None);
        };
        let mut raw = before.clone();
        raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        raw.input_modes -= InputModes::ICRNL | InputModes::IXON;
        let set = rustix::termios::tcsetattr(stdin, OptionalActions::Now, &raw);
        Self(set.is_ok().then_some(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // The terminal may be gone, and then needs no mode.
            let _ =
                rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, before);
        }
    }
}
