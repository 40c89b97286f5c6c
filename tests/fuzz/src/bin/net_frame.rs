//! A network device between a hostile guest and a hostile network: chains of any shape in both
//! queues, frames of any length from a stream that may say anything. Only a chain that is none stops
//! the device, and after a reset it carries frames again.

#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use cloudlet_fuzz::Input;
use cloudlet_vmm::devices::rate::Limits;
use cloudlet_vmm::devices::virtio::net::{
    FrameReader, HEADER_BYTES, MacAddr, Net, NetBackend, StreamBackend,
};
use cloudlet_vmm::devices::virtio::testing::{BUFFERS, Driver, EVENT_IDX, LOW_RAM, VERSION_1};
use libfuzzer_sys::fuzz_target;

const RX: usize = 0;
const TX: usize = 1;
const MRG_RXBUF: u64 = 1 << 15;
/// Descriptors of a chain.
const PIECES_MAX: u8 = 12;

/// A device over one end of a stream, and the other end.
fn start(features: u64) -> (Driver, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("two sockets");
    theirs.set_nonblocking(true).expect("a socket");
    let backend = Box::new(StreamBackend::new(ours, "user").expect("a socket"));
    let limits = Limits::default();
    let mac = MacAddr::local([0; 6]);
    let device = Net::new(mac, Some(NetBackend { backend, limits })).expect("a device");
    (Driver::started(Box::new(device), features), theirs)
}

/// Offers a chain of the input's choice; most of its buffers are in RAM.
fn post(driver: &mut Driver, input: &mut Input<'_>, queue: usize) {
    let count = 1 + input.byte() % PIECES_MAX;
    let pieces: Vec<_> = (0..count)
        .map(|_| {
            let [kind, a, b, c] = input.array();
            let len = match kind % 8 {
                0 => u32::from(a % 16),
                1 => 0x1_0000 + u32::from(a) * 64,
                2 => u32::from_le_bytes([a, b, c, kind]),
                _ => u32::from(u16::from_le_bytes([a, b])) % 3000,
            };
            let address = match kind {
                0xff => LOW_RAM - u64::from(a),
                0xfe => u64::from_le_bytes(input.array()),
                _ => BUFFERS + u64::from(u16::from_le_bytes([b, c])) * 128,
            };
            // Now and then a buffer that is of no use in its queue.
            let writable = (queue == RX) != (kind % 64 == 9);
            (address, len, writable)
        })
        .collect();
    driver.post(queue, &pieces);
    driver.kick_and_turn(queue);
}

/// Drains the stream; true if it has ended.
fn drain(network: &mut UnixStream) -> bool {
    let mut bytes = [0; 4096];
    loop {
        match network.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

/// What the device did must be bounded by what it was given.
fn take_used(driver: &mut Driver) {
    for queue in [RX, TX] {
        while let Some((head, _)) = driver.used(queue) {
            assert!(head < u32::from(driver.queues[queue].size));
        }
    }
}

fuzz_target!(|data: &[u8]| {
    thread_local! {
        static READER: RefCell<FrameReader> = RefCell::new(FrameReader::default());
    }
    let mut input = Input(data);
    let kind = input.byte();
    if kind & 1 == 1 {
        // The framing alone: what it gives is never longer than what came.
        READER.with_borrow_mut(|reader| {
            *reader = FrameReader::default();
            let (mut given, mut taken) = (0, 0);
            while !input.0.is_empty() {
                let cut = usize::from(input.byte()) + 1;
                let part = &input.0[..cut.min(input.0.len())];
                given += reader.fill(part).expect("a slice");
                input.0 = &input.0[part.len()..];
                while let Ok(Some(frame)) = reader.next_frame() {
                    assert!(!frame.is_empty());
                    taken += 4 + frame.len();
                }
                if reader.next_len().is_err() {
                    break;
                }
            }
            assert!(taken <= given);
        });
        return;
    }
    let features = VERSION_1
        | if kind & 2 == 0 { MRG_RXBUF } else { 0 }
        | if kind & 4 == 0 { EVENT_IDX } else { 0 };
    let (mut driver, mut network) = start(features);
    for _ in 0..64 {
        if input.0.is_empty() {
            break;
        }
        match input.byte() % 8 {
            0 | 1 => post(&mut driver, &mut input, TX),
            2..=4 => post(&mut driver, &mut input, RX),
            5 => {
                let [a, b, fill] = input.array();
                let len = u32::from(u16::from_le_bytes([a, b])).max(1);
                // A socket that is full takes a part: a stream that is cut anywhere.
                let _ = network.write_all(&len.to_be_bytes());
                let _ = network.write_all(&vec![fill; len as usize]);
            }
            6 => drop(network.write_all(&input.array::<8>())),
            _ => drop(drain(&mut network)),
        }
        driver.turn();
        take_used(&mut driver);
    }
    // A driver that starts anew is served, as long as the network speaks sense.
    drop(network);
    driver.turn();
    let (mut driver, mut network) = {
        driver.start(features);
        assert!(!driver.needs_reset());
        start(features)
    };
    driver.post(RX, &[(BUFFERS, 2000, true)]);
    driver.kick_and_turn(RX);
    network.write_all(&[0, 0, 0, 3, 7, 8, 9]).expect("room");
    driver.turn();
    assert_eq!(driver.used(RX).map(|used| used.1), Some(15));
    assert_eq!(driver.bytes(BUFFERS + HEADER_BYTES as u64, 3), [7, 8, 9]);
});
