//! Network cards, end to end: what stands behind them, and Linux guests that use them. Each case has
//! a network namespace of its own, which goes with it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use super::{Case, Needs, is_long};
use crate::failure::{Failure, Outcome};
use crate::host::{Host, Lane};
use crate::linux::LinuxGuest;
use crate::{ensure, ensure_eq, namespace, process};

/// What each of the two guests sends the other: a file so often. That is 1 GiB; what lane 2 emulates
/// passes about 1 MiB a second each way, and makes do with 16 MiB, or 64 in a long run.
const FILE_MIB: u32 = 16;
const FETCHES: u32 = 64;
const FETCHES_LANE_2_LONG: u32 = 4;
const FETCHES_LANE_2: u32 = 1;
/// Bytes a frame, on average and with acknowledgements, that only segmentation offload reaches: it is
/// what the longest Ethernet frame has.
const FRAME_BYTES_MIN: u64 = 1514;
/// Bits of the features that a Linux driver takes of a TAP: CSUM, GUEST_CSUM, MAC, GUEST_TSO4 and 6,
/// HOST_TSO4 and 6, MRG_RXBUF, STATUS.
const FEATURES: [usize; 9] = [0, 1, 5, 7, 8, 11, 12, 15, 16];

const PATIENCE: Duration = Duration::from_secs(20);
const EXCHANGE: Duration = Duration::from_secs(60);

const MODULES: &[&str] = &["virtio_mmio", "virtio_net"];

pub(super) const CASES: &[Case] = &[
    Case {
        name: "network_cards_are_kept_and_connected_anew",
        run: kept,
        needs: Needs::GUEST.as_root(),
    },
    Case {
        name: "passt_ends_with_its_vm",
        run: passt_ends,
        needs: Needs::GUEST.as_root().with_programs(&["passt"]),
    },
    Case {
        name: "linux_guests_exchange_data_over_a_bridge",
        run: bridge,
        needs: Needs::linux(&["6.1"]).as_root().within(180),
    },
    Case {
        name: "linux_finds_its_network_again_after_a_restore",
        run: restored,
        needs: Needs::linux(&["6.1"]).as_root().within(120),
    },
    Case {
        name: "linux_serves_a_published_port",
        run: published,
        needs: Needs::linux(&["6.1"])
            .as_root()
            .with_programs(&["passt"])
            .within(120),
    },
];

/// Changes the case's own network.
#[track_caller]
fn ip(arguments: &str) -> Outcome {
    let done = Command::new("ip").args(arguments.split(' ')).output()?;
    let error = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "ip {arguments}: {error}");
    Ok(())
}

/// A namespace with a TAP interface `t0`, whose host has the address 10.9.0.254.
pub(super) fn with_tap() -> Outcome {
    namespace::private_network()?;
    ip("tuntap add t0 mode tap")?;
    ip("addr add 10.9.0.254/24 dev t0")?;
    ip("link set t0 up")
}

/// A namespace whose host has the address 1 of the network `net` (three numbers) and a route to nowhere,
/// which passt takes for its network, and gives to the guest.
pub(super) fn with_route(net: &str) -> Outcome {
    namespace::private_network()?;
    ip("tuntap add t0 mode tap")?;
    ip(&format!("addr add {net}.1/24 dev t0"))?;
    ip("link set t0 up")?;
    ip(&format!("route add default via {net}.254"))
}

/// Asks the server at `address` until it says `expected`. The client speaks first: passt completes a
/// connection to the guest only with the client's first byte.
#[track_caller]
fn wait_for_answer(host: &Host, address: &str, expected: &str) -> Outcome {
    let address: SocketAddr = address.parse().map_err(|_| Failure::new("no address"))?;
    host.wait_until(&format!("{expected:?} from {address}"), PATIENCE, || {
        let timeout = host.limit(Duration::from_secs(1));
        let mut stream = TcpStream::connect_timeout(&address, timeout).ok()?;
        stream.set_read_timeout(Some(timeout)).ok()?;
        stream.write_all(b"what?\n").ok()?;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        (answer.trim() == expected).then_some(())
    })
}

fn listens(address: &str) -> bool {
    TcpStream::connect(address).is_ok()
}

