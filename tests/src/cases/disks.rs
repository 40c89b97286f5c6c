//! Disks: layers that outlast their VM, images of other formats, limits.

use std::fs;
use std::time::{Duration, Instant};

use cloudlet_resources::client::ClientError;

use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, Lane};
use crate::{ensure, ensure_eq, process, qcow2};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "a_disks_layer_outlasts_a_killed_vm",
        run: outlasts,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_vm_killed_while_it_writes_leaves_a_sound_disk",
        run: killed_while_writing,
        needs: Needs::GUEST.within(120),
    },
    Case {
        name: "a_layer_is_for_one_vm_and_one_base",
        run: one_vm_one_base,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_vm_runs_from_a_qcow2_image",
        run: from_qcow2,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_qcow2_image_reads_nothing_but_itself",
        run: hostile_qcow2,
        needs: Needs::GUEST,
    },
    Case {
        name: "a_limited_disk_holds_its_guest_back_and_nobody_spins",
        run: limited,
        needs: Needs {
            only_lane: Some((Lane::One, "compares times")),
            ..Needs::GUEST
        },
    },
];

/// The disk that the cases use, with its layer in the host's directory.
fn disk(host: &Host) -> String {
    format!("empty:64,layer={}", host.path("layer").display())
}

/// Asks the guest to start the application on its disk. `None` if it says that there is none; what
/// is there is checked by the guest against its hash, and afterwards by the application itself.
fn load(host: &Host, name: &str) -> Outcome<Option<String>> {
    let mut client = cloudlet::guest::connect(&host.vm_dir(name).join("vsock.sock"))?;
    match client.load() {
        Ok(text) => {
            host.ok(&["call", name, "verify"])?;
            Ok(Some(text))
        }
        Err(ClientError::Refused(why)) if why.contains("holds no application") => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn kill(host: &Host, pid: u32) -> Outcome {
    process::signal_pid(pid, libc::SIGKILL)?;
    host.wait_for_end(pid)
}

fn outlasts(host: &Host) -> Outcome {
    let disk = disk(host);
    let pid = host.boot("web", &["--disk", &disk])?;
    ensure_eq!(load(host, "web")?, None, "the application on a new disk");
    host.install_fluid("web")?;
    kill(host, pid)?;
    for end in ["stopped", "killed"] {
        let pid = host.boot("web", &["--disk", &disk])?;
        let loaded = load(host, "web")?;
        ensure!(loaded.is_some(), "nothing is left of what was flushed");
        match end {
            "stopped" => drop(host.ok(&["stop", "web"])?),
            _ => kill(host, pid)?,
        }
    }
    Ok(())
}

fn killed_while_writing(host: &Host) -> Outcome {
    let disk = disk(host);
    let mut interrupted = 0;
    for round in 0..10_u64 {
        let pid = host.boot("web", &["--disk", &disk])?;
        load(host, "web")?;
        let params = "tanks=16 particles=3000 warmup=0 rate_hz=1";
        let install = host.spawn(&["app", "install", "web", "fluid", "--params", params])?;
        // An installation takes some tens of milliseconds: from before its first write to after its
        // last.
        std::thread::sleep(host.limit(Duration::from_millis(7 * round)));
        kill(host, pid)?;
        let ended = install.wait(host.limit(Duration::from_secs(30)))?;
        interrupted += u32::from(ended.code() != 0);
    }
    ensure!(interrupted > 0, "no installation was interrupted");
    host.boot("web", &["--disk", &disk])?;
    load(host, "web")?;
    host.install_fluid("web")?;
    Ok(())
}

fn one_vm_one_base(host: &Host) -> Outcome {
    let disk = disk(host);
    host.boot("web", &["--disk", &disk])?;
    let refused = |disk: &str, why: &str| {
        let stderr = host.fails(&["run", "--detach", "--disk", disk], 1)?;
        ensure_eq!(stderr.lines().count(), 1, "sentences in {stderr:?}");
        ensure!(stderr.contains(why), "{disk}: {stderr}");
        Ok::<_, Failure>(())
    };
    refused(&disk, "in use by another VM")?;
    host.ok(&["stop", "web"])?;
    refused(&disk.replace("empty:64", "empty:65"), "67108864 bytes")?;
    let image = host.path("image");
    fs::File::create(&image)?.set_len(64 << 20)?;
    let image = image.display().to_string();
    refused(&disk.replace("empty:64", &image), "another base image")?;
    host.boot("web", &["--disk", &disk])?;
    Ok(())
}

/// The disk of a VM with an application on it, as a raw file.
fn raw_disk(host: &Host) -> Outcome<Vec<u8>> {
    host.boot("first", &["--disk", "empty:64"])?;
    host.install_fluid("first")?;
    let dir = host.path("snap");
    host.ok(&["snapshot", "first", &dir.to_string_lossy()])?;
    host.ok(&["stop", "first"])?;
    Ok(fs::read(dir.join("disk0"))?)
}

fn from_qcow2(host: &Host) -> Outcome {
    let image = host.path("disk.qcow2");
    fs::write(&image, qcow2::image(&raw_disk(host)?))?;
    let image = image.display().to_string();
    host.boot("web", &["--disk", &image])?;
    ensure!(load(host, "web")?.is_some(), "nothing on the disk");
    // As a base of a layer, and read-only.
    let layered = format!("{image},layer={}", host.path("layer").display());
    let pid = host.boot("layered", &["--disk", &layered])?;
    host.install_fluid("layered")?;
    kill(host, pid)?;
    host.boot("layered", &["--disk", &layered])?;
    ensure!(load(host, "layered")?.is_some(), "nothing in the layer");
    host.boot("fixed", &["--disk", &format!("{image},ro")])?;
    ensure!(load(host, "fixed")?.is_some(), "nothing on the fixed disk");
    Ok(())
}

fn hostile_qcow2(host: &Host) -> Outcome {
    let secret = host.path("secret");
    fs::write(&secret, vec![b's'; 1 << 20])?;
    let good = qcow2::image(&vec![7; 1 << 20]);
    let mut backed = good.clone();
    qcow2::set_backing_file(&mut backed, &secret.to_string_lossy());
    let mut wild = good.clone();
    // A second-level table beyond everything, and one with bits that nobody knows.
    wild[64 << 10..(64 << 10) + 8]
        .copy_from_slice(&((1_u64 << 63) | 0xff_ffff_ffff_fe00).to_be_bytes());
    let mut reserved = good.clone();
    reserved[64 << 10..(64 << 10) + 8].copy_from_slice(&u64::MAX.to_be_bytes());
    let path = host.path("image.img");
    let text = path.display().to_string();
    for (image, option, why) in [
        (&good, "", "format=qcow2"),
        (&backed, ",format=qcow2", "qemu-img convert"),
        (&wild, ",format=qcow2", "image.img"),
        (&reserved, ",format=qcow2", "image.img"),
        (&vec![0; 1 << 20], ",format=qcow2", "no qcow2 image"),
    ] {
        fs::write(&path, image)?;
        let disk = format!("{text}{option}");
        let stderr = host.fails(&["run", "--detach", "--disk", &disk], 1)?;
        ensure_eq!(stderr.lines().count(), 1, "sentences in {stderr:?}");
        ensure!(stderr.contains(why), "{disk}: {stderr}");
        ensure!(!stderr.contains("panicked"), "{disk}: {stderr}");
    }
    // What a guest wrote to its raw disk is its own affair.
    fs::write(&path, &backed)?;
    host.boot("raw", &["--disk", &format!("{text},format=raw")])?;
    fs::write(&path, &good)?;
    host.boot("good", &["--disk", &format!("{text},format=qcow2")])?;
    Ok(())
}

/// CPU time of a process's first thread, in ticks of a hundredth of a second (proc_pid_stat(5)).
fn main_thread_ticks(pid: u32) -> Outcome<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{pid}/stat"))?;
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let ticks = fields.split(' ').skip(11).take(2);
    Ok(ticks.filter_map(|field| field.parse::<u64>().ok()).sum())
}

fn limited(host: &Host) -> Outcome {
    let data = host.path("app-data");
    fs::write(&data, vec![7; 8 << 20])?;
    let data = data.to_string_lossy();
    let install = |name: &str| {
        let start = Instant::now();
        let params = "tanks=1 particles=64 warmup=0 rate_hz=1";
        host.ok(&[
            "app", "install", name, "fluid", "--data", &data, "--params", params,
        ])?;
        Ok::<_, Failure>(start.elapsed())
    };
    host.boot("free", &["--disk", "empty:64"])?;
    let free = install("free")?;
    // Written and read once, 16 MiB of which 4 are saved up.
    let pid = host.boot("slow", &["--disk", "empty:64,bandwidth=4"])?;
    let slow = install("slow")?;
    ensure!(
        slow >= free.max(Duration::from_millis(2500)),
        "{slow:?} with a limit, {free:?} without"
    );
    let ticks = main_thread_ticks(pid)?;
    ensure!(ticks < 100, "the control thread ran for {ticks} ticks");

    // Limits are the host's: a restored VM has those it is given.
    let dir = host.path("snap").to_string_lossy().into_owned();
    host.ok(&["snapshot", "slow", &dir])?;
    host.ok(&["restore", &dir, "--name", "again"])?;
    let again = install("again")?;
    ensure!(again < slow / 2, "{again:?} without, {slow:?} with a limit");
    host.ok(&[
        "restore",
        &dir,
        "--name",
        "limited",
        "--disk-limit",
        "0,bandwidth=4",
    ])?;
    let limited = install("limited")?;
    ensure!(limited >= Duration::from_millis(2500), "{limited:?}");
    let stderr = host.fails(&["restore", &dir, "--disk-limit", "1,iops=4"], 1)?;
    ensure!(stderr.contains("no disk number 1"), "{stderr}");
    Ok(())
}
