//! Unix sockets at paths of any length. A socket address takes 107 bytes (`sun_path`, unix(7)); a
//! longer path is reached through a descriptor of its directory, `/proc/self/fd/N/NAME`, so that only
//! the socket's own name has to be short.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Longest path in an address, in bytes: behind it comes a zero.
pub const ADDRESS_LEN_MAX: usize = 107;

/// The way to a socket.
#[derive(Debug)]
pub struct SocketPath {
    /// Held open as long as the address is used.
    _dir: Option<File>,
    address: PathBuf,
}

impl SocketPath {
    /// The way to the socket at `path`.
    ///
    /// # Errors
    /// Its directory cannot be used, or its own name is too long.
    pub fn new(path: &Path) -> io::Result<Self> {
        Self::with_room(path, 0)
    }

    /// As [`SocketPath::new`], with room for so many more bytes at the end of the name.
    ///
    /// # Errors
    /// As [`SocketPath::new`].
    pub fn with_room(path: &Path, room: usize) -> io::Result<Self> {
        let fits = |address: &Path| address.as_os_str().len() + room <= ADDRESS_LEN_MAX;
        if fits(path) {
            let (_dir, address) = (None, path.to_owned());
            return Ok(Self { _dir, address });
        }
        let too_long = || {
            io::Error::new(
                io::ErrorKind::InvalidFilename,
                "the socket's own name is too long",
            )
        };
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(too_long());
        };
        // A relative path of one long name has an empty parent.
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        let dir = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(dir)?;
        let address = Path::new("/proc/self/fd")
            .join(dir.as_raw_fd().to_string())
            .join(name);
        if !fits(&address) {
            return Err(too_long());
        }
        Ok(Self {
            _dir: Some(dir),
            address,
        })
    }

    /// What a socket address takes, as long as this value lives.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.address
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_long_directory_is_no_hindrance_and_a_long_name_is() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120)).join("e".repeat(120));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("a.sock");
        assert!(UnixListener::bind(&path).is_err());
        let listener = UnixListener::bind(SocketPath::new(&path).unwrap().address()).unwrap();
        assert!(path.exists());
        UnixStream::connect(SocketPath::new(&path).unwrap().address()).unwrap();
        listener.accept().unwrap();

        let short = dir.path().join("b.sock");
        assert_eq!(SocketPath::new(&short).unwrap().address(), short);
        let named = |len: usize| SocketPath::with_room(&deep.join("n".repeat(len)), 11);
        assert!(named(60).is_ok());
        let error = named(96).unwrap_err().to_string();
        assert!(error.contains("own name is too long"), "{error}");
        assert!(SocketPath::new(&deep.join("missing/a.sock")).is_err());
    }
}
