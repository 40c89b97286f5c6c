//! The block device behind its transport: a model disk to compare with, and requests that are none.

use std::fs::File;
use std::io::Write;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::devices::disk::{BLOCK, BaseMark, BlockNumber, Disk, Layer, PendingBlocks};
use crate::devices::rate::{Limits, Rate};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::testing::{BUFFERS, Driver, EVENT_IDX, HIGH_BASE, LOW_RAM};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
/// VIRTIO_BLK_F_FLUSH.
const F_FLUSH: u64 = 1 << 9;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 64;
const DATA: u64 = BUFFERS + 4096;

const BASE_BYTES: u64 = 30 * 4096 + 1024;
const DISK_BYTES: u64 = 48 * 4096 + 512;

fn image(bytes: u64) -> (File, Vec<u8>) {
    let contents: Vec<u8> = (0..bytes)
        .map(|at| u8::try_from((at / 512 * 7 + at) % 251).unwrap())
        .collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&contents).unwrap();
    (file, contents)
}

fn layered() -> (Disk, Vec<u8>) {
    let (base, mut model) = image(BASE_BYTES);
    model.resize(usize::try_from(DISK_BYTES).unwrap(), 0);
    let layer = Layer::temporary(tempfile::tempfile().unwrap(), DISK_BYTES).unwrap();
    (Disk::new(Some(base), layer).unwrap(), model)
}

struct Guest {
    driver: Driver,
}

impl Guest {
    fn new(disk: Disk) -> Self {
        let device = Box::new(Block::new(disk, "cloudlet-disk-0"));
        Self {
            driver: Driver::started(device, EVENT_IDX | F_FLUSH),
        }
    }

    fn post(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.driver.put(HEADER, &header);
        self.driver.put(STATUS, &[0xee]);
        let all = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
        self.driver.post(0, &all);
        self.driver.kick_and_turn(0);
    }

    /// Does a request; its status.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u8 {
        self.post(kind, sector, data);
        let (_, len) = self.driver.used(0).expect("the request was not answered");
        assert!(len >= 1);
        self.driver.bytes(STATUS, 1)[0]
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [
                    &sector.to_le_bytes()[..],
                    &count.to_le_bytes(),
                    &flags.to_le_bytes(),
                ]
                .concat()
            })
            .collect();
        self.driver.put(DATA, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(kind, 0, &[(DATA, len, false)])
    }
}

#[derive(Debug, Clone)]
enum Op {
    Read(u64, u64, u32),
    Write(u64, u64, u32, u8),
    Discard(u64, u64),
    Zeroes(u64, u64),
    Flush,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let sectors = DISK_BYTES / 512;
    let range = (0..sectors, 1_u64..60).prop_map(move |(at, len)| (at, len.min(sectors - at)));
    let op = prop_oneof![
        4 => (range.clone(), 1_u32..30_000).prop_map(|((at, len), cut)| Op::Read(at, len, cut)),
        4 => (range.clone(), 1_u32..30_000, any::<u8>())
            .prop_map(|((at, len), cut, byte)| Op::Write(at, len, cut, byte)),
        1 => range.clone().prop_map(|(at, len)| Op::Discard(at, len)),
        1 => range.prop_map(|(at, len)| Op::Zeroes(at, len)),
        1 => Just(Op::Flush),
    ];
    prop::collection::vec(op, 1..30)
}

