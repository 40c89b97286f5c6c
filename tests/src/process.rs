//! Processes of the harness: started in a group of their own, watched with a time limit, ended by
//! the ids the harness was given and never by name.

use std::fs;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::failure::{Failure, Outcome};

/// Output kept of one stream; a process that writes more is cut off, not the machine's memory.
const OUTPUT_LEN_MAX: usize = 16 << 20;

/// What a process wrote to one stream, as it comes.
#[derive(Clone, Default)]
struct Captured(Arc<(Mutex<Stream>, Condvar)>);

#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    ended: bool,
}

impl Captured {
    fn follow(source: impl Read + Send + 'static) -> Self {
        let captured = Self::default();
        let sink = captured.clone();
        thread::spawn(move || sink.fill(source));
        captured
    }

    fn fill(&self, mut source: impl Read) {
        let mut piece = [0; 16384];
        loop {
            let got = source.read(&mut piece).unwrap_or(0);
            let (stream, changed) = &*self.0;
            let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            let room = OUTPUT_LEN_MAX.saturating_sub(stream.bytes.len());
            stream.bytes.extend_from_slice(&piece[..got.min(room)]);
            stream.ended = got == 0;
            changed.notify_all();
            if got == 0 {
                return;
            }
        }
    }

    fn text(&self) -> String {
        let stream = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&stream.bytes).into_owned()
    }

    /// Waits until the text satisfies `enough`; false if it ended or the time was up first.
    fn wait(&self, timeout: Duration, mut enough: impl FnMut(&str) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let (stream, changed) = &*self.0;
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if enough(&String::from_utf8_lossy(&stream.bytes)) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if stream.ended || left.is_zero() {
                return false;
            }
            stream = changed
                .wait_timeout(stream, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for the end of the stream.
    fn ended(&self, timeout: Duration) {
        self.wait(timeout, |_| false);
    }
}

/// A running process with its output captured. Dropping it kills its whole process group.
pub struct Process {
    child: Child,
    what: String,
    started: Instant,
    stdout: Captured,
    stderr: Captured,
}

/// What a finished process left.
#[derive(Debug)]
pub struct Finished {
    /// The command, for messages.
    pub what: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Process {
    /// Starts `command` in a process group of its own, without standard input unless the command
    /// says otherwise by `stdin`.
    pub fn spawn(command: &mut Command, stdin: Stdio) -> Outcome<Self> {
        let what = describe(command);
        let started = Instant::now();
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| Failure::new(format!("{what}: cannot be started: {error}")))?;
        let missing = || Failure::new("a pipe that was asked for is not there");
        let stdout = Captured::follow(child.stdout.take().ok_or_else(missing)?);
        let stderr = Captured::follow(child.stderr.take().ok_or_else(missing)?);
        Ok(Self {
            child,
            what,
            started,
            stdout,
            stderr,
        })
    }

    /// Starts `command`, which leads a session of its own, on a terminal whose other end is `master`:
    /// all that comes from there counts as its standard output.
    pub(crate) fn on_terminal(
        command: &mut Command,
        master: impl Read + Send + 'static,
    ) -> Outcome<Self> {
        let what = describe(command);
        let started = Instant::now();
        let child = command
            .spawn()
            .map_err(|error| Failure::new(format!("{what}: cannot be started: {error}")))?;
        Ok(Self {
            child,
            what,
            started,
            stdout: Captured::follow(master),
            stderr: Captured::follow(io::empty()),
        })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child's standard input, once, if it was asked for.
    pub fn stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// What was written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What was written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until standard output contains `text`.
    pub fn wait_for_output(&self, text: &str, timeout: Duration) -> Outcome {
        if self.stdout.wait(timeout, |seen| seen.contains(text)) {
            return Ok(());
        }
        Err(Failure::new(format!(
            "{}: no {text:?} within {timeout:?}\nstdout: {}\nstderr: {}",
            self.what,
            self.stdout.text(),
            self.stderr.text()
        )))
    }

    /// Waits for the end, or kills the process group and fails when `timeout` has passed.
    pub fn wait(mut self, timeout: Duration) -> Outcome<Finished> {
        if !ends_within(&self.child, timeout)? {
            kill_group(self.child.id());
            self.child.wait()?;
            return Err(Failure::new(format!(
                "{}: not finished after {timeout:?}\nstdout: {}\nstderr: {}",
                self.what,
                self.stdout.text(),
                self.stderr.text()
            )));
        }
        let status = self.child.wait()?;
        let took = self.started.elapsed();
        // A VM that lives on may hold the other end of the pipes: what is there now is enough.
        self.stdout.ended(Duration::from_millis(200));
        self.stderr.ended(Duration::from_millis(200));
        Ok(Finished {
            what: std::mem::take(&mut self.what),
            status,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            took,
        })
    }

    /// Sends `signal` to the process alone.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        signal_pid(self.child.id(), signal)
    }
}

/// Whether the process ends before `timeout` has passed; wakes at once when it does.
fn ends_within(child: &Child, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            kill_group(self.child.id());
            // An error only means that somebody else has collected it.
            let _ = self.child.wait();
        }
    }
}

