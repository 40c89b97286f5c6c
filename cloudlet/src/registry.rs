//! The VMs of this user: one directory a name under the runtime directory. The VMM process holds a
//! lock on its directory for as long as it lives, so a name whose lock is free is a VM that has
//! ended, whatever it left behind.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::paths::private_dir;

mod holder;

pub use holder::{Held, Holder};

/// Longest VM name.
pub const NAME_LEN_MAX: usize = 32;

/// How often, and how far apart, a claim is tried: a lock that is only being looked at is free again
/// within microseconds.
const CLAIM_TRIES: u32 = 20;
const CLAIM_PAUSE: Duration = Duration::from_millis(1);

/// Why a VM's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is empty, too long, or has characters that do not belong in a file name.
    #[error(
        "{name:?} is no VM name: use 1 to {NAME_LEN_MAX} letters, digits, '-', '_' or '.', \
         beginning with a letter or digit"
    )]
    BadName {
        /// The name as given.
        name: String,
    },
    /// A VM of that name is alive.
    #[error("a VM named {name} is running already: stop it, or choose another name with --name")]
    Taken {
        /// The name.
        name: String,
    },
    /// No VM of that name is alive, and none has left a report.
    #[error("no VM named {name}: `cloudlet ps` lists the running ones")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The directory cannot be used.
    #[error(transparent)]
    Paths(#[from] crate::paths::Error),
    /// A file of the VM cannot be used.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A name that may become a directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmName(String);

impl VmName {
    /// Checks `name`.
    pub fn new(name: &str) -> Result<Self, Error> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good = (1..=NAME_LEN_MAX).contains(&name.len())
            && name.chars().all(allowed)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if good {
            Ok(Self(name.to_owned()))
        } else {
            Err(Error::BadName {
                name: name.to_owned(),
            })
        }
    }

    /// A name nobody chose: `prefix-` and six hexadecimal digits from the clock and the process.
    #[must_use]
    pub fn generated(prefix: &str) -> Self {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_nanos());
        let seed = blake3::hash(format!("{now} {}", std::process::id()).as_bytes());
        Self(format!("{prefix}-{}", &seed.to_hex()[..6]))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for VmName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The files of one VM.
#[derive(Debug, Clone)]
pub struct VmDir {
    /// The VM's name.
    pub name: VmName,
    path: PathBuf,
}

impl VmDir {
    /// The directory of `name` below `vms`, which need not exist.
    #[must_use]
    pub fn new(vms: &Path, name: VmName) -> Self {
        let path = vms.join(name.as_str());
        Self { name, path }
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// The socket that console clients connect to.
    #[must_use]
    pub fn console_socket(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    /// The host side of the guest's vsock, unless `--vsock` says otherwise.
    #[must_use]
    pub fn vsock_socket(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// What the guest wrote to its serial port.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What the VMM process wrote to standard error.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// How the VM ended, if it ended otherwise than in order.
    #[must_use]
    pub fn report(&self) -> PathBuf {
        self.path.join("report")
    }

    fn lock_path(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// Takes the name for this process: makes the directory, takes its lock, and clears what an
    /// earlier VM of the name left. The name is free again when the returned lock is dropped or
    /// the process ends, however it ends.
    pub fn claim(&self) -> Result<VmLock, Error> {
        let path = self.lock_path();
        let failed = |source| Error::File {
            path: path.clone(),
            source,
        };
        for _ in 0..CLAIM_TRIES {
            private_dir(&self.path)?;
            let lock = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path);
            let lock = match lock {
                Err(source) if source.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(failed)?,
            };
            match lock.try_lock() {
                Ok(()) if is_same_file(&lock, &path) => {
                    self.clear_leftovers()?;
                    leave_mark(&lock).map_err(failed)?;
                    return Ok(VmLock {
                        dir: self.clone(),
                        lock,
                    });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                // Held by somebody, who may only be asking whether the VM is alive, or the
                // directory went away between opening and locking.
                Ok(()) | Err(TryLockError::WouldBlock) => std::thread::sleep(CLAIM_PAUSE),
            }
        }
        Err(Error::Taken {
            name: self.name.to_string(),
        })
    }

    fn clear_leftovers(&self) -> Result<(), Error> {
        let failed = |source| Error::File {
            path: self.path.clone(),
            source,
        };
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            // The log is this process's standard error already.
            if entry.path() != self.lock_path() && entry.path() != self.log() {
                std::fs::remove_file(entry.path()).map_err(|source| Error::File {
                    path: entry.path(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Whether a VMM process holds the name now.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let Ok(lock) = File::open(self.lock_path()) else {
            return false;
        };
        matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock))
    }

    /// The VMM process that holds the name, or held it last.
    #[must_use]
    pub fn holder(&self) -> Option<Holder> {
        Holder::read(&self.lock_path())
    }

    /// Removes what a VM that has ended left. Refuses while it lives.
    pub fn remove(&self) -> Result<(), Error> {
        if self.is_alive() {
            return Err(Error::Taken {
                name: self.name.to_string(),
            });
        }
        remove_dir(&self.path)
    }
}

/// Says in the lock file who holds it.
fn leave_mark(mut lock: &File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.write_all(Holder::own()?.mark().as_bytes())
}

/// Whether `path` names the file that `file` is.
pub(crate) fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(named)) => ours.ino() == named.ino() && ours.dev() == named.dev(),
        _ => false,
    }
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::File {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// The claim of a VMM process on its name.
#[derive(Debug)]
pub struct VmLock {
    dir: VmDir,
    lock: File,
}

impl VmLock {
    /// Whether the VM can still be found: its directory is in its place, with the lock and the
    /// control socket in it.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.is_ours() && self.dir.control_socket().exists()
    }

    fn is_ours(&self) -> bool {
        is_same_file(&self.lock, &self.dir.lock_path())
    }

    /// The VM ended in order: nothing of it stays. A directory that another VM of the name has made
    /// since is left alone.
    pub fn leave_nothing(&self) -> Result<(), Error> {
        if self.is_ours() {
            remove_dir(&self.dir.path)
        } else {
            Ok(())
        }
    }

    /// Gives up the name before the process is gone, for one that may not be able to go. Whatever else
    /// it has locked stays so until then.
    pub fn release(&self) -> Result<(), Error> {
        self.lock.unlock().map_err(|source| Error::File {
            path: self.dir.lock_path(),
            source,
        })
    }
}

/// The VM named `name`, alive or ended with a report.
pub fn find(vms: &Path, name: &str) -> Result<VmDir, Error> {
    let dir = VmDir::new(vms, VmName::new(name)?);
    if dir.path.is_dir() {
        Ok(dir)
    } else {
        Err(Error::Unknown {
            name: name.to_owned(),
        })
    }
}

/// All VMs, by name. A directory without a lock file is one that is being made or removed.
pub fn list(vms: &Path) -> Result<Vec<VmDir>, Error> {
    let failed = |source| Error::File {
        path: vms.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(vms).map_err(failed)? {
        let file_name = entry.map_err(failed)?.file_name();
        let Some(Ok(name)) = file_name.to_str().map(VmName::new) else {
            continue;
        };
        let dir = VmDir::new(vms, name);
        if dir.lock_path().exists() {
            found.push(dir);
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "-a", ".a", "a b", &"x".repeat(33)] {
            assert!(VmName::new(bad).is_err(), "{bad:?}");
        }
        assert!(VmName::new("web-1.a_b").is_ok());
        assert!(VmName::new(VmName::generated("vm").as_str()).is_ok());
    }

    #[test]
    fn a_name_is_held_once_and_leftovers_are_cleared() {
        let vms = tempfile::tempdir().unwrap();
        let dir = VmDir::new(vms.path(), VmName::new("a").unwrap());
        let lock = dir.claim().unwrap();
        assert!(dir.is_alive());
        assert!(matches!(dir.claim(), Err(Error::Taken { .. })));
        std::fs::write(dir.control_socket(), "stale").unwrap();
        drop(lock);
        assert!(!dir.is_alive());
        let lock = dir.claim().unwrap();
        assert!(!dir.control_socket().exists());
        assert_eq!(list(vms.path()).unwrap().len(), 1);
        assert_eq!(dir.holder(), Some(Holder::own().unwrap()));
        assert!(!lock.is_in_place());
        std::fs::write(dir.control_socket(), "").unwrap();
        assert!(lock.is_in_place());
        lock.leave_nothing().unwrap();
        assert!(matches!(find(vms.path(), "a"), Err(Error::Unknown { .. })));

        // A directory that was taken away and made anew is another VM's.
        let lock = dir.claim().unwrap();
        std::fs::remove_dir_all(dir.path()).unwrap();
        let next = dir.claim().unwrap();
        assert!(!lock.is_in_place());
        lock.leave_nothing().unwrap();
        lock.release().unwrap();
        assert!(dir.is_alive());
        next.release().unwrap();
        assert!(!dir.is_alive());
    }
}
