//! Debian's kernels with the initial RAM disk that Debian's own tools make, and Debian's userland, in
//! machines of different sizes.

use std::process::Stdio;
use std::time::Duration;

use super::net::with_route;
use super::{Case, Needs, is_long};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, pid_of};
use crate::linux::{self, DEBIAN, SYSTEMD};
use crate::process::Process;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "debian_6_1_boots_on_machines_of_all_sizes",
        run: |host| boots(host, "6.1", &[(4, 4096), (1, 128)]),
        needs: needs(&["6.1/initrd.debian", DEBIAN]),
    },
    Case {
        name: "debian_6_1_cloud_boots_on_machines_of_all_sizes",
        run: |host| boots(host, "6.1-cloud", &[(2, 128), (1, 1024)]),
        needs: needs(&["6.1-cloud/initrd.debian", DEBIAN]),
    },
    Case {
        name: "debian_6_12_boots_on_machines_of_all_sizes",
        run: |host| boots(host, "6.12", &[(1, 128), (2, 4096)]),
        needs: needs(&["6.12/initrd.debian", DEBIAN]),
    },
    Case {
        name: "debian_reboots_with_exit_code_10",
        run: reboots,
        needs: needs(&["6.1/initrd.debian", DEBIAN]),
    },
    Case {
        name: "debian_with_systemd_is_a_base_vm",
        run: with_systemd,
        needs: needs(&[SYSTEMD]).as_root().with_programs(&["passt"]),
    },
];

const fn needs(guests: &'static [&'static str]) -> Needs {
    Needs::linux(guests).with_memory_mib(1536).within(180)
}

/// How long a guest may take until its agent answers, in lane 1's time.
const BOOT: Duration = Duration::from_secs(70);
/// How long it may take to end, once it was told to.
const END: Duration = Duration::from_secs(15);
const CMDLINE: &str = "console=ttyS0 panic=-1 root=/dev/vda rw init=/usr/lib/cloudlet/init";

