//! The socket device behind its transport, with a guest's driver on one side and host programs on
//! the other.

mod gate;
mod hostile;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;

use proptest::prelude::*;

use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::*;
use crate::devices::virtio::Gate;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::testing::{BUFFERS, Driver, EVENT_IDX, LOW_RAM};

const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;
const PORT: u32 = 1024;
/// Where transmitted packets are put, above the receive buffers.
const TX_BUFFER: u64 = LOW_RAM - (2 << 20);

/// A guest: a driver that keeps the receive queue full and sorts what comes in.
struct Guest {
    driver: Driver,
    dir: tempfile::TempDir,
    rx_bytes: u32,
    inbox: VecDeque<(Header, Vec<u8>)>,
}

impl Guest {
    fn new() -> Self {
        Self::with(EVENT_IDX, 4096, 64)
    }

    fn with(features: u64, rx_bytes: u32, rx_count: u16) -> Self {
        Self::behind(Gate::default(), features, rx_bytes, rx_count)
    }

    fn behind(gate: Gate, features: u64, rx_bytes: u32, rx_count: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = HostSocket::bind(&dir.path().join("v")).unwrap();
        let device = Box::new(Vsock::new(CID, host).unwrap().behind(gate));
        let driver = Driver::started(device, features);
        let mut guest = Self {
            driver,
            dir,
            rx_bytes,
            inbox: VecDeque::new(),
        };
        for slot in 0..rx_count {
            guest.post_rx(slot);
        }
        guest.driver.kick_and_turn(RX);
        guest
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    fn post_rx(&mut self, slot: u16) {
        let address = BUFFERS + u64::from(slot) * u64::from(self.rx_bytes);
        self.driver.queues[RX].next_descriptor = slot;
        self.driver.post(RX, &[(address, self.rx_bytes, true)]);
    }

    /// Runs the device and takes in what it sent.
    fn turn(&mut self) {
        self.driver.turn();
        while let Some((slot, len)) = self.driver.used(RX) {
            let address = BUFFERS + u64::from(slot) * u64::from(self.rx_bytes);
            let bytes = self.driver.bytes(address, usize::try_from(len).unwrap());
            let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.src_cid, HOST_CID);
            assert_eq!(
                usize::try_from(header.len).unwrap(),
                bytes.len() - HEADER_BYTES
            );
            self.inbox
                .push_back((header, bytes[HEADER_BYTES..].to_vec()));
            self.post_rx(u16::try_from(slot).unwrap());
            self.driver.kick(RX);
        }
        self.driver.turn();
    }

