//! The command line: what can be said, with its help. What is done about it stands in
//! `commands/`, a file a group.

mod help;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::ArgPredicate;
use clap::{Args, Parser, Subcommand, ValueEnum};
use cloudlet_vmm::devices::rate::Limits;

use crate::commands::ANSWER_SECS;

/// A minimal hypervisor that provisions, overlays and moves microVMs.
#[derive(Debug, Parser)]
#[command(name = "cloudlet", version, after_help = help::EXIT_CODES, max_term_width = 100)]
pub(crate) struct Cli {
    /// Print results as JSON, one object a line
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to do
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the whole of it on the embedded guest: base VM, overlay, synthesis with early start
    Demo(Demo),
    /// Boot a VM
    #[command(after_help = help::RUN_HELP)]
    Run(Run),
    /// List the VMs
    Ps,
    /// Show how a VM does
    Status(Vm),
    /// Show a VM's memory balloon, or change how much memory its guest may keep
    #[command(after_help = help::BALLOON_HELP)]
    Balloon(Balloon),
    /// Stop a VM's vCPUs
    Pause(Vm),
    /// Let a VM's vCPUs run again
    Resume(Vm),
    /// Ask a VM's guest to shut down, by its agent or else by the power button, and wait until it has
    #[command(after_help = "Example:\n  cloudlet shutdown web --timeout 120")]
    Shutdown(Shutdown),
    /// End a VM at once and forget it
    #[command(after_help = help::STOP_HELP)]
    Stop(Stop),
    /// Attach to a VM's serial console; Ctrl-] detaches
    Console(Vm),
    /// Run a command in a Linux guest
    #[command(after_help = help::EXEC_HELP)]
    Exec(Exec),
    /// Copy files and directories to a Linux guest or from it
    #[command(after_help = help::CP_HELP)]
    Cp(Cp),
    /// Have a Linux guest write out, discard free disk blocks and drop its caches
    #[command(after_help = help::SYNC_HELP)]
    Sync(Vm),
    /// Write a VM's machine state, RAM and disks into a new directory
    #[command(after_help = "Example:\n  cloudlet snapshot web /var/tmp/web-1")]
    Snapshot(Snapshot),
    /// Start VMs from a snapshot directory or a base VM
    #[command(after_help = help::RESTORE_HELP)]
    Restore(Restore),
    /// Bootable images: kernel, initial RAM disk and root file system
    #[command(subcommand)]
    Image(Image),
    /// Base VMs: immutable images that overlays refer to
    #[command(subcommand)]
    Base(Base),
    /// Overlays: what makes a customised VM of a base VM
    #[command(subcommand)]
    Overlay(Overlay),
    /// Make a VM of its base and an overlay, from a file or a URL
    #[command(after_help = help::SYNTHESIZE_HELP)]
    Synthesize(Synthesize),
    /// Applications of the embedded guest
    #[command(subcommand)]
    App(App),
    /// Send a request to the application in a VM of the embedded guest
    #[command(after_help = help::CALL_HELP)]
    Call(Call),
    /// Serve a directory of overlays over HTTP
    #[command(after_help = "Example:\n  cloudlet serve /srv/overlays --listen 0.0.0.0:8080")]
    Serve(Serve),
    /// Print shell completions
    #[command(
        after_help = "Example:\n  cloudlet completions bash > /etc/bash_completion.d/cloudlet"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// The VMM process itself; started by the other commands
    #[command(name = cloudlet::launch::VMM_COMMAND, hide = true)]
    VmmProcess,
    /// Reads a disk image of another format; started by the VMM process
    #[command(name = cloudlet::process::image::IMAGE_COMMAND, hide = true)]
    ImageProcess,
    /// Removes the directory of a command that was killed; started by the command
    #[command(name = crate::commands::SWEEP_COMMAND, hide = true)]
    SweepProcess,
}

/// A VM by name.
#[derive(Debug, Args)]
pub(crate) struct Vm {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
}