/// Data of `len` bytes in pieces of `cut` bytes, the second half of them in high memory.
fn pieces(len: u32, cut: u32, writable: bool) -> Vec<(u64, u32, bool)> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < len {
        let part = cut.max(len / 100).min(len - at);
        let base = if at < len / 2 { DATA } else { HIGH_BASE + 7 };
        pieces.push((base + u64::from(at), part, writable));
        at += part;
    }
    pieces
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn a_disk_is_what_was_written_to_it(ops in ops()) {
        let (disk, mut model) = layered();
        let mut guest = Guest::new(disk.clone());
        for op in ops {
            let range = |at: u64, len: u64| {
                let at = usize::try_from(at * 512).unwrap();
                at..at + usize::try_from(len * 512).unwrap()
            };
            match op {
                Op::Read(at, len, cut) => {
                    let bytes = u32::try_from(len * 512).unwrap();
                    let pieces = pieces(bytes, cut, true);
                    prop_assert_eq!(guest.request(IN, at, &pieces), 0);
                    let got: Vec<u8> = pieces
                        .iter()
                        .flat_map(|(at, len, _)| guest.driver.bytes(*at, usize::try_from(*len).unwrap()))
                        .collect();
                    prop_assert!(got == model[range(at, len)]);
                }
                Op::Write(at, len, cut, byte) => {
                    let bytes = u32::try_from(len * 512).unwrap();
                    let mut value = byte;
                    let mut new = Vec::new();
                    let pieces = pieces(bytes, cut, false);
                    for (at, len, _) in &pieces {
                        value = value.wrapping_add(13);
                        let part = vec![value; usize::try_from(*len).unwrap()];
                        guest.driver.put(*at, &part);
                        new.extend(part);
                    }
                    prop_assert_eq!(guest.request(OUT, at, &pieces), 0);
                    model[range(at, len)].copy_from_slice(&new);
                }
                Op::Discard(at, len) => {
                    let count = u32::try_from(len).unwrap();
                    prop_assert_eq!(guest.ranges(DISCARD, &[(at, count, 0)]), 0);
                    let first = (at * 512).div_ceil(4096);
                    let last = (at + len) * 512 / 4096;
                    if first < last {
                        model[range(first * 8, (last - first) * 8)].fill(0);
                    }
                }
                Op::Zeroes(at, len) => {
                    let count = u32::try_from(len).unwrap();
                    prop_assert_eq!(guest.ranges(ZEROES, &[(at, count, 1)]), 0);
                    model[range(at, len)].fill(0);
                }
                Op::Flush => prop_assert_eq!(guest.request(FLUSH, 0, &[]), 0),
            }
        }
        for (number, expected) in (0..).zip(model.chunks(BLOCK)) {
            let mut got = [0; BLOCK];
            disk.read_blocks(BlockNumber(number), &mut got).unwrap();
            prop_assert!(got[..expected.len()] == *expected, "block {}", number);
        }
    }

    #[test]
    fn no_request_breaks_the_device(
        requests in prop::collection::vec(
            (
                prop_oneof![4 => 0_u32..15, 1 => any::<u32>()],
                prop_oneof![3 => 0_u64..400, 1 => any::<u64>()],
                prop::collection::vec((0_u64..200, prop_oneof![3 => 0_u32..8192, 1 => (0_u32..16).prop_map(|n| n * 512)], any::<bool>()), 0..5),
                prop::collection::vec(any::<u8>(), 64),
            ),
            1..30,
        ),
    ) {
        let (disk, _) = layered();
        let mut guest = Guest::new(disk);
        for (kind, sector, mut data, bytes) in requests {
            data.sort_by_key(|piece| piece.2);
            let data: Vec<_> = data.iter().map(|(at, len, write)| (DATA + at, *len, *write)).collect();
            guest.driver.put(DATA, &bytes);
            let status = guest.request(kind, sector, &data);
            prop_assert!(status <= 2);
            prop_assert!(!guest.driver.needs_reset());
        }
        prop_assert_eq!(guest.request(IN, 0, &[(DATA, 512, true)]), 0);
    }
}