    /// The next packet of the device.
    fn next(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..4 {
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            self.turn();
        }
        panic!("no packet came");
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn quiet(&mut self) {
        self.turn();
        assert!(self.inbox.is_empty(), "{:?}", self.inbox);
    }

    fn transmit_raw(&mut self, bytes: &[u8]) {
        self.driver.put(TX_BUFFER, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        let split = len.min(30);
        let pieces = [
            (TX_BUFFER, split, false),
            (TX_BUFFER + u64::from(split), len - split, false),
        ];
        self.driver.post(TX, &pieces);
        self.driver.kick(TX);
        self.turn();
        while let Some((_, len)) = self.driver.used(TX) {
            assert_eq!(len, 0);
        }
    }

    fn transmit(&mut self, header: &Header, payload: &[u8]) {
        let header = Header {
            len: u32::try_from(payload.len()).unwrap(),
            ..*header
        };
        self.transmit_raw(&[&header.encode()[..], payload].concat());
    }

    /// Connects a host program to the guest's port; its stream and the guest's header to answer.
    fn connected(&mut self) -> (UnixStream, Header) {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
            .write_all(format!("CONNECT {PORT}\n").as_bytes())
            .unwrap();
        let request = self.expect(op::REQUEST);
        assert_eq!((request.dst_port, request.kind), (PORT, 1));
        assert_eq!(request.buf_alloc, BUFFER_BYTES);
        let reply = answer(&request, op::RESPONSE);
        self.transmit(&reply, &[]);
        assert_eq!(
            read(&mut stream),
            format!("OK {}\n", request.src_port).into_bytes()
        );
        (stream, reply)
    }
}

fn answer(to: &Header, op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: to.dst_port,
        dst_port: to.src_port,
        kind: 1,
        op,
        buf_alloc: 64 * 1024,
        ..Header::default()
    }
}

fn read(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 65536];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

fn is_closed(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!(stream.read(&mut [0]), Ok(0))
}

#[test]
fn a_host_program_talks_to_the_guest_and_back() {
    for features in [0, EVENT_IDX] {
        let mut guest = Guest::with(features, 4096, 64);
        let (mut stream, to_host) = guest.connected();
        stream.write_all(b"hello guest").unwrap();
        let (header, payload) = guest.next();
        assert_eq!((header.op, &payload[..]), (op::RW, &b"hello guest"[..]));
        guest.transmit(
            &Header {
                op: op::RW,
                ..to_host
            },
            b"hello host",
        );
        assert_eq!(read(&mut stream), b"hello host");
        // A clean end: the host's half, then the guest's.
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
        guest.transmit(
            &Header {
                op: op::RW,
                ..to_host
            },
            b"late",
        );
        assert_eq!(read(&mut stream), b"late");
        let close = Header {
            op: op::SHUTDOWN,
            flags: SHUTDOWN_BOTH,
            ..to_host
        };
        guest.transmit(&close, &[]);
        guest.expect(op::RST);
        assert!(is_closed(&mut stream));
        guest.quiet();
        assert!(!guest.driver.needs_reset());
    }
}

#[test]
fn what_follows_the_opening_line_at_once_is_not_lost() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 1024\nfirst words").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.transmit(&answer(&request, op::RESPONSE), &[]);
    let (header, payload) = guest.next();
    assert_eq!((header.op, &payload[..]), (op::RW, &b"first words"[..]));
}

#[test]
fn an_opening_line_in_pieces_opens_and_a_bad_one_closes() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    for byte in b"CONNECT 77\n" {
        guest.quiet();
        stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(guest.expect(op::REQUEST).dst_port, 77);
    for line in ["GET / HTTP/1.1\n", "CONNECT x\n", &"C".repeat(100)] {
        let mut stream = UnixStream::connect(guest.path()).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        guest.quiet();
        stream.set_nonblocking(true).unwrap();
        let gone = stream.read(&mut [0]);
        assert!(
            matches!(gone, Ok(0)) || gone.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
        );
    }
}

#[test]
fn a_guest_that_refuses_closes_the_socket() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.transmit(&answer(&request, op::RST), &[]);
    assert!(is_closed(&mut stream));
    guest.quiet();
}

#[test]
fn the_guest_connects_to_a_host_program() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.dir.path().join("v_52")).unwrap();
    let mut request = answer(
        &Header {
            src_port: 52,
            dst_port: 4000,
            ..Header::default()
        },
        op::REQUEST,
    );
    guest.transmit(&request, &[]);
    guest.expect(op::RESPONSE);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    guest.transmit(
        &Header {
            op: op::RW,
            ..request
        },
        b"from inside",
    );
    assert_eq!(read(&mut stream), b"from inside");
    stream.write_all(b"from outside").unwrap();
    assert_eq!(guest.next().1, b"from outside");
    // The same ports again: the old connection is reset.
    guest.transmit(&request, &[]);
    guest.expect(op::RST);
    assert!(is_closed(&mut stream));
    // Nobody listens there.
    request.dst_port = 53;
    guest.transmit(&request, &[]);
    assert_eq!(guest.expect(op::RST).src_port, 53);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut stream, to_host) = guest.connected();
    let sent: Vec<u8> = (0..=250).cycle().take(150_000).collect();
    stream.write_all(&sent).unwrap();
    let mut got = Vec::new();
    let mut forwarded = 0;
    while got.len() < sent.len() {
        guest.turn();
        let mut asked = false;
        for (header, payload) in std::mem::take(&mut guest.inbox) {
            asked |= header.op == op::CREDIT_REQUEST;
            got.extend(payload);
        }
        assert!(
            got.len() - forwarded <= 64 * 1024,
            "more than the guest's buffer"
        );
        if got.len() < sent.len() {
            assert!(asked && got.len() - forwarded == 64 * 1024, "stopped early");
        }
        forwarded = got.len();
        let fwd_cnt = u32::try_from(forwarded).unwrap();
        guest.transmit(
            &Header {
                op: op::CREDIT_UPDATE,
                fwd_cnt,
                ..to_host
            },
            &[],
        );
    }
    assert_eq!(got, sent);
}

