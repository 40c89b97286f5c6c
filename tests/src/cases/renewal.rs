//! Restored guests: none has the random numbers of another. And guests that are told to shut down.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use cloudlet_resources::client::Client;
use cloudlet_resources::protocol::PORT;
use serde_json::Value;

use super::kernels::await_agent;
use super::{Case, Needs};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, pid_of};
use crate::linux::{self, DEBIAN, SYSTEMD};
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "clones_of_the_embedded_guest_draw_other_numbers",
        run: embedded,
        needs: Needs::GUEST,
    },
    Case {
        name: "debian_clones_share_no_random_numbers",
        run: clones,
        needs: needs(&[DEBIAN]),
    },
    Case {
        name: "debian_is_shut_down_by_its_agent",
        run: shuts_down,
        needs: needs(&[DEBIAN]).with_programs(&["tar", "busybox"]),
    },
    Case {
        name: "debian_with_systemd_is_shut_down_by_its_agent",
        run: systemd_shuts_down,
        needs: needs(&[SYSTEMD]),
    },
];

const fn needs(guests: &'static [&'static str]) -> Needs {
    Needs::linux(guests).with_memory_mib(1536).within(150)
}

/// How long a guest may take until its agent answers, in lane 1's time.
const BOOT: Duration = Duration::from_secs(70);
/// How long a restored guest may take to renew, in lane 1's time.
const RENEWS: Duration = Duration::from_secs(30);

