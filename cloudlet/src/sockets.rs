//! Unix sockets of VMs: listening and connecting, whatever the length of the path
//! (`vmm/src/socket_path.rs`).

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use cloudlet_vmm::socket_path::SocketPath;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Listens at `path`; accepting does not wait.
///
/// # Errors
/// The system refuses, or the socket's name is too long.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(SocketPath::new(path)?.address())?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A connection to the socket at `path`. A process that accepts nobody any more has a full queue in
/// the end, in which a place is waited for no longer than `limit`.
///
/// # Errors
/// Nobody listens, there is no place, or the socket's name is too long.
pub fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let path = SocketPath::new(path)?;
    let address = SocketAddrUnix::new(path.address())?;
    let flags = SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    net::connect(&socket, &address)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(UnixStream::from(socket))
}
