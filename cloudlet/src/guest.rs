//! Talking to the embedded guest in a VM: its control port over the VM's vsock socket.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use cloudlet_resources::client::{Answer, Client, ClientError};
use cloudlet_resources::protocol::PORT;

use crate::vsock::{self, ConnectError};

/// How long an embedded guest may take to boot; it takes some ten milliseconds.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const READY_POLL: Duration = Duration::from_millis(1);

/// Why the guest does not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no VM.
    #[error(transparent)]
    Connect(#[from] ConnectError),
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
pub fn connect(path: &Path) -> Result<Client<UnixStream>, Error> {
    Ok(Client::connect(vsock::connect(path)?, PORT)?)
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
