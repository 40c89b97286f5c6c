//! The device behind its transport, driven as a guest would, over a socket pair that keeps frames
//! apart as a TAP does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::backend::{Received, Sent};
use super::*;
use crate::devices::rate::{Limiter, Limits, Rate};
use crate::devices::virtio::testing::{
    BUFFERS, Driver, EVENT_IDX, HIGH_BASE, HIGH_RAM, LOW_RAM, VERSION_1,
};
use crate::devices::virtio::{GuestRam, buffers::Buffers};

mod gate_tests;
mod link_tests;
mod stream_tests;
mod tap_tests;

const RX: usize = 0;
const TX: usize = 1;
const MRG: u64 = 1 << 15;
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const MAC_AND_STATUS: u64 = 1 << 5 | 1 << 16;
/// Where the driver sends from.
const TX_BUFFERS: u64 = BUFFERS + (48 << 20);

/// One end of a socket pair, in place of a TAP.
struct Wire {
    socket: UnixDatagram,
    features: Arc<AtomicU64>,
    copy: Vec<u8>,
}

impl Backend for Wire {
    fn name(&self) -> String {
        "wire".to_owned()
    }

    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        CSUM | GUEST_CSUM
    }

    fn set_up(&mut self, features: u64) -> io::Result<()> {
        self.features.store(features, Ordering::Relaxed);
        Ok(())
    }

    fn receive(&mut self, guest: &GuestRam, buffers: &Buffers, overflow: &mut [u8]) -> Received {
        match frames::read(guest, buffers, self.socket.as_fd(), overflow) {
            Ok((0, _)) => Received::Gone,
            Ok((len, direct)) => Received::Frame { len, direct },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
            Err(_) => Received::Gone,
        }
    }

    fn send(&mut self, guest: &GuestRam, buffers: &Buffers) -> Sent {
        match frames::write(guest, buffers, self.socket.as_fd(), &mut self.copy) {
            Ok(_) => Sent::Done,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Busy,
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => Sent::Gone,
            Err(_) => Sent::Refused,
        }
    }

    fn flush(&mut self) -> Sent {
        Sent::Done
    }
}

/// The network's end of the pair, and what the device has set up at the other.
struct Network {
    socket: UnixDatagram,
    features: Arc<AtomicU64>,
}

impl Network {
    fn new() -> (Self, Box<dyn Backend>) {
        let (socket, other) = socket_pair();
        socket.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        let features = Arc::new(AtomicU64::new(u64::MAX));
        let wire = Wire {
            socket: other,
            features: features.clone(),
            copy: vec![0; FRAME_BYTES_MAX],
        };
        (Self { socket, features }, Box::new(wire))
    }

    /// The next frame from the guest, without its header.
    fn take(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        let len = self.socket.recv(&mut frame).ok()?;
        frame.truncate(len);
        Some(frame.split_off(HEADER_BYTES))
    }

    /// Sends the guest a frame behind an empty header.
    fn give(&self, frame: &[u8]) {
        let whole = [&[0; HEADER_BYTES], frame].concat();
        assert_eq!(self.socket.send(&whole).unwrap(), whole.len());
    }
}

/// Two sockets that keep frames apart and in order, and tell when the other is gone.
fn socket_pair() -> (UnixDatagram, UnixDatagram) {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes two ints, which live across the call.
    let result = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has just given these two descriptors to us alone.
    let [one, other] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    (one.into(), other.into())
}

fn mac() -> MacAddr {
    "02:00:00:00:00:07".parse().unwrap()
}

fn net(backend: Option<Box<dyn Backend>>) -> Net {
    let limits = Limits::default();
    Net::new(mac(), backend.map(|backend| NetBackend { backend, limits })).unwrap()
}

/// A running device with `features`, and the network behind it.
fn started(features: u64) -> (Driver, Network) {
    let (network, wire) = Network::new();
    let device = Box::new(net(Some(wire)));
    (Driver::started(device, features | MAC_AND_STATUS), network)
}

/// Bytes that are not alike.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 7 + at / 251 + seed) % 256).unwrap())
        .collect()
}

/// Offers `count` receive buffers of `len` bytes, the first at `slot`.
fn post_rx(driver: &mut Driver, slots: std::ops::Range<u64>, len: u32) {
    for slot in slots {
        driver.post(RX, &[(BUFFERS + slot * 0x2_0000, len, true)]);
    }
    driver.kick_and_turn(RX);
}

