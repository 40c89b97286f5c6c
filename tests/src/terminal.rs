//! A terminal of the harness: what a user sits at, with a process in front of it.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Termios, Winsize};

use crate::failure::{Failure, Outcome};
use crate::process::Process;

/// A pseudo-terminal, both ends of it, for one process.
pub struct Terminal {
    master: File,
    /// Where what is shown is read, until somebody does.
    shown: Cell<Option<File>>,
    slave: OwnedFd,
}

impl Terminal {
    /// A terminal of 24 lines of 80 characters, as every one begins.
    pub fn new() -> Outcome<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::grantpt(&master)?;
        rustix::pty::unlockpt(&master)?;
        let path = rustix::pty::ptsname(&master, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(path, flags, Mode::empty())?;
        let master = File::from(master);
        let terminal = Self {
            shown: Cell::new(Some(master.try_clone()?)),
            master,
            slave,
        };
        terminal.resize(24, 80)?;
        Ok(terminal)
    }

    /// Starts `command` in a session of its own whose terminal this is; what it writes there is its
    /// standard output.
    pub fn spawn(&self, command: &mut Command) -> Outcome<Process> {
        let prepare = || {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        };
        command
            .stdin(self.slave.try_clone()?)
            .stdout(self.slave.try_clone()?)
            .stderr(self.slave.try_clone()?);
        // SAFETY: the closure runs between fork and exec, and makes two system calls and nothing else:
        // no allocation, no lock.
        unsafe { command.pre_exec(prepare) };
        let shown = self.shown.take();
        let shown = shown.ok_or_else(|| Failure::new("the terminal has had its process"))?;
        Process::on_terminal(command, shown)
    }

    /// The terminal as standard input alone, of a process whose session has another terminal or none.
    pub fn stdin(&self) -> io::Result<Stdio> {
        Ok(self.slave.try_clone()?.into())
    }

    /// Types `keys`.
    pub fn type_keys(&self, keys: &[u8]) -> io::Result<()> {
        (&self.master).write_all(keys)
    }

    /// Gives the terminal another size.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(rustix::termios::tcsetwinsize(&self.slave, size)?)
    }

    /// How the terminal treats keys.
    pub fn modes(&self) -> io::Result<Termios> {
        Ok(rustix::termios::tcgetattr(&self.slave)?)
    }

    /// Whether keys go to the program as they are typed.
    pub fn is_raw(&self) -> io::Result<bool> {
        let handled = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        Ok(!self.modes()?.local_modes.intersects(handled))
    }
}