#[test]
fn a_slow_host_program_slows_the_guest_and_loses_nothing() {
    let mut guest = Guest::new();
    let (mut stream, to_host) = guest.connected();
    let chunk: Vec<u8> = (0..=250).cycle().take(32 * 1024).collect();
    let (mut sent, mut got) = (0_u32, Vec::new());
    let mut forwarded = 0;
    // As fast as credit allows, nobody reading.
    while sent - forwarded + 32 * 1024 <= BUFFER_BYTES {
        guest.transmit(
            &Header {
                op: op::RW,
                ..to_host
            },
            &chunk,
        );
        sent += 32 * 1024;
        for (header, _) in std::mem::take(&mut guest.inbox) {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
    }
    // Now it reads, and gets all, and the guest its credit back.
    while got.len() < usize::try_from(sent).unwrap() {
        got.extend(read(&mut stream));
        guest.turn();
    }
    assert!(got.chunks(32 * 1024).all(|part| part == chunk));
    let last = guest.inbox.pop_back().unwrap().0;
    assert!(sent - last.fwd_cnt < BUFFER_BYTES / 2);
}

#[test]
fn more_than_the_credit_is_a_reset() {
    let mut guest = Guest::new();
    let (mut stream, to_host) = guest.connected();
    let chunk = vec![1; 64 * 1024];
    for _ in 0..200 {
        guest.transmit(
            &Header {
                op: op::RW,
                ..to_host
            },
            &chunk,
        );
        if guest.inbox.iter().any(|(header, _)| header.op == op::RST) {
            let got = read(&mut stream).len();
            assert!(got > 0 && got < 200 * chunk.len());
            return;
        }
    }
    panic!("the device took everything");
}

#[test]
fn a_program_that_goes_away_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let (mut stream, to_host) = guest.connected();
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(guest.next().1, b"bye");
    let shutdown = guest.expect(op::SHUTDOWN);
    assert_eq!(shutdown.flags, SHUTDOWN_BOTH);
    // What the guest still sends goes nowhere, and costs it no credit.
    guest.transmit(
        &Header {
            op: op::RW,
            ..to_host
        },
        &[0; 100_000],
    );
    guest.transmit(
        &Header {
            op: op::RST,
            ..to_host
        },
        &[],
    );
    guest.transmit(
        &Header {
            op: op::RW,
            ..to_host
        },
        b"?",
    );
    let ops: Vec<u16> = guest.inbox.drain(..).map(|(header, _)| header.op).collect();
    assert_eq!(ops, [op::CREDIT_UPDATE, op::RST]);
}

#[test]
fn a_guest_that_reads_no_more_is_sent_no_more() {
    let mut guest = Guest::new();
    let (mut stream, to_host) = guest.connected();
    let close = Header {
        op: op::SHUTDOWN,
        flags: SHUTDOWN_RECEIVE,
        ..to_host
    };
    guest.transmit(&close, &[]);
    assert!(stream.write_all(b"x").is_err(), "the program is told");
    guest.transmit(
        &Header {
            op: op::RW,
            ..to_host
        },
        b"still sending",
    );
    assert_eq!(read(&mut stream), b"still sending");
    guest.quiet();
}

