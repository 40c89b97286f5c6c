//! Where things live on a host: the runtime directory (sockets, locks: gone with the session)
//! and the data directory (the base store: kept). Both belong to one user and are mode 0700.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a directory of ours cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither the variable for the directory nor `HOME` is set.
    #[error("no {what} directory: set {variable} or HOME")]
    NoHome {
        /// Which directory was wanted.
        what: &'static str,
        /// The variable that names it.
        variable: &'static str,
    },
    /// The directory cannot be made or looked at.
    #[error("cannot use the directory {path}")]
    Use {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The directory's name cannot be told to a VMM process.
    #[error("{variable} is {path:?}, which is not UTF-8: set it to a directory whose name is")]
    NotUtf8 {
        /// The variable that names it.
        variable: &'static str,
        /// The directory.
        path: PathBuf,
    },
    /// The directory is open to others, who could plant sockets and files in it.
    #[error("{path} belongs to user {owner} with mode {mode:03o}; it must be yours with mode 700")]
    Shared {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
}

/// The directories of one user on this host.
#[derive(Debug, Clone)]
pub struct Paths {
    runtime: PathBuf,
    data: PathBuf,
}

impl Paths {
    /// From the environment: `XDG_RUNTIME_DIR` (else `/run/cloudlet-UID`, else under the temporary
    /// directory) and `CLOUDLET_HOME` (else `XDG_DATA_HOME/cloudlet`, else
    /// `HOME/.local/share/cloudlet`). Nothing is created yet.
    pub fn from_env() -> Result<Self, Error> {
        let runtime = match dir_variable("XDG_RUNTIME_DIR")? {
            Some(dir) => dir.join("cloudlet"),
            None => {
                utf8("TMPDIR", std::env::temp_dir())?.join(format!("cloudlet-{}", current_uid()))
            }
        };
        let data = match (
            dir_variable("CLOUDLET_HOME")?,
            dir_variable("XDG_DATA_HOME")?,
        ) {
            (Some(home), _) => home,
            (None, Some(data)) => data.join("cloudlet"),
            (None, None) => dir_variable("HOME")?
                .ok_or(Error::NoHome {
                    what: "data",
                    variable: "CLOUDLET_HOME",
                })?
                .join(".local/share/cloudlet"),
        };
        Ok(Self { runtime, data })
    }

    /// All below `dir`, for VMs and bases that are to leave nothing behind.
    #[must_use]
    pub fn below(dir: &Path) -> Self {
        Self {
            runtime: dir.join("run"),
            data: dir.join("data"),
        }
    }

    /// The directory that holds one directory a VM, created if it is missing.
    pub fn vms(&self) -> Result<PathBuf, Error> {
        private_dir(&self.runtime)?;
        let dir = self.runtime.join("vms");
        private_dir(&dir)?;
        Ok(dir)
    }

    /// The base store, created if it is missing.
    pub fn store(&self) -> Result<PathBuf, Error> {
        private_dir(&self.data)?;
        let dir = self.data.join("bases");
        private_dir(&dir)?;
        Ok(dir)
    }

    /// Where files without a name are kept, on the data directory's file system.
    pub fn scratch(&self) -> Result<PathBuf, Error> {
        private_dir(&self.data)?;
        let dir = self.data.join("scratch");
        private_dir(&dir)?;
        Ok(dir)
    }
}

/// An absolute directory from the environment; an empty or relative one counts as unset, as the
/// XDG base directory specification says.
fn dir_variable(name: &'static str) -> Result<Option<PathBuf>, Error> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .map(|path| utf8(name, path))
        .transpose()
}

fn utf8(variable: &'static str, path: PathBuf) -> Result<PathBuf, Error> {
    if path.to_str().is_some() {
        Ok(path)
    } else {
        Err(Error::NotUtf8 { variable, path })
    }
}

fn current_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Makes `path` (and its parents) if need be and insists that nobody else can write in it.
pub fn private_dir(path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Use {
        path: path.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed)?;
    let meta = std::fs::metadata(path).map_err(failed)?;
    let mode = meta.permissions().mode() & 0o777;
    if meta.uid() != current_uid() || mode & 0o022 != 0 {
        return Err(Error::Shared {
            path: path.to_owned(),
            owner: meta.uid(),
            mode,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("open");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            private_dir(&path),
            Err(Error::Shared { mode: 0o777, .. })
        ));
    }

    #[test]
    fn missing_directories_are_made_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        private_dir(&path).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }
}