/// The next frame that the device gave, put together from as many buffers as its header says, which
/// are those of `post_rx` in their order from `slot` on.
fn taken(driver: &mut Driver, slot: &mut u64) -> Option<Vec<u8>> {
    let (_, first_len) = driver.used(RX)?;
    let address = |slot: u64| BUFFERS + slot * 0x2_0000;
    let mut frame = driver.bytes(address(*slot), first_len as usize);
    *slot += 1;
    let count = u16::from_le_bytes([frame[10], frame[11]]);
    for _ in 1..count {
        let (_, len) = driver.used(RX).expect("all buffers of a frame at once");
        frame.extend(driver.bytes(address(*slot), len as usize));
        *slot += 1;
    }
    Some(frame.split_off(HEADER_BYTES))
}

fn send(driver: &mut Driver, frame: &[u8]) {
    driver.put(TX_BUFFERS, &[0; HEADER_BYTES]);
    driver.put(TX_BUFFERS + 12, frame);
    let len = u32::try_from(HEADER_BYTES + frame.len()).unwrap();
    driver.post(TX, &[(TX_BUFFERS, len, false)]);
    driver.kick_and_turn(TX);
}

fn link_is_up(driver: &mut Driver) -> bool {
    driver.read(0x104) >> 16 & 1 == 1
}

#[test]
fn address_and_link_are_in_the_configuration() {
    let (mut driver, network) = started(CSUM | GUEST_CSUM);
    assert_eq!(driver.read(0x100), 2);
    assert_eq!(driver.read(0x104), 0x0001_0700);
    assert!(link_is_up(&mut driver));
    let set_up = network.features.load(Ordering::Relaxed);
    assert_eq!(set_up & 0xffff_ffff, CSUM | GUEST_CSUM | MAC_AND_STATUS);
}

#[test]
fn frames_go_out_with_header_and_without_a_copy_too_many() {
    let (mut driver, network) = started(0);
    let frame = pattern(1514, 1);
    send(&mut driver, &frame);
    assert_eq!(driver.used(TX).unwrap().1, 0);
    assert_eq!(network.take().unwrap(), frame);
    // Header and frame in pieces of any size, in both regions of RAM.
    driver.put(TX_BUFFERS, &[0; HEADER_BYTES]);
    driver.put(TX_BUFFERS + 12, &frame[..1]);
    driver.put(HIGH_BASE, &frame[1..]);
    let rest = u32::try_from(frame.len() - 1).unwrap();
    driver.post(
        TX,
        &[
            (TX_BUFFERS, 5, false),
            (TX_BUFFERS + 5, 8, false),
            (HIGH_BASE, rest, false),
        ],
    );
    driver.kick_and_turn(TX);
    assert_eq!(network.take().unwrap(), frame);
}

#[test]
fn a_frame_in_more_pieces_than_a_call_takes_is_whole() {
    let (mut driver, network) = started(MRG);
    let frame = pattern(200 * 40 - HEADER_BYTES, 3);
    let whole = [&[0; HEADER_BYTES], &frame[..]].concat();
    let mut pieces = Vec::new();
    for (slot, part) in (0..).zip(whole.chunks(40)) {
        driver.put(TX_BUFFERS + slot * 64, part);
        pieces.push((TX_BUFFERS + slot * 64, 40, false));
    }
    driver.post(TX, &pieces);
    driver.kick_and_turn(TX);
    assert_eq!(network.take().unwrap(), frame);

    let pieces: Vec<_> = pieces
        .iter()
        .map(|(at, len, _)| (*at, *len, true))
        .collect();
    driver.put(TX_BUFFERS, &[0; 64 * 200]);
    driver.post(RX, &pieces);
    driver.kick_and_turn(RX);
    network.give(&frame);
    driver.turn();
    assert_eq!(driver.used(RX).unwrap().1 as usize, whole.len());
    let got: Vec<u8> = pieces
        .iter()
        .flat_map(|(at, ..)| driver.bytes(*at, 40))
        .collect();
    assert_eq!(got[HEADER_BYTES..], frame);
}

#[test]
fn frames_come_in_and_mark_memory_dirty() {
    for features in [0, MRG, MRG | EVENT_IDX] {
        let (mut driver, network) = started(features);
        post_rx(&mut driver, 0..8, 2000);
        let frames = [pattern(60, 1), pattern(1514, 2), pattern(1, 3)];
        frames.iter().for_each(|frame| network.give(frame));
        driver.turn();
        let mut slot = 0;
        for frame in &frames {
            assert_eq!(taken(&mut driver, &mut slot).as_ref(), Some(frame));
        }
        assert_eq!(taken(&mut driver, &mut slot), None);
        assert!(driver.interrupt().is_some_and(|bits| bits & 1 == 1));
        use vm_memory::bitmap::Bitmap;
        use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
        let (region, at) = driver.guest.to_region_addr(GuestAddress(BUFFERS)).unwrap();
        assert!(region.bitmap().dirty_at(usize::try_from(at.0).unwrap()));
    }
}

