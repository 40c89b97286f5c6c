//! `run`: boots a VM, attached to the terminal or in the background.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use cloudlet::boot_image::BootImage;
use cloudlet::launch::{BootSource, DiskSource, Source, Vmm};
use cloudlet_vmm::devices::rate::Limits;
use serde_json::json;

use super::console::End;
use super::output::{print, tell};
use super::vm::how_ended;
use super::{Host, console, disk, existing, output, terminal, vsock_for};
use crate::cli::{NewVm, Run};

/// The word for `resources/linux/init` that keeps a VM whose image's process has ended.
const KEEP: &str = "cloudlet.keep";

pub(super) fn run(host: &Host, args: &Run) -> Result<ExitCode> {
    let (mut disks, mut disk_limits) = disk::parse_all(&args.disks)?;
    let optional =
        |path: &Option<PathBuf>, what| path.as_deref().map(|path| existing(path, what)).transpose();
    let image = args.image.as_deref().map(open_image).transpose()?;
    let (kernel, initrd, cmdline) = match image {
        Some(image) => {
            disks.insert(0, root_disk(image.root));
            disk_limits.insert(0, Limits::default());
            let keep = args.keep.then_some(KEEP);
            let words = [image.manifest.cmdline.as_str(), args.cmdline.as_str()];
            let words = words
                .into_iter()
                .chain(keep)
                .filter(|word| !word.is_empty());
            let cmdline = words.collect::<Vec<_>>().join(" ");
            (Some(image.kernel), Some(image.initrd), cmdline)
        }
        None => (
            optional(&args.kernel, "kernel")?,
            optional(&args.initrd, "initial RAM disk")?,
            args.cmdline.clone(),
        ),
    };
    let source = Source::Boot(BootSource {
        kernel,
        initrd,
        cmdline,
        disks,
        cpus: args.cpus,
        memory_mib: args.memory,
        cpu_model: args.cpu.clone(),
        discovery: args.discovery.clone(),
        balloon: !args.no_balloon,
    });
    let options = NewVm {
        disk_limits,
        ..args.vm.clone()
    };
    let vmm = host.start(&options, !args.detach, "vm", source)?;
    if args.detach {
        let name = vmm.dir.name.as_str();
        host.output
            .result(&json!({ "name": name, "pid": vmm.child.id() }), || {
                name.to_owned()
            });
        return Ok(ExitCode::SUCCESS);
    }
    let vsock = vsock_for(&args.vm, &vmm.dir)?;
    attend(host, vmm, vsock)
}

/// The image in `dir`, with paths that a VMM process understands.
pub(super) fn open_image(dir: &Path) -> Result<BootImage> {
    let dir = existing(dir, "image")?;
    BootImage::open(&dir).with_context(|| format!("{} is no bootable image", dir.display()))
}

/// An image's root as a disk.
pub(super) fn root_disk(image: PathBuf) -> DiskSource {
    DiskSource {
        image: Some(image),
        ..DiskSource::default()
    }
}

/// Shows the guest's console until the VM ends or the user has had enough. The exit code is the VM's,
/// or says what ended it.
fn attend(host: &Host, mut vmm: Vmm, vsock: PathBuf) -> Result<ExitCode> {
    let attached = console::attach(&vmm.dir.console_socket(), vsock);
    if attached.is_err() && vmm.dir.is_alive() {
        // Nobody holds the lifeline any more then, and the VM ends.
        return Err(attached.expect_err("it is one"));
    }
    let ended = matches!(attached, Err(_) | Ok(End::Console { .. }));
    if !ended {
        // Closing the lifeline ends a VM that the user has had enough of.
        drop(vmm.child.stdin.take());
    }
    let status = vmm.wait().context("cannot wait for the VMM process")?;
    // The VM may have been over before it let the terminal in; what it wrote is in its log then.
    if matches!(attached, Err(_) | Ok(End::Console { received: 0 }))
        && let Ok(log) = std::fs::read(vmm.dir.console_log())
    {
        print(&log);
    }
    let report = vmm.ended();
    if host.output.is_json() {
        let mut said = how_ended(&report);
        said["name"] = json!(vmm.dir.name.as_str());
        // The console's last line may have no end.
        print(b"\n");
        host.output.result(&said, String::new);
    } else if !report.words.is_empty() && report.guest_code() != Some(0) {
        tell(&format!("cloudlet: {}", report.words));
    }
    vmm.dir.remove()?;
    match attached {
        Ok(End::Signal(signal)) => return Ok(terminal::exit_of_signal(signal)),
        Ok(End::Output(error)) => return Ok(output::code_of(&error)),
        _ => {}
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    match code {
        Some(code) => Ok(ExitCode::from(code)),
        None => bail!("the VMM process was killed ({status})"),
    }
}
