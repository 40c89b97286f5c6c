//! Starting a VMM process, from its parent's side: the child is this same program, told over its
//! standard input what to be, and it says over its standard output how far it has come. The child
//! needs nothing of the parent afterwards, unless it was started attached: then the end of its
//! standard input, however it comes about, ends the VM.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cloudlet_vmm::devices::rate::Limits;
use cloudlet_vmm::devices::virtio::net::MacAddr;
use serde::{Deserialize, Serialize};

use crate::registry::{self, VmDir};
use crate::report::read_words;
pub use crate::report::{End, Report, end_of, read_report};

/// The subcommand that makes this program a VMM process.
pub const VMM_COMMAND: &str = "vmm-process";

/// How long a process that has said why there is no VM may take to end.
const END_LIMIT: Duration = Duration::from_secs(2);
const END_POLL: Duration = Duration::from_millis(2);

/// What a VMM process is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// The VM's name; its directory is `vms`/`name`.
    pub name: String,
    /// The directory of all VMs.
    pub vms: PathBuf,
    /// Whether the VM ends with its parent.
    pub attached: bool,
    /// Whether the seccomp filters are installed.
    pub seccomp: bool,
    /// Whether the vCPUs wait for a `resume`.
    pub paused: bool,
    /// The host side of the guest's vsock.
    pub vsock: PathBuf,
    /// The base store.
    pub store: PathBuf,
    /// Where disks' layers are kept that have no name.
    pub scratch: PathBuf,
    /// Limits of the disks in order; those it does not reach have none.
    pub disk_limits: Vec<Limits>,
    /// What the network cards are connected to, in their order.
    pub nets: Vec<NetSource>,
    /// Where the VM's state comes from.
    pub source: Source,
}

/// Where a VM's state comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Source {
    /// A kernel.
    Boot(BootSource),
    /// A directory with an image: a snapshot or a base VM.
    Image {
        /// The directory.
        dir: PathBuf,
        /// The base VM's id, if the image is one: overlays can be made against it.
        base: Option<String>,
    },
    /// A base VM and an overlay.
    Overlay(OverlaySource),
}

/// A VM that boots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BootSource {
    /// The kernel; the embedded guest if there is none.
    pub kernel: Option<PathBuf>,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Disks in order.
    pub disks: Vec<DiskSource>,
    /// Number of vCPUs.
    pub cpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// CPU model by name.
    pub cpu_model: String,
    /// How the guest learns of its devices, by name.
    pub discovery: String,
    /// Whether it has a memory balloon.
    pub balloon: bool,
}

/// What a disk image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The disk's bytes.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSource {
    /// The image, which is never written to; an empty disk if there is none.
    pub image: Option<PathBuf>,
    /// The image's format; if it is not said, a raw one that does not look like another.
    pub format: Option<DiskFormat>,
    /// Size in bytes of an empty disk.
    pub empty_len: u64,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// The serial number that the guest sees; none if it is empty.
    pub serial: String,
    /// Where the guest's writes are kept; without, they are gone with the VM.
    pub layer: Option<PathBuf>,
}

/// A network card and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSource {
    /// What it is connected to.
    pub link: NetLink,
    /// Its address. Without, it is made up, or stays as it was saved.
    pub mac: Option<MacAddr>,
    /// So much in each direction.
    pub limits: Limits,
}

/// What a network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetLink {
    /// A TAP interface of the host.
    Tap {
        /// Its name.
        name: String,
    },
    /// The host's network, as one of the user's programs would use it.
    User {
        /// Ports of the host that lead to the guest.
        publish: Vec<Publish>,
    },
}

/// What is spoken at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Ports of the host that lead to as many of the guest's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// What is spoken there.
    pub protocol: Protocol,
    /// The address that they are at.
    pub address: IpAddr,
    /// The first one there; all of them are below 65536.
    pub host_port: u16,
    /// The guest's first one.
    pub guest_port: u16,
    /// How many follow one another, at least 1.
    pub count: u16,
}

/// A VM that is synthesised.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OverlaySource {
    /// The overlay: a path or URL.
    pub location: String,
    /// Whether the VM runs before its overlay has arrived.
    pub early_start: bool,
    /// Whether pages are placed on demand alone, one a fault, to learn the order of first touch.
    pub record: bool,
    /// Limit of the transfer in Mbit/s.
    pub rate_mbit: Option<f64>,
    /// Certificate authorities beside the system's, as a PEM file.
    pub ca: Option<PathBuf>,
    /// Seconds without a byte after which the transfer counts as stalled.
    pub stall_secs: f64,
    /// The overlay's id, if another than the one named here must be refused.
    pub expect: Option<String>,
}

