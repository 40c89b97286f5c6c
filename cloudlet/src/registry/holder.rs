//! The process that holds a VM's name. It leaves its id and its start time in the lock file: a pid is
//! given away again, but not together with the moment at which its process began.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Longest content of a lock file: two numbers.
const MARK_LEN_MAX: u64 = 64;

/// A VMM process, as it has described itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// When it began, in clock ticks since the host did (field 22 of proc_pid_stat(5)).
    began: u64,
}

/// A handle to a living process that held a name when it was made.
#[derive(Debug)]
pub struct Held(OwnedFd);

impl Holder {
    /// This process.
    pub(super) fn own() -> io::Result<Self> {
        let pid = std::process::id();
        let began = began(pid)?;
        Ok(Self { pid, began })
    }

    /// What the lock file has of it.
    pub(super) fn mark(self) -> String {
        format!("{} {}\n", self.pid, self.began)
    }

    /// The process that left its mark in the lock file `path`.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let mut text = String::new();
        let file = File::open(path).ok()?;
        file.take(MARK_LEN_MAX).read_to_string(&mut text).ok()?;
        let (pid, began) = text.strip_suffix('\n')?.split_once(' ')?;
        let (pid, began) = (pid.parse().ok()?, began.parse().ok()?);
        Some(Self { pid, began })
    }

    /// A handle to it; none if it has ended, whoever has its id now.
    ///
    /// # Errors
    /// The system refuses.
    pub fn open(&self) -> io::Result<Option<Held>> {
        let raw = i32::try_from(self.pid).map_err(|_| io::ErrorKind::InvalidData)?;
        let pid = Pid::from_raw(raw).ok_or(io::ErrorKind::InvalidData)?;
        let held = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(None),
            opened => Held(opened?),
        };
        // The handle is to whoever has the id now; the start time says whether that is the one.
        Ok((began(self.pid).ok() == Some(self.began)).then_some(held))
    }

    /// What its threads wait for that nothing can interrupt, by the kernel's name; none if there
    /// is no such thread.
    #[must_use]
    pub fn stuck_in(&self) -> Option<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid)).ok()?;
        tasks.flatten().find_map(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
            let is_stuck = behind_name(&stat).is_some_and(|rest| rest.starts_with("D "));
            let place = std::fs::read_to_string(task.path().join("wchan"));
            is_stuck.then(|| place.unwrap_or_default())
        })
    }
}

impl Held {
    /// Ends the process at once.
    ///
    /// # Errors
    /// The system refuses. A process that has ended already is none.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Err(Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Whether the process ends within `limit`, all of its threads.
    #[must_use]
    pub fn ends_within(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        // An interrupted wait counts as one that was too short.
        poll(&mut fds, limit.as_ref()).is_ok_and(|ready| ready > 0)
    }
}

/// When process `pid` began, in clock ticks.
fn began(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 22, and the rest begins with field 3.
    let began = behind_name(&stat).and_then(|rest| rest.split(' ').nth(19)?.parse().ok());
    began.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The fields behind the process' name, which may have anything in it.
fn behind_name(stat: &str) -> Option<&str> {
    stat.rsplit_once(") ").map(|(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_found_by_its_mark_and_another_of_its_id_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let began = began(pid).unwrap();
        std::fs::write(&path, Holder { pid, began }.mark()).unwrap();
        let holder = Holder::read(&path).unwrap();
        assert_eq!(holder, Holder { pid, began });
        let other = Holder {
            pid,
            began: began + 1,
        };
        assert!(other.open().unwrap().is_none());
        let held = holder.open().unwrap().unwrap();
        assert!(!held.ends_within(Duration::ZERO));
        held.kill().unwrap();
        assert!(held.ends_within(Duration::from_secs(20)));
        child.wait().unwrap();
        assert!(holder.open().unwrap().is_none());
        held.kill().unwrap();
        for bad in ["", "1", "1 2", "x 2\n", "1 2 3\n"] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(Holder::read(&path), None, "{bad:?}");
        }
    }
}