#[test]
fn a_long_frame_is_merged_from_many_buffers_at_once() {
    let (mut driver, network) = started(MRG);
    post_rx(&mut driver, 0..200, 1536);
    let mut slot = 0;
    // The first is long by surprise, the second is expected to be, the third is short again.
    for len in [
        64 << 10,
        50_000,
        42,
        1514,
        1536 - HEADER_BYTES,
        1537 - HEADER_BYTES,
    ] {
        let before = slot;
        let frame = pattern(len, len);
        network.give(&frame);
        driver.turn();
        assert_eq!(taken(&mut driver, &mut slot), Some(frame), "{len}");
        let buffers = u64::try_from((len + HEADER_BYTES).div_ceil(1536)).unwrap();
        assert_eq!(slot - before, buffers, "{len}");
        assert!(driver.interrupt().is_some(), "{len}");
    }
    assert!(!driver.needs_reset());
}

#[test]
fn an_interrupt_that_is_wanted_amid_a_merged_frame_comes() {
    use vm_memory::{Bytes, GuestAddress};
    let (mut driver, network) = started(MRG | EVENT_IDX);
    post_rx(&mut driver, 0..100, 1000);
    let event = GuestAddress(driver.queues[RX].available + 4 + 2 * 256);
    for (wanted, expected) in [(3_u16, true), (3, false), (60, false), (33, true)] {
        driver.guest.write_obj(wanted, event).unwrap();
        network.give(&pattern(9500, 1));
        driver.turn();
        assert_eq!(driver.interrupt().is_some(), expected, "{wanted}");
    }
}

#[test]
fn frames_wait_while_there_are_no_buffers() {
    for features in [MRG, MRG | EVENT_IDX, 0] {
        let (mut driver, network) = started(features);
        let frames = [pattern(100, 1), pattern(200, 2)];
        frames.iter().for_each(|frame| network.give(frame));
        driver.turn();
        assert!(driver.used(RX).is_none());
        // Readable for ever, and the event loop at rest.
        for _ in 0..3 {
            assert_eq!(driver.manager.run_with_timeout(0).unwrap(), 0);
        }
        let mut slot = 0;
        for (at, frame) in (0..).zip(&frames) {
            post_rx(&mut driver, at..at + 1, 2000);
            assert_eq!(taken(&mut driver, &mut slot).as_ref(), Some(frame));
            assert_eq!(taken(&mut driver, &mut slot), None);
        }
    }
}

#[test]
fn a_long_frame_waits_whole_for_enough_buffers() {
    for features in [MRG, MRG | EVENT_IDX] {
        let (mut driver, network) = started(features);
        post_rx(&mut driver, 0..3, 1000);
        let frame = pattern(4500, 9);
        network.give(&frame);
        network.give(&pattern(10, 1));
        driver.turn();
        let mut slot = 0;
        assert_eq!(taken(&mut driver, &mut slot), None);
        for at in 3..5 {
            assert_eq!(driver.manager.run_with_timeout(0).unwrap(), 0);
            post_rx(&mut driver, at..at + 1, 1000);
        }
        assert_eq!(taken(&mut driver, &mut slot), Some(frame));
        assert_eq!(slot, 5);
        post_rx(&mut driver, 5..6, 1000);
        assert_eq!(taken(&mut driver, &mut slot), Some(pattern(10, 1)));
    }
}

#[test]
fn a_frame_that_no_buffer_has_room_for_is_dropped() {
    let (network, wire) = Network::new();
    let device = net(Some(wire));
    let stats = device.stats();
    let mut driver = Driver::started(Box::new(device), 0);
    post_rx(&mut driver, 0..2, 1000);
    network.give(&pattern(989, 1));
    network.give(&pattern(988, 2));
    driver.turn();
    let mut slot = 0;
    assert_eq!(taken(&mut driver, &mut slot), Some(pattern(988, 2)));
    assert_eq!(taken(&mut driver, &mut slot), None);
    assert_eq!((stats.received(), stats.dropped()), (1, 1));
}

