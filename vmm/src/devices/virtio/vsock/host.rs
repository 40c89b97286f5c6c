//! The host's side: the socket programs connect to, the line they open a connection with, and
//! connections out to programs that listen for the guest.
//!
//! All sockets are non-blocking. The listening socket is readable and writable by its owner only.
//! A socket file that a dead process left is replaced; one on which somebody listens is not.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::socket_path::SocketPath;

/// Connections that may wait for the control thread.
const BACKLOG: libc::c_int = 128;
/// Longest line that opens a connection: "CONNECT 4294967295\r\n" and a little air.
pub(super) const LINE_BYTES_MAX: usize = 32;

/// Why the host's socket could not be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Somebody listens there.
    #[error("another process listens on {0}; choose another path or stop it")]
    InUse(PathBuf),
    /// There is a file that is no socket.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The socket's own name does not fit an address.
    #[error(
        "the name of the socket {0} is too long: with the port's number behind it, it does not fit a \
         Unix socket's address"
    )]
    TooLong(PathBuf),
    /// The system refused.
    #[error("cannot listen on {path}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Room that the port's suffix (`_4294967295`) needs at the end of a socket path.
const SUFFIX_BYTES_MAX: usize = 11;

/// The host's side of a device: a listening Unix socket, removed when dropped.
#[derive(Debug)]
pub struct HostSocket {
    listener: UnixListener,
    path: PathBuf,
    way: SocketPath,
}

impl HostSocket {
    /// Listens at `path`, mode 0600.
    ///
    /// # Errors
    /// When somebody listens there already, something else is there, or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let listen = |source| VsockError::Listen {
            path: path.to_path_buf(),
            source,
        };
        let way =
            SocketPath::with_room(path, SUFFIX_BYTES_MAX).map_err(|error| match error.kind() {
                io::ErrorKind::InvalidFilename => VsockError::TooLong(path.to_path_buf()),
                _ => listen(error),
            })?;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(listen(error)),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(VsockError::NotASocket(path.to_path_buf()));
            }
            Ok(_) => match connect(way.address()) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(listen)?;
                }
                // It was removed in the meantime.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                _ => return Err(VsockError::InUse(path.to_path_buf())),
            },
        }
        let socket = socket().map_err(listen)?;
        bind(&socket, way.address()).map_err(listen)?;
        let host = Self {
            listener: UnixListener::from(socket),
            path: path.to_path_buf(),
            way,
        };
        // Nobody can connect before `listen`, so nobody finds the socket open to others.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(listen)?;
        // SAFETY: a call on an open descriptor of our own; no memory is passed.
        if unsafe { libc::listen(host.listener.as_raw_fd(), BACKLOG) } != 0 {
            return Err(listen(io::Error::last_os_error()));
        }
        Ok(host)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a waiting connection, if there is one.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Connects to the program that listens for the guest's connections to `port`.
    pub(super) fn connect_out(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.way.address().as_os_str().to_owned();
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        // A file that is gone already is as good; another process cannot have replaced it while
        // this one listened.
        let _ = fs::remove_file(&self.path);
    }
}

/// The line that opens a connection, as it comes in.
#[derive(Debug, Default)]
pub(super) struct Line {
    bytes: [u8; LINE_BYTES_MAX],
    len: usize,
}

/// What a line came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// The rest has not arrived.
    More,
    /// `CONNECT port`.
    Port(u32),
    /// Anything else, or the end of the stream.
    Refused,
}

