//! The command's process: started, signalled, waited for.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::pty::OpenptFlags;

use crate::protocol::{End, Exec, Size};
use crate::server::Error;
use crate::server::console::set_size;
use crate::sys;

/// Where commands are looked for, unless the request says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What else every command finds in its environment, with its value if the agent has none.
const DEFAULTS: [(&str, &str); 2] = [("HOME", "/root"), ("USER", "root")];

/// Why a command did not start.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// The directory is none.
    #[error("cannot use the directory {0:?}")]
    Directory(PathBuf, #[source] io::Error),
    /// The program cannot be run.
    #[error("cannot run {0:?}")]
    Program(PathBuf, #[source] io::Error),
    /// There is no terminal to be had.
    #[error("cannot make a terminal")]
    Terminal(#[source] io::Error),
    /// Its streams or its end cannot be watched.
    #[error("cannot watch the command")]
    Watch(#[source] io::Error),
}

impl StartError {
    pub(super) fn end(&self) -> End {
        match self {
            Self::Program(_, error) if error.kind() == io::ErrorKind::NotFound => End::NotFound,
            _ => End::NotRun,
        }
    }
}

/// A command that runs. Its process group is killed if this is dropped before its end.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    /// What reads its input, until it is closed.
    pub(super) input: Option<File>,
    /// Its outputs, until each ends.
    pub(super) outputs: [Option<File>; 2],
    /// Ends when the command does.
    pub(super) end: Option<PipeReader>,
    terminal: Option<File>,
    /// The terminal was told of the input's end.
    pub(super) told_end: bool,
    reaped: bool,
}

/// Starts a command.
pub(super) fn start(exec: &Exec<'_>) -> Result<Running, StartError> {
    let program = exec.arguments.first().copied().unwrap_or_default();
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .args(
            exec.arguments
                .iter()
                .skip(1)
                .map(|word| OsStr::from_bytes(word)),
        )
        .current_dir(directory_of(exec)?);
    set_environment(&mut command, exec);
    let terminal = exec.terminal.map(|size| attach(&mut command, size));
    let terminal = terminal.transpose().map_err(StartError::Terminal)?;
    if terminal.is_none() {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
    }
    let failed = |error| StartError::Program(PathBuf::from(OsStr::from_bytes(program)), error);
    let child = command.spawn().map_err(failed)?;
    // From here on the child ends with this value.
    let mut running = Running {
        child,
        input: None,
        outputs: [None, None],
        end: None,
        terminal,
        told_end: false,
        reaped: false,
    };
    running.connect().map_err(StartError::Watch)?;
    Ok(running)
}

fn directory_of(exec: &Exec<'_>) -> Result<PathBuf, StartError> {
    let directory = Path::new("/").join(OsStr::from_bytes(exec.directory));
    let error = match std::fs::metadata(&directory) {
        Ok(found) if found.is_dir() => return Ok(directory),
        Ok(_) => io::ErrorKind::NotADirectory.into(),
        Err(error) => error,
    };
    Err(StartError::Directory(directory, error))
}

fn set_environment(command: &mut Command, exec: &Exec<'_>) {
    command.env_clear().env("PATH", PATH);
    for (name, value) in DEFAULTS {
        let own = std::env::var_os(name);
        command.env(name, own.unwrap_or_else(|| value.into()));
    }
    for variable in &exec.environment {
        let name_len = variable.iter().skip(1).position(|&byte| byte == b'=');
        let (name, value) = variable.split_at(name_len.map_or(0, |at| at + 1));
        let value = value.get(1..).unwrap_or_default();
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
    }
}

/// Makes a terminal the command's input and outputs, and returns its other end.
fn attach(command: &mut Command, size: Size) -> io::Result<File> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&ours)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    set_size(&ours, size)?;
    command
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs);
    sys::lead_session_on_terminal(command);
    Ok(ours.into())
}

/// `descriptor` as a file that never makes one wait.
fn without_waiting(descriptor: impl Into<OwnedFd>) -> io::Result<File> {
    let descriptor = descriptor.into();
    let flags = rustix::fs::fcntl_getfl(&descriptor)?;
    rustix::fs::fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
    Ok(descriptor.into())
}

impl Running {
    /// Takes hold of the command's streams and of its end.
    fn connect(&mut self) -> io::Result<()> {
        if let Some(terminal) = &self.terminal {
            self.input = Some(without_waiting(terminal.try_clone()?)?);
            self.outputs[0] = Some(without_waiting(terminal.try_clone()?)?);
        } else {
            self.input = self.child.stdin.take().map(without_waiting).transpose()?;
            let stdout = self.child.stdout.take().map(without_waiting);
            let stderr = self.child.stderr.take().map(without_waiting);
            self.outputs = [stdout.transpose()?, stderr.transpose()?];
        }
        let (end, ends_with_thread) = io::pipe()?;
        let pid = Pid::from_child(&self.child);
        let wait = move || {
            // Not collected: until `reap` its number belongs to nobody else.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            // Nothing but an interruption can make it fail.
            let _ =
                rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::Pid(pid), options));
            drop(ends_with_thread);
        };
        thread::Builder::new().name("wait".into()).spawn(wait)?;
        self.end = Some(end);
        Ok(())
    }

    pub(super) fn is_on_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Signals the command's process group.
    pub(super) fn signal(&self, number: u32) -> Result<(), Error> {
        let signal = i32::try_from(number).ok().and_then(Signal::from_named_raw);
        let signal = signal.ok_or(Error::Unexpected)?;
        // A group that is gone has had its end already.
        let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), signal);
        Ok(())
    }

    pub(super) fn resize(&self, size: Size) -> Result<(), Error> {
        let Some(terminal) = &self.terminal else {
            return Err(Error::Unexpected);
        };
        set_size(terminal, size).map_err(|error| Error::System("resize the terminal", error))
    }

    /// Collects the command, which has ended.
    pub(super) fn reap(mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            // One that has ended in between is collected all the same.
            let group = Pid::from_child(&self.child);
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
            let _ = self.child.wait();
        }
    }
}
