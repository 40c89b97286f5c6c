//! Talking to the agent of a Linux guest: commands, files, trimming. Whatever the agent says comes
//! from a guest, and is believed as little as that deserves.

mod copy;
mod exec;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use cloudlet_agent::connection::{self, Incoming, Outgoing};
use cloudlet_agent::protocol::{self, ENTROPY_LEN, Entropy, PORT, Reply, Request, Size, VERSION};
use cloudlet_agent::tree;
use cloudlet_resources::client::{ClientError, shake_hands};

use crate::plain;
use crate::vsock::{self, ConnectError};

pub use copy::{get, put};
pub use exec::{Control, Streams, exec};

/// How long a guest may take to let us in and say who it is.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is tried whether an agent is there.
const WAIT_POLL: Duration = Duration::from_millis(50);

/// Why the agent did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no VM.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Nobody listens on the agent's port.
    #[error("no agent answers in the guest: it may still boot, or have no agent")]
    NoAgent,
    /// The guest says nothing at all.
    #[error(
        "the guest does not answer: it may still boot, be waiting for its memory, be renewing its random \
         numbers after a restore (`cloudlet status` says so), or have no vsock driver"
    )]
    Silent,
    /// The VM's socket says something odd.
    #[error(transparent)]
    Handshake(ClientError),
    /// An agent of another build.
    #[error(
        "the guest's agent speaks version {0} of its protocol and this program version {VERSION}: build \
         the image anew (`cloudlet image build` or `import`), or use the program that it was built by"
    )]
    Version(u32),
    /// The connection to the agent is of no use.
    #[error(transparent)]
    Connection(connection::Error),
    /// The agent refused or failed, in its own words.
    #[error("{0}")]
    Refused(String),
    /// The agent answered with something that is no answer.
    #[error("the agent answered out of turn")]
    Unexpected,
    /// A tree on the host cannot be read or written.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// What the command wrote cannot be passed on.
    #[error("cannot write what the command wrote")]
    Output(#[source] io::Error),
}

impl From<protocol::Error> for Error {
    fn from(error: protocol::Error) -> Self {
        match error {
            protocol::Error::Version(version) => Self::Version(version),
            error => Self::Connection(error.into()),
        }
    }
}

impl From<connection::Error> for Error {
    fn from(error: connection::Error) -> Self {
        match error {
            connection::Error::Protocol(error) => error.into(),
            error => Self::Connection(error),
        }
    }
}

/// Bytes for the guest's random numbers, drawn now.
pub(crate) fn entropy() -> io::Result<Entropy> {
    let mut bytes = [0; ENTROPY_LEN];
    let mut rest = &mut bytes[..];
    while !rest.is_empty() {
        let done = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty())?;
        rest = &mut rest[done..];
    }
    Ok(Entropy(bytes))
}

/// Words of a guest, for a terminal, which they are not to steer.
pub(crate) fn words(text: &str) -> String {
    plain::line(text).into_owned()
}

/// How long the guest may take for its next words.
fn set_patience(stream: &UnixStream, limit: Duration) -> Result<(), ClientError> {
    Ok(stream.set_read_timeout(Some(limit))?)
}

/// A connection to the agent behind the VM's vsock socket at `path`.
///
/// # Errors
/// When there is no VM, or no agent in it.
pub fn connect(path: &Path) -> Result<UnixStream, Error> {
    let mut stream = vsock::connect(path)?;
    set_patience(&stream, OPENING_TIMEOUT).map_err(Error::Handshake)?;
    match shake_hands(&mut stream, PORT) {
        Ok(()) => Ok(stream),
        Err(ClientError::Handshake(said)) if said.is_empty() => Err(Error::NoAgent),
        Err(ClientError::Io(error)) if vsock::is_timeout(&error) => Err(Error::Silent),
        // The guest's driver started, which drops who was there before.
        Err(ClientError::Io(error)) if is_hang_up(&error) => Err(Error::NoAgent),
        Err(error) => Err(Error::Handshake(error)),
    }
}

