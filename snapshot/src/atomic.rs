//! Files and directories that appear at their place whole, or not at all.
//!
//! Both are built under a temporary name in the directory of the target, synced, renamed and
//! the directory synced. A value that is dropped without `commit` removes what it had written.
//! A process that dies in between leaves a temporary entry: it is invisible to readers of the
//! target, and [`sweep_leftovers`] removes it later, told apart from the entries of live
//! processes by an advisory lock that every live builder holds.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

/// Entries whose name begins and ends like this are unfinished.
const TEMPORARY_START: &str = ".unfinished-";
const TEMPORARY_END: &str = ".tmp";
/// A name is taken at most this often before creating gives up: by other threads, by leftovers
/// of an earlier process with this pid, or by a sweep that ran in between.
const ATTEMPTS_MAX: u32 = 1000;

/// What failed, at which path.
#[derive(Debug, Error)]
pub enum AtomicError {
    /// The target has no file name, as `/` and `..` have none.
    #[error("{} does not name a file", path.display())]
    NoName {
        /// The target.
        path: PathBuf,
    },
    /// The target is there and was not to be replaced.
    #[error("{} exists", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done: "create", "sync", "rename to", ...
        doing: &'static str,
        /// To which path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Adds operation and path to an I/O error.
fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AtomicError {
    move |source| AtomicError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

/// The directory that the target is in, and a fresh temporary name there.
fn temporary_path(target: &Path) -> Result<(PathBuf, PathBuf), AtomicError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = target.file_name().ok_or_else(|| AtomicError::NoName {
        path: target.to_owned(),
    })?;
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    // The target's name only helps a human who finds a leftover; cut so that the whole name
    // stays under the 255 bytes of NAME_MAX.
    let hint: String = name.to_string_lossy().chars().take(40).collect();
    let (pid, number) = (std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let temporary = OsString::from(format!(
        "{TEMPORARY_START}{pid}-{number}-{hint}{TEMPORARY_END}"
    ));
    Ok((directory.clone(), directory.join(temporary)))
}

fn sync_directory(directory: &Path) -> Result<(), AtomicError> {
    File::open(directory)
        .and_then(|file| file.sync_all())
        .map_err(io_error("sync", directory))
}

/// Locks a fresh temporary entry; false if a sweep removed it before the lock was held.
fn lock_fresh(file: &File, path: &Path) -> Result<bool, AtomicError> {
    file.lock().map_err(io_error("lock", path))?;
    match fs::symlink_metadata(path) {
        Ok(there) => {
            let ours = file.metadata().map_err(io_error("look at", path))?;
            Ok(there.ino() == ours.ino() && there.dev() == ours.dev())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error("look at", path)(error)),
    }
}

/// A file that becomes visible with [`AtomicFile::commit`], complete and synced.
#[derive(Debug)]
pub struct AtomicFile {
    file: File,
    temporary: PathBuf,
    directory: PathBuf,
    target: PathBuf,
    done: bool,
}

impl AtomicFile {
    /// Begins a file, readable and writable for its owner only (mode 0600): machine state and
    /// guest memory hold the guest's secrets.
    ///
    /// # Errors
    /// The target names no file, or the temporary file cannot be created beside it.
    pub fn create(target: impl AsRef<Path>) -> Result<Self, AtomicError> {
        Self::create_with_mode(target, 0o600)
    }

    /// Begins a file with permission bits `mode` (before the umask).
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn create_with_mode(target: impl AsRef<Path>, mode: u32) -> Result<Self, AtomicError> {
        let target = target.as_ref();
        let mut attempt = 0;
        loop {
            let (directory, temporary) = temporary_path(target)?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(mode);
            attempt += 1;
            match options.open(&temporary) {
                Ok(file) => {
                    if lock_fresh(&file, &temporary)? {
                        let target = target.to_owned();
                        return Ok(Self {
                            file,
                            temporary,
                            directory,
                            target,
                            done: false,
                        });
                    }
                }
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists && attempt < ATTEMPTS_MAX => {}
                Err(error) => return Err(io_error("create", &temporary)(error)),
            }
        }
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path that the file will have.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Makes the file visible at its target, in place of whatever file is there, with its
    /// content and its name on stable storage.
    ///
    /// # Errors
    /// Syncing or renaming failed. The target is as it was, except when only the last sync of
    /// the directory failed: then the new file is there but may not survive a power cut.
    pub fn commit(mut self) -> Result<(), AtomicError> {
        self.file
            .sync_all()
            .map_err(io_error("sync", &self.temporary))?;
        fs::rename(&self.temporary, &self.target).map_err(io_error("rename to", &self.target))?;
        self.done = true;
        sync_directory(&self.directory)
    }

    /// As [`AtomicFile::commit`], but never replaces anything.
    ///
    /// # Errors
    /// [`AtomicError::Exists`] if the target exists by then, otherwise as [`AtomicFile::commit`].
    pub fn commit_new(self) -> Result<(), AtomicError> {
        self.file
            .sync_all()
            .map_err(io_error("sync", &self.temporary))?;
        // A hard link fails on an existing name, which a rename does not; the drop of `self`
        // then takes the temporary name away.
        match fs::hard_link(&self.temporary, &self.target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(AtomicError::Exists {
                    path: self.target.clone(),
                });
            }
            Err(error) => return Err(io_error("link", &self.target)(error)),
        }
        sync_directory(&self.directory)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.done {
            // Nobody to report to; a leftover is harmless and swept later.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Read for AtomicFile {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.file.read(bytes)
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// A directory that becomes visible with [`AtomicDir::commit`], with all that is in it synced.
#[derive(Debug)]
pub struct AtomicDir {
    lock: File,
    temporary: PathBuf,
    parent: PathBuf,
    target: PathBuf,
    done: bool,
}

impl AtomicDir {
    /// Begins a directory with mode 0700. Files are created under [`AtomicDir::path`].
    ///
    /// # Errors
    /// The target exists, names nothing, or the temporary directory cannot be created beside it.
    pub fn create(target: impl AsRef<Path>) -> Result<Self, AtomicError> {
        let target = target.as_ref();
        if fs::symlink_metadata(target).is_ok() {
            return Err(AtomicError::Exists {
                path: target.to_owned(),
            });
        }
        let mut attempt = 0;
        loop {
            let (parent, temporary) = temporary_path(target)?;
            attempt += 1;
            match DirBuilder::new().mode(0o700).create(&temporary) {
                Ok(()) => {
                    let lock = match File::open(&temporary) {
                        Ok(lock) => lock,
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        Err(error) => return Err(io_error("open", &temporary)(error)),
                    };
                    if lock_fresh(&lock, &temporary)? {
                        let target = target.to_owned();
                        return Ok(Self {
                            lock,
                            temporary,
                            parent,
                            target,
                            done: false,
                        });
                    }
                }
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists && attempt < ATTEMPTS_MAX => {}
                Err(error) => return Err(io_error("create", &temporary)(error)),
            }
        }
    }

    /// Where the content is put until `commit`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// The path that the directory will have.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Syncs everything in the directory and gives it its name. Never replaces a directory that
    /// has something in it.
    ///
    /// # Errors
    /// [`AtomicError::Exists`] if the target exists by then; or syncing or renaming failed. The
    /// target is as it was, except when only the last sync of the parent failed: then the new
    /// directory is there but may not survive a power cut.
    pub fn commit(mut self) -> Result<(), AtomicError> {
        sync_tree(&self.temporary)?;
        self.lock
            .sync_all()
            .map_err(io_error("sync", &self.temporary))?;
        rename_directory(&self.temporary, &self.target)?;
        self.done = true;
        sync_directory(&self.parent)
    }
}

/// Syncs a directory that is complete, with everything in it, and gives it the name `target` on the same
/// file system. Never replaces a directory that has something in it.
///
/// # Errors
/// As [`AtomicDir::commit`].
pub fn place_directory(directory: &Path, target: &Path) -> Result<(), AtomicError> {
    if fs::symlink_metadata(target).is_ok() {
        return Err(AtomicError::Exists {
            path: target.to_owned(),
        });
    }
    sync_tree(directory)?;
    sync_directory(directory)?;
    rename_directory(directory, target)?;
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

fn rename_directory(from: &Path, target: &Path) -> Result<(), AtomicError> {
    fs::rename(from, target).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists
        | io::ErrorKind::DirectoryNotEmpty
        | io::ErrorKind::NotADirectory => AtomicError::Exists {
            path: target.to_owned(),
        },
        _ => io_error("rename to", target)(error),
    })
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.done {
            // Nobody to report to; a leftover is harmless and swept later.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Syncs all regular files under `directory`, and the directories in it (not itself).
fn sync_tree(directory: &Path) -> Result<(), AtomicError> {
    for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
        let entry = entry.map_err(io_error("list", directory))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(io_error("look at", &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
            sync_directory(&path)?;
        } else if kind.is_file() {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(io_error("sync", &path))?;
        }
    }
    Ok(())
}

/// Removes what dead processes left unfinished in `directory`; entries of live ones stay.
/// Returns how many were removed.
///
/// # Errors
/// The directory cannot be listed, or a leftover cannot be removed.
pub fn sweep_leftovers(directory: &Path) -> Result<usize, AtomicError> {
    let mut removed = 0;
    for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
        let entry = entry.map_err(io_error("list", directory))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(TEMPORARY_START) || !name.ends_with(TEMPORARY_END) {
            continue;
        }
        let path = entry.path();
        let kind = entry.file_type().map_err(io_error("look at", &path))?;
        if !kind.is_file() && !kind.is_dir() {
            continue;
        }
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(error)) => return Err(io_error("lock", &path)(error)),
        }
        let result = if kind.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        match result {
            Ok(()) => removed += 1,
            Err(error) if gone(&error) => {}
            Err(error) => return Err(io_error("remove", &path)(error)),
        }
    }
    Ok(removed)
}

#[cfg(test)]
#[path = "atomic_tests.rs"]
mod tests;
