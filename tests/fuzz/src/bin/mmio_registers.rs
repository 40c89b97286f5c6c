//! A driver that writes registers and rings as it pleases: whatever it does, a reset makes the
//! device whole again.
//!
//! The input is a sequence of steps: register writes and reads of any width, words put into the
//! rings, kicks, and turns of the event loop.

#![no_main]

use std::cell::RefCell;

use cloudlet_fuzz::Input;
use cloudlet_vmm::bus::BusDevice;
use cloudlet_vmm::devices::virtio::rng::Rng;
use cloudlet_vmm::devices::virtio::testing::{BUFFERS, Driver, EVENT_IDX, VERSION_1};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static DRIVER: RefCell<Driver> = RefCell::new(Driver::new(Box::new(Rng::new())));
}

/// One step of the driver.
fn step(driver: &mut Driver, input: &mut Input<'_>) {
    let kind = input.byte();
    match kind % 8 {
        // Registers that a driver writes.
        0 => driver.write(
            u64::from(input.byte() % 64) * 4,
            u32::from_le_bytes(input.array()),
        ),
        1 => driver.write(0x70, u32::from(input.byte())),
        // Accesses of any width at any place.
        2 => {
            let offset = u64::from(u16::from_le_bytes(input.array()));
            let bytes: [u8; 8] = input.array();
            driver
                .transport
                .write(offset, &bytes[..usize::from(kind / 8) % 9]);
        }
        3 => {
            let offset = u64::from(u16::from_le_bytes(input.array()));
            driver
                .transport
                .read(offset, &mut vec![0; usize::from(kind / 8)]);
        }
        // The descriptor table and both rings of the queue.
        4 => {
            let at = u64::from(u16::from_le_bytes(input.array()));
            driver.put(0x1000 + at, &input.array::<8>());
        }
        5 => {
            let [index, len, flags, next] = input.array();
            let address = u64::from_le_bytes(input.array());
            let address = if kind & 0x80 == 0 {
                BUFFERS + (address & 0xffff)
            } else {
                address
            };
            let (len, flags) = (u32::from(len) << (kind / 8 % 16), u16::from(flags % 8));
            if !driver.queues.is_empty() {
                driver.descriptor(
                    0,
                    u16::from(index % 64),
                    address,
                    len,
                    flags,
                    u16::from(next),
                );
                driver.offer(0, u16::from(index % 64));
            }
        }
        6 => driver.kick_and_turn(usize::from(kind / 8 % 4)),
        _ => driver.start(VERSION_1),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    DRIVER.with_borrow_mut(|driver| {
        driver.start(VERSION_1 | if input.byte() % 2 == 0 { EVENT_IDX } else { 0 });
        for _ in 0..256 {
            if input.0.is_empty() {
                break;
            }
            step(driver, &mut input);
        }
        driver.turn();
        driver.start(VERSION_1);
        driver.post(0, &[(BUFFERS, 16, true)]);
        driver.kick_and_turn(0);
        assert_eq!(driver.used(0), Some((0, 16)));
    });
});
