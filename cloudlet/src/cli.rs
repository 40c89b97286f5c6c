//! The command line: what can be said, with its help. What is done about it stands in
//! `commands/`, a file a group.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::ArgPredicate;
use clap::{Args, Parser, Subcommand, ValueEnum};
use cloudlet_vmm::devices::rate::Limits;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the command failed; the message says why
  2    the command line was wrong
  10+  the VM ended by itself: see `cloudlet run --help`";

/// A minimal hypervisor that provisions, overlays and moves microVMs.
#[derive(Debug, Parser)]
#[command(name = "cloudlet", version, after_help = EXIT_CODES, max_term_width = 100)]
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
    #[command(after_help = RUN_HELP)]
    Run(Run),
    /// List the VMs
    Ps,
    /// Show how a VM does
    Status(Vm),
    /// Show a VM's memory balloon, or change how much memory its guest may keep
    #[command(after_help = BALLOON_HELP)]
    Balloon(Balloon),
    /// Stop a VM's vCPUs
    Pause(Vm),
    /// Let a VM's vCPUs run again
    Resume(Vm),
    /// Ask a VM's guest to shut down, by the power button, and wait until it has
    #[command(after_help = "Example:\n  cloudlet shutdown web --timeout 120")]
    Shutdown(Shutdown),
    /// End a VM at once and forget it
    Stop(Vm),
    /// Attach to a VM's serial console; Ctrl-] detaches
    Console(Vm),
    /// Run a command in a Linux guest
    #[command(after_help = EXEC_HELP)]
    Exec(Exec),
    /// Copy files and directories to a Linux guest or from it
    #[command(after_help = CP_HELP)]
    Cp(Cp),
    /// Have a Linux guest write out, discard free disk blocks and drop its caches
    #[command(after_help = SYNC_HELP)]
    Sync(Vm),
    /// Write a VM's machine state, RAM and disks into a new directory
    #[command(after_help = "Example:\n  cloudlet snapshot web /var/tmp/web-1")]
    Snapshot(Snapshot),
    /// Start VMs from a snapshot directory or a base VM
    #[command(after_help = RESTORE_HELP)]
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
    #[command(after_help = SYNTHESIZE_HELP)]
    Synthesize(Synthesize),
    /// Applications of the embedded guest
    #[command(subcommand)]
    App(App),
    /// Send a request to the application in a VM of the embedded guest
    #[command(after_help = CALL_HELP)]
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

const RUN_HELP: &str = "\
Without --kernel the embedded guest boots. The disks' images are never written to: what the guest
writes goes to a copy-on-write layer that a snapshot or an overlay keeps, and that is gone with the
VM unless layer=FILE names it.

Options of --disk:
  ro           the guest may not write
  format=KIND  what the image is: raw or qcow2. Without, a name that ends with .qcow2 is one, all
               others are raw; a raw one that looks like qcow2 is refused. A qcow2 image must not
               refer to other files (`qemu-img convert` puts them into one)
  serial=TEXT  the disk's serial number (Linux shows /dev/disk/by-id/virtio-TEXT)
  layer=FILE   keep what the guest writes in FILE, which is made if it is not there; a later run
               with the same image goes on with it. What the guest has flushed survives a crash
  bandwidth=MIB, iops=N
               limits: MiB and requests a second, with a second's worth saved up. They are this
               host's: a restored VM has those of its own command line
A comma in a file's name is written twice.

Attached (without --detach) the terminal is the guest's serial console, and the VM ends with this
command; Ctrl-] ends both.

Exit codes when the VM ended by itself:
  0   power-off by the guest, or stopped   10  reset by the guest
  11  triple fault                         12  KVM internal error
  13  KVM refused to enter the guest       14  an exit of KVM without use here
  15  the host failed the VM               159 seccomp violation

Examples:
  cloudlet run
  cloudlet run --image deb
  cloudlet run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --memory 512 --cpus 2
  cloudlet run --kernel app.elf --disk data.img,ro --name web --detach
  cloudlet run --kernel vmlinuz --disk debian.qcow2,layer=debian.layer --cmdline 'root=/dev/vda1'
  cloudlet run --disk root.img,layer=root.layer,serial=root --disk empty:512
  cloudlet run --kernel vmlinuz --net user --publish 8080:80
  cloudlet run --kernel vmlinuz --net tap=tap0,mac=02:00:00:00:00:01,bandwidth=100";

const IMAGE_BUILD_HELP: &str = "\
The image is a directory with vmlinuz, initrd.img, root.ext4 and manifest.json. It is made of the
distribution's packages alone, which come from where this machine's apt gets them; the same versions
give the same bytes. It needs mmdebstrap, and root or unprivileged user namespaces. DIR must not
exist, and appears whole or not at all.

Examples:
  cloudlet image build debian deb
  cloudlet image build debian py --include python3-minimal,python3-numpy --size 4096";

const BALLOON_HELP: &str = "\
A guest with a balloon driver (Linux: virtio_balloon) gives memory above the target back to the host,
takes it back rather than run out of memory, and reports what it does not use without being asked.
Snapshots and overlays of a running VM leave its free memory out; a paused guest cannot be asked, so
make them while it runs.

Examples:
  cloudlet balloon web
  cloudlet balloon web --target 256";

const IMAGE_IMPORT_HELP: &str = "\
Nothing is extracted on this machine: owners, device nodes and links go into the file system only,
and it takes no root. An archive may be compressed by gzip or zstd. Of an OCI image (`skopeo copy
docker://IMAGE oci:DIR`) the hashes are checked, layers are applied in order, and its process is
started with the image's environment, directory and user once the guest is up.

