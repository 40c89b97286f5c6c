//! Sending a tree: walked twice, first for its extent, and by open directories, so that a
//! directory which is exchanged for a link meanwhile leads nowhere.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};

use crate::sparse;

use super::{DEPTH_MAX, Entry, Error, Extent, Invalid, MODE_MASK, Meta, capability};

/// Bytes of data in one entry.
const DATA_LEN: usize = 64 << 10;

/// How everything is opened: a pipe that appears in place of a file does not hold us up.
const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);

/// Hands the tree at `path`, a file or a directory or a link to one, to `sink`, entry by entry.
///
/// # Errors
/// Those of `sink`, and when something cannot be read.
pub fn send<E: From<Error>>(
    path: &Path,
    sink: &mut impl FnMut(Entry<'_>) -> Result<(), E>,
) -> Result<Extent, E> {
    let failed = |error| failed("read", path)(error);
    let root = rustix::fs::open(path, OPEN, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&root).map_err(failed)?;
    let mut walk = Walk {
        sink,
        at: path.to_owned(),
        buffer: vec![0; DATA_LEN],
    };
    let meta = meta_of(&stat);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let extent = Extent {
                bytes: length_of(&stat),
                entries: 1,
                skipped: 0,
                stripped: capability::has_others(root.as_fd()).into(),
            };
            (walk.sink)(Entry::Extent(extent))?;
            walk.file(b"", &stat, root)?;
            Ok(extent)
        }
        FileType::Directory => {
            let mut extent = Extent::default();
            measure(&mut walk.at, root.as_fd(), 1, &mut extent)?;
            (walk.sink)(Entry::Extent(extent))?;
            walk.directory(b"", meta, root.as_fd(), 1)?;
            Ok(extent)
        }
        _ => Err(Error::Special(path.to_owned()).into()),
    }
}

fn failed<E: From<Error>>(
    doing: &'static str,
    path: &Path,
) -> impl Fn(rustix::io::Errno) -> E + use<E> {
    let path = path.to_owned();
    move |errno| {
        E::from(Error::Io {
            doing,
            path: path.clone(),
            source: errno.into(),
        })
    }
}

fn meta_of(stat: &Stat) -> Meta {
    let mode = u16::try_from(stat.st_mode & u32::from(MODE_MASK)).unwrap_or(0);
    let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Meta {
        mode,
        seconds: stat.st_mtime,
        nanos,
    }
}

fn length_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// The names in a directory, which stays open.
fn names(directory: BorrowedFd<'_>) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn component(name: &CStr) -> &std::ffi::OsStr {
    std::ffi::OsStr::from_bytes(name.to_bytes())
}

/// Adds what is in `directory` to `extent`. What vanishes meanwhile is not counted, and what cannot
/// be opened stops the real walk, with its name.
fn measure(
    at: &mut PathBuf,
    directory: BorrowedFd<'_>,
    depth: usize,
    extent: &mut Extent,
) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        return Err(Invalid::Depth.into());
    }
    extent.entries += 1;
    extent.stripped += u64::from(capability::has_others(directory));
    for name in names(directory).map_err(failed::<Error>("read", at))? {
        let Ok(stat) = rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                extent.entries += 1;
                extent.stripped += u64::from(capability::name_has_others(directory, &name));
                extent.bytes = extent.bytes.saturating_add(length_of(&stat));
            }
            FileType::Symlink => extent.entries += 1,
            FileType::Directory => {
                at.push(component(&name));
                if let Ok(inner) = open(directory, &name, OFlags::DIRECTORY) {
                    measure(at, inner.as_fd(), depth + 1, extent)?;
                }
                at.pop();
            }
            _ => extent.skipped += 1,
        }
    }
    Ok(())
}

fn open(directory: BorrowedFd<'_>, name: &CStr, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OPEN | OFlags::NOFOLLOW | flags;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

struct Walk<'s, S> {
    sink: &'s mut S,
    at: PathBuf,
    buffer: Vec<u8>,
}

