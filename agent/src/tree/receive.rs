//! Receiving a tree from somebody who may be hostile: nothing is written but below the destination,
//! and nothing through a link.
//!
//! A file is written under a name of its own and renamed when it is whole; one that does not become
//! whole is removed again. In the place of a file it takes that one's owner and mode. A link is
//! replaced, whoever made it: it may be one that came with an earlier tree. What is neither file nor link
//! stays. Capabilities are privileges, as the bits of a mode that change who runs a file are: whoever does
//! not take those from the sender does not take capabilities either, and counts them.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::{DEPTH_MAX, Entry, Error, Invalid, Meta, capability, check_name};

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// How many names are tried for a file that is not whole yet.
const NAME_TRIES: u32 = 1000;

/// What was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Bytes of files, holes included.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
    /// Files whose capabilities were not taken.
    pub unprivileged: u64,
}

/// Bits of a mode that change who runs a file.
const PRIVILEGES: u16 = 0o6000;

/// Makes a tree of entries.
#[derive(Debug)]
pub struct Receiver {
    /// Where the root goes, until it comes.
    place: Option<Place>,
    /// The directories that are open, outermost first.
    levels: Vec<Level>,
    file: Option<Partial>,
    /// Bits of modes that are kept.
    modes: u16,
    received: Received,
    complete: bool,
}

#[derive(Debug)]
enum Place {
    /// A name in a directory; of a directory's only, if it was written so.
    Named {
        parent: OwnedFd,
        name: OsString,
        slash: bool,
        shown: PathBuf,
    },
    /// A directory that is there: the root's contents become its.
    Within { directory: OwnedFd, shown: PathBuf },
}

#[derive(Debug)]
struct Level {
    directory: OwnedFd,
    /// What is to become of its attributes; nothing, if it was there before.
    meta: Option<Meta>,
    /// For messages.
    shown: PathBuf,
}

/// A file that is not whole.
#[derive(Debug)]
struct Partial {
    directory: OwnedFd,
    temporary: String,
    name: OsString,
    meta: Meta,
    capability: Option<Vec<u8>>,
    file: File,
    /// Whether it ends with a hole, so far.
    ends_hollow: bool,
    shown: PathBuf,
    renamed: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.renamed {
            // What cannot be removed stays, under a name that says what it is.
            let _ = rustix::fs::unlinkat(&self.directory, &self.temporary, AtFlags::empty());
        }
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |errno| Error::Io {
        doing,
        path,
        source: errno.into(),
    }
}

impl Receiver {
    /// Receives into `path`: below it as `name` if it is a directory, else as the file or directory of
    /// that name. Without `name`, a root directory's contents become those of `path`. Only the bits
    /// `modes` of the files' modes are kept.
    ///
    /// # Errors
    /// When there is no such place.
    pub fn new(path: &Path, name: Option<&OsStr>, modes: u16) -> Result<Self, Error> {
        let place = match rustix::fs::open(path, DIRECTORY, Mode::empty()) {
            Ok(directory) => {
                let shown = path.to_owned();
                match name {
                    Some(name) => Place::Named {
                        parent: directory,
                        name: name.to_owned(),
                        slash: false,
                        shown: shown.join(name),
                    },
                    None => Place::Within { directory, shown },
                }
            }
            Err(Errno::NOENT | Errno::NOTDIR) => beside(path)?,
            Err(error) => return Err(failed("open", path)(error)),
        };
        if let Place::Named { name, .. } = &place {
            check_name(name.as_bytes())?;
        }
        Ok(Self {
            place: Some(place),
            levels: Vec::new(),
            file: None,
            modes,
            received: Received::default(),
            complete: false,
        })
    }

    /// What was received, if the tree is complete.
    #[must_use]
    pub fn complete(&self) -> Option<Received> {
        self.complete.then_some(self.received)
    }

    /// Takes the next entry.
    ///
    /// # Errors
    /// When it cannot come here, or the system refuses. Nothing may be taken after that.
    pub fn take(&mut self, entry: Entry<'_>) -> Result<(), Error> {
        match entry {
            _ if self.complete => Err(Invalid::Order.into()),
            Entry::Extent(_) if self.place.is_some() => Ok(()),
            Entry::Capability(value) => self.capability(value),
            Entry::Data(bytes) => self.data(bytes),
            Entry::Hole(length) => self.hole(length),
            Entry::Up if self.file.is_none() => self.up(),
            Entry::File { name, meta } if self.file.is_none() => self.open_file(name, meta),
            Entry::Directory { name, meta } if self.file.is_none() => self.enter(name, meta),
            Entry::Link { name, meta, target } if self.file.is_none() => {
                self.link(name, meta, target)
            }
            Entry::Extent(_)
            | Entry::Up
            | Entry::File { .. }
            | Entry::Directory { .. }
            | Entry::Link { .. } => Err(Invalid::Order.into()),
        }
    }