#[test]
fn receive_buffers_too_small_for_a_packet_stop_the_device() {
    let mut guest = Guest::with(EVENT_IDX, 44, 4);
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 1\n").unwrap();
    guest.driver.turn();
    assert!(guest.driver.needs_reset());
}

#[test]
fn a_reset_drops_connections_and_the_device_serves_on() {
    let mut guest = Guest::new();
    let (mut stream, _) = guest.connected();
    guest.driver.write(0x70, 0);
    assert!(is_closed(&mut stream));
    guest.driver.start(super::super::testing::VERSION_1);
    for slot in 0..8 {
        guest.post_rx(slot);
    }
    guest.driver.kick_and_turn(RX);
    let (mut stream, _) = guest.connected();
    stream.write_all(b"again").unwrap();
    assert_eq!(guest.next().1, b"again");
}

#[test]
fn restore_tells_the_guest_that_connections_are_gone() {
    let mut guest = Guest::new();
    let (_stream, to_host) = guest.connected();
    guest.driver.transport.pause();
    let state = guest.driver.transport.save();
    let dir = tempfile::tempdir().unwrap();
    let host = HostSocket::bind(&dir.path().join("v")).unwrap();
    let device = Box::new(Vsock::new(99, host).unwrap());
    let ram = guest.driver.guest.clone();
    let transport = MmioTransport::restore(&state, ram.clone(), device).unwrap();
    assert_eq!(transport.save(), state);
    // A driver that looks twice notices that it is elsewhere.
    let mut restored = Driver::with(ram.clone(), transport);
    let generation = |driver: &mut Driver| driver.read(0xfc);
    assert_ne!(generation(&mut restored), generation(&mut guest.driver));
    let transport = restored.transport;
    let queues = guest.driver.queues.clone();
    guest.driver = Driver::with(ram, transport);
    guest.driver.queues = queues;
    guest.dir = dir;
    // A host program that is early waits, and so does the event loop.
    let mut early = UnixStream::connect(guest.path()).unwrap();
    early.write_all(b"CONNECT 1024\n").unwrap();
    guest.driver.turn();
    assert!(guest.driver.used(2).is_none());
    guest.driver.transport.resume();
    guest.turn();
    assert!(
        guest.inbox.is_empty(),
        "a connection of the new place came before the news of the place"
    );
    // As many buffers as Linux has there: those behind the event's are no sign of anything.
    for _ in 0..3 {
        guest.driver.post(2, &[(TX_BUFFER + 4096, 8, true)]);
    }
    guest.driver.kick_and_turn(2);
    guest.turn();
    assert_eq!(guest.driver.used(2).unwrap().1, 4);
    assert_eq!(guest.driver.bytes(TX_BUFFER + 4096, 4), [0; 4]);
    assert_eq!(
        guest.driver.read(0x100),
        3,
        "the context id is the saved one"
    );
    assert!(
        guest.inbox.is_empty(),
        "a connection of the new place came before the guest dealt with the news of it"
    );
    let ring = &guest.driver.queues[2];
    let kick_beyond = ring.used + 4 + 8 * u64::from(ring.size);
    assert_eq!(guest.driver.bytes(kick_beyond, 2), 3_u16.to_le_bytes());
    guest.driver.post(2, &[(TX_BUFFER + 4096, 8, true)]);
    guest.driver.kick_and_turn(2);
    guest.turn();
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, PORT);
    assert_ne!(
        request.src_port, to_host.dst_port,
        "what the old connection left in the queues would meet the new one"
    );
    guest.transmit(
        &Header {
            op: op::RW,
            ..to_host
        },
        b"old",
    );
    guest.expect(op::RST);
    let (mut stream, _) = guest.connected();
    stream.write_all(b"new").unwrap();
    assert_eq!(guest.next().1, b"new");
}

