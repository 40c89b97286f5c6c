//! What is said over a VM's control socket: one JSON object a line, a request answered by any
//! number of progress lines and one last line. The socket is mode 0600 in a directory of mode
//! 0700: whoever can connect is the VM's owner.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::registry::VmDir;
use crate::sockets;

/// Longest request line in bytes. An overlay's page order is the largest thing said: 20 bytes a
/// page at most, for half a million pages.
pub const REQUEST_LEN_MAX: usize = 10 << 20;

/// How long a VM may have its name and not listen yet.
const STARTING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a VM may take to have room for another connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const STARTING_POLL: Duration = Duration::from_millis(5);

/// A page of memory (`space` 0) or a block of disk `space - 1`, both in units of 4 KiB.
pub type SpacePage = (u8, u64);

/// What can be asked of a VMM process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the VM is and how it does.
    Status,
    /// Stops the vCPUs. With `lease`, the guest's free pages are given back before, as for an overlay,
    /// and the vCPUs run again when this connection closes.
    Pause {
        /// Whether the pause ends with the connection.
        lease: bool,
    },
    /// Lets the vCPUs run.
    Resume,
    /// Waits until somebody has the vCPUs stopped, other than on lease.
    AwaitPause,
    /// Presses the power button; the guest does what it thinks fit.
    PowerButton,
    /// Ends the VM.
    Stop,
    /// Writes the machine state, RAM and disks into a new directory.
    Snapshot {
        /// The directory, absolute, which must not exist.
        dir: PathBuf,
    },
    /// Writes what differs from the VM's base into an overlay file.
    Overlay {
        /// The file, absolute.
        out: PathBuf,
        /// Pages to come first, in order of first touch.
        early: Vec<SpacePage>,
        /// zstd level.
        level: i32,
    },
    /// The order in which overlay pages were first touched, in a VM that records it.
    FirstTouch,
    /// How the memory balloon does, with the guest's latest statistics.
    Balloon {
        /// Memory that the guest is to keep from now on, in MiB.
        target_mib: Option<u64>,
    },
    /// Waits until the VM's overlay has arrived and is applied.
    WaitComplete,
}

/// What a VMM process answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Reply {
    /// Work goes on.
    Progress {
        /// What is being done.
        step: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// The request was carried out; nothing follows.
    Done {
        /// What came of it.
        result: Value,
    },
    /// The request was refused or failed; nothing follows.
    Failed {
        /// What was wrong, in one sentence.
        message: String,
    },
}

/// Why a request could not be made or was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("cannot reach the VM at {path}")]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the VM went away during the request")]
    Io(#[source] io::Error),
    /// The VM ended before its answer.
    #[error("the VM ended during the request")]
    Ended,
    /// The answer cannot be read.
    #[error("the VM's answer cannot be understood (is it of another version?)")]
    Answer(#[source] serde_json::Error),
    /// The VM refused, in its own words.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// Whether the VM has not answered in its time.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        let (Self::Connect { source, .. } | Self::Io(source)) = self else {
            return false;
        };
        matches!(
            source.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
        )
    }

    fn is_nobody_there(&self) -> bool {
        let nobody = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        matches!(self, Self::Connect { source, .. } if nobody.contains(&source.kind()))
    }
}

/// A connection to a VM's control socket.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream = sockets::connect(path, CONNECT_TIMEOUT).map_err(|source| Error::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// Connects to the VM of `dir`. One that is just starting has its name before it listens, and is
    /// waited for.
    pub fn reach(dir: &VmDir) -> Result<Self, Error> {
        let deadline = Instant::now() + STARTING_TIMEOUT;
        loop {
            match Self::connect(&dir.control_socket()) {
                Err(error)
                    if error.is_nobody_there() && dir.is_alive() && Instant::now() < deadline =>
                {
                    std::thread::sleep(STARTING_POLL);
                }
                connected => return connected,
            }
        }
    }

    /// Gives up on answers that take longer than `limit`.
    pub fn set_timeout(&self, limit: Duration) -> Result<(), Error> {
        self.reader
            .get_ref()
            .set_read_timeout(Some(limit))
            .map_err(Error::Io)
    }

    /// Makes `request` and waits for its end; `progress` sees the lines before that.
    pub fn call(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Value, Error> {
        let mut line = serde_json::to_vec(request).map_err(Error::Answer)?;
        line.push(b'\n');
        self.reader.get_ref().write_all(&line).map_err(Error::Io)?;
        loop {
            let mut answer = String::new();
            if self.reader.read_line(&mut answer).map_err(Error::Io)? == 0 {
                return Err(Error::Ended);
            }
            match serde_json::from_str(&answer).map_err(Error::Answer)? {
                Reply::Progress { step, done, total } => progress(&step, done, total),
                Reply::Done { result } => return Ok(result),
                Reply::Failed { message } => return Err(Error::Refused(message)),
            }
        }
    }

    /// Makes a request whose progress nobody watches.
    pub fn ask(&mut self, request: &Request) -> Result<Value, Error> {
        self.call(request, &mut |_, _, _| {})
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::registry::VmName;

    #[test]
    fn requests_read_as_documented() {
        let parse = |text: &str| serde_json::from_str::<Request>(text);
        assert_eq!(parse(r#"{"op":"status"}"#).unwrap(), Request::Status);
        assert_eq!(
            parse(r#"{"op":"pause","lease":true}"#).unwrap(),
            Request::Pause { lease: true }
        );
        assert!(parse(r#"{"op":"explode"}"#).is_err());
        assert!(parse(r#"{"op":"pause","lease":true,"more":1}"#).is_err());
    }
    #[test]
    fn a_vm_that_starts_is_waited_for_and_one_that_has_ended_is_not() {
        let vms = tempfile::tempdir().unwrap();
        let dir = VmDir::new(vms.path(), VmName::new("vm").unwrap());
        assert!(Client::reach(&dir).unwrap_err().is_nobody_there());
        let lock = dir.claim().unwrap();
        let client = std::thread::spawn({
            let dir = dir.clone();
            move || Client::reach(&dir).map(drop)
        });
        std::thread::sleep(10 * STARTING_POLL);
        let listener = UnixListener::bind(dir.control_socket()).unwrap();
        client.join().unwrap().unwrap();
        drop((listener, lock));
        assert!(Client::reach(&dir).unwrap_err().is_nobody_there());
    }
}