/// `stop`
#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// How long the VM may take to answer before its process is killed
    #[arg(long, default_value_t = ANSWER_SECS, value_name = "SECONDS")]
    pub(crate) timeout: u64,
    /// Kill its process without asking
    #[arg(long, conflicts_with = "timeout")]
    pub(crate) force: bool,
}

/// `exec`
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// Give the command a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Leave standard input alone: the command's is empty
    #[arg(long, short)]
    pub(crate) no_stdin: bool,
    /// Set a variable of the command's environment
    #[arg(long = "env", short, value_name = "NAME=VALUE")]
    pub(crate) environment: Vec<OsString>,
    /// Run it in this directory
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) cwd: OsString,
    #[command(flatten)]
    pub(crate) patience: Patience,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// `cp`
#[derive(Debug, Args)]
pub(crate) struct Cp {
    /// What to copy: PATH or VM:PATH
    #[arg(value_name = "SRC")]
    pub(crate) source: OsString,
    /// Where to: VM:PATH or PATH
    #[arg(value_name = "DST")]
    pub(crate) destination: OsString,
    #[command(flatten)]
    pub(crate) patience: Patience,
}

/// For a guest that may still boot.
#[derive(Debug, Args)]
pub(crate) struct Patience {
    /// Wait so long for the guest's agent
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u32,
}

impl Patience {
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_secs(self.wait.into())
    }
}

/// `balloon`
#[derive(Debug, Args)]
pub(crate) struct Balloon {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// Memory that the guest may keep, in MiB
    #[arg(long, value_name = "MIB")]
    pub(crate) target: Option<u64>,
}

/// `demo`
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Link rate in Mbit/s
    #[arg(long, default_value_t = 38.0, value_name = "MBIT")]
    pub(crate) rate: f64,
    /// Size of the recogniser's feature database in MiB
    #[arg(long, default_value_t = 100, value_name = "MIB")]
    pub(crate) database: u32,
    /// Where to leave the frames
    #[arg(long, default_value = "cloudlet-demo", value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// `run`
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Kernel: a Linux bzImage, or an ELF file with a PVH note or for the 64-bit Linux protocol
    #[arg(long, value_name = "FILE", group = "boots")]
    pub(crate) kernel: Option<PathBuf>,
    /// Bootable image (`cloudlet image`): its kernel, initial RAM disk and command line, and its
    /// root as the first disk
    #[arg(long, value_name = "DIR", group = "boots")]
    pub(crate) image: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(
        long,
        value_name = "FILE",
        requires = "kernel",
        conflicts_with = "image"
    )]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line; of an image, what is added to its own
    #[arg(
        long,
        default_value = "",
        value_name = "TEXT",
        allow_hyphen_values = true,
        requires = "boots"
    )]
    pub(crate) cmdline: String,
    /// Disk image, or `empty:MIB` for an empty disk; options follow after commas, see below
    #[arg(long = "disk", value_name = "FILE[,OPTION]...")]
    pub(crate) disks: Vec<String>,
    /// Number of vCPUs, 1 to 8
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) cpus: u8,
    /// RAM in MiB [default with --image: 512]
    #[arg(
        long,
        default_value_t = 128,
        default_value_if("image", ArgPredicate::IsPresent, "512"),
        value_name = "MIB"
    )]
    pub(crate) memory: u64,
    /// CPU model: host, x86-64-v2 or x86-64-v3
    #[arg(long, default_value = "host", value_name = "MODEL")]
    pub(crate) cpu: String,
    /// How the guest learns of its devices: acpi, cmdline (`virtio_mmio.device=`), or auto, which
    /// is acpi for Linux unless its command line has `acpi=off`
    #[arg(long, default_value = "auto", value_name = "WAY")]
    pub(crate) discovery: String,
    /// Do without the memory balloon
    #[arg(long)]
    pub(crate) no_balloon: bool,
    /// Keep the VM when the process of its imported image ends; without, it ends with that exit code
    #[arg(long, requires = "image")]
    pub(crate) keep: bool,
    /// Run in the background and print the VM's name
    #[arg(long, short)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) vm: NewVm,
}