/// Megabytes a second through one connection to the guest, and to the host. Not a test of the
/// figure, which depends on the machine; it prints it.
#[test]
fn throughput_both_ways() {
    const TOTAL: usize = 64 << 20;
    let mut guest = Guest::with(EVENT_IDX, 65536, 128);
    let (mut stream, mut to_host) = guest.connected();
    stream.set_nonblocking(false).unwrap();
    to_host.buf_alloc = 4 << 20;
    guest.transmit(
        &Header {
            op: op::CREDIT_UPDATE,
            ..to_host
        },
        &[],
    );
    let mut sender = stream.try_clone().unwrap();
    let start = Instant::now();
    let thread = std::thread::spawn(move || {
        let chunk = vec![5; 1 << 20];
        for _ in 0..TOTAL / chunk.len() {
            sender.write_all(&chunk).unwrap();
        }
    });
    let (mut got, mut told) = (0_usize, 0);
    while got < TOTAL {
        guest.driver.turn();
        let mut any = false;
        while let Some((slot, len)) = guest.driver.used(RX) {
            got += usize::try_from(len).unwrap() - HEADER_BYTES;
            guest.post_rx(u16::try_from(slot).unwrap());
            any = true;
        }
        if got - told > 1 << 20 {
            told = got;
            to_host.fwd_cnt = u32::try_from(got).unwrap();
            guest.driver.put(
                TX_BUFFER,
                &Header {
                    op: op::CREDIT_UPDATE,
                    ..to_host
                }
                .encode(),
            );
            guest.driver.post(TX, &[(TX_BUFFER, 44, false)]);
            guest.driver.kick(TX);
        }
        if any {
            guest.driver.kick(RX);
        } else {
            std::thread::yield_now();
        }
    }
    thread.join().unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("to the guest: {:.0} MB/s", 64.0 * 1.048_576 / seconds);
    // The last of the packets that were posted, before their buffer is written again.
    guest.driver.turn();

    let start = Instant::now();
    let thread = std::thread::spawn(move || {
        let mut chunk = vec![0; 1 << 20];
        let mut left = TOTAL;
        while left > 0 {
            left -= stream.read(&mut chunk).unwrap();
        }
    });
    let mut sent = 0_u32;
    let mut forwarded = 0_u32;
    let packet = Header {
        op: op::RW,
        len: 65536 - 44,
        ..to_host
    };
    guest.driver.put(TX_BUFFER, &packet.encode());
    while usize::try_from(sent).unwrap() < TOTAL {
        if sent - forwarded + packet.len <= BUFFER_BYTES {
            let left = u32::try_from(TOTAL).unwrap() - sent;
            let len = packet.len.min(left);
            guest
                .driver
                .put(TX_BUFFER, &Header { len, ..packet }.encode());
            guest.driver.post(TX, &[(TX_BUFFER, 44 + len, false)]);
            guest.driver.kick(TX);
            sent += len;
        }
        guest.driver.turn();
        while let Some((slot, _)) = guest.driver.used(RX) {
            let address = BUFFERS + u64::from(slot) * 65536;
            let header = guest.driver.bytes(address, HEADER_BYTES);
            let header = Header::decode(&header.try_into().unwrap());
            // Requests for credit may be left over from the other way.
            let known = [op::CREDIT_UPDATE, op::CREDIT_REQUEST, op::SHUTDOWN];
            assert!(known.contains(&header.op), "{header:?}");
            forwarded = header.fwd_cnt;
            guest.post_rx(u16::try_from(slot).unwrap());
            guest.driver.kick(RX);
        }
        if guest.driver.used(TX).is_none() {
            std::thread::yield_now();
        }
    }
    while !thread.is_finished() {
        guest.driver.turn();
        std::thread::yield_now();
    }
    thread.join().unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("to the host: {:.0} MB/s", 64.0 * 1.048_576 / seconds);
}