impl Finished {
    /// The exit code, or 128 plus the signal as a shell would say.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// This, if the exit code is `expected`; a failure that shows everything otherwise.
    #[track_caller]
    pub fn expect_code(self, expected: i32) -> Outcome<Self> {
        if self.code() == expected {
            return Ok(self);
        }
        Err(Failure::new(format!(
            "{}: exit code {}, not {expected}\nstdout: {}\nstderr: {}",
            self.what,
            self.code(),
            self.stdout,
            self.stderr
        )))
    }
}

/// The command as one would type it.
fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Sends `signal` to one process.
pub fn signal_pid(pid: u32, signal: i32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: kill takes two integers and touches no memory of ours.
    let result = unsafe { libc::kill(pid, signal) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Kills the process group that `leader` was started as the leader of.
pub fn kill_group(leader: u32) {
    if let Ok(pid) = libc::pid_t::try_from(leader) {
        // SAFETY: kill takes two integers and touches no memory of ours. A group that is gone
        // already is what is wanted.
        unsafe { libc::kill(-pid, libc::SIGKILL) };
    }
}

/// Makes orphaned descendants children of this process, so that it can find and end them.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: PR_SET_CHILD_SUBREAPER (prctl(2)) takes one integer and touches no memory of ours.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Kills and collects every child of this process, and the children that these leave.
pub fn end_children() {
    for _ in 0..100 {
        let children = children_of(std::process::id());
        if children.is_empty() {
            return;
        }
        for pid in children {
            // A child that has ended in between needs no signal.
            let _ = signal_pid(pid, libc::SIGKILL);
            collect(pid);
        }
    }
}

fn collect(pid: u32) {
    let Ok(pid) = libc::pid_t::try_from(pid) else {
        return;
    };
    // SAFETY: waitpid with a null status pointer writes nothing.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
}

/// The ids of the processes whose parent is `parent`.
#[must_use]
pub fn children_of(parent: u32) -> Vec<u32> {
    pids()
        .filter(|&pid| parent_of(pid) == Some(parent))
        .collect()
}

/// All process ids that this user may see.
pub(crate) fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").ok();
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Whether the process is there and any of its threads has not ended: the first thread is a zombie
/// for as long as the others take.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .ok()
        .into_iter()
        .flatten()
        .flatten();
    let runs = |stat: String| {
        stat.rsplit_once(')').is_some_and(|(_, rest)| {
            let state = rest.trim_start();
            !state.starts_with('Z') && !state.starts_with('X')
        })
    };
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("stat")).ok())
        .any(runs)
}

/// The threads of a process: id and name.
#[must_use]
pub fn threads(pid: u32) -> Vec<(u32, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .ok()
        .into_iter()
        .flatten()
        .flatten();
    let named = tasks.filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        Some((
            task.file_name().to_str()?.parse().ok()?,
            name.trim_end().to_owned(),
        ))
    });
    named.collect()
}

/// What the threads of a process are doing, a line each: state, where in the kernel, and the ticks in
/// user and in kernel mode (proc_pid_stat(5)).
#[must_use]
pub fn thread_states(pid: u32) -> String {
    let mut text = String::new();
    for (thread, name) in threads(pid) {
        let read = |what: &str| {
            fs::read_to_string(format!("/proc/{pid}/task/{thread}/{what}")).unwrap_or_default()
        };
        let (stat, wchan) = (read("stat"), read("wchan"));
        // The name may have anything in it, so it is counted from behind it.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let fields: Vec<_> = fields.split_whitespace().collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or_default();
        let (state, user, kernel) = (field(0), field(11), field(12));
        text += &format!("\n{pid}/{name}: {state} in {wchan}, {user} and {kernel} ticks");
    }
    text
}

/// One figure of proc_pid_smaps_rollup(5) by its name, KiB.
pub fn memory_kib(pid: u32, what: &str) -> Outcome<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(what)?.strip_prefix(':'));
    let number = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse().ok());
    number.ok_or_else(|| Failure::new(format!("no {what} in {text}")))
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 4 of proc_pid_stat(5), counted after the command, which may hold anything.
    stat.rsplit_once(')')?
        .1
        .split_ascii_whitespace()
        .nth(1)?
        .parse()
        .ok()
}