/// What is common to everything that starts a VM.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct NewVm {
    /// The VM's name; made up if it is not given
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Unix socket for the host side of the guest's vsock
    #[arg(long, value_name = "PATH")]
    pub(crate) vsock: Option<PathBuf>,
    /// Network card: `tap=NAME` is an interface of the host, `user` shares the host's network through
    /// passt; options after commas are `mac=ADDRESS`, `bandwidth=MBIT` and `packets=PER_SECOND`, the
    /// limits in each direction
    #[arg(long = "net", value_name = "tap=NAME|user[,OPTION]...")]
    pub(crate) nets: Vec<String>,
    /// Forward a port of the host (on 127.0.0.1 unless an address is given) to the guest's, with
    /// `--net user`; or as many in a row, as in 8000-8010:9000-9010. TCP unless it ends with /udp, whose
    /// answers programs on this host itself get only of a passt of September 2024 or later
    #[arg(long, value_name = "[ADDRESS:]HOST[-LAST]:GUEST[-LAST][/udp]")]
    pub(crate) publish: Vec<String>,
    /// Do not let the vCPUs run before `cloudlet resume`
    #[arg(long)]
    pub(crate) paused: bool,
    /// Run without seccomp filters (for debugging the VMM itself)
    #[arg(long, hide = true)]
    pub(crate) no_seccomp: bool,
    /// Limits of the disks in order, from `--disk` or `--disk-limit`
    #[arg(skip)]
    pub(crate) disk_limits: Vec<Limits>,
}

/// Limits of disks that a saved VM has.
#[derive(Debug, Clone, Args)]
pub(crate) struct DiskLimits {
    /// Limit disk number N (the first is 0) to so many MiB and requests a second
    #[arg(long = "disk-limit", value_name = "N[,bandwidth=MIB][,iops=N]")]
    pub(crate) disk_limits: Vec<String>,
}

/// `shutdown`
#[derive(Debug, Args)]
pub(crate) struct Shutdown {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// How long the guest may take
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub(crate) timeout: u64,
}

/// `snapshot`
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// The directory, which must not exist
    pub(crate) dir: PathBuf,
}

/// `restore`
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Snapshot directory, or tag or id of a base VM
    pub(crate) source: String,
    /// Start N VMs; their names are NAME-1 to NAME-N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) clones: Option<u16>,
    #[command(flatten)]
    pub(crate) limits: DiskLimits,
    #[command(flatten)]
    pub(crate) vm: NewVm,
}

/// `image`
#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Build a bootable image from a distribution's packages
    #[command(after_help = help::IMAGE_BUILD_HELP)]
    Build(ImageBuild),
    /// Make a bootable image of a directory, a tar archive or a container image
    #[command(after_help = help::IMAGE_IMPORT_HELP)]
    Import(ImageImport),
}

/// `image import`
#[derive(Debug, Args)]
pub(crate) struct ImageImport {
    /// A directory, an archive (`-`: standard input) or a container image in either; of several images
    /// SOURCE:NAME is one
    pub(crate) source: PathBuf,
    /// The directory to make
    pub(crate) out: PathBuf,
    /// Take kernel, initial RAM disk and init from an image that `image build` made
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kernel", "initrd"])]
    pub(crate) kernel_from: Option<PathBuf>,
    /// Kernel
    #[arg(long, value_name = "FILE", requires = "initrd")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// Size of the root file system in MiB, of which what is not used takes no space [default: 2048, or
    /// twice what the contents need]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    pub(crate) size: Option<u64>,
}