Without options kernel and initial RAM disk are those of the root file system's /boot, and its own
init runs. With --kernel-from they are Debian's, with an init that needs nothing of the root file system.

Examples:
  cloudlet image import rootfs.tar.gz alpine --kernel-from deb
  cloudlet image import oci-dir web --kernel-from deb --size 4096";

const RESTORE_HELP: &str = "\
SOURCE is a snapshot directory, or the tag or id of a base VM. The VMs run in the background, share
the pages they do not change, and get names of their own. Network cards keep their addresses; those
that no --net connects have their link down. A card that was on an interface stays on one: its
driver has agreed to what `user` cannot do.

Examples:
  cloudlet restore /var/tmp/web-1 --name web
  cloudlet restore unikernel --name dev
  cloudlet restore /var/tmp/web-1 --clones 8
  cloudlet restore /var/tmp/web-1 --net tap=tap1";

const SYNTHESIZE_HELP: &str = "\
The base VM that the overlay names must be in the store (`cloudlet base ls`). The VM runs as soon as
its machine state is there; pages that are missing are fetched as they are touched, and the command
returns when the VM runs (--wait: when the overlay is complete).

Examples:
  cloudlet synthesize fluid.overlay --name fluid
  cloudlet synthesize https://cloudlet.example/fluid.overlay --rate 38 --wait
  cloudlet synthesize http://10.0.0.2:8080/fluid.overlay --no-early-start";

const EXEC_HELP: &str = "\
Needs the agent in the guest. The command's standard input, output and error are those of this one;
SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to its process group, which ends when this command
ends. It runs as the agent's user (root) with a small environment, in the root directory.

Exit codes:
  the command's own, or 128 and its signal
  125  this command failed; the message says why
  126  the command cannot be run
  127  there is no such command

Examples:
  cloudlet exec web -- uname -a
  cloudlet exec web --cwd /srv --env DEBUG=1 -- ./server --port 80
  cloudlet exec -t web -- bash
  tar c dir | cloudlet exec web -- tar x -C /srv";

const CP_HELP: &str = "\
One of the two is in the guest, as VM:PATH, and needs the agent there; a path on the host with a colon
in it is written ./a:b. A directory is copied with all that is in it. If DST is a directory, the copy
is made in it; otherwise it gets that name. DIR/. stands for what is in DIR.

Modes and times of change are kept (from a guest without set-user-ID and such), owners are not, links
are copied as links, devices and sockets are left out. A file appears under its name when it is whole.

Examples:
  cloudlet cp server.conf web:/etc/
  cloudlet cp web:/var/log ./logs
  cloudlet cp site/. web:/srv/www";

const SYNC_HELP: &str = "\
What the guest has deleted, and what it only caches, need not be in a snapshot or an overlay. Needs the
agent in the guest.

Example:
  cloudlet sync web && cloudlet snapshot web /var/tmp/web-1";

const CALL_HELP: &str = "\
Requests of `fluid`:   frame TANK [WIDTH HEIGHT] | poke TANK X Y FORCE | stats
Requests of `object`:  recognise (with --attach IMAGE or --sample N) | stats
Any application:       verify

Examples:
  cloudlet call dev frame 3 --save frame.png
  cloudlet call dev recognise --sample 12";

/// A VM by name.
#[derive(Debug, Args)]
pub(crate) struct Vm {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) name: String,
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
    /// Set a variable of the command's environment
    #[arg(long = "env", short, value_name = "NAME=VALUE")]
    pub(crate) environment: Vec<OsString>,
    /// Run it in this directory
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) cwd: OsString,
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
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Bootable image (`cloudlet image`): its kernel, initial RAM disk and command line, and its
    /// root as the first disk
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kernel", "initrd"])]
    pub(crate) image: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line; of an image, what is added to its own
    #[arg(
        long,
        default_value = "",
        value_name = "TEXT",
        allow_hyphen_values = true
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
    /// Forward a TCP port of the host (on 127.0.0.1 unless an address is given) to the guest's, with
    /// `--net user`
    #[arg(long, value_name = "[ADDRESS:]HOST:GUEST")]
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
    #[command(after_help = IMAGE_BUILD_HELP)]
    Build(ImageBuild),
    /// Make a bootable image of a directory, a tar archive or an OCI image's directory
    #[command(after_help = IMAGE_IMPORT_HELP)]
    Import(ImageImport),
}

/// `image import`
#[derive(Debug, Args)]
pub(crate) struct ImageImport {
    /// The root file system
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
    /// Size of the root file system in MiB; what is not used takes no space
    #[arg(long, default_value_t = 2048, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    pub(crate) size: u64,
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
    Rm {
        /// Tag or id
        base: String,
        /// Remove the base VM itself
        #[arg(long)]
        all: bool,
    },
}

/// `base create`
#[derive(Debug, Args)]
pub(crate) struct BaseCreate {
    /// The tag to publish it under
    pub(crate) tag: String,
    /// Publish the state of this VM, which goes on running
    #[arg(long, value_name = "VM", required_unless_present = "builtin")]
    pub(crate) from: Option<String>,
    /// Boot the embedded guest and publish it
    #[arg(long, conflicts_with = "from")]
    pub(crate) builtin: bool,
    /// RAM of the embedded guest in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB", requires = "builtin")]
    pub(crate) memory: u64,
    /// CPU model of the embedded guest
    #[arg(
        long,
        default_value = "host",
        value_name = "MODEL",
        requires = "builtin"
    )]
    pub(crate) cpu: String,
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