impl<S> Walk<'_, S> {
    fn directory<E: From<Error>>(
        &mut self,
        name: &[u8],
        meta: Meta,
        directory: BorrowedFd<'_>,
        depth: usize,
    ) -> Result<(), E>
    where
        S: FnMut(Entry<'_>) -> Result<(), E>,
    {
        if depth > DEPTH_MAX {
            return Err(Error::from(Invalid::Depth).into());
        }
        (self.sink)(Entry::Directory { name, meta })?;
        for name in names(directory).map_err(failed("read", &self.at))? {
            self.at.push(component(&name));
            self.child(&name, directory, depth)?;
            self.at.pop();
        }
        (self.sink)(Entry::Up)
    }

    fn child<E: From<Error>>(
        &mut self,
        name: &CStr,
        directory: BorrowedFd<'_>,
        depth: usize,
    ) -> Result<(), E>
    where
        S: FnMut(Entry<'_>) -> Result<(), E>,
    {
        let failed = failed("read", &self.at);
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = match stat {
            // It was removed since its directory was read.
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            other => other.map_err(&failed)?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file = open(directory, name, OFlags::empty()).map_err(&failed)?;
                let stat = rustix::fs::fstat(&file).map_err(&failed)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Ok(());
                }
                self.file(name.to_bytes(), &stat, file)
            }
            FileType::Directory => {
                let inner = open(directory, name, OFlags::DIRECTORY).map_err(&failed)?;
                self.directory(name.to_bytes(), meta_of(&stat), inner.as_fd(), depth + 1)
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(directory, name, Vec::new());
                let target = target.map_err(&failed)?;
                (self.sink)(Entry::Link {
                    name: name.to_bytes(),
                    meta: meta_of(&stat),
                    target: target.to_bytes(),
                })
            }
            _ => Ok(()),
        }
    }

    fn file<E: From<Error>>(&mut self, name: &[u8], stat: &Stat, file: OwnedFd) -> Result<(), E>
    where
        S: FnMut(Entry<'_>) -> Result<(), E>,
    {
        let meta = meta_of(stat);
        (self.sink)(Entry::File { name, meta })?;
        if let Some(value) = capability::get(&file).map_err(failed("read", &self.at))? {
            (self.sink)(Entry::Capability(&value))?;
        }
        let mut file = File::from(file);
        if has_holes(stat) {
            self.stretches(&mut file, length_of(stat))?;
        } else {
            self.data(&mut file, u64::MAX)?;
        }
        (self.sink)(Entry::Data(&[]))
    }

    /// Sends `length` bytes, of which holes are not read.
    fn stretches<E: From<Error>>(&mut self, file: &mut File, length: u64) -> Result<(), E>
    where
        S: FnMut(Entry<'_>) -> Result<(), E>,
    {
        let mut at = 0;
        // A handle of its own: both move the one position, and here it is set before each read.
        let seen = file.try_clone().map_err(|error| self.unread(error))?;
        for stretch in sparse::data(&seen, length) {
            let stretch = stretch.map_err(|error| self.unread(error))?;
            if stretch.start > at {
                (self.sink)(Entry::Hole(stretch.start - at))?;
            }
            let start = file.seek(SeekFrom::Start(stretch.start));
            start.map_err(|error| self.unread(error))?;
            let wanted = stretch.end - stretch.start;
            if self.data(file, wanted)? < wanted {
                // It is shorter than it said, as files are that the kernel makes up.
                return Ok(());
            }
            at = stretch.end;
        }
        if at < length {
            (self.sink)(Entry::Hole(length - at))?;
        }
        Ok(())
    }

    /// Sends up to `limit` bytes of what the file has from here on, and says how many.
    fn data<E: From<Error>>(&mut self, file: &mut File, limit: u64) -> Result<u64, E>
    where
        S: FnMut(Entry<'_>) -> Result<(), E>,
    {
        let mut sent = 0;
        while sent < limit {
            let wanted = usize::try_from(limit - sent).unwrap_or(usize::MAX);
            let wanted = wanted.min(self.buffer.len());
            match file.read(&mut self.buffer[..wanted]) {
                Ok(0) => break,
                Ok(length) => {
                    (self.sink)(Entry::Data(&self.buffer[..length]))?;
                    sent += u64::try_from(length).unwrap_or(u64::MAX);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.unread(error)),
            }
        }
        Ok(sent)
    }

    fn unread<E: From<Error>>(&self, source: io::Error) -> E {
        E::from(Error::Io {
            doing: "read",
            path: self.at.clone(),
            source,
        })
    }
}

/// Whether a file takes fewer blocks, of 512 bytes, than its length needs.
fn has_holes(stat: &Stat) -> bool {
    u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512)
        < length_of(stat)
}
