//! Linux test guests: Debian's kernels with an initramfs of busybox, a few modules and a script of
//! the case's. `tests/linux/pack` makes kernels and initramfs; the script goes into a second
//! archive behind the first.
//!
//! ```no_run
//! # use cloudlet_tests::{failure::Outcome, host::Host, linux::LinuxGuest};
//! # fn case(host: &Host) -> Outcome {
//! let guest = LinuxGuest::new(host, "6.1", &["virtio_mmio", "virtio_blk"], "
//!     echo disk: $(blockdev --getsize64 /dev/vda)
//! ")?;
//! guest.boot(host, "vm", &["--disk", "empty:3"])?;
//! guest.wait_for(host, "vm", "disk: 3145728")?;
//! # Ok(())
//! # }
//! ```
//!
//! The script is run by busybox' shell as root, its output goes to the serial console, and the
//! guest powers off when it ends. `/dev`, `/proc` and `/sys` are there, and `modprobe` knows all
//! that `tests/linux/pack` lists.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::failure::{Failure, Outcome};
use crate::host::{Host, pid_of};

/// How long a guest may take to say something, in lane 1's time.
const PATIENCE: Duration = Duration::from_secs(30);
/// Nothing but the script's words on the console; a panic ends the VM.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// What `/init` says before the script's first line.
const READY: &str = "runs the script";

/// A guest that can be booted.
pub struct LinuxGuest {
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// Where the guest `name`, or a part of it, is.
pub fn dir(name: &str) -> Outcome<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.ancestors().nth(2);
    let target = target.ok_or_else(|| Failure::new("this program is in no target directory"))?;
    Ok(target.join("linux").join(name))
}

/// Whether `tests/linux/pack`, or `tests/linux/debian`, has made the guest `name`, or the file of one.
#[must_use]
pub fn is_there(name: &str) -> bool {
    let has = |dir: PathBuf| {
        let parts = ["initramfs", "manifest.json", "usr"];
        parts.iter().any(|part| dir.join(part).exists())
    };
    dir(name).is_ok_and(|dir| dir.is_file() || has(dir))
}

/// The name of the guest that `tests/linux/debian` makes.
pub const DEBIAN: &str = "debian";
/// The image with systemd.
pub const SYSTEMD: &str = "debian/systemd";
/// What it has beside it: the tree of a recogniser of speech.
pub const SPEECH: &str = "debian/speech";
/// And the tree of Python with numpy.
pub const OBJECT: &str = "debian/object";

impl LinuxGuest {
    /// A guest with Debian's kernel `kernel` (a name of `tests/linux/pack`), which loads `modules`
    /// and runs `script`.
    pub fn new(host: &Host, kernel: &str, modules: &[&str], script: &str) -> Outcome<Self> {
        Self::with_programs(host, kernel, modules, script, &[])
    }

    /// As [`LinuxGuest::new`], with `programs` (names and contents) in `/case`.
    pub fn with_programs(
        host: &Host,
        kernel: &str,
        modules: &[&str],
        script: &str,
        programs: &[(&str, &[u8])],
    ) -> Outcome<Self> {
        let dir = dir(kernel)?;
        let mut archive = fs::read(dir.join("initramfs"))?;
        let modules = format!("{}\n", modules.join(" "));
        for (name, mode, content) in [
            ("case", 0o40755, ""),
            ("case/modules", 0o100_644, modules.as_str()),
            ("case/script", 0o100_644, script),
        ] {
            add_entry(&mut archive, name, mode, content.as_bytes())?;
        }
        for (name, content) in programs {
            add_entry(&mut archive, &format!("case/{name}"), 0o100_755, content)?;
        }
        add_entry(&mut archive, "TRAILER!!!", 0, b"")?;
        let initramfs = (0..)
            .map(|number| host.path(format!("initramfs-{number}")))
            .find(|path| !path.exists())
            .ok_or_else(|| Failure::new("no free name for an initramfs"))?;
        fs::write(&initramfs, archive)?;
        let kernel = dir.join("vmlinuz");
        Ok(Self { kernel, initramfs })
    }

    /// The arguments of `run`, but for the VM's name. `more` comes behind, and its `--cmdline`, if
    /// any, replaces ours.
    #[must_use]
    pub fn run_args<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let path = |path: &'a PathBuf| path.to_str().unwrap_or_default();
        let mut args = vec!["run", "--kernel", path(&self.kernel)];
        args.extend(["--initrd", path(&self.initramfs)]);
        if !more.contains(&"--cmdline") {
            args.extend(["--cmdline", CMDLINE]);
        }
        args.extend_from_slice(more);
        args
    }

    /// Boots it as `name` in the background, with more `options` for `run`, and waits until its
    /// script begins. Returns the id of the VMM process.
    #[track_caller]
    pub fn boot(&self, host: &Host, name: &str, options: &[&str]) -> Outcome<u32> {
        let options = [&["--detach", "--name", name], options].concat();
        let pid = pid_of(&host.json(&self.run_args(&options))?)?;
        self.wait_for(host, name, READY)?;
        Ok(pid)
    }

    /// Waits until `text` is on the console of `name`; returns all of the console.
    #[track_caller]
    pub fn wait_for(&self, host: &Host, name: &str, text: &str) -> Outcome<String> {
        let what = format!("{text:?} on the console of {name}");
        let found = host.wait_until(&what, PATIENCE, || {
            let console = host.console(name);
            console.contains(text).then_some(console)
        });
        found.map_err(|failure| {
            let console = host.console(name);
            Failure::new(format!("{failure}; the console:\n{console}"))
        })
    }
}

/// Adds a file to an archive in the kernel's format (linux
/// `Documentation/driver-api/early-userspace/buffer-format.rst`).
fn add_entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) -> Outcome {
    let len = |bytes: usize| u32::try_from(bytes).map_err(|_| Failure::new("too long a file"));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(b"070701");
    let fields = [
        0, // inode
        mode,
        0, // user
        0, // group
        1, // links
        0, // time
        len(content.len())?,
        0, // device, major and minor
        0,
        0, // special file, major and minor
        0,
        len(name.len() + 1)?,
        0, // checksum
    ];
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    Ok(())
}