/// As [`connect`], and waits until the agent lets us in, for `limit` at the most; its first answer may
/// take what is left of that.
///
/// # Errors
/// There is no VM any more, or no agent until then.
pub fn connect_within(path: &Path, limit: Duration) -> Result<UnixStream, Error> {
    let deadline = Instant::now() + limit;
    loop {
        match connect(path) {
            Ok(stream) => {
                let left = deadline.saturating_duration_since(Instant::now());
                set_patience(&stream, left.max(OPENING_TIMEOUT)).map_err(Error::Handshake)?;
                return Ok(stream);
            }
            Err(Error::NoAgent | Error::Silent) if Instant::now() < deadline => {
                std::thread::sleep(WAIT_POLL);
            }
            Err(error) => return Err(error),
        }
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// A session: frames to the agent and from it.
#[derive(Debug)]
struct Session {
    stream: UnixStream,
    incoming: Incoming<UnixStream>,
    outgoing: Outgoing<UnixStream>,
}

impl Session {
    /// Makes `request` over a connection to the agent, which has the time for its first answer that
    /// [`connect`] gave it.
    fn open(stream: UnixStream, request: &Request<'_>) -> Result<Self, Error> {
        let io = |error| Error::from(connection::Error::from(error));
        let mut session = Self {
            incoming: Incoming::new(stream.try_clone().map_err(io)?),
            outgoing: Outgoing::new(stream.try_clone().map_err(io)?),
            stream,
        };
        let hello = Request::Hello(entropy().map_err(io)?);
        session.outgoing.request(&hello)?;
        session.outgoing.request(request)?;
        match session.incoming.reply() {
            Ok(Reply::Hello) => {}
            // It serves nobody else now.
            Ok(Reply::Error(why)) => return Err(Error::Refused(words(why))),
            Ok(_) => return Err(Error::Unexpected),
            Err(connection::Error::Io(error)) if vsock::is_timeout(&error) => {
                return Err(Error::Silent);
            }
            Err(error) => return Err(error.into()),
        }
        session.stream.set_read_timeout(None).map_err(io)?;
        Ok(session)
    }

    /// Waits until a request is carried out whose answer is no more than that, and takes no time.
    fn done(mut self) -> Result<(), Error> {
        self.stream
            .set_read_timeout(Some(OPENING_TIMEOUT))
            .map_err(connection::Error::from)?;
        match self.incoming.reply()? {
            Reply::Done => Ok(()),
            Reply::Error(why) => Err(Error::Refused(words(why))),
            _ => Err(Error::Unexpected),
        }
    }
}

/// Has the guest shut itself down. It does that after its answer.
///
/// # Errors
/// See [`Error`].
pub fn power_off(stream: UnixStream) -> Result<(), Error> {
    Session::open(stream, &Request::PowerOff)?.done()
}

/// What trimming one file system came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trimmed {
    /// Where the guest has it mounted.
    pub path: String,
    /// Bytes trimmed, or why not.
    pub result: Result<u64, String>,
}

/// Most file systems that a guest can tell of.
const FILE_SYSTEMS_MAX: usize = 4096;

/// Has the guest write everything out, discard free blocks and drop its caches.
///
/// # Errors
/// See [`Error`].
pub fn sync(stream: UnixStream) -> Result<Vec<Trimmed>, Error> {
    let mut session = Session::open(stream, &Request::Sync)?;
    let mut all = Vec::new();
    loop {
        match session.incoming.reply()? {
            Reply::Trimmed(trimmed) if all.len() < FILE_SYSTEMS_MAX => all.push(Trimmed {
                path: words(&String::from_utf8_lossy(trimmed.path)),
                result: match trimmed.error {
                    "" => Ok(trimmed.bytes),
                    error => Err(words(error)),
                },
            }),
            Reply::Done => return Ok(all),
            Reply::Error(why) => return Err(Error::Refused(words(why))),
            _ => return Err(Error::Unexpected),
        }
    }
}

/// Tells the agent behind the VM's vsock socket at `path` the size of the guest's serial console.
///
/// # Errors
/// See [`Error`].
pub fn resize_console(path: &Path, size: Size) -> Result<(), Error> {
    Session::open(connect(path)?, &Request::Console(size))?.done()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_connection_dropped_before_its_request_was_read_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let client = std::thread::spawn(move || {
            let refused = connect(&path);
            let accepted = connect_within(&path, Duration::from_secs(60));
            (refused.map(drop), accepted.map(drop))
        });
        for _ in 0..2 {
            let (stream, _) = listener.accept().unwrap();
            // The request has come; closing now resets the connection.
            let mut first = [0];
            rustix::net::recv(&stream, &mut first, rustix::net::RecvFlags::PEEK).unwrap();
        }
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        assert_eq!(line, format!("CONNECT {PORT}\n"));
        stream.write_all(b"OK 1024\n").unwrap();
        let (refused, accepted) = client.join().unwrap();
        assert!(matches!(refused, Err(Error::NoAgent)), "{refused:?}");
        accepted.unwrap();
    }
}
