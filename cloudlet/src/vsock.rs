//! The host's side of a VM's vsock device: a socket in the VM's directory.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::sockets;

/// How long a VM may take to have room for another connection: it may be writing a snapshot.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// The VM's vsock socket is not there, or takes nobody.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach the guest through {path}")]
pub struct ConnectError {
    /// The socket.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// A connection to the vsock device whose socket is `path`; the port is still to be named.
///
/// # Errors
/// There is no VM.
pub fn connect(path: &Path) -> Result<UnixStream, ConnectError> {
    sockets::connect(path, CONNECT_TIMEOUT).map_err(|source| ConnectError {
        path: path.to_owned(),
        source,
    })
}

/// Whether a read has waited for as long as it may.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