/// What a VMM process says on its standard output.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Work before the VM runs.
    Progress {
        /// What is being done.
        step: String,
        /// Units done.
        done: u64,
        /// Units in all.
        total: u64,
    },
    /// The VM runs (or waits for `resume`), and its sockets are there.
    Ready,
    /// The VM could not be started.
    Failed {
        /// Why, in one sentence.
        message: String,
    },
}

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM's directory cannot be used, or its name is taken.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The process could not be started.
    #[error("cannot start the VMM process")]
    Spawn(#[source] io::Error),
    /// The process said why.
    #[error("{0}")]
    Failed(String),
    /// The process ended without a word.
    #[error("the VMM process ended before the VM ran ({status}){detail}")]
    Died {
        /// How it ended.
        status: ExitStatus,
        /// What it left in its report or log.
        detail: String,
    },
    /// The process said why, and is still there: a thread of it waits in the kernel, where nothing
    /// ends it.
    #[error(
        "{error}. Its process {pid} cannot end before the file server answers, or is itself ended, \
         that it waits for in the kernel"
    )]
    Stuck {
        /// The process.
        pid: u32,
        /// What it said.
        error: Box<Error>,
    },
    /// What it says cannot be read.
    #[error("cannot understand the VMM process")]
    Event(#[source] serde_json::Error),
}

/// A VMM process that has a running VM.
#[derive(Debug)]
pub struct Vmm {
    /// The process.
    pub child: Child,
    /// The VM's directory.
    pub dir: VmDir,
    /// Opened while the VM lived: the directory may be gone when it ends.
    report: Option<File>,
}

impl Vmm {
    /// Waits for the VM's end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// How the VM ended, once it has.
    #[must_use]
    pub fn ended(&self) -> Report {
        match &self.report {
            Some(report) => Report::read(report),
            None => Report::of(&self.dir),
        }
    }

    /// What the VM left to say about its end, if it did not end in order.
    #[must_use]
    pub fn report(&self) -> Option<String> {
        let words = self.ended().words;
        (!words.is_empty()).then_some(words)
    }
}

/// Starts the VMM process for `spec` and waits until its VM runs.
pub fn start(
    spec: &Spec,
    dir: VmDir,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vmm, Error> {
    let mut child = spawn(&dir)?;
    let mut stdin = child.stdin.take().expect("standard input is a pipe");
    let mut line = serde_json::to_vec(spec).map_err(Error::Event)?;
    line.push(b'\n');
    // A child that died at once is reported below, with its reason.
    let _ = stdin.write_all(&line);
    if spec.attached {
        child.stdin = Some(stdin);
    }
    let stdout = child.stdout.take().expect("standard output is a pipe");
    let error = match wait_ready(stdout, progress) {
        Ok(true) => {
            let report = File::open(dir.report()).ok();
            return Ok(Vmm { child, dir, report });
        }
        Ok(false) => {
            let status = child.wait().map_err(Error::Spawn)?;
            Error::Died {
                status,
                detail: last_words(&dir, status),
            }
        }
        Err(error) if ends_within(&mut child, END_LIMIT).map_err(Error::Spawn)? => error,
        Err(error) => Error::Stuck {
            pid: child.id(),
            error: Box::new(error),
        },
    };
    // A VM that never ran is told of here and nowhere else. The directory stays where it belongs
    // to a living VM of the same name.
    let _ = dir.remove();
    Err(error)
}

/// Whether `child` has ended by the end of `limit`.
fn ends_within(child: &mut Child, limit: Duration) -> io::Result<bool> {
    let begin = Instant::now();
    while child.try_wait()?.is_none() {
        if begin.elapsed() > limit {
            return Ok(false);
        }
        std::thread::sleep(END_POLL);
    }
    Ok(true)
}

fn spawn(dir: &VmDir) -> Result<Child, Error> {
    if dir.is_alive() {
        return Err(registry::Error::Taken {
            name: dir.name.to_string(),
        }
        .into());
    }
    crate::paths::private_dir(dir.path()).map_err(registry::Error::Paths)?;
    let log = File::create(dir.log()).map_err(Error::Spawn)?;
    Command::new("/proc/self/exe")
        .arg0("cloudlet")
        .arg(VMM_COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        // Signals typed at the parent's terminal are the parent's to act on.
        .process_group(0)
        .spawn()
        .map_err(Error::Spawn)
}

/// Reads events up to the one that ends the start; `false` if the process ended without it.
fn wait_ready(
    stdout: ChildStdout,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<bool, Error> {
    for line in BufReader::new(stdout).lines() {
        match serde_json::from_str(&line.map_err(Error::Spawn)?).map_err(Error::Event)? {
            Event::Progress { step, done, total } => progress(&step, done, total),
            Event::Ready => return Ok(true),
            Event::Failed { message } => return Err(Error::Failed(message)),
        }
    }
    Ok(false)
}

fn last_words(dir: &VmDir, status: ExitStatus) -> String {
    if let Some(report) = read_report(dir) {
        return format!(": {report}");
    }
    let log = read_words(&dir.log());
    match (log.lines().last(), status.signal()) {
        (Some(line), _) => format!(": {line}"),
        (None, Some(signal)) => format!(": killed by signal {signal}"),
        (None, None) => String::new(),
    }
}
