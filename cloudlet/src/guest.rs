//! Talking to the embedded guest in a VM: its control port over the VM's vsock socket.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use cloudlet_resources::client::{Answer, Client, ClientError};
use cloudlet_resources::protocol::PORT;

use crate::vsock::{self, ConnectError};

/// How long a guest may take to let us in: one that waits for its memory takes its time.
const OPENING_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an embedded guest may take to boot; it takes some ten milliseconds.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const READY_POLL: Duration = Duration::from_millis(1);

/// Why the guest does not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no VM.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The guest says nothing at all.
    #[error(
        "the guest does not answer: it may be waiting for its memory, or be another than the embedded one"
    )]
    Silent,
    /// The guest, or what is between, said no.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// A request to an application.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AppRequest {
    /// Its words. `verify` alone is for the guest itself.
    pub text: String,
    /// What goes with it.
    pub attachment: Vec<u8>,
}

/// A connection to the guest behind the vsock socket at `path`.
///
/// # Errors
/// There is no VM, or a guest that does not let us in within a minute.
pub fn connect(path: &Path) -> Result<Client<UnixStream>, Error> {
    let stream = vsock::connect(path)?;
    let client =
        set_patience(&stream, Some(OPENING_TIMEOUT)).and_then(|()| Client::connect(stream, PORT));
    match client {
        Ok(client) => {
            set_patience(client.stream(), None)?;
            Ok(client)
        }
        Err(ClientError::Io(error)) if vsock::is_timeout(&error) => Err(Error::Silent),
        Err(error) => Err(error.into()),
    }
}

fn set_patience(stream: &UnixStream, limit: Option<Duration>) -> Result<(), ClientError> {
    Ok(stream.set_read_timeout(limit)?)
}

/// Makes one request of the guest behind `path`.
pub fn call(path: &Path, request: &AppRequest) -> Result<Answer, Error> {
    let mut client = connect(path)?;
    if request.text == "verify" {
        return Ok(Answer {
            text: client.verify()?,
            blob: Vec::new(),
        });
    }
    Ok(client.call(&request.text, &request.attachment)?)
}

/// Waits until the guest behind `path` takes requests.
pub fn wait_ready(path: &Path) -> Result<(), Error> {
    let start = Instant::now();
    loop {
        match connect(path).and_then(|mut client| Ok(client.status()?)) {
            Ok(_) => return Ok(()),
            Err(error) if start.elapsed() > READY_TIMEOUT => return Err(error),
            Err(_) => std::thread::sleep(READY_POLL),
        }
    }
}
