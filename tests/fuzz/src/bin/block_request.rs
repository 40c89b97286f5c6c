//! Disk requests of any shape: each is answered with a status or stops the device, and the next
//! good one is served after a reset.
//!
//! Half of the headers are made mostly right, so that what is behind the checks is reached.

#![no_main]

use std::cell::RefCell;

use cloudlet_fuzz::Input;
use cloudlet_vmm::devices::disk::{Disk, Layer};
use cloudlet_vmm::devices::virtio::block::Block;
use cloudlet_vmm::devices::virtio::testing::{BUFFERS, Driver, VERSION_1};
use libfuzzer_sys::fuzz_target;

const DISK_BYTES: u64 = 37 * 4096 + 512;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 64;
const DATA: u64 = BUFFERS + 4096;
/// VIRTIO_BLK_F_FLUSH.
const FLUSH: u64 = 1 << 9;

thread_local! {
    static DRIVER: RefCell<Driver> = RefCell::new(driver());
}

fn driver() -> Driver {
    let file = tempfile::tempfile().expect("a temporary file");
    let layer = Layer::temporary(file, DISK_BYTES).expect("a layer");
    let disk = Disk::new(None, layer).expect("a disk");
    Driver::new(Box::new(Block::new(disk, "fuzz")))
}

/// Type, reserved, sector.
fn header(input: &mut Input<'_>) -> [u8; 16] {
    if input.byte() % 2 == 0 {
        return input.array();
    }
    let mut header = [0; 16];
    header[0] = input.byte() % 16;
    header[8..10].copy_from_slice(&(u16::from_le_bytes(input.array()) % 320).to_le_bytes());
    header
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    DRIVER.with_borrow_mut(|driver| {
        driver.start(VERSION_1 | FLUSH);
        while !input.0.is_empty() {
            driver.put(HEADER, &header(&mut input));
            driver.put(DATA, &input.array::<32>());
            let shape = input.byte();
            let mut chain = vec![(HEADER, 16 - u32::from(shape & 1), false)];
            for _ in 0..shape / 2 % 4 {
                let [offset, size, unit, writable] = input.array();
                let unit = if unit % 4 == 0 { 1 } else { 512 };
                let len = u32::from(size) * unit;
                chain.push((DATA + u64::from(offset), len, writable % 2 == 1));
            }
            chain[1..].sort_by_key(|piece| piece.2);
            if shape < 0xe0 {
                chain.push((STATUS, 1, true));
            }
            driver.put(STATUS, &[0xee]);
            driver.post(0, &chain);
            driver.kick_and_turn(0);
            if driver.needs_reset() {
                driver.start(VERSION_1 | FLUSH);
                continue;
            }
            assert!(driver.used(0).is_some(), "not answered");
            if shape < 0xe0 {
                assert!(driver.bytes(STATUS, 1)[0] <= 2, "no status");
            }
        }
        driver.put(HEADER, &[0; 16]);
        driver.post(
            0,
            &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)],
        );
        driver.kick_and_turn(0);
        assert!(driver.used(0).is_some());
        assert_eq!(driver.bytes(STATUS, 1), [0]);
    });
});
