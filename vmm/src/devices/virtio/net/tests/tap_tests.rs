//! A real TAP interface, in a network namespace of the test's own. They need root.

use std::net::UdpSocket;
use std::process::Command;

use super::*;

const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const ALL: u64 = CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;

fn ip(arguments: &str) {
    let done = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "ip {arguments}: {error}");
}

/// Runs `test` on a thread with a network namespace of its own, in which there is a TAP interface
/// `t0` with the address 10.9.0.1/24, and 10.9.0.2 is the guest's. False without root.
fn in_namespace(test: impl FnOnce() + Send + 'static) -> bool {
    let thread = std::thread::spawn(|| {
        // SAFETY: unshare takes one integer; a network namespace is this thread's alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return false;
        }
        ip("tuntap add t0 mode tap");
        ip("addr add 10.9.0.1/24 dev t0");
        ip("link set t0 address 02:00:00:00:00:01");
        ip("link set t0 up");
        ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:07 dev t0");
        test();
        true
    });
    let ran = thread.join().unwrap();
    if !ran {
        println!("not run: no network namespace without root");
    }
    ran
}

fn tap_net(features: u64) -> (Driver, Arc<NetStats>) {
    let device = net(Some(Box::new(Tap::open("t0").unwrap())));
    let stats = device.stats();
    let driver = Driver::started(Box::new(device), features | MRG | EVENT_IDX);
    (driver, stats)
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0;
    for pair in parts.concat().chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn be(value: usize) -> [u8; 2] {
    u16::try_from(value).unwrap().to_be_bytes()
}

/// The pseudo header of UDP from the guest to the host or the other way.
fn pseudo(udp_len: usize) -> Vec<u8> {
    [&[10, 9, 0, 1, 10, 9, 0, 2, 0, 17][..], &be(udp_len)].concat()
}

/// An Ethernet frame with `payload` over UDP from the guest to port 7000 of the host. The checksum
/// covers only the pseudo header if the host is to complete it.
fn udp_frame(payload: &[u8], partial: bool) -> Vec<u8> {
    let udp_len = 8 + payload.len();
    let mut ip = [
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1,
    ];
    ip[2..4].copy_from_slice(&be(20 + udp_len));
    let sum = !checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut udp = [0x1b, 0x59, 0x1b, 0x58, 0, 0, 0, 0];
    udp[4..6].copy_from_slice(&be(udp_len));
    let sum = if partial {
        checksum(&[&pseudo(udp_len)])
    } else {
        !checksum(&[&pseudo(udp_len), &udp, payload])
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    let ethernet = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 7, 8, 0];
    [&ethernet[..], &ip, &udp, payload].concat()
}

fn send_with_header(driver: &mut Driver, header: &[u8; HEADER_BYTES], frame: &[u8]) {
    driver.put(TX_BUFFERS, header);
    driver.put(TX_BUFFERS + 12, frame);
    let len = u32::try_from(HEADER_BYTES + frame.len()).unwrap();
    driver.post(TX, &[(TX_BUFFERS, len, false)]);
    driver.kick_and_turn(TX);
    assert!(driver.used(TX).is_some());
}

fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind("10.9.0.1:7000").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

/// Lets the host send `payload` to the guest until a frame of UDP over IPv4 comes; that one, with its
/// header. The host drops what is sent in the first moments of an interface.
fn udp_to_guest(driver: &mut Driver, host: &UdpSocket, payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut slot = 0;
    for _ in 0..200 {
        host.send_to(payload, "10.9.0.2:7001").unwrap();
        driver.manager.run_with_timeout(25).unwrap();
        let header = driver.bytes(BUFFERS + slot * 0x2_0000, HEADER_BYTES);
        if let Some(frame) = taken(driver, &mut slot)
            && frame[12..14] == [8, 0]
            && frame[23] == 17
        {
            return (header, frame);
        }
    }
    panic!("no frame came");
}

#[test]
fn names_and_interfaces_that_cannot_be_used_are_refused() {
    assert!(matches!(Tap::open(""), Err(TapError::Name(_))));
    assert!(matches!(
        Tap::open("sixteen-letters!"),
        Err(TapError::Name(_))
    ));
    assert!(matches!(Tap::open("a\0b"), Err(TapError::Name(_))));
    in_namespace(|| {
        assert!(matches!(Tap::open("t1"), Err(TapError::Missing(_))));
        assert!(matches!(Tap::open("lo"), Err(TapError::Attach { .. })));
        let _tap = Tap::open("t0").unwrap();
        assert!(matches!(Tap::open("t0"), Err(TapError::Busy(_))));
    });
}

#[test]
fn checksums_are_left_to_whoever_can_do_them() {
    in_namespace(|| {
        let host = host_socket();
        for features in [0, ALL] {
            let (mut driver, stats) = tap_net(features);
            post_rx(&mut driver, 0..100, 1600);
            let payload = pattern(1000, 5);
            // To the host, with the checksum made, and left to the host where that was agreed.
            send_with_header(&mut driver, &[0; HEADER_BYTES], &udp_frame(&payload, false));
            let mut got = [0; 2000];
            assert_eq!(host.recv(&mut got).unwrap(), 1000);
            assert_eq!(got[..1000], payload);
            if features == ALL {
                let header = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
                send_with_header(&mut driver, &header, &udp_frame(&payload, true));
                assert_eq!(host.recv(&mut got).unwrap(), 1000);
            }
            assert_eq!(stats.dropped(), 0);
            // To the guest: it is told that the checksum is partial only if it can do that.
            let (header, frame) = udp_to_guest(&mut driver, &host, &payload);
            assert_eq!(frame[42..], payload);
            let sum = checksum(&[&pseudo(1008), &frame[34..]]);
            if features == ALL {
                assert_eq!(header[..1], [1], "needs a checksum");
                assert_eq!(header[6..10], [34, 0, 6, 0]);
            } else {
                assert_eq!(header[..1], [0]);
                assert_eq!(sum, 0xffff, "the checksum does not hold");
            }
        }
    });
}

#[test]
fn headers_that_lie_are_refused_by_the_kernel() {
    in_namespace(|| {
        let host = host_socket();
        let (mut driver, stats) = tap_net(ALL);
        let frame = udp_frame(&pattern(1000, 5), true);
        let lies = [
            // Checksum outside of the frame, segments without a size, of a kind that is none.
            [1, 0, 0, 0, 0, 0, 0xff, 0xff, 6, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 34, 0, 0xff, 0xff, 0, 0],
            [1, 1, 54, 0, 0, 0, 34, 0, 6, 0, 0, 0],
            [1, 0x7f, 54, 0, 100, 0, 34, 0, 6, 0, 0, 0],
            [1, 1, 0xff, 0xff, 100, 0, 34, 0, 16, 0, 0, 0],
        ];
        for lie in &lies {
            send_with_header(&mut driver, lie, &frame);
        }
        assert_eq!(stats.dropped(), 5);
        send_with_header(&mut driver, &[1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &frame);
        assert_eq!(host.recv(&mut [0; 2000]).unwrap(), 1000);
        assert!(!driver.needs_reset());
    });
}

#[test]
fn an_interface_that_is_removed_takes_the_link_down() {
    in_namespace(|| {
        let (mut driver, stats) = tap_net(0);
        post_rx(&mut driver, 0..4, 1600);
        driver.turn();
        assert!(stats.is_link_up());
        ip("link del t0");
        driver.turn();
        assert!(!stats.is_link_up());
        assert_eq!(driver.manager.run_with_timeout(0).unwrap(), 0);
    });
}