impl Line {
    /// Reads on, not a byte beyond the line's end: what follows is the connection's.
    pub(super) fn read(&mut self, mut stream: impl Read) -> Opening {
        loop {
            let Some(slot) = self.bytes.get_mut(self.len..self.len + 1) else {
                return Opening::Refused;
            };
            match stream.read(slot) {
                Ok(0) => return Opening::Refused,
                Ok(_) if slot == b"\n" => return self.parse(),
                Ok(_) => self.len += 1,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Opening::More,
                    io::ErrorKind::Interrupted => {}
                    _ => return Opening::Refused,
                },
            }
        }
    }

    fn parse(&self) -> Opening {
        let line = self
            .bytes
            .get(..self.len)
            .and_then(|line| std::str::from_utf8(line).ok());
        let mut words = line.unwrap_or("").split_ascii_whitespace();
        match (words.next(), words.next().map(str::parse), words.next()) {
            (Some("CONNECT"), Some(Ok(port)), None) => Opening::Port(port),
            _ => Opening::Refused,
        }
    }
}

fn empty_address() -> libc::sockaddr_un {
    libc::sockaddr_un {
        sun_family: 1,
        sun_path: [0; 108],
    }
}

/// A Unix socket address; `NUL` ends it, so there must be room for one.
fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    let mut address = empty_address();
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (slot, byte) in address.sun_path.iter_mut().zip(bytes) {
        *slot = libc::c_char::from_ne_bytes([*byte]);
    }
    Ok(address)
}

fn address_len() -> libc::socklen_t {
    libc::socklen_t::try_from(std::mem::size_of::<libc::sockaddr_un>()).unwrap_or(0)
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the call takes no memory.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(socket: &OwnedFd, path: &Path) -> io::Result<()> {
    let address = address(path)?;
    // SAFETY: the address is a whole sockaddr_un that lives across the call, and its length is
    // passed with it.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            address_len(),
        )
    };
    if result != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Connects without ever waiting: a full backlog counts as a refusal.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket()?;
    let address = address(path)?;
    // SAFETY: as in `bind`.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            address_len(),
        )
    };
    if result != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(UnixStream::from(socket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_opening_line_opens() {
        let read = |mut bytes: &[u8]| Line::default().read(&mut bytes);
        assert_eq!(read(b"CONNECT 1024\nrest"), Opening::Port(1024));
        assert_eq!(read(b"CONNECT 4294967295\r\n"), Opening::Port(u32::MAX));
        let bad: [&[u8]; 8] = [
            b"CONNECT 4294967296\n",
            b"CONNECT\n",
            b"CONNECT 1 2\n",
            b"connect 1\n",
            b"CONNECT -1\n",
            b"\xff\xfe 1\n",
            b"\n",
            b"CONNECT 1",
        ];
        for line in bad {
            assert_eq!(read(line), Opening::Refused, "{line:?}");
        }
        assert_eq!(read(&[b' '; 100]), Opening::Refused);
        let mut source: &[u8] = b"CONNECT 7\nabc";
        assert_eq!(Line::default().read(&mut source), Opening::Port(7));
        assert_eq!(source, b"abc");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        drop(UnixListener::bind(&path).unwrap());
        let host = HostSocket::bind(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(HostSocket::bind(&path), Err(VsockError::InUse(_))));
        assert!(UnixStream::connect(&path).is_ok());
        drop(host);
        assert!(!path.exists());
        fs::write(&path, b"precious").unwrap();
        assert!(matches!(
            HostSocket::bind(&path),
            Err(VsockError::NotASocket(_))
        ));
        let long = dir.path().join("x".repeat(100));
        assert!(matches!(
            HostSocket::bind(&long),
            Err(VsockError::TooLong(_))
        ));
    }

    #[test]
    fn a_long_directory_holds_both_sides_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(150));
        fs::create_dir(&deep).unwrap();
        let path = deep.join("v.sock");
        let host = HostSocket::bind(&path).unwrap();
        assert!(matches!(HostSocket::bind(&path), Err(VsockError::InUse(_))));
        let theirs = SocketPath::new(&deep.join("v.sock_5000")).unwrap();
        let listener = UnixListener::bind(theirs.address()).unwrap();
        host.connect_out(5000).unwrap();
        listener.accept().unwrap();
        drop(host);
        assert!(!path.exists());
    }
}
