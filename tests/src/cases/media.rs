//! What disks lie on: block devices, images that are not read, images of which a part is missing, a
//! host's file system that is full.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, Lane};
use crate::{ensure, ensure_eq, namespace, qcow2};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_block_device_is_a_disk_of_its_size",
        run: block_device,
        needs: Needs {
            only_lane: Some((Lane::One, "needs loop devices")),
            ..Needs::GUEST.as_root().with_programs(&["losetup"])
        },
    },
    Case {
        name: "images_that_are_not_read_are_named",
        run: not_read,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_full_host_disk_shows_in_status_and_log",
        run: full,
        needs: Needs::GUEST.as_root(),
    },
];

/// A loop device, given back when dropped.
struct Loop(String);

impl Loop {
    fn over(file: &Path, sector: &str) -> Outcome<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", sector])
            .arg(file)
            .output()?;
        let error = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "losetup: {error}");
        Ok(Self(
            String::from_utf8_lossy(&made.stdout).trim().to_owned(),
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // One that stays is of no harm to other cases.
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

fn block_device(host: &Host) -> Outcome {
    let contents: Vec<u8> = (0..8_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let file = host.path("loop.img");
    fs::write(&file, &contents)?;
    for (name, sector) in [("small", 512), ("large", 4096)] {
        let device = Loop::over(&file, &sector.to_string())?;
        for (disk, read_only) in [
            (device.0.clone(), false),
            (format!("{},ro", device.0), true),
        ] {
            host.boot(name, &["--disk", &disk])?;
            let about = host.status(name)?["disk0"].clone();
            ensure_eq!(about["bytes"], 8 << 20, "size of {disk}");
            ensure_eq!(about["sector_bytes"], sector, "sectors of {disk}");
            ensure_eq!(about["read_only"], read_only, "{disk}");
            let snap = host.path(format!("{name}-{read_only}"));
            host.ok(&["snapshot", name, &snap.to_string_lossy()])?;
            ensure!(
                fs::read(snap.join("disk0"))? == contents,
                "{disk} reads other bytes"
            );
            host.ok(&["stop", name])?;
        }
    }
    let image = host.path("image.img");
    fs::write(&image, qcow2::image(&contents))?;
    let device = Loop::over(&image, "512")?;
    host.boot("web", &["--disk", &format!("{},format=qcow2", device.0)])?;
    ensure_eq!(
        host.status("web")?["disk0"]["bytes"],
        8 << 20,
        "a qcow2 image on a device"
    );
    Ok(())
}

fn not_read(host: &Host) -> Outcome {
    let path = host.path("some disk");
    let text = path.display().to_string();
    let refused = |disk: &str, words: &[&str]| -> Outcome {
        let said = host.fails(&["run", "--detach", "--disk", disk], 1)?;
        for word in words {
            ensure!(said.contains(word), "{disk}: no {word:?} in {said}");
        }
        ensure_eq!(said.lines().count(), 1, "sentences in {said:?}");
        Ok(())
    };
    let mut image = vec![0; 1 << 20];
    for (magic, format) in [
        (&b"KDMV"[..], "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"QED\0", "qed"),
    ] {
        image[..8].fill(0);
        image[..magic.len()].copy_from_slice(magic);
        fs::write(&path, &image)?;
        let command = format!("qemu-img convert -f {format} -O qcow2 {text}");
        refused(&text, &[&command, "format=raw"])?;
    }
    // What a guest wrote to its raw disk is its own affair.
    host.boot("raw", &["--disk", &format!("{text},format=raw")])?;

    // Sizes that no disk has, and what is no file at all.
    fs::write(&path, [7; 100])?;
    for option in ["", ",ro", ",format=raw"] {
        refused(&format!("{text}{option}"), &[&text, "100 bytes"])?;
    }
    fs::write(&path, [])?;
    refused(&text, &[&text, "0 bytes"])?;
    refused("/dev/null", &["/dev/null"])?;
    refused("/dev", &["/dev is"])?;
    for option in ["--kernel", "--initrd"] {
        let kernel = ["--kernel", "/no/such/kernel", option, "/dev/null"];
        let args = [
            &["run", "--detach"],
            &kernel[if option == "--kernel" { 2 } else { 0 }..],
        ]
        .concat();
        let said = host.fails(&args, 1)?;
        ensure!(
            said.contains("/dev/null") || said.contains("/no/such"),
            "{said}"
        );
    }

    // A qcow2 image that was not copied whole.
    let good = qcow2::image(&vec![7; 1 << 20]);
    for kept in [good.len() / 2, 3 << 16, 2 << 16, 3 << 15] {
        fs::write(&path, &good[..kept])?;
        refused(
            &format!("{text},format=qcow2"),
            &[&text, "parts of it are missing"],
        )?;
    }
    Ok(())
}

fn full(host: &Host) -> Outcome {
    namespace::private_mounts()?;
    let small = host.path("small");
    fs::create_dir(&small)?;
    namespace::mount_tmpfs(&small, 256 << 10)?;
    let data = host.path("app-data");
    fs::write(&data, vec![7; 2 << 20])?;
    let disk = format!("empty:64,layer={}", small.join("layer").display());
    host.boot("web", &["--disk", &disk])?;
    let before = host.status("web")?;
    ensure_eq!(
        before["disk0"]["failed_writes"],
        0,
        "failures before there are any"
    );
    ensure_eq!(before["device_failures"], 0, "stopped devices");
    let data = data.to_string_lossy();
    host.fails(&["app", "install", "web", "fluid", "--data", &data], 1)?;
    let after = host.status("web")?["disk0"].clone();
    ensure!(
        after["failed_writes"].as_u64() > Some(0),
        "not counted: {after}"
    );
    let why = after["last_failure"].as_str().unwrap_or_default();
    ensure!(why.contains("No space left on device"), "not why: {after}");
    let log = fs::read_to_string(host.vm_dir("web").join("vmm.log"))?;
    let lines = log
        .lines()
        .filter(|line| line.contains("disk 0 failed its guest"));
    ensure_eq!(lines.count(), 1, "lines in the log:\n{log}");
    // The VM itself took no harm.
    if host.state("web")? != "running" {
        return Err(Failure::new("it does not run on"));
    }
    Ok(())
}