    /// The directory and the name of a new entry, checked. The root's are those of its place.
    fn locate(&mut self, name: &[u8]) -> Result<(OwnedFd, OsString, PathBuf), Error> {
        self.received.entries += 1;
        if let Some(place) = self.place.take() {
            return match place {
                Place::Named {
                    parent,
                    name,
                    shown,
                    ..
                } => Ok((parent, name, shown)),
                Place::Within { shown, .. } => Err(Error::Slash(shown)),
            };
        }
        check_name(name)?;
        let level = self.levels.last().ok_or(Invalid::Order)?;
        let name = OsString::from_vec(name.to_vec());
        let shown = level.shown.join(&name);
        let directory = level.directory.try_clone().map_err(|source| Error::Io {
            doing: "keep open",
            path: level.shown.clone(),
            source,
        })?;
        Ok((directory, name, shown))
    }

    fn enter(&mut self, name: &[u8], meta: Meta) -> Result<(), Error> {
        if self.levels.len() >= DEPTH_MAX {
            return Err(Invalid::Depth.into());
        }
        if let Some(Place::Within { .. }) = self.place
            && let Some(Place::Within { directory, shown }) = self.place.take()
        {
            self.received.entries += 1;
            self.levels.push(Level {
                directory,
                meta: None,
                shown,
            });
            return Ok(());
        }
        let (parent, name, shown) = self.locate(name)?;
        let meta = match rustix::fs::mkdirat(&parent, &name, Mode::RWXU) {
            Ok(()) => Some(meta),
            Err(Errno::EXIST) => None,
            Err(error) => return Err(failed("make the directory", &shown)(error)),
        };
        // A link of this name, whoever made it, is not followed.
        let directory =
            rustix::fs::openat(&parent, &name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
                .map_err(failed("enter the directory", &shown))?;
        self.levels.push(Level {
            directory,
            meta,
            shown,
        });
        Ok(())
    }

    fn up(&mut self) -> Result<(), Error> {
        let level = self.levels.pop().ok_or(Invalid::Order)?;
        if let Some(meta) = level.meta {
            self.set_attributes(level.directory.as_fd(), meta)
                .map_err(failed("set the attributes of", &level.shown))?;
        }
        self.complete = self.levels.is_empty();
        Ok(())
    }

    fn open_file(&mut self, name: &[u8], meta: Meta) -> Result<(), Error> {
        if let Some(Place::Named {
            slash: true, shown, ..
        }) = &self.place
        {
            return Err(Error::Slash(shown.clone()));
        }
        let (directory, name, shown) = self.locate(name)?;
        replaced(directory.as_fd(), &name, &shown)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let open = |name: &str| rustix::fs::openat(&directory, name, flags, mode);
        let (temporary, file) = with_fresh_name(open).map_err(failed("create", &shown))?;
        self.file = Some(Partial {
            directory,
            temporary,
            name,
            meta,
            capability: None,
            file: file.into(),
            ends_hollow: false,
            shown,
            renamed: false,
        });
        Ok(())
    }

    /// Notes a file's capabilities, which are set when it is whole: writing takes them away.
    fn capability(&mut self, value: &[u8]) -> Result<(), Error> {
        let partial = self.file.as_mut().ok_or(Invalid::Order)?;
        if self.modes & PRIVILEGES == PRIVILEGES {
            partial.capability = Some(value.to_vec());
        } else {
            self.received.unprivileged += 1;
        }
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let partial = self.file.as_mut().ok_or(Invalid::Order)?;
        if bytes.is_empty() {
            return self.finish_file();
        }
        let written = partial.file.write_all(bytes);
        written.map_err(|source| Error::Io {
            doing: "write",
            path: partial.shown.clone(),
            source,
        })?;
        partial.ends_hollow = false;
        self.received.bytes += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Ok(())
    }

    /// Passes over zeros. The system knows how long a file can be.
    fn hole(&mut self, length: u64) -> Result<(), Error> {
        let partial = self.file.as_mut().ok_or(Invalid::Order)?;
        let step = i64::try_from(length).unwrap_or(i64::MAX);
        let moved = partial.file.seek(SeekFrom::Current(step));
        moved.map_err(|source| Error::Io {
            doing: "leave a hole in",
            path: partial.shown.clone(),
            source,
        })?;
        partial.ends_hollow = true;
        self.received.bytes = self.received.bytes.saturating_add(length);
        Ok(())
    }

    fn finish_file(&mut self) -> Result<(), Error> {
        let mut partial = self.file.take().ok_or(Invalid::Order)?;
        if partial.ends_hollow {
            let end = partial.file.stream_position();
            let end = end.and_then(|end| partial.file.set_len(end));
            end.map_err(|source| Error::Io {
                doing: "set the length of",
                path: partial.shown.clone(),
                source,
            })?;
        }
        let directory = &partial.directory;
        let meta = match replaced(directory.as_fd(), &partial.name, &partial.shown)? {
            Some(file) => {
                take_owner(partial.file.as_fd(), &file)
                    .map_err(failed("keep the owner of", &partial.shown))?;
                // No more bits than a mode has.
                let mode = u16::try_from(file.st_mode & 0o7777).unwrap_or(0);
                Meta {
                    mode,
                    ..partial.meta
                }
            }
            None => partial.meta,
        };
        self.set_attributes(partial.file.as_fd(), meta)
            .map_err(failed("set the attributes of", &partial.shown))?;
        if let Some(value) = &partial.capability {
            capability::set(&partial.file, value)
                .map_err(failed("keep the capabilities of", &partial.shown))?;
        }
        rustix::fs::renameat(directory, &partial.temporary, directory, &partial.name)
            .map_err(failed("put in place", &partial.shown))?;
        partial.renamed = true;
        self.complete = self.levels.is_empty();
        Ok(())
    }

    fn link(&mut self, name: &[u8], meta: Meta, target: &[u8]) -> Result<(), Error> {
        if self.place.is_some() {
            return Err(Invalid::Order.into());
        }
        let (directory, name, shown) = self.locate(name)?;
        replaced(directory.as_fd(), &name, &shown)?;
        let make = |name: &str| rustix::fs::symlinkat(OsStr::from_bytes(target), &directory, name);
        let (temporary, ()) = with_fresh_name(make).map_err(failed("make the link", &shown))?;
        let times = timestamps(meta);
        // A file system that keeps no times of links is no reason to fail.
        let _ = rustix::fs::utimensat(&directory, &temporary, &times, AtFlags::SYMLINK_NOFOLLOW);
        let renamed = rustix::fs::renameat(&directory, &temporary, &directory, &name);
        renamed.map_err(|error| {
            // What cannot be removed stays, under a name that says what it is.
            let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
            failed("put in place", &shown)(error)
        })
    }

    fn set_attributes(&self, of: BorrowedFd<'_>, meta: Meta) -> rustix::io::Result<()> {
        let mode = Mode::from_raw_mode(u32::from(meta.mode & self.modes));
        rustix::fs::fchmod(of, mode)?;
        rustix::fs::futimens(of, &timestamps(meta))
    }
}

/// The place of a name that is not there, or is a file: beside it.
fn beside(path: &Path) -> Result<Place, Error> {
    let missing = failed("find", path);
    let Some(name) = path.file_name() else {
        return Err(missing(Errno::NOENT));
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let opened = rustix::fs::open(parent, DIRECTORY, Mode::empty());
    Ok(Place::Named {
        parent: opened.map_err(failed("open the directory", parent))?,
        name: name.to_owned(),
        slash: path.as_os_str().as_bytes().ends_with(b"/"),
        shown: path.to_owned(),
    })
}

/// The regular file that is to be replaced; nothing where there is none, or a link.
fn replaced(directory: BorrowedFd<'_>, name: &OsStr, shown: &Path) -> Result<Option<Stat>, Error> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(Some(stat)),
            // A directory is the renaming's to refuse.
            FileType::Directory => Ok(None),
            // One such as /dev/stdout is meant as what it leads to.
            FileType::Symlink if !leads_to_special(directory, name) => Ok(None),
            _ => Err(Error::Special(shown.to_owned())),
        },
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(failed("examine", shown)(error)),
    }
}