fn renewal(host: &Host, vm: &str) -> Outcome<String> {
    let status = host.status(vm)?;
    Ok(status["renewal"]["state"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// A number that the embedded guest draws.
fn random_of(host: &Host, vm: &str) -> Outcome<String> {
    let status = host.status(vm)?;
    let stream = UnixStream::connect(status["vsock"].as_str().unwrap_or_default())?;
    let client = Client::connect(stream, PORT);
    let said = client.and_then(|mut client| client.status());
    let said = said.map_err(|error| Failure::new(format!("{vm}: {error}")))?;
    let said: Value = serde_json::from_str(&said)?;
    Ok(said["random"].as_str().unwrap_or_default().to_owned())
}

/// The embedded guest draws from the host whenever it needs a number, and says so of itself.
fn embedded(host: &Host) -> Outcome {
    host.boot("web", &[])?;
    ensure!(host.status("web")?["renewal"].is_null(), "nothing to renew");
    let snap = host.path("snap").to_string_lossy().into_owned();
    host.ok(&["snapshot", "web", &snap])?;
    host.ok(&["stop", "web"])?;
    host.ok(&["restore", &snap, "--name", "c", "--clones", "3"])?;
    let again = host.path("again").to_string_lossy().into_owned();
    host.ok(&["snapshot", "c-1", &again])?;
    host.ok(&["restore", &again, "--name", "d", "--clones", "2"])?;
    let mut drawn = HashSet::new();
    for vm in ["c-1", "c-2", "c-3", "d-1", "d-2"] {
        let random = random_of(host, vm)?;
        ensure!(random.len() == 16, "{vm} drew {random}");
        ensure!(drawn.insert(random), "{vm} drew what another clone did");
        ensure_eq!(renewal(host, vm)?, "no agent", "renewal of {vm}");
    }
    Ok(())
}

/// A program that draws all the time, and writes down what and when.
const DRAW: &str = "while :; do
        read up rest </proc/uptime; read id </proc/sys/kernel/random/uuid; echo $up $id
    done >/run/drawn 2>/dev/null";

/// What `vm` has drawn: seconds since its boot, and the numbers.
fn drawn(host: &Host, vm: &str) -> Outcome<Vec<(f64, String)>> {
    let said = host.ok(&["exec", vm, "--", "cat", "/run/drawn"])?;
    let line = |line: &str| {
        let (up, id) = line.split_once(' ')?;
        Some((up.parse().ok()?, id.to_owned()))
    };
    // The last line may be one that is just being written.
    let whole = &said[..said.rfind('\n').unwrap_or(0)];
    let lines: Option<Vec<_>> = whole.lines().map(line).collect();
    lines.ok_or_else(|| Failure::new(format!("{vm} has drawn {whole}")))
}

/// Holds two clones against each other: what both drew is the beginning of either, and each has more.
/// Seconds for which both drew the same after they were restored, to the hundredth that a guest tells.
fn share_only_the_past(host: &Host, vms: [&str; 2]) -> Outcome<f64> {
    let [one, other] = [drawn(host, vms[0])?, drawn(host, vms[1])?];
    let same = one.iter().zip(&other).take_while(|(a, b)| a.1 == b.1);
    let same = same.count();
    ensure!(same > 0, "{vms:?} have no past in common");
    let later: HashSet<&String> = one[same..].iter().map(|(_, id)| id).collect();
    ensure!(!later.is_empty(), "{} drew nothing of its own", vms[0]);
    ensure!(other.len() > same, "{} drew nothing of its own", vms[1]);
    let shared = other[same..].iter().find(|(_, id)| later.contains(id));
    ensure!(
        shared.is_none(),
        "{vms:?} share {shared:?} after they differed"
    );
    // The guest's clock has gone on while it was a file: that is the longest pause.
    let pause = |at: &usize| one[at + 1].0 - one[*at].0;
    let restored = (0..one.len() - 1).max_by(|a, b| pause(a).total_cmp(&pause(b)));
    let first = restored.map_or(0, |at| at + 1);
    Ok((one[same - 1].0 - one[first].0).max(0.0))
}

/// The default image, whose kernel need not know of generation ids: clones, and clones of a clone, with
/// a program that draws across the snapshot.
fn clones(host: &Host) -> Outcome {
    let image = linux::dir(DEBIAN)?.to_string_lossy().into_owned();
    host.ok(&[
        "run", "--image", &image, "--name", "vm", "--memory", "192", "--detach",
    ])?;
    let draw = format!(
        "setsid sh -c '{DRAW}' </dev/null >/dev/null 2>&1 &
        until [ -s /run/drawn ]; do sleep 0.1; done"
    );
    await_agent(host, &draw)?;
    let snap = host.path("snap").to_string_lossy().into_owned();
    host.ok(&["snapshot", "vm", &snap])?;
    host.ok(&["stop", "vm"])?;
    host.ok(&["restore", &snap, "--name", "c", "--clones", "2", "--paused"])?;
    ensure_eq!(renewal(host, "c-1")?, "waiting", "renewal of a paused VM");
    // A snapshot of a clone that has not been renewed.
    let again = host.path("again").to_string_lossy().into_owned();
    host.ok(&["snapshot", "c-2", &again])?;
    host.ok(&["restore", &again, "--name", "d"])?;
    let mut first = HashSet::new();
    for vm in ["c-1", "c-2", "d"] {
        if vm != "d" {
            host.ok(&["resume", vm])?;
        }
        // It is the first to reach the guest, and waits until that has renewed.
        let wait = host.limit(RENEWS).as_secs().to_string();
        let uuid = "/proc/sys/kernel/random/uuid";
        let id = host.ok(&["exec", "--wait", &wait, vm, "--", "cat", uuid])?;
        ensure!(id.trim().len() == 36, "{vm} drew {id}");
        ensure!(first.insert(id), "{vm} drew first what another clone did");
        let status = host.status(vm)?["renewal"].clone();
        ensure_eq!(status["state"], "renewed", "renewal of {vm}");
        println!("renewed: {status}");
    }
    for vms in [["c-1", "c-2"], ["c-1", "d"], ["c-2", "d"]] {
        let seconds = share_only_the_past(host, vms)?;
        println!("{vms:?} drew the same for {seconds} s after they were restored");
    }
    Ok(())
}

/// Shuts `vm` down, which is to be by its agent.
fn by_agent(host: &Host, vm: &str, pid: u32) -> Outcome {
    let timeout = host.limit(BOOT).as_secs().to_string();
    let said = host.json(&["shutdown", vm, "--timeout", &timeout])?;
    ensure_eq!(said["asked"], "agent", "who was asked");
    host.wait_for_end(pid)
}

/// Starts the image with a layer of its own on its root.
fn start(host: &Host, image: &str, layer: &str) -> Outcome<u32> {
    let dir = Path::new(image);
    let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let manifest: Value = serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?;
    let cmdline = manifest["cmdline"].as_str().unwrap_or_default();
    let disk = format!("{},layer={layer}", file("root.ext4"));
    let (kernel, initrd) = (file("vmlinuz"), file("initrd.img"));
    let boot = [
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        cmdline,
    ];
    let args = [
        "run", "--name", "vm", "--memory", "384", "--disk", &disk, "--detach",
    ];
    let pid = pid_of(&host.json(&[&args[..], &boot[..]].concat())?)?;
    await_agent(host, "true")?;
    Ok(pid)
}

/// Writes to the guest's root, shuts it down, and boots it again: the file system needs no recovery.
fn is_clean_after(host: &Host, image: &str, layer: &str) -> Outcome {
    let pid = start(host, image, layer)?;
    host.ok(&["exec", "vm", "--", "sh", "-c", "echo kept >/kept"])?;
    by_agent(host, "vm", pid)?;
    let pid = start(host, image, layer)?;
    let look = "read word </kept; echo $word; dmesg | grep -E 'EXT4-fs.*(recover|orphan|error)'";
    let said = host.run(&["exec", "vm", "--", "sh", "-c", look])?;
    ensure_eq!(said.stdout, "kept\n", "the root after a shutdown");
    by_agent(host, "vm", pid)
}

fn shuts_down(host: &Host) -> Outcome {
    let image = linux::dir(DEBIAN)?.to_string_lossy().into_owned();
    is_clean_after(host, &image, "layer")?;
    // A root of another origin, which has nothing of ours: the init comes with the initial RAM disk.
    let tree = host.path("tree");
    fs::create_dir_all(tree.join("bin"))?;
    let busybox = super::images::which("busybox")?;
    fs::copy(busybox, tree.join("bin/busybox"))?;
    for name in ["sh", "cat", "true", "dmesg", "grep"] {
        symlink("busybox", tree.join("bin").join(name))?;
    }
    let source = tree.to_string_lossy().into_owned();
    host.ok(&[
        "image",
        "import",
        &source,
        "imported",
        "--size",
        "64",
        "--kernel-from",
        &image,
    ])?;
    let imported = host.path("imported").to_string_lossy().into_owned();
    is_clean_after(host, &imported, "other-layer")
}

fn systemd_shuts_down(host: &Host) -> Outcome {
    let image = linux::dir(SYSTEMD)?.to_string_lossy().into_owned();
    is_clean_after(host, &image, "layer")
}