#[test]
fn requests_that_cannot_be_get_an_error() {
    let (disk, model) = layered();
    let mut guest = Guest::new(disk.clone());
    let sectors = DISK_BYTES / 512;
    let read = |guest: &mut Guest, sector, len| guest.request(IN, sector, &[(DATA, len, true)]);
    assert_eq!(read(&mut guest, sectors - 1, 512), 0);
    assert_eq!(read(&mut guest, sectors - 1, 1024), 1);
    assert_eq!(read(&mut guest, sectors, 512), 1);
    for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
        assert_eq!(read(&mut guest, sector, 512), 1, "{sector}");
        assert_eq!(guest.request(OUT, sector, &[(DATA, 512, false)]), 1);
    }
    for len in [1, 511, 513] {
        assert_eq!(read(&mut guest, 0, len), 1);
        assert_eq!(guest.request(OUT, 0, &[(DATA, len, false)]), 1);
    }
    assert_eq!(guest.request(IN, 0, &[]), 1);
    assert_eq!(guest.request(2, 0, &[]), 2);
    // More than one request may move, made of one buffer many times over.
    let big = u32::try_from(LOW_RAM - DATA).unwrap();
    assert_eq!(guest.request(IN, 0, &[(DATA, big, true); 60]), 1);
    // Ranges.
    let full = u32::try_from(sectors).unwrap();
    for (kind, ranges, status) in [
        (DISCARD, &[][..], 1),
        (DISCARD, &[(0, 0, 0)], 1),
        (DISCARD, &[(0, 8, 1)], 2),
        (ZEROES, &[(0, 8, 2)], 2),
        (DISCARD, &[(sectors, 1, 0)], 1),
        (DISCARD, &[(0, full + 1, 0)], 1),
        (ZEROES, &[(u64::MAX, u32::MAX, 0)], 1),
        (ZEROES, &[(0, 8, 0), (8, 8, 0), (sectors, 8, 0)], 1),
        (ZEROES, &[(0, 8, 0); 33], 1),
    ] {
        assert_eq!(guest.ranges(kind, ranges), status, "{kind} {ranges:?}");
    }
    assert_eq!(guest.request(DISCARD, 0, &[(DATA, 17, false)]), 1);
    assert!(disk.changed_runs().is_empty(), "something was done in part");
    assert_eq!(read(&mut guest, 0, 4096), 0);
    assert!(guest.driver.bytes(DATA, 4096) == model[..4096]);
    assert_eq!(guest.ranges(ZEROES, &[(0, full, 0)]), 0);
}