#[test]
fn frames_that_are_none_are_dropped() {
    let (network, wire) = Network::new();
    let device = net(Some(wire));
    let stats = device.stats();
    let mut driver = Driver::started(Box::new(device), MRG);
    let too_long = u32::try_from(FRAME_BYTES_MAX + 1).unwrap();
    let ram = u32::try_from(LOW_RAM - BUFFERS).unwrap();
    for len in [0, 1, 11, 12, too_long, ram] {
        driver.post(TX, &[(BUFFERS, len, false)]);
    }
    // The longest that there is, and one that has no bytes to read at all.
    driver.post(TX, &[(BUFFERS, too_long - 1, false)]);
    driver.post(TX, &[(BUFFERS, 100, true)]);
    driver.kick_and_turn(TX);
    for _ in 0..8 {
        assert_eq!(driver.used(TX).unwrap().1, 0);
    }
    assert_eq!(
        network.take().unwrap().len(),
        FRAME_BYTES_MAX - HEADER_BYTES
    );
    assert!(network.take().is_none());
    assert_eq!((stats.sent(), stats.dropped()), (1, 7));
    assert!(!driver.needs_reset());
}

#[test]
fn hostile_chains_stop_the_device_until_its_reset() {
    let outside = [
        LOW_RAM,
        LOW_RAM - 4,
        0xd000_0000,
        HIGH_BASE + HIGH_RAM - 1,
        u64::MAX - 20,
    ];
    for address in outside {
        for (queue, writable) in [(RX, true), (TX, false)] {
            let (mut driver, network) = started(MRG);
            driver.post(queue, &[(address, 40, writable)]);
            network.give(&pattern(100, 1));
            driver.kick_and_turn(queue);
            assert!(driver.needs_reset(), "{address:#x}");
            driver.start(VERSION_1 | MRG);
            post_rx(&mut driver, 0..1, 2000);
            assert_eq!(taken(&mut driver, &mut 0), Some(pattern(100, 1)));
            send(&mut driver, &pattern(50, 2));
            assert_eq!(network.take(), Some(pattern(50, 2)));
        }
    }
    // Buffers without room for a header.
    let (mut driver, network) = started(MRG);
    driver.post(RX, &[(BUFFERS, 11, true)]);
    network.give(&pattern(100, 1));
    driver.kick_and_turn(RX);
    assert!(driver.needs_reset());
}

#[test]
fn overlapping_buffers_harm_only_the_guest() {
    let (mut driver, network) = started(MRG);
    for _ in 0..100 {
        driver.post(RX, &[(BUFFERS, 20, true), (BUFFERS + 4, 20, true)]);
    }
    let ring = driver.queues[RX].descriptors;
    driver.post(RX, &[(ring, 0x10, true)]);
    driver.kick_and_turn(RX);
    network.give(&pattern(3000, 1));
    driver.turn();
    for _ in 0..75 {
        assert_eq!(driver.used(RX).unwrap().1, 40);
    }
    assert!(!driver.needs_reset());
}

#[test]
fn a_flood_does_not_keep_the_event_loop_in_one_turn() {
    let flood = |driver: &mut Driver| {
        driver.put(TX_BUFFERS, &[0; 64]);
        for _ in 0..256 {
            driver.post(TX, &[(TX_BUFFERS, 64, false)]);
        }
        driver.kick(TX);
        driver.manager.run_with_timeout(0).unwrap();
        std::iter::from_fn(|| driver.used(TX)).count()
    };
    let mut driver = Driver::started(Box::new(net(None)), 0);
    assert_eq!(flood(&mut driver), 128);
    driver.turn();
    assert_eq!(std::iter::from_fn(|| driver.used(TX)).count(), 128);

    let (mut driver, network) = started(0);
    post_rx(&mut driver, 0..256, 100);
    for _ in 0..200 {
        network.give(&[7; 50]);
    }
    driver.manager.run_with_timeout(0).unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used(RX)).count(), 128);
    driver.turn();
    assert_eq!(std::iter::from_fn(|| driver.used(RX)).count(), 72);
}

#[test]
fn frames_wait_for_a_backend_that_is_busy() {
    let (mut driver, network) = started(0);
    let mut sent = 0;
    // Long frames, so that the socket pair is full before the ring is.
    let frame = pattern(60_000, 1);
    while sent < 20 {
        send(&mut driver, &frame);
        sent += 1;
    }
    let gone = std::iter::from_fn(|| driver.used(TX)).count();
    assert!(gone < 20, "the socket pair took all");
    assert_eq!(driver.manager.run_with_timeout(0).unwrap(), 0);
    let mut left = 20;
    while left > 0 {
        assert_eq!(network.take().as_ref(), Some(&frame), "{left} to come");
        left -= 1;
        driver.turn();
    }
    assert_eq!(std::iter::from_fn(|| driver.used(TX)).count(), 20 - gone);
}

