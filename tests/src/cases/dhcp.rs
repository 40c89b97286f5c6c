//! The script for the guest's network (`resources/linux/network`), with what a DHCP client tells it: in a
//! network and a mount namespace of this machine, without a guest. The guest's own clients are asked in
//! `readme.rs` and `kernels.rs`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::net::with_tap;
use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::Host;
use crate::process::Process;
use crate::{ensure, ensure_eq, namespace};

pub(super) const CASES: &[Case] = &[Case {
    name: "the_guests_network_is_what_dhcp_says",
    run: leases,
    needs: Needs::NO_GUEST.as_root().with_programs(&["ip", "busybox"]),
}];

const SCRIPT: &str = include_str!("../../../resources/linux/network");
const LIMIT: Duration = Duration::from_secs(10);

/// The script beside a busybox, as in a guest, about the interface `t0`.
struct Network<'h>(&'h Host);

impl Network<'_> {
    /// Calls the script with a client's word and variables.
    fn tell(&self, word: &str, variables: &[(&str, &str)]) -> Outcome {
        let mut command = Command::new("busybox");
        command
            .arg("sh")
            .arg(self.0.path("guest/network"))
            .arg(word)
            .env("interface", "t0")
            .envs(variables.iter().copied());
        let process = Process::spawn(&mut command, Stdio::null())?;
        process.wait(LIMIT)?.expect_code(0).map(drop)
    }

    /// Addresses and routes as the kernel has them.
    fn state(&self) -> Outcome<String> {
        let mut said = String::new();
        for words in [
            ["-4", "-o", "addr", "show", "t0"],
            ["-4", "route", "show", "dev", "t0"],
        ] {
            let output = Command::new("ip").args(words).output()?;
            said += &String::from_utf8_lossy(&output.stdout);
        }
        Ok(said)
    }
}

fn resolv_conf() -> Outcome<String> {
    Ok(fs::read_to_string("/etc/resolv.conf")?)
}

fn leases(host: &Host) -> Outcome {
    with_tap()?;
    namespace::private_mounts()?;
    // The kernel's files of this namespace's interfaces.
    namespace::mount_sysfs()?;
    namespace::mount_tmpfs(Path::new("/run"), 1 << 20)?;
    fs::create_dir_all("/run/cloudlet-network")?;
    fs::write(host.path("empty"), "")?;
    namespace::bind(&host.path("empty"), Path::new("/etc/resolv.conf"))?;
    fs::create_dir_all(host.path("guest"))?;
    fs::write(host.path("guest/network"), SCRIPT)?;
    fs::copy("/bin/busybox", host.path("guest/busybox"))?;
    let network = Network(host);
    let lease = [
        ("ip", "10.7.0.5"),
        ("mask", "24"),
        ("router", "10.7.0.1 10.7.0.2"),
        ("dns", "10.7.0.53 10.7.0.54"),
        ("domain", "lane.example"),
    ];
    fs::write("/run/cloudlet-network/t0.new", "")?;
    network.tell("deconfig", &[])?;
    network.tell("bound", &lease)?;
    let bound = network.state()?;
    for part in [
        "inet 10.7.0.5/24",
        "default via 10.7.0.1",
        "inet 10.9.0.254/24",
    ] {
        ensure!(bound.contains(part), "no {part:?} in {bound}");
    }
    let names =
        "# Of the DHCP server\nsearch lane.example\nnameserver 10.7.0.53\nnameserver 10.7.0.54\n";
    ensure_eq!(resolv_conf()?, names, "name servers");

    // A client that begins anew, as after a restore, takes nothing away before it knows better.
    network.tell("renew", &lease)?;
    fs::write("/run/cloudlet-network/t0.new", "")?;
    network.tell("deconfig", &[])?;
    ensure_eq!(network.state()?, bound, "what a client that begins leaves");

    // Another network, whose router is outside of it; routes instead of a router (RFC 3442).
    let other = [("ip", "10.6.0.5"), ("mask", "32"), ("router", "10.1.1.1")];
    network.tell("bound", &[&other[..], &[("dns", "10.6.0.53")]].concat())?;
    let moved = network.state()?;
    for part in [
        "inet 10.6.0.5/32",
        "default via 10.1.1.1",
        "inet 10.9.0.254/24",
    ] {
        ensure!(moved.contains(part), "no {part:?} in {moved}");
    }
    ensure!(
        !moved.contains("10.7.0."),
        "left of the other network: {moved}"
    );
    ensure!(!resolv_conf()?.contains("10.7.0."), "an old name server");
    let routes = [("staticroutes", "10.5.0.0/16 10.1.1.1 10.4.0.0/16 0.0.0.0")];
    network.tell("renew", &[&other[..], &routes].concat())?;
    let routed = network.state()?;
    for part in ["10.5.0.0/16 via 10.1.1.1", "10.4.0.0/16 scope link"] {
        ensure!(routed.contains(part), "no {part:?} in {routed}");
    }

    // A lease that is lost takes its address along; what others have set stays.
    network.tell("deconfig", &[])?;
    let lost = network.state()?;
    ensure!(
        !lost.contains("10.6.0.5"),
        "an address without a lease: {lost}"
    );
    ensure!(
        lost.contains("inet 10.9.0.254/24"),
        "somebody else's address: {lost}"
    );
    fs::write("/etc/resolv.conf", "nameserver 10.3.3.3\n")?;
    network.tell("bound", &lease)?;
    ensure_eq!(
        resolv_conf()?,
        "nameserver 10.3.3.3\n",
        "somebody else's name server"
    );
    Ok(())
}