#[test]
fn chains_that_are_no_request_stop_the_device() {
    for pieces in [
        &[(HEADER, 16, false)][..],
        &[(HEADER, 15, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
        &[(HEADER, 0, false)],
    ] {
        let mut guest = Guest::new(layered().0);
        guest.driver.post(0, pieces);
        guest.driver.kick_and_turn(0);
        assert!(guest.driver.needs_reset(), "{pieces:?}");
        assert!(guest.driver.used(0).is_none());
    }
    // A header and a status in pieces are fine.
    let mut guest = Guest::new(layered().0);
    guest.driver.put(HEADER, &[0; 16]);
    let pieces = [
        (HEADER, 3, false),
        (HEADER + 3, 13, false),
        (DATA, 500, true),
        (DATA + 500, 13, true),
    ];
    guest.driver.post(0, &pieces);
    guest.driver.kick_and_turn(0);
    assert_eq!(guest.driver.used(0), Some((0, 513)));
    assert_eq!(guest.driver.bytes(DATA + 512, 1), [0]);
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let (file, model) = image(8192);
    let disk = Disk::read_only(file).unwrap();
    let mut guest = Guest::new(disk);
    assert_eq!(guest.request(OUT, 0, &[(DATA, 512, false)]), 1);
    assert_eq!(guest.ranges(ZEROES, &[(0, 8, 0)]), 1);
    assert_eq!(guest.ranges(DISCARD, &[(0, 8, 0)]), 1);
    assert_eq!(guest.request(FLUSH, 0, &[]), 0);
    assert_eq!(guest.request(IN, 0, &[(DATA, 8192, true)]), 0);
    assert!(guest.driver.bytes(DATA, 8192) == model);
    guest.driver.write(0x14, 0);
    let features = guest.driver.read(0x10);
    assert_eq!((features >> 5 & 1, features >> 13 & 3), (1, 0));
}

#[test]
fn tells_its_size_limits_and_name() {
    let mut guest = Guest::new(layered().0);
    assert_eq!(
        guest.driver.read(0x100),
        u32::try_from(DISK_BYTES / 512).unwrap()
    );
    assert_eq!(guest.driver.read(0x10c), 254);
    assert_eq!(guest.driver.read(0x114), 512);
    assert_eq!(guest.driver.read(0x12c), 8);
    assert_eq!(guest.request(ID, 0, &[(DATA, 20, true)]), 0);
    assert_eq!(guest.driver.bytes(DATA, 20), b"cloudlet-disk-0\0\0\0\0\0");
    guest.driver.put(DATA, &[9; 20]);
    assert_eq!(guest.request(ID, 0, &[(DATA, 4, true)]), 0);
    assert_eq!(guest.driver.bytes(DATA, 5), b"clou\x09");
}

#[test]
fn a_driver_without_flush_gets_its_writes_made_durable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    let disk = Disk::new(
        None,
        Layer::create(&path, DISK_BYTES, BaseMark::default()).unwrap(),
    )
    .unwrap();
    let map = |path: &std::path::Path| std::fs::read(path).unwrap()[4096];
    let mut guest = Guest {
        driver: Driver::started(Box::new(Block::new(disk.clone(), "")), 0),
    };
    assert_eq!(guest.request(OUT, 0, &[(DATA, 4096, false)]), 0);
    assert_eq!(map(&path), 1);
    let mut guest = Guest::new(disk);
    assert_eq!(guest.request(OUT, 8, &[(DATA, 4096, false)]), 0);
    assert_eq!(map(&path), 1);
    assert_eq!(guest.request(FLUSH, 0, &[]), 0);
    assert_eq!(map(&path), 5);
}

#[test]
fn requests_for_blocks_that_have_yet_to_arrive_wait_in_order() {
    let (disk, _) = layered();
    let demanded = Arc::new(Mutex::new(Vec::new()));
    let heard = demanded.clone();
    let demand = Box::new(move |block: BlockNumber| heard.lock().unwrap().push(block.0));
    disk.set_pending(PendingBlocks::new(disk.blocks(), [(4, 8), (20, 2)], demand));
    let mut guest = Guest::new(disk.clone());
    assert_eq!(guest.request(IN, 0, &[(DATA, 4096, true)]), 0);
    // Three at once: the first waits, the second needs another block, the third none at all.
    let header = |sector: u64| [&IN.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    for (slot, sector) in [(1, 5 * 8 + 1), (2, 20 * 8), (3, 0)] {
        let at = HEADER + slot * 16;
        guest.driver.put(at + 128, &header(sector));
        let data = DATA + slot * 4096;
        guest.driver.post(
            0,
            &[
                (at + 128, 16, false),
                (data, 512, true),
                (STATUS + slot, 1, true),
            ],
        );
    }
    guest.driver.kick_and_turn(0);
    assert!(guest.driver.used(0).is_none());
    assert_eq!(std::mem::take(&mut *demanded.lock().unwrap()), [5, 20]);
    assert_eq!(
        guest.driver.manager.run_with_timeout(0).unwrap(),
        0,
        "no busy waiting"
    );
    disk.apply_block(BlockNumber(4), Some(&[1; BLOCK])).unwrap();
    assert_eq!(
        guest.driver.manager.run_with_timeout(0).unwrap(),
        0,
        "not what it waits for"
    );

    // Saved and restored while parked, it is still in the ring.
    guest.driver.transport.pause();
    let state = guest.driver.transport.save();
    let ram = guest.driver.guest.clone();
    let device = Box::new(Block::new(disk.clone(), "another name"));
    let transport = MmioTransport::restore(&state, ram.clone(), device).unwrap();
    assert_eq!(transport.save(), state);
    let queues = guest.driver.queues.clone();
    guest.driver = Driver::with(ram, transport);
    guest.driver.queues = queues;
    guest.driver.transport.resume();
    guest.driver.turn();
    assert!(guest.driver.used(0).is_none());

    let worker = disk.clone();
    std::thread::spawn(move || {
        worker
            .apply_block(BlockNumber(5), Some(&[50; BLOCK]))
            .unwrap()
    })
    .join()
    .unwrap();
    guest.driver.turn();
    assert!(guest.driver.used(0).is_some());
    assert!(guest.driver.used(0).is_none());
    assert_eq!(guest.driver.bytes(DATA + 4096, 512), [50; 512]);
    assert_eq!(
        disk.apply_run(BlockNumber(20), &[60; 2 * BLOCK]).unwrap(),
        2
    );
    guest.driver.turn();
    assert!(guest.driver.used(0).is_some() && guest.driver.used(0).is_some());
    assert_eq!(guest.driver.bytes(DATA + 2 * 4096, 512), [60; 512]);

    // A write of a whole pending block does not wait; one of a part of it does.
    guest.driver.put(DATA, &[70; BLOCK]);
    assert_eq!(guest.request(OUT, 8 * 8, &[(DATA, 4096, false)]), 0);
    guest.post(OUT, 9 * 8 + 1, &[(DATA, 512, false)]);
    assert!(guest.driver.used(0).is_none());
    assert_eq!(disk.apply_run(BlockNumber(8), &[80; 2 * BLOCK]).unwrap(), 1);
    guest.driver.turn();
    assert!(guest.driver.used(0).is_some());
    let mut got = [0; BLOCK];
    disk.read_blocks(BlockNumber(9), &mut got).unwrap();
    assert_eq!((got[0], got[512], got[1023], got[1024]), (80, 70, 70, 80));
    disk.read_blocks(BlockNumber(8), &mut got).unwrap();
    assert_eq!(got, [70; BLOCK]);
}

#[test]
fn another_disk_than_the_saved_one_is_refused() {
    let (disk, _) = layered();
    let guest = Guest::new(disk);
    guest.driver.transport.pause();
    let state = guest.driver.transport.save();
    let restore = |device: Box<dyn VirtioDevice>| {
        MmioTransport::restore(&state, guest.driver.guest.clone(), device)
    };
    let smaller = Layer::temporary(tempfile::tempfile().unwrap(), DISK_BYTES - 512).unwrap();
    assert!(restore(Box::new(Block::new(Disk::new(None, smaller).unwrap(), ""))).is_err());
    let fixed = Disk::read_only(image(DISK_BYTES).0).unwrap();
    assert!(restore(Box::new(Block::new(fixed, ""))).is_err());
    let other: Box<dyn VirtioDevice> = Box::new(super::super::rng::Rng::new());
    assert!(restore(other).is_err());
    assert!(restore(Box::new(Block::new(layered().0, ""))).is_ok());
}

#[test]
fn limits_hold_requests_back_in_the_ring() {
    let rate = |per_second, burst| {
        let [per_second, burst] = [per_second, burst].map(|n| NonZeroU64::new(n).unwrap());
        Some(Rate { per_second, burst })
    };
    let operations = Limits {
        operations: rate(5, 2),
        ..Limits::default()
    };
    let bytes = Limits {
        bytes: rate(5 * 4096, 2 * 4096),
        ..Limits::default()
    };
    for limits in [operations, bytes] {
        let (disk, _) = layered();
        let device = Block::new(disk.clone(), "").limited(limits).unwrap();
        let mut guest = Guest {
            driver: Driver::started(Box::new(device), EVENT_IDX | F_FLUSH),
        };
        let start = Instant::now();
        let mut done = 0;
        guest.driver.put(HEADER, &[0; 16]);
        for _ in 0..6 {
            let read = [(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)];
            guest.driver.post(0, &read);
        }
        guest.driver.kick_and_turn(0);
        let mut wakes = 0;
        // Two at once, and one that overdraws; then one each fifth of a second.
        while done < 5 {
            wakes += guest.driver.manager.run_with_timeout(1000).unwrap();
            done += std::iter::from_fn(|| guest.driver.used(0)).count();
        }
        assert!(start.elapsed() >= Duration::from_millis(380), "too early");
        assert!(wakes < 10, "{wakes} wakes: busy waiting");

        // The limits stay with this host, what they held back is in the ring.
        guest.driver.transport.pause();
        let state = guest.driver.transport.save();
        let (ram, queues) = (guest.driver.guest.clone(), guest.driver.queues.clone());
        let device = Box::new(Block::new(disk, ""));
        let transport = MmioTransport::restore(&state, ram.clone(), device).unwrap();
        guest.driver = Driver::with(ram, transport);
        guest.driver.queues = queues;
        guest.driver.transport.resume();
        guest.driver.turn();
        let rest = std::iter::from_fn(|| guest.driver.used(0)).count();
        assert_eq!(done + rest, 6);
    }
}

/// Megabytes a second of 1 MiB requests. Not a test of the figure, which depends on the machine;
/// it prints it.
#[test]
fn throughput() {
    let layer = Layer::temporary(tempfile::tempfile().unwrap(), 64 << 20).unwrap();
    let mut guest = Guest::new(Disk::new(None, layer).unwrap());
    for (kind, writable, what) in [
        (OUT, false, "written"),
        (OUT, false, "rewritten"),
        (IN, true, "read"),
    ] {
        let start = Instant::now();
        for request in 0..64 {
            assert_eq!(
                guest.request(kind, request * 2048, &[(DATA, 1 << 20, writable)]),
                0
            );
        }
        let seconds = start.elapsed().as_secs_f64();
        println!("{what}: {:.0} MB/s", 64.0 * 1.048_576 / seconds);
    }
}