/// `image build`
#[derive(Debug, Args)]
pub(crate) struct ImageBuild {
    /// The distribution
    pub(crate) distribution: Distribution,
    /// The directory to make
    pub(crate) out: PathBuf,
    /// The distribution's release
    #[arg(long, default_value = "bookworm", value_name = "NAME")]
    pub(crate) suite: String,
    /// Which of its kernels
    #[arg(long, default_value = "cloud", value_name = "KIND")]
    pub(crate) kernel: KernelKind,
    /// What runs as the guest's first program
    #[arg(long, default_value = "tiny", value_name = "KIND")]
    pub(crate) init: InitKind,
    /// More packages, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "PACKAGES")]
    pub(crate) include: Vec<String>,
    /// Size of the root file system in MiB; what is not used takes no space
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    pub(crate) size: u32,
    /// Build it twice and compare
    #[arg(long)]
    pub(crate) check: bool,
}

/// Distributions with a recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Distribution {
    /// Debian, by mmdebstrap
    Debian,
}

/// Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KernelKind {
    /// For virtual machines
    Cloud,
    /// With drivers for everything
    Generic,
}

impl KernelKind {
    /// The recipe's word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        }
    }
}

/// The guest's first program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum InitKind {
    /// A script: mounts, a shell on the console, up soonest
    Tiny,
    /// systemd, for images with services
    Systemd,
}

impl InitKind {
    /// The recipe's word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Systemd => "systemd",
        }
    }
}

/// `base`
#[derive(Debug, Subcommand)]
pub(crate) enum Base {
    /// Publish a base VM
    #[command(
        after_help = "Examples:\n  cloudlet base create unikernel --builtin\n  \
                            cloudlet base create debian --image deb\n  \
                            cloudlet base create debian-12 --from vm1"
    )]
    Create(BaseCreate),
    /// List the base VMs
    Ls,
    /// Show a base VM
    Show(BaseRef),
    /// Check every byte of a base VM against its manifest
    Verify(BaseRef),
    /// Remove a tag; with --all, the base VM and all its tags
    #[command(
        after_help = "Examples:\n  cloudlet base rm old-tag\n  cloudlet base rm debian-12 --all"
    )]
    Rm(BaseRm),
}

/// `base create`
#[derive(Debug, Args)]
pub(crate) struct BaseCreate {
    /// The tag to publish it under
    pub(crate) tag: String,
    /// Publish the state of this VM, which goes on running
    #[arg(long, value_name = "VM", required_unless_present_any = ["builtin", "image"])]
    pub(crate) from: Option<String>,
    /// Boot this bootable image and publish it once its agent answers
    #[arg(long, value_name = "DIR", conflicts_with_all = ["from", "builtin"])]
    pub(crate) image: Option<PathBuf>,
    /// Boot the embedded guest and publish it
    #[arg(long, conflicts_with = "from")]
    pub(crate) builtin: bool,
    /// RAM of what boots, in MiB
    #[arg(
        long,
        default_value_t = 256,
        value_name = "MIB",
        conflicts_with = "from"
    )]
    pub(crate) memory: u64,
    /// CPU model of what boots
    #[arg(
        long,
        default_value = "host",
        value_name = "MODEL",
        conflicts_with = "from"
    )]
    pub(crate) cpu: String,
}

/// `base rm`
#[derive(Debug, Args)]
pub(crate) struct BaseRm {
    /// Tag or id
    pub(crate) base: String,
    /// Remove the base VM itself, unless a VM uses it
    #[arg(long)]
    pub(crate) all: bool,
    /// Remove it from under the VMs that use it: they run on, but no overlay can be made of them
    #[arg(long, requires = "all")]
    pub(crate) force: bool,
}

/// A base VM by name.
#[derive(Debug, Args)]
pub(crate) struct BaseRef {
    /// Tag or id (its first digits are enough)
    pub(crate) base: String,
}

/// `overlay`
#[derive(Debug, Subcommand)]
pub(crate) enum Overlay {
    /// Write what differs from its base VM in a running VM
    #[command(after_help = "\
With --train the first request is rehearsed in a throw-away copy, and the pages it touches come
first in the overlay, so that early start answers it soonest.

Example:
  cloudlet overlay create fluid.overlay --from dev --train 'frame 3'")]
    Create(OverlayCreate),
    /// Show what an overlay has in it
    Show {
        /// The overlay
        file: PathBuf,
    },
    /// Check every byte of an overlay
    Verify {
        /// The overlay
        file: PathBuf,
    },
}