/// What a healthy guest says of itself. There is no PCI, and a kernel finds that worth an error.
const LOOK: &str = "
    echo kernel $(uname -r)
    echo cpus $(nproc)
    echo memory $(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
    echo clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
    echo root $(findmnt -n -o SOURCE,FSTYPE /)
    dmesg --level=emerg,alert,crit,err | grep -v 'PCI: Fatal: No config space' | sed 's/^/error: /'
    echo looked";

/// What a guest says of its network cards and their DHCP clients.
const CARDS: &str = "
    busybox ip -4 -o addr
    busybox ps | grep -q '[u]dhcpc' || echo no client";
/// The same, after the guest was given a network service of its own.
const OWN_NETWORK: &str = "set -e
    mkdir -p /etc/systemd/network
    printf '[Match]\\nName=e*\\n[Network]\\nDHCP=yes\\n' >/etc/systemd/network/e.network
    systemctl --quiet enable systemd-networkd
    systemctl restart cloudlet-network
    busybox ps | grep -q '[u]dhcpc' || echo no client";

/// Starts the kernel with Debian's initial RAM disk and root, and waits for its agent.
fn start(host: &Host, kernel: &str, cpus: u32, memory_mib: u32) -> Outcome<Process> {
    let dir = linux::dir(kernel)?;
    let root = linux::dir(DEBIAN)?.join("root.ext4");
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let (kernel, initrd) = (path(&dir.join("vmlinuz")), path(&dir.join("initrd.debian")));
    let (root, cpus, memory) = (path(&root), cpus.to_string(), memory_mib.to_string());
    let machine = ["--cpus", &cpus, "--memory", &memory, "--disk", &root];
    let boot = [
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        CMDLINE,
    ];
    let args = [&["run", "--name", "vm"], &boot[..], &machine].concat();
    let vm = Process::spawn(&mut host.command(&args), Stdio::piped())?;
    let runs = || host.state("vm").is_ok_and(|state| state == "running");
    host.wait_until("the VM", END, || runs().then_some(()))?;
    await_agent(host, "true")?;
    Ok(vm)
}

/// Runs `script` in the guest of the VM `vm` once that has booted. What it said is lost with its VM,
/// hence told here.
pub(super) fn await_agent(host: &Host, script: &str) -> Outcome {
    let limit = host.limit(BOOT);
    let wait = limit.as_secs().to_string();
    let exec = host.spawn(&["exec", "--wait", &wait, "vm", "--", "sh", "-c", script])?;
    exec.wait(limit * 2)?
        .expect_code(0)
        .map(drop)
        .map_err(|failure| Failure::new(format!("{failure}{}", host.evidence())))
}

/// Runs a command in the guest that ends it, and perhaps its own connection with it: the VM's exit
/// code is to be `code`.
fn ends(host: &Host, vm: Process, command: &str, code: i32) -> Outcome {
    host.run(&["exec", "vm", "--", command])?;
    vm.wait(host.limit(END))?.expect_code(code).map(drop)
}

/// Boots a kernel with each number of vCPUs and MiB of memory, looks round in it, and shuts it down
/// from inside; but for a long run, one machine of each kernel.
fn boots(host: &Host, kernel: &str, machines: &[(u32, u32)]) -> Outcome {
    let machines = if is_long() { machines } else { &machines[..1] };
    for (cpus, memory_mib) in machines.iter().copied() {
        let at = format!("{cpus} vCPUs, {memory_mib} MiB");
        let vm = start(host, kernel, cpus, memory_mib)?;
        let said = host.ok(&["exec", "vm", "--", "sh", "-c", LOOK])?;
        let field = |name: &str| {
            let found = said.lines().find_map(|line| line.strip_prefix(name));
            found.ok_or_else(|| Failure::new(format!("{at}: no {name}in {said}")))
        };
        ensure!(said.ends_with("looked\n"), "{at}: {said}");
        ensure!(!said.contains("error: "), "{at}: {said}");
        ensure_eq!(field("cpus ")?, cpus.to_string(), "{at}: vCPUs");
        ensure_eq!(field("clock ")?, "kvm-clock", "{at}: clock");
        ensure_eq!(field("root ")?, "/dev/vda ext4", "{at}: root");
        // The kernel keeps some for itself: its own image, and 1/64 for what describes
        // pages.
        let (all, kib) = (
            u64::from(memory_mib) << 10,
            field("memory ")?.parse::<u64>()?,
        );
        let least = all - (64 << 10) - all / 32;
        ensure!((least..all).contains(&kib), "{at}: {kib} KiB of memory");
        ends(host, vm, "poweroff", 0)?;
    }
    Ok(())
}

fn reboots(host: &Host) -> Outcome {
    for cpus in [1, 2] {
        let vm = start(host, "6.1", cpus, 256)?;
        ends(host, vm, "reboot", 10)?;
    }
    Ok(())
}

/// All of Debian as `image build` makes it: published, restored, and shut down by its power button.
fn with_systemd(host: &Host) -> Outcome {
    with_route("10.9.0")?;
    let image = linux::dir(SYSTEMD)?.to_string_lossy().into_owned();
    let machine = ["--image", &image, "--memory", "384", "--cpus", "2"];
    let machine = [&machine[..], &["--net", "user"]].concat();
    host.ok(&[&["run", "--detach", "--name", "vm"], &machine[..]].concat())?;
    await_agent(host, "true")?;
    // Waiting for its end is the guest's own: asked again and again, it would not come to it.
    let start = [
        "exec",
        "vm",
        "--",
        "systemctl",
        "is-system-running",
        "--wait",
    ];
    host.spawn(&start)?.wait(host.limit(BOOT))?;
    let state = ["exec", "vm", "--", "systemctl", "is-system-running"];
    let failed = ["exec", "vm", "--", "systemctl", "--failed", "--no-legend"];
    ensure_eq!(host.ok(&failed)?, "", "services that failed");
    ensure_eq!(host.ok(&state)?, "running\n", "systemd");
    let cards = host.ok(&["exec", "vm", "--", "sh", "-c", CARDS])?;
    ensure!(cards.contains("inet 10.9.0.1/24"), "no lease: {cards}");
    ensure!(!cards.contains("no client"), "no client: {cards}");
    host.ok(&["exec", "vm", "--", "touch", "/run/here"])?;
    host.ok(&["base", "create", "all", "--from", "vm"])?;
    host.ok(&["stop", "vm"])?;

    let vm = pid_of(&host.json(&["restore", "all", "--name", "vm"])?)?;
    host.ok(&["exec", "vm", "--", "test", "-e", "/run/here"])?;
    ensure_eq!(host.ok(&state)?, "running\n", "systemd after the restore");
    let cards = host.ok(&["exec", "vm", "--", "sh", "-c", OWN_NETWORK])?;
    ensure!(cards.contains("no client"), "beside networkd: {cards}");
    host.shut_down("vm")?;
    host.wait_for_end(vm)
}
