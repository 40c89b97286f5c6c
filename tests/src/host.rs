//! A temporary host: directories of its own for everything that the program keeps, so that cases
//! neither see each other nor the user's VMs. It runs the built program as a user would.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cloudlet_resources::GUEST_READY;
use kvm_ioctls::{Kvm, VmFd};
use serde_json::Value;

use crate::failure::{Failure, Outcome};
use crate::process::{self, Finished, Process};

/// How long a command may take in lane 1 where nothing else is said.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// Lane 2 emulates the processor in software: everything takes that much longer.
const LANE_2_SLOWDOWN: u32 = 6;

/// How long a guest may take to boot, and a process to end.
const BOOT_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest may take to shut down, in lane 1.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(60);

/// Which KVM is underneath.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The machine's own `/dev/kvm`.
    One,
    /// `kvm_amd` inside a software-emulated outer VM (see `tests/lane2/boot`).
    Two,
}

impl Lane {
    /// The lane's number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    /// A time limit that was thought of for lane 1, for this lane.
    #[must_use]
    pub fn scale(self, limit: Duration) -> Duration {
        match self {
            Self::One => limit,
            Self::Two => limit * LANE_2_SLOWDOWN,
        }
    }

    /// What is to be kept for as long as the lane is used: in lane 2, a VM without a vCPU.
    ///
    /// KVM patches the scheduler of the outer kernel when the first VM comes and when the last one
    /// goes (`preempt_notifier_inc` in virt/kvm/kvm_main.c, a static key). The emulator sometimes
    /// keeps the breakpoint that such a patch goes through, and all its CPUs then take breakpoints
    /// in `finish_task_switch` for ever. With one VM always there, nothing is patched.
    pub fn hold(self) -> Outcome<Option<VmFd>> {
        match self {
            Self::One => Ok(None),
            Self::Two => Ok(Some(Kvm::new()?.create_vm()?)),
        }
    }
}

/// A host with nothing on it yet. Its directory goes when it is dropped.
pub struct Host {
    dir: tempfile::TempDir,
    program: PathBuf,
    lane: Lane,
}

/// How much of a log's end [`Host::evidence`] shows, bytes.
const EVIDENCE_LEN_MAX: usize = 2000;

impl Host {
    /// A new host for `lane`, with the program that [`program`] finds.
    pub fn new(lane: Lane) -> Outcome<Self> {
        let dir = tempfile::Builder::new().prefix("cl-").tempdir()?;
        let host = Self {
            dir,
            program: program()?,
            lane,
        };
        for part in ["run", "data"] {
            fs::DirBuilder::new().create(host.path(part))?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(host.path(part), mode)?;
        }
        Ok(host)
    }

    /// The lane this host is in.
    #[must_use]
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// The program under test.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// A path in the host's own directory.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A time limit for this host's lane.
    #[must_use]
    pub fn limit(&self, lane_1: Duration) -> Duration {
        self.lane.scale(lane_1)
    }