fn kept(host: &Host) -> Outcome {
    with_tap()?;
    let mac = "02:00:00:00:00:0a";
    let stderr = host.fails(&["run", "--detach", "--net", "tap=t9"], 1)?;
    ensure!(stderr.contains("ip tuntap add t9"), "no help: {stderr}");
    let tap = format!("tap=t0,mac={mac},bandwidth=100,packets=1000");
    host.boot("web", &["--net", &tap])?;
    let card = host.status("web")?["net0"].clone();
    ensure_eq!(card["mac"], mac, "address");
    ensure_eq!(card["link"], "up", "link");
    ensure_eq!(card["backend"], "tap t0", "backend");
    let stderr = host.fails(&["run", "--detach", "--net", "tap=t0"], 1)?;
    ensure!(stderr.contains("in use"), "not said so: {stderr}");

    let snap = host.path("snap");
    let snap = snap.to_string_lossy();
    host.ok(&["snapshot", "web", &snap])?;
    host.ok(&["restore", &snap, "--name", "alone"])?;
    let card = host.status("alone")?["net0"].clone();
    ensure_eq!(card["mac"], mac, "address of a restored card");
    ensure_eq!(card["link"], "down", "link without a --net");
    ensure!(card["backend"].is_null(), "backend without a --net: {card}");

    let more = ["restore", &snap, "--net", "tap=t0", "--net", "tap=t1"];
    ensure!(
        host.fails(&more, 1)?.contains("2 times"),
        "more than there are"
    );
    let other = ["restore", &snap, "--net", "tap=t0,mac=02:00:00:00:00:0b"];
    ensure!(host.fails(&other, 1)?.contains(mac), "another address");
    let clones = ["restore", &snap, "--clones", "2", "--net", "tap=t0"];
    ensure!(host.fails(&clones, 1)?.contains("one by one"), "clones");
    host.ok(&["stop", "web"])?;
    host.ok(&["restore", &snap, "--name", "again", "--net", "tap=t0"])?;
    ensure_eq!(
        host.status("again")?["net0"]["link"],
        "up",
        "link after a restore"
    );
    host.fails(&["run", "--detach", "--publish", "1:2"], 1)?;
    Ok(())
}

fn passt_ends(host: &Host) -> Outcome {
    with_route("10.9.0")?;
    let address = "127.0.0.1:18080";
    let user = [
        "--net",
        "user",
        "--publish",
        "18080-18082:80-82",
        "--publish",
        "10.9.0.1:15353-15354:53-54/udp",
    ];
    let pid = host.boot("web", &user)?;
    ensure_eq!(host.status("web")?["net0"]["link"], "up", "link");
    for port in 18080..=18082 {
        ensure!(
            listens(&format!("127.0.0.1:{port}")),
            "nobody listens on port {port}"
        );
    }
    // What can be bound is nobody's.
    for port in [15353, 15354] {
        let taken = UdpSocket::bind(("10.9.0.1", port)).is_err();
        ensure!(taken, "UDP port {port} is nobody's");
    }
    // The port is taken.
    let stderr = host.fails(&[&["run", "--detach"], &user[..]].concat(), 1)?;
    ensure!(stderr.contains("passt"), "not said so: {stderr}");
    process::signal_pid(pid, libc::SIGKILL)?;
    host.wait_for_end(pid)?;
    host.wait_until("the end of passt", PATIENCE, || {
        (!listens(address)).then_some(())
    })
}

