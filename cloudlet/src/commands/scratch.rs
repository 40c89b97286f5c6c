//! Directories of one command, gone with it however it ends: a child that outlives the command
//! by a moment removes what a killed one could not.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

/// The hidden command that the child runs.
pub(crate) const SWEEP_COMMAND: &str = "sweep-process";

/// VMs that end with the same command may put files into the directory while it is removed: it is
/// tried this often, so far apart.
const ATTEMPTS: u32 = 100;
const ATTEMPT_GAP: Duration = Duration::from_millis(20);
/// Longest path that is taken (`PATH_MAX` of linux/limits.h).
const PATH_LEN_MAX: u64 = 4096;

/// A fresh directory that ends with this value, or with the process.
pub(super) struct Scratch {
    dir: Option<TempDir>,
    sweeper: Child,
}

impl Scratch {
    /// A directory below `parent` whose name begins with `prefix`.
    pub(super) fn new(parent: &Path, prefix: &str) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        let path = std::path::absolute(dir.path())?;
        let sweeper = spawn_sweeper(&path).context("cannot start what cleans up")?;
        Ok(Self {
            dir: Some(dir),
            sweeper,
        })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.as_ref().expect("held until the drop").path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed here, the child tries again.
        drop(self.dir.take());
        drop(self.sweeper.stdin.take());
        // It has nothing to say that could be acted on.
        let _ = self.sweeper.wait();
    }
}

/// Starts the child; the pipe that tells it the path stays open as long as this process lives.
fn spawn_sweeper(path: &Path) -> io::Result<Child> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("cloudlet")
        .arg(SWEEP_COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        // Signals typed at the terminal end the command, not the child.
        .process_group(0)
        .spawn()?;
    let stdin = child.stdin.as_mut().expect("standard input is a pipe");
    stdin.write_all(path.as_os_str().as_bytes())?;
    Ok(child)
}

/// The child: reads a path up to the end of its parent, then removes what is there.
pub(super) fn sweep() -> Result<()> {
    let mut path = Vec::new();
    io::stdin().take(PATH_LEN_MAX).read_to_end(&mut path)?;
    let path = PathBuf::from(std::ffi::OsString::from_vec(path));
    for _ in 1..ATTEMPTS {
        if is_gone(fs::remove_dir_all(&path)) {
            return Ok(());
        }
        thread::sleep(ATTEMPT_GAP);
    }
    fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))
}

fn is_gone(removed: io::Result<()>) -> bool {
    removed.map_or_else(|error| error.kind() == ErrorKind::NotFound, |()| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_needs_no_removing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(is_gone(fs::remove_dir_all(dir.path().join("missing"))));
        assert!(is_gone(fs::remove_dir_all(dir.path())));
        fs::write(dir.path().with_extension("file"), b"").unwrap();
        let not_a_directory = dir.path().with_extension("file");
        assert!(!is_gone(fs::remove_dir_all(not_a_directory.join("below"))));
        fs::remove_file(not_a_directory).unwrap();
    }
}
