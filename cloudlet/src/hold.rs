//! Directories in use: a VM that runs on the files of a base VM or a snapshot holds their directory by a
//! shared lock, for as long as its process lives, and who wants to remove it finds out. The kernel lets
//! go of it however the process ends.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::registry::is_same_file;

/// Why a directory is not held.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is being removed, or is gone.
    #[error("{0} is being removed")]
    Removed(PathBuf),
    /// The directory cannot be opened or locked.
    #[error("cannot hold {path}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A held directory, until this is dropped.
#[derive(Debug)]
pub struct Hold {
    _dir: File,
}

impl Hold {
    /// Holds the directory `path` together with others.
    ///
    /// # Errors
    /// It is being removed; the system's.
    pub fn shared(path: &Path) -> Result<Self, Error> {
        Self::lock(path, File::try_lock_shared)?.ok_or_else(|| Error::Removed(path.to_owned()))
    }

    /// Holds it alone, which nobody must do who does not remove it. `None` if somebody else holds it.
    ///
    /// # Errors
    /// It is gone; the system's.
    pub fn alone(path: &Path) -> Result<Option<Self>, Error> {
        Self::lock(path, File::try_lock)
    }

    fn lock(
        path: &Path,
        lock: impl FnOnce(&File) -> Result<(), TryLockError>,
    ) -> Result<Option<Self>, Error> {
        let failed = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        let dir = File::open(path).map_err(failed)?;
        match lock(&dir) {
            // Somebody may have removed it between opening and locking.
            Ok(()) if !is_same_file(&dir, path) => Err(Error::Removed(path.to_owned())),
            Ok(()) => Ok(Some(Self { _dir: dir })),
            Err(TryLockError::WouldBlock) => Ok(None),
            // A file system without locks: nobody can ask there, so there is nothing to answer.
            Err(TryLockError::Error(error))
                if [Errno::NOTSUP, Errno::NOLCK, Errno::NOSYS]
                    .map(|errno| Some(errno.raw_os_error()))
                    .contains(&error.raw_os_error()) =>
            {
                Ok(Some(Self { _dir: dir }))
            }
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_who_removes_waits_for_nobody_and_disturbs_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        std::fs::create_dir(&path).unwrap();
        let users = [Hold::shared(&path).unwrap(), Hold::shared(&path).unwrap()];
        assert!(Hold::alone(&path).unwrap().is_none());
        drop(users);
        let alone = Hold::alone(&path).unwrap().unwrap();
        assert!(matches!(Hold::shared(&path), Err(Error::Removed(_))));
        std::fs::remove_dir(&path).unwrap();
        drop(alone);
        assert!(matches!(Hold::shared(&path), Err(Error::Io { .. })));
    }
}