#[test]
fn limits_hold_in_both_directions() {
    let time = Arc::new(AtomicU64::new(0));
    let limiter = |limits| {
        let clock = time.clone();
        let clock = move || Duration::from_millis(clock.load(Ordering::Relaxed));
        Limiter::with_clock(limits, Box::new(clock)).unwrap()
    };
    let rate = |count| Some(Rate::new(std::num::NonZeroU64::new(count).unwrap()));
    for (limits, a_second) in [
        (
            Limits {
                bytes: rate(1000),
                operations: None,
            },
            10,
        ),
        (
            Limits {
                bytes: None,
                operations: rate(5),
            },
            5,
        ),
    ] {
        let (network, wire) = Network::new();
        let limiters = (limiter(limits), limiter(limits));
        let device = Net::with_limiters(mac(), Some(wire), limiters).unwrap();
        let mut driver = Driver::started(Box::new(device), MRG);
        post_rx(&mut driver, 0..200, 200);
        let mut slot = 0;
        driver.put(TX_BUFFERS, &[0; 112]);
        for second in 0..4 {
            // More than a second's worth, offered at once.
            for _ in 0..a_second + 3 {
                network.give(&pattern(100, 1));
                driver.post(TX, &[(TX_BUFFERS, 112, false)]);
            }
            driver.kick_and_turn(TX);
            driver.kick_and_turn(RX);
            let got = std::iter::from_fn(|| taken(&mut driver, &mut slot)).count();
            let sent = std::iter::from_fn(|| network.take()).count();
            assert_eq!((got, sent), (a_second, a_second), "second {second}");
            time.fetch_add(1001, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_limit_ends_by_itself() {
    let (network, wire) = Network::new();
    let limits = Limits {
        bytes: None,
        operations: Some(Rate {
            per_second: std::num::NonZeroU64::new(100).unwrap(),
            burst: std::num::NonZeroU64::new(1).unwrap(),
        }),
    };
    let device = Net::new(
        mac(),
        Some(NetBackend {
            backend: wire,
            limits,
        }),
    )
    .unwrap();
    let mut driver = Driver::started(Box::new(device), MRG);
    post_rx(&mut driver, 0..50, 200);
    let begin = Instant::now();
    driver.put(TX_BUFFERS, &[0; 64]);
    for _ in 0..6 {
        network.give(&pattern(60, 1));
        driver.post(TX, &[(TX_BUFFERS, 64, false)]);
    }
    driver.kick_and_turn(TX);
    let (mut got, mut sent, mut slot) = (0, 0, 0);
    while got < 6 || sent < 6 {
        assert!(begin.elapsed() < Duration::from_secs(10), "{got} {sent}");
        driver.manager.run_with_timeout(100).unwrap();
        got += std::iter::from_fn(|| taken(&mut driver, &mut slot)).count();
        sent += std::iter::from_fn(|| network.take()).count();
    }
    // Six, less the burst and the one that overdraws, at 10 ms each.
    assert!(
        begin.elapsed() >= Duration::from_millis(35),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn how_fast() {
    const FRAMES: usize = 2000;
    let (mut driver, network) = started(MRG | EVENT_IDX);
    let frame = pattern(60_000, 1);
    let len = u32::try_from(HEADER_BYTES + frame.len()).unwrap();
    driver.put(TX_BUFFERS, &[0; HEADER_BYTES]);
    driver.put(TX_BUFFERS + 12, &frame);
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    let rate = |begin: Instant| {
        let bytes = f64::from(u32::try_from(FRAMES * frame.len()).unwrap());
        bytes / 1e6 / begin.elapsed().as_secs_f64()
    };
    let begin = Instant::now();
    for _ in 0..FRAMES {
        driver.post(TX, &[(TX_BUFFERS, len, false)]);
        driver.kick_and_turn(TX);
        assert!(driver.used(TX).is_some());
        assert_eq!(network.socket.recv(&mut buffer).unwrap(), len as usize);
    }
    println!("to the network: {:.0} MB/s", rate(begin));
    let begin = Instant::now();
    for slot in 0..100 {
        driver.post(RX, &[(BUFFERS + slot * 0x2_0000, 4096, true)]);
    }
    let mut slot = 0;
    for _ in 0..FRAMES {
        network.give(&frame);
        driver.turn();
        while driver.used(RX).is_some() {
            driver.post(RX, &[(BUFFERS + slot % 100 * 0x2_0000, 4096, true)]);
            slot += 1;
        }
        driver.kick_and_turn(RX);
    }
    println!("to the guest: {:.0} MB/s", rate(begin));
    assert_eq!(
        slot,
        u64::try_from(FRAMES * frame.len().div_ceil(4096)).unwrap()
    );
}
