//! The gate through which files come in that a user names: regular files and block devices, and
//! nothing whose opening waits for somebody or does something.
//!
//! A path is looked up without being opened (`O_PATH`, open(2)), so that a named pipe does not wait
//! for its other end and no device notices; what it leads to is opened only when it is known to be a
//! file. A file server that does not answer is waited for all the same, which is why a VMM process
//! opens files beside a thread that can end it (`process/starting.rs`).

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("cannot open {}", path.display())]
    Open {
        /// The path as it was named.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is something else than a file.
    #[error("{} is {kind}; a regular file or a block device is needed", path.display())]
    Kind {
        /// The path as it was named.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// A file inside of a directory of ours is something else than a regular file.
    #[error("{} is {kind}; what belongs to an image is a regular file in its directory", path.display())]
    Inside {
        /// The path.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// It has more bytes than anything of its kind.
    #[error("{} has more than {len_max} bytes", path.display())]
    TooLong {
        /// The path as it was named.
        path: PathBuf,
        /// Most bytes that are taken.
        len_max: u64,
    },
}

impl Error {
    /// Whether there is nothing at the path.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Opens the regular file or block device `path` for reading.
///
/// # Errors
/// It is not there, something else, or not to be read.
pub fn open(path: &Path) -> Result<File, Error> {
    open_with(path, File::options().read(true))
}

/// As [`open`], for reading and writing; the file must be there.
///
/// # Errors
/// As [`open`].
pub fn open_to_write(path: &Path) -> Result<File, Error> {
    open_with(path, File::options().read(true).write(true))
}

/// Opens the regular file `name` of the directory `dir` for reading. Whoever made what is in the
/// directory had the names in it as well: a link would lead to any file of the host, and is refused.
///
/// # Errors
/// It is not there, something else, or not to be read.
pub fn open_inside(dir: &Path, name: &str) -> Result<File, Error> {
    let path = dir.join(name);
    let failed = |source| Error::Open {
        path: path.clone(),
        source,
    };
    if Path::new(name).components().count() != 1 || name.starts_with('.') {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let (place, metadata) = look_up(&path, OFlags::NOFOLLOW).map_err(failed)?;
    let kind = match metadata.file_type() {
        found if found.is_symlink() => Some("a symbolic link"),
        found if found.is_block_device() => Some("a block device"),
        found => other_kind(found),
    };
    match kind {
        Some(kind) => Err(Error::Inside { path, kind }),
        None => reopen(&place, File::options().read(true)).map_err(failed),
    }
}

/// All of the file `path`, which must not be longer than `len_max` bytes.
///
/// # Errors
/// As [`open`], or it is too long.
pub fn read(path: &Path, len_max: u64) -> Result<Vec<u8>, Error> {
    read_all(open(path)?, path, len_max)
}

/// All of the file `name` of the directory `dir`, which must not be longer than `len_max` bytes.
///
/// # Errors
/// As [`open_inside`], or it is too long.
pub fn read_inside(dir: &Path, name: &str, len_max: u64) -> Result<Vec<u8>, Error> {
    read_all(open_inside(dir, name)?, &dir.join(name), len_max)
}

fn read_all(file: File, path: &Path, len_max: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let mut limited = file.take(len_max.saturating_add(1));
    let length = limited
        .read_to_end(&mut bytes)
        .map_err(|source| Error::Open {
            path: path.to_owned(),
            source,
        })?;
    if length as u64 > len_max {
        let path = path.to_owned();
        return Err(Error::TooLong { path, len_max });
    }
    Ok(bytes)
}

fn open_with(path: &Path, options: &OpenOptions) -> Result<File, Error> {
    let failed = |source| Error::Open {
        path: path.to_owned(),
        source,
    };
    let (place, metadata) = look_up(path, OFlags::empty()).map_err(failed)?;
    if let Some(kind) = other_kind(metadata.file_type()) {
        let path = path.to_owned();
        return Err(Error::Kind { path, kind });
    }
    reopen(&place, options).map_err(failed)
}

/// Opens the very file that was looked at, whatever the path leads to by now (proc_pid_fd(5)).
fn reopen(place: &File, options: &OpenOptions) -> io::Result<File> {
    options.open(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

fn look_up(path: &Path, flags: OFlags) -> io::Result<(File, Metadata)> {
    let flags = (OFlags::PATH | flags).bits().cast_signed();
    let place = File::options().read(true).custom_flags(flags).open(path)?;
    let metadata = place.metadata()?;
    Ok((place, metadata))
}

/// What a thing is that is neither a regular file nor a block device, with its article.
fn other_kind(found: FileType) -> Option<&'static str> {
    if found.is_file() || found.is_block_device() {
        None
    } else if found.is_dir() {
        Some("a directory")
    } else if found.is_fifo() {
        Some("a pipe")
    } else if found.is_socket() {
        Some("a socket")
    } else if found.is_char_device() {
        Some("a character device")
    } else {
        Some("of a kind that is not known here")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn files_alone_are_opened_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "words").unwrap();
        assert_eq!(read(&file, 5).unwrap(), b"words");
        assert!(matches!(read(&file, 4), Err(Error::TooLong { .. })));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read(&link, 5).unwrap(), b"words");
        open_to_write(&file).unwrap().set_len(3).unwrap();
        assert_eq!(read(&file, 5).unwrap(), b"wor");

        let pipe = dir.path().join("pipe");
        let mode = rustix::fs::Mode::from(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let others = [
            (pipe.as_path(), "a pipe"),
            (&socket, "a socket"),
            (dir.path(), "a directory"),
            (Path::new("/dev/null"), "a character device"),
        ];
        for (path, what) in others {
            for opened in [open(path), open_to_write(path)] {
                let said = opened.unwrap_err().to_string();
                let begin = format!("{} is {what};", path.display());
                assert!(said.starts_with(&begin), "{said}");
            }
        }
        assert_eq!(read_inside(dir.path(), "file", 5).unwrap(), b"wor");
        for (name, what) in [
            ("link", "a symbolic link"),
            ("pipe", "a pipe"),
            ("socket", "a socket"),
        ] {
            let said = open_inside(dir.path(), name).unwrap_err().to_string();
            assert!(said.contains(&format!("{name} is {what};")), "{said}");
        }
        for name in ["..", "../file", "/etc/passwd", ""] {
            assert!(open_inside(dir.path(), name).is_err(), "{name:?}");
        }
        let missing = open(&dir.path().join("missing")).unwrap_err();
        assert!(missing.is_not_found(), "{missing:?}");
    }
}