/// `overlay create`
#[derive(Debug, Args)]
pub(crate) struct OverlayCreate {
    /// The file to write
    pub(crate) out: PathBuf,
    /// The VM
    #[arg(long, value_name = "VM")]
    pub(crate) from: String,
    /// zstd level
    #[arg(long, default_value_t = cloudlet_overlay::LEVEL_DEFAULT, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(crate) level: i32,
    /// Write over an existing file
    #[arg(long)]
    pub(crate) force: bool,
    /// A request to rehearse, as one argument
    #[arg(long, value_name = "REQUEST")]
    pub(crate) train: Option<String>,
    /// A file that goes with the rehearsed request
    #[arg(
        long,
        value_name = "FILE",
        requires = "train",
        conflicts_with = "train_sample"
    )]
    pub(crate) train_attach: Option<PathBuf>,
    /// The N-th held-back picture of the recogniser's data goes with it
    #[arg(long, value_name = "N", requires = "train")]
    pub(crate) train_sample: Option<usize>,
}

/// `synthesize`
#[derive(Debug, Args)]
pub(crate) struct Synthesize {
    /// The overlay: a file or a URL (http, https)
    pub(crate) overlay: String,
    /// Let the VM run only when all of the overlay has arrived
    #[arg(long)]
    pub(crate) no_early_start: bool,
    /// Limit the transfer to so many Mbit/s
    #[arg(long, value_name = "MBIT")]
    pub(crate) rate: Option<f64>,
    /// Return only when the overlay is complete
    #[arg(long)]
    pub(crate) wait: bool,
    /// Trust the certificate authorities in this PEM file, beside the system's
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// Refuse any overlay but this one
    #[arg(long, value_name = "ID")]
    pub(crate) expect: Option<String>,
    /// Seconds without a byte after which the transfer counts as stalled
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub(crate) stall: f64,
    #[command(flatten)]
    pub(crate) limits: DiskLimits,
    #[command(flatten)]
    pub(crate) vm: NewVm,
}

/// `app`
#[derive(Debug, Subcommand)]
pub(crate) enum App {
    /// Install an application in a VM of the embedded guest, start it and warm it up
    #[command(
        after_help = "Examples:\n  cloudlet app install dev fluid --params 'rate_hz=10'\n  \
                            cloudlet app install dev object --params mib=100"
    )]
    Install(AppInstall),
}

/// `app install`
#[derive(Debug, Args)]
pub(crate) struct AppInstall {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// The application
    pub(crate) app: AppName,
    /// Its data; the application's own if not given
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Its knobs, as KEY=VALUE words
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub(crate) params: String,
}

/// The embedded applications.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AppName {
    /// A particle fluid simulation
    Fluid,
    /// A recogniser of handwritten digits
    Object,
}

/// `call`
#[derive(Debug, Args)]
pub(crate) struct Call {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// The request's words
    #[arg(required = true, value_name = "REQUEST")]
    pub(crate) request: Vec<String>,
    /// A file that goes with the request: a PNG picture, or raw bytes
    #[arg(long, value_name = "FILE", conflicts_with = "sample")]
    pub(crate) attach: Option<PathBuf>,
    /// Attach the N-th held-back picture of the recogniser's data
    #[arg(long, value_name = "N")]
    pub(crate) sample: Option<usize>,
    /// Save what comes with the answer (a picture as PNG)
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
}

/// `serve`
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The directory
    pub(crate) dir: PathBuf,
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR:PORT")]
    pub(crate) listen: String,
    /// Serve HTTPS with this certificate and key (PEM files)
    #[arg(long, num_args = 2, value_names = ["CERT", "KEY"])]
    pub(crate) tls: Option<Vec<PathBuf>>,
    /// Limit all transfers together to so many Mbit/s
    #[arg(long, value_name = "MBIT")]
    pub(crate) rate: Option<f64>,
}