/// A script that serves `hello` on port 80 and tells of the link whenever it changes.
const SERVE: &str = "
    while :; do echo hello | nc -l -p 80; done &
    echo serving
    last=
    while :; do
        carrier=$(cat /sys/class/net/eth0/carrier)
        [ \"$carrier\" = \"$last\" ] || echo \"carrier: $carrier\"
        last=$carrier
        sleep 1
    done
";

fn restored(host: &Host) -> Outcome {
    with_tap()?;
    let script = format!("ip addr add 10.9.0.1/24 dev eth0; ip link set eth0 up\n{SERVE}");
    let guest = LinuxGuest::new(host, "6.1", MODULES, &script)?;
    guest.boot(host, "vm", &["--memory", "128", "--net", "tap=t0"])?;
    guest.wait_for(host, "vm", "carrier: 1")?;
    wait_for_answer(host, "10.9.0.1:80", "hello")?;
    let snap = host.path("snap");
    let snap = snap.to_string_lossy();
    host.ok(&["snapshot", "vm", &snap])?;
    host.ok(&["stop", "vm"])?;

    host.ok(&["restore", &snap, "--name", "cut"])?;
    guest.wait_for(host, "cut", "carrier: 0")?;
    host.ok(&["stop", "cut"])?;
    host.ok(&["restore", &snap, "--name", "again", "--net", "tap=t0"])?;
    wait_for_answer(host, "10.9.0.1:80", "hello")?;
    ensure!(
        !host.console("again").contains("carrier: 0"),
        "the link went down: {}",
        host.console("again")
    );
    Ok(())
}

fn published(host: &Host) -> Outcome {
    with_route("10.9.0")?;
    let script = format!(
        "printf '%s\\n' '#!/bin/sh' '[ \"$1\" = bound ] || exit 0' \
             'ip addr add $ip/24 dev $interface' 'ip route add default via $router' >/tmp/bound
         chmod +x /tmp/bound
         ip link set eth0 up
         udhcpc -q -n -i eth0 -s /tmp/bound
         {SERVE}"
    );
    let guest = LinuxGuest::new(host, "6.1", MODULES, &script)?;
    let net = ["--net", "user", "--publish", "18080:80"];
    guest.boot(host, "vm", &[&["--memory", "128"], &net[..]].concat())?;
    guest.wait_for(host, "vm", "serving")?;
    wait_for_answer(host, "127.0.0.1:18080", "hello")
        .map_err(|failure| Failure::new(format!("{failure}; the console:\n{}", host.console("vm"))))
}

/// A script for the guest `me`, which serves a file and fetches the other's again and again, both at
/// once. Long frames are what lane 2 has the time for: the server hands whole files to the kernel, which
/// is told not to make its frames as short as it would for a slow network (tcp_tso_autosize() in
/// net/ipv4/tcp_output.c).
fn exchange(me: u32, fetches: u32) -> String {
    let other = 3 - me;
    format!(
        "
        mkdir /srv
        dd if=/dev/urandom of=/srv/file bs=1M count={FILE_MIB} 2>/dev/null
        echo \"has: $(md5sum </srv/file)\"
        httpd -p 7000 -h /srv
        echo 32 >/proc/sys/net/ipv4/tcp_min_tso_segs
        ip addr add 10.9.0.{me}/24 dev eth0
        ip link set eth0 up
        echo \"features: $(cat /sys/class/net/eth0/device/features)\"
        until ping -c 1 -W 1 10.9.0.{other} >/dev/null; do :; done
        n=0
        while [ $n -lt {fetches} ]; do
            wget -q -O - http://10.9.0.{other}:7000/file | md5sum
            n=$((n + 1))
        done | uniq -c | sed 's/^ */got: /'
        cd /sys/class/net/eth0/statistics
        echo \"packets: $(cat rx_packets) bytes: $(cat rx_bytes) errors: $(cat rx_errors) end\"
        sleep 1000
        "
    )
}

/// The word behind `key` on a console.
#[track_caller]
fn word<'a>(console: &'a str, key: &str) -> Outcome<&'a str> {
    let found = console.split(key).nth(1);
    let word = found.and_then(|rest| rest.split_whitespace().next());
    word.ok_or_else(|| Failure::new(format!("no {key:?} on the console:\n{console}")))
}

fn bridge(host: &Host) -> Outcome {
    namespace::private_network()?;
    ip("link add br0 type bridge")?;
    for tap in ["t1", "t2"] {
        ip(&format!("tuntap add {tap} mode tap"))?;
        ip(&format!("link set {tap} master br0"))?;
        ip(&format!("link set {tap} up"))?;
    }
    ip("link set br0 up")?;
    let fetches = match host.lane() {
        Lane::One => FETCHES,
        Lane::Two if is_long() => FETCHES_LANE_2_LONG,
        Lane::Two => FETCHES_LANE_2,
    };
    for me in [1, 2] {
        let guest = LinuxGuest::new(host, "6.1", MODULES, &exchange(me, fetches))?;
        let tap = format!("tap=t{me}");
        let name = format!("vm{me}");
        guest.boot(host, &name, &["--memory", "128", "--net", &tap])?;
    }
    for name in ["vm1", "vm2"] {
        host.wait_until(&format!("the end of {name}'s data"), EXCHANGE, || {
            host.console(name).contains(" end").then_some(())
        })
        .map_err(|failure| {
            let state = host.status(name).map(|status| status["net0"].to_string());
            let state = state.unwrap_or_default();
            Failure::new(format!("{failure}; {state}; {}", host.console(name)))
        })?;
    }
    let consoles = [host.console("vm1"), host.console("vm2")];
    for (console, other) in [(&consoles[0], &consoles[1]), (&consoles[1], &consoles[0])] {
        let got = format!("got: {fetches} {} ", word(other, "has: ")?);
        ensure!(console.contains(&got), "no {got:?} in {console}");
        let features = word(console, "features: ")?.as_bytes();
        for bit in FEATURES {
            ensure_eq!(
                features.get(bit),
                Some(&b'1'),
                "feature {bit} of {features:?}"
            );
        }
        let number = |key| Ok::<u64, Failure>(word(console, key)?.parse().unwrap_or(0));
        let (packets, bytes) = (number("packets: ")?, number("bytes: ")?);
        ensure!(
            bytes > u64::from(FILE_MIB * fetches) << 20 && bytes / packets.max(1) > FRAME_BYTES_MIN,
            "{bytes} bytes came in {packets} frames"
        );
        ensure_eq!(word(console, "errors: ")?, "0", "receive errors");
    }
    for name in ["vm1", "vm2"] {
        ensure_eq!(
            host.status(name)?["net0"]["dropped"],
            0,
            "frames dropped by {name}"
        );
    }
    Ok(())
}