/// Whether the link leads to what is neither file nor directory; one that leads nowhere does not.
fn leads_to_special(directory: BorrowedFd<'_>, link: &OsStr) -> bool {
    let target = rustix::fs::statat(directory, link, AtFlags::empty());
    target.is_ok_and(|stat| {
        let kind = FileType::from_raw_mode(stat.st_mode);
        !matches!(kind, FileType::RegularFile | FileType::Directory)
    })
}

/// Gives `file` the owner and the group of `old`, where they differ from what it has: only a privileged
/// process may set others than its own.
fn take_owner(file: BorrowedFd<'_>, old: &Stat) -> rustix::io::Result<()> {
    let new = rustix::fs::fstat(file)?;
    let differs = |old: u32, new: u32| (old != new).then_some(old);
    rustix::fs::fchown(
        file,
        differs(old.st_uid, new.st_uid).map(Uid::from_raw),
        differs(old.st_gid, new.st_gid).map(Gid::from_raw),
    )
}

/// Makes something under a name that nothing has yet.
fn with_fresh_name<T>(
    make: impl Fn(&str) -> rustix::io::Result<T>,
) -> rustix::io::Result<(String, T)> {
    let process = std::process::id();
    for number in 0..NAME_TRIES {
        let name = format!(".cloudlet-partial-{process}-{number}");
        match make(&name) {
            Err(Errno::EXIST) => {}
            made => return made.map(|made| (name, made)),
        }
    }
    Err(Errno::EXIST)
}

fn timestamps(meta: Meta) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: meta.seconds,
            tv_nsec: meta.nanos.into(),
        },
    }
}