    /// The program with `args`, set up for this host and not yet started.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env_remove("CLOUDLET_HOME")
            .env("NO_COLOR", "1");
        command
    }

    /// Starts the program with `args`.
    pub fn spawn<S: AsRef<OsStr>>(&self, args: &[S]) -> Outcome<Process> {
        Process::spawn(&mut self.command(args), Stdio::null())
    }

    /// Runs the program to its end, however it ends.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Outcome<Finished> {
        self.spawn(args)?.wait(self.limit(COMMAND_TIMEOUT))
    }

    /// Runs the program, which must succeed, and returns its standard output.
    #[track_caller]
    pub fn ok<S: AsRef<OsStr>>(&self, args: &[S]) -> Outcome<String> {
        Ok(self.run(args)?.expect_code(0)?.stdout)
    }

    /// Runs the program, which must fail with `code`, and returns its standard error.
    #[track_caller]
    pub fn fails<S: AsRef<OsStr>>(&self, args: &[S], code: i32) -> Outcome<String> {
        Ok(self.run(args)?.expect_code(code)?.stderr)
    }

    /// Runs the program with `--json` before `args`; it must succeed and print one JSON value.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Outcome<Value> {
        let all = [&["--json"], args].concat();
        let text = self.ok(&all)?;
        serde_json::from_str(text.trim()).map_err(|error| {
            Failure::new(format!(
                "{}: not one JSON value ({error}): {text}",
                all.join(" ")
            ))
        })
    }

    /// As [`Host::json`], of a command that prints a JSON value a line.
    #[track_caller]
    pub fn json_lines(&self, args: &[&str]) -> Outcome<Vec<Value>> {
        let all = [&["--json"], args].concat();
        let text = self.ok(&all)?;
        text.lines()
            .map(|line| Ok(serde_json::from_str(line)?))
            .collect()
    }

    /// Boots the embedded guest as `name` in the background, with more `options` for `run`, and
    /// waits until it says that it is ready. Returns the id of the VMM process.
    #[track_caller]
    pub fn boot(&self, name: &str, options: &[&str]) -> Outcome<u32> {
        let mut args = vec!["run", "--detach", "--name", name];
        args.extend_from_slice(options);
        let pid = pid_of(&self.json(&args)?)?;
        self.wait_for_console(name, GUEST_READY)?;
        Ok(pid)
    }

    /// Installs `fluid` in a VM with 2 MB of live state and little to compute, for lane 2 is slow.
    #[track_caller]
    pub fn install_fluid(&self, name: &str) -> Outcome {
        let params = "tanks=16 particles=3000 warmup=0 rate_hz=1";
        self.ok(&["app", "install", name, "fluid", "--params", params])
            .map(drop)
    }

    /// The directory of a VM's sockets and logs.
    #[must_use]
    pub fn vm_dir(&self, name: &str) -> PathBuf {
        self.path("run/cloudlet/vms").join(name)
    }

    /// What the VM's guest wrote to its serial port so far.
    #[must_use]
    pub fn console(&self, name: &str) -> String {
        let bytes = fs::read(self.vm_dir(name).join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What the VMs that are there have left in their logs, and what their threads are doing: for the
    /// report of a failure.
    #[must_use]
    pub fn evidence(&self) -> String {
        let mut text = String::new();
        let vms = fs::read_dir(self.path("run/cloudlet/vms"));
        for vm in vms.into_iter().flatten().flatten() {
            for name in ["report", "vmm.log", "console.log"] {
                let bytes = fs::read(vm.path().join(name)).unwrap_or_default();
                let tail = &bytes[bytes.len().saturating_sub(EVIDENCE_LEN_MAX)..];
                let tail = String::from_utf8_lossy(tail);
                let (vm, tail) = (vm.file_name(), tail.trim_end());
                text += &format!("\n{}/{name}: {tail}", vm.to_string_lossy());
            }
        }
        for pid in self.processes() {
            text += &process::thread_states(pid);
        }
        text
    }

    /// Waits until the guest has written `text` to its serial port.
    #[track_caller]
    pub fn wait_for_console(&self, name: &str, text: &str) -> Outcome {
        self.wait_until(
            &format!("{text:?} on the console of {name}"),
            BOOT_LIMIT,
            || self.console(name).contains(text).then_some(()),
        )
    }

    /// What `status` says of the VM.
    #[track_caller]
    pub fn status(&self, name: &str) -> Outcome<Value> {
        self.json(&["status", name])
    }

    /// The VM's `state` of its `status`.
    #[track_caller]
    pub fn state(&self, name: &str) -> Outcome<String> {
        Ok(self.status(name)?["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }

    /// Presses the VM's power button and waits until its guest has shut down.
    #[track_caller]
    pub fn shut_down(&self, name: &str) -> Outcome {
        let timeout = self.limit(SHUTDOWN_LIMIT).as_secs().to_string();
        self.ok(&["shutdown", name, "--timeout", &timeout])
            .map(drop)
    }

    /// Waits until the process `pid` is no more.
    #[track_caller]
    pub fn wait_for_end(&self, pid: u32) -> Outcome {
        self.wait_until(&format!("the end of process {pid}"), BOOT_LIMIT, || {
            (!process::is_alive(pid)).then_some(())
        })
    }

    /// The ids of all live processes of the program on this host, found by their environment.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let mark = format!("XDG_RUNTIME_DIR={}", self.path("run").display());
        let is_ours = |pid: &u32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|&byte| byte == 0)
                .any(|entry| entry == mark.as_bytes())
        };
        process::pids()
            .filter(|&pid| pid != std::process::id())
            .filter(is_ours)
            .collect()
    }

    /// Waits until `done` gives something, looking again every few milliseconds.
    #[track_caller]
    pub fn wait_until<T>(
        &self,
        what: &str,
        lane_1_limit: Duration,
        mut done: impl FnMut() -> Option<T>,
    ) -> Outcome<T> {
        let limit = self.limit(lane_1_limit);
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = done() {
                return Ok(value);
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!("not within {limit:?}: {what}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.processes() {
            // One that has ended in between needs no signal.
            let _ = process::signal_pid(pid, libc::SIGKILL);
        }
    }
}

/// The process id in what a command that starts a VM prints.
#[track_caller]
pub fn pid_of(started: &Value) -> Outcome<u32> {
    let pid = started["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    pid.ok_or_else(|| Failure::new(format!("no pid in {started}")))
}

/// The program under test: `CLOUDLET_BIN`, else `cloudlet` next to this executable.
pub fn program() -> Outcome<PathBuf> {
    if let Some(path) = std::env::var_os("CLOUDLET_BIN") {
        return Ok(PathBuf::from(path));
    }
    let here = std::env::current_exe()?;
    let path = here.with_file_name("cloudlet");
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::new(format!(
        "{} is not there: build it (cargo build), or set CLOUDLET_BIN",
        path.display()
    )))
}
