//! The entropy device behind its transport, driven as a guest would.

use super::*;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::testing::{BUFFERS, Driver, EVENT_IDX, HIGH_BASE, LOW_RAM};

#[test]
fn fills_what_it_may_write_and_marks_it_dirty() {
    let mut driver = Driver::started(Box::new(Rng::new()), EVENT_IDX);
    let head = driver.post(0, &[(BUFFERS, 100, true), (HIGH_BASE + 8, 4096, true)]);
    driver.kick_and_turn(0);
    assert_eq!(driver.used(0), Some((u32::from(head), 4196)));
    assert_eq!(driver.interrupt(), Some(1));
    assert!(
        driver
            .bytes(HIGH_BASE + 8, 4096)
            .iter()
            .filter(|byte| **byte == 0)
            .count()
            < 200
    );
    assert_eq!(driver.bytes(BUFFERS + 100, 8), [0; 8]);
    let dirty = |address: u64| {
        use vm_memory::bitmap::Bitmap;
        use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
        let (region, at) = driver.guest.to_region_addr(GuestAddress(address)).unwrap();
        region.bitmap().dirty_at(usize::try_from(at.0).unwrap())
    };
    assert!(dirty(BUFFERS) && dirty(HIGH_BASE) && dirty(HIGH_BASE + 4100));
    assert!(!dirty(BUFFERS + 4096) && !dirty(LOW_RAM - 1));
}

#[test]
fn work_for_one_request_is_bounded() {
    let mut driver = Driver::started(Box::new(Rng::new()), 0);
    let len = u32::try_from(LOW_RAM - BUFFERS).unwrap();
    driver.post(0, &[(BUFFERS, len, true); 8]);
    driver.kick_and_turn(0);
    assert_eq!(driver.used(0).unwrap().1, 64 * 1024);
}

#[test]
fn a_request_with_nothing_to_write_gets_nothing() {
    let mut driver = Driver::started(Box::new(Rng::new()), 0);
    driver.post(0, &[(BUFFERS, 64, false)]);
    driver.post(0, &[(BUFFERS, 0, true)]);
    driver.kick_and_turn(0);
    assert_eq!(driver.used(0).unwrap().1, 0);
    assert_eq!(driver.used(0).unwrap().1, 0);
    assert_eq!(driver.bytes(BUFFERS, 64), [0; 64]);
}

#[test]
fn goes_on_after_restore_with_what_was_posted_before() {
    let mut driver = Driver::started(Box::new(Rng::new()), EVENT_IDX);
    driver.post(0, &[(BUFFERS, 16, true)]);
    driver.kick_and_turn(0);
    assert!(driver.used(0).is_some());
    driver.transport.pause();
    driver.post(0, &[(BUFFERS + 4096, 16, true)]);
    driver.kick_and_turn(0);
    assert!(
        driver.used(0).is_none(),
        "a paused device leaves guest memory alone"
    );
    let state = driver.transport.save();
    let guest = driver.guest.clone();
    let transport = MmioTransport::restore(&state, guest.clone(), Box::new(Rng::new())).unwrap();
    assert_eq!(transport.save(), state);
    let mut restored = Driver::with(guest, transport);
    restored.queues = driver.queues.clone();
    restored.turn();
    assert!(restored.used(0).is_none());
    restored.transport.resume();
    restored.turn();
    assert_eq!(restored.used(0).unwrap().1, 16);
}
