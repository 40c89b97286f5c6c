//! Page numbers, ranges, commands and statistics of any kind in a balloon's queues: the device goes
//! on or asks for a reset, and pages that nobody named keep what they hold.

#![no_main]

use std::cell::RefCell;

use cloudlet_fuzz::Input;
use cloudlet_vmm::devices::virtio::balloon::{Balloon, BalloonHandle};
use cloudlet_vmm::devices::virtio::testing::{BUFFERS, Driver, VERSION_1};
use cloudlet_vmm::memory::{PAGE_BYTES, Ram, RamLayout};
use libfuzzer_sys::fuzz_target;

const PAGES: u64 = 1024;
/// What may be given away starts here; rings and buffers lie below, and the last page is kept.
const FREE: u64 = 512;
const LAST: u64 = PAGES - 1;
/// Statistics, deflate on OOM, hints, reporting.
const FEATURES: u64 = VERSION_1 | 0b10_1110;
/// Page poisoning.
const POISON: u64 = 1 << 4;

thread_local! {
    static GUEST: RefCell<(Driver, BalloonHandle)> = RefCell::new(guest());
}

fn guest() -> (Driver, BalloonHandle) {
    let layout = RamLayout::new(PAGES * PAGE_BYTES).expect("a layout");
    let ram = Ram::anonymous(&layout).expect("memory");
    let balloon = Balloon::new(ram.discarder().expect("a discarder")).expect("a balloon");
    let handle = balloon.handle();
    (Driver::over(ram.guest().clone(), Box::new(balloon)), handle)
}

/// Negotiates, with a poison value for some.
fn start(driver: &mut Driver, choice: u8) {
    let poison = if choice % 4 == 0 { POISON } else { 0 };
    driver.negotiate(FEATURES | poison);
    driver.set_up_queues();
    driver.write(0x10c, u32::from(choice / 4 % 2));
    driver.write(0x70, 15);
    driver.turn();
}

/// A page number: mostly one that may go, else anything but those of the rings.
fn frame(input: &mut Input<'_>) -> u32 {
    let word = u32::from_le_bytes(input.array());
    let free = u32::try_from(FREE).unwrap();
    let last = u32::try_from(LAST).unwrap();
    if word % 4 != 0 {
        free + (word >> 8) % (last - free)
    } else if word <= last {
        word | 1 << 31
    } else {
        word
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    GUEST.with_borrow_mut(|(driver, handle)| {
        start(driver, input.byte());
        driver.put(LAST * PAGE_BYTES, &[0x5a; 4096]);
        while !input.0.is_empty() {
            let queue = usize::from(input.byte() % 5);
            let count = usize::from(input.byte() % 16);
            let bytes: Vec<u8> = (0..count).flat_map(|_| frame(&mut input).to_le_bytes()).collect();
            driver.put(BUFFERS, &bytes);
            let [readable, ranges, wish] = input.array();
            let mut chain = vec![(BUFFERS, u32::from(readable), false)];
            for _ in 0..ranges % 4 {
                let offset = u64::from(u32::from_le_bytes(input.array()));
                let start = FREE * PAGE_BYTES + offset % ((LAST - FREE) * PAGE_BYTES);
                let len = u32::from_le_bytes(input.array());
                let room = u32::try_from(LAST * PAGE_BYTES - start).unwrap();
                // Now and then one that leads out of RAM.
                let len = if ranges < 0xf0 {
                    len % (room + 1)
                } else {
                    len | 1 << 31
                };
                chain.push((start, len, true));
            }
            match wish % 8 {
                0 => handle.set_wanted_pages(u64::from(wish)),
                1 => drop(handle.poll_statistics()),
                2 => handle.start_hints(),
                3 => handle.end_hints(),
                _ => {}
            }
            driver.write(0x104, u32::from(wish));
            driver.post(queue, &chain);
            driver.kick_and_turn(queue);
            assert_eq!(driver.bytes(LAST * PAGE_BYTES, 4096), [0x5a; 4096]);
            let _ = (handle.status(), handle.hints());
            if driver.needs_reset() {
                start(driver, input.byte());
            }
        }
    });
});
