//! The agent: takes connections, and serves each in a thread of its own.

mod console;
mod copy;
mod exec;
mod power;
mod renew;
mod sync;

use std::convert::Infallible;
use std::fs::Permissions;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::connection::{self, Incoming, Outgoing};
use crate::protocol::{self, Reply, Request};
use crate::{sys, tree};

/// Sessions at a time.
pub const SESSIONS_MAX: usize = 64;
/// Connections that may wait to be taken.
const BACKLOG: i32 = 32;
/// How long a connection may take to say what it wants.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the other side may take to read the last words.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait when there is no vsock yet, or no descriptor for a connection.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Why the agent cannot serve, or a session failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot listen.
    #[error("cannot listen on {0}")]
    Listen(String, #[source] io::Error),
    /// The connection is of no use any more.
    #[error(transparent)]
    Connection(#[from] connection::Error),
    /// The request makes no sense here.
    #[error("the request was not expected here")]
    Unexpected,
    /// A request of a later program.
    #[error(
        "this guest's agent does not know what it was asked for (request {0:#x}): it is older than the \
         program on the host, so build the image anew"
    )]
    Unknown(u8),
    /// Too many sessions.
    #[error("the agent serves {SESSIONS_MAX} sessions already")]
    Busy,
    /// A tree cannot be read or written.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// The system refused.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
    /// Neither a known init nor a program can end the guest in order.
    #[error("this guest has an init that the agent does not know ({0}), and no poweroff program")]
    Init(String),
}

impl From<protocol::Error> for Error {
    fn from(error: protocol::Error) -> Self {
        Self::Connection(error.into())
    }
}

/// An error and what led to it, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Says something on standard error, which may be a console that nobody holds any more.
pub fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Where the agent listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A vsock port; only the host is served.
    Vsock(u32),
    /// A Unix socket, of its owner only.
    Unix(PathBuf),
}

impl Address {
    /// Reads `vsock:PORT` or `unix:PATH`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("vsock", port) => port.parse().ok().map(Self::Vsock),
            ("unix", path) if !path.is_empty() => Some(Self::Unix(path.into())),
            _ => None,
        }
    }
}

enum Listener {
    Vsock(OwnedFd),
    Unix(UnixListener),
}

impl Listener {
    fn new(address: &Address) -> Result<Self, Error> {
        match address {
            Address::Vsock(port) => Ok(Self::Vsock(listen_on_vsock(*port))),
            Address::Unix(path) => {
                let failed = |error| Error::Listen(path.display().to_string(), error);
                let listener = UnixListener::bind(path).map_err(failed)?;
                std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
                Ok(Self::Unix(listener))
            }
        }
    }

    /// The next connection that is to be served.
    fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self {
            Self::Vsock(socket) => Ok(sys::accept(socket)?.map(UnixStream::from)),
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Some(stream)),
        }
    }
}

/// Listens as soon as there is a vsock: its module may come after the agent.
fn listen_on_vsock(port: u32) -> OwnedFd {
    let mut told = false;
    loop {
        match sys::listen(port, BACKLOG) {
            Ok(socket) => return socket,
            Err(error) if !told => {
                tell(&format!(
                    "cloudlet-agent: cannot listen on vsock port {port} yet: {error}"
                ));
                told = true;
            }
            Err(_) => {}
        }
        thread::sleep(RETRY_PAUSE);
    }
}

/// Serves for ever. Sets what signals do in this process.
///
/// # Errors
/// When it cannot listen.
pub fn run(address: &Address) -> Result<Infallible, Error> {
    sys::reset_signals();
    let listener = Listener::new(address)?;
    // Whoever comes by a Unix socket is in this machine, and cannot have cloned it.
    let is_guest = matches!(address, Address::Vsock(_));
    let sessions = Arc::new(());
    loop {
        match listener.accept() {
            Ok(Some(stream)) => start(stream, &sessions, is_guest),
            Ok(None) => {}
            // Out of descriptors or memory, or a connection that was gone again.
            Err(_) => thread::sleep(RETRY_PAUSE / 10),
        }
    }
}

/// Serves one connection in a thread; `sessions` has an owner for each.
fn start(stream: UnixStream, sessions: &Arc<()>, is_guest: bool) {
    let busy = Arc::strong_count(sessions) > SESSIONS_MAX;
    let session = Arc::clone(sessions);
    let serve = move || {
        serve(stream, busy, is_guest);
        drop(session);
    };
    // Without a thread the connection is closed, which is the answer.
    let _ = thread::Builder::new().name("session".into()).spawn(serve);
}

/// Serves one connection to its end.
fn serve(stream: UnixStream, busy: bool, is_guest: bool) {
    let result = if busy {
        Err(Error::Busy)
    } else {
        session(&stream, is_guest)
    };
    if let Err(error) = result {
        // Whoever is gone cannot be told.
        let _ = stream.set_nonblocking(false);
        let _ = stream.set_write_timeout(Some(CLOSING_TIMEOUT));
        let _ = Outgoing::new(&stream).reply(&Reply::Error(&chain(&error)));
    }
    close(&stream);
}

/// Closes so that the last words arrive: bytes that nobody read would reset the connection.
fn close(mut stream: &UnixStream) {
    let deadline = Instant::now() + CLOSING_TIMEOUT;
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(CLOSING_TIMEOUT));
    if stream.shutdown(Shutdown::Write).is_ok() {
        let mut rest = [0; 4096];
        while Instant::now() < deadline && matches!(stream.read(&mut rest), Ok(1..)) {}
    }
}

fn session(stream: &UnixStream, is_guest: bool) -> Result<(), Error> {
    let limit = |limit| stream.set_read_timeout(limit);
    limit(Some(OPENING_TIMEOUT)).map_err(connection::Error::from)?;
    let mut incoming = Incoming::new(stream);
    let mut outgoing = Outgoing::new(stream);
    outgoing.reply(&Reply::Hello)?;
    let Request::Hello(entropy) = incoming.request()? else {
        return Err(Error::Unexpected);
    };
    // Before anything else of the session, which may be the first of a clone.
    if is_guest {
        renew::add_entropy(&entropy)?;
    }
    // A copy: the frame is in the buffer that what follows comes into.
    let frame = incoming.frame().map_err(unknown)?;
    let (kind, payload) = (frame.kind, frame.payload.to_vec());
    let payload = payload.as_slice();
    let request = Request::decode(protocol::Frame { kind, payload })?;
    limit(None).map_err(connection::Error::from)?;
    match request {
        Request::Exec(command) => exec::run(&command, incoming, outgoing),
        Request::Put { path, name } => copy::put(path, name, &mut incoming, &mut outgoing),
        Request::Get(path) => copy::get(path, &mut outgoing),
        Request::Sync => sync::sync(&mut outgoing),
        Request::Console(size) => {
            console::resize(Path::new(console::SERIAL), size)?;
            Ok(outgoing.reply(&Reply::Done)?)
        }
        Request::Renew => renew::renew(&mut outgoing),
        // Else it would be the machine of whoever tries the agent out.
        Request::PowerOff if is_guest => power::off(&mut outgoing),
        _ => Err(Error::Unexpected),
    }
}

/// A first frame of a kind that is not known is a request of a later program.
fn unknown(error: connection::Error) -> Error {
    match error {
        connection::Error::Protocol(protocol::Error::Kind(kind)) => Error::Unknown(kind),
        error => error.into(),
    }
}
