//! A driver that does the wrong thing, register by register and chain by chain.
//!
//! The device behind the transport here takes every chain it is offered, so that what is tested is
//! the gate in `queue.rs` and the status state machine.

use std::os::fd::RawFd;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::testing::{
    BUFFERS, Driver, DriverQueue, EVENT_IDX, HIGH_BASE, HIGH_RAM, INDIRECT, LOW_RAM, NEXT,
    VERSION_1, WRITE,
};
use crate::devices::virtio::{
    DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice, device_type,
};

/// Takes chains and gives them back unwritten.
#[derive(Default)]
struct Taker {
    chain: Chain,
    rng: Rng,
}

impl VirtioDevice for Taker {
    fn id(&self) -> u32 {
        device_type::RNG
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[8, 128]
    }

    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5]
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn queue_event(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let ring = &mut io.queues[queue];
        while ring
            .pop(io.guest, &mut self.chain)
            .map_err(DeviceError::queue(queue))?
        {
            let len = self.chain.writable.len();
            ring.push_used(io.guest, &self.chain, len)
                .map_err(DeviceError::queue(queue))?;
        }
        io.enable_kicks(queue).map(drop)
    }

    fn backend_event(&mut self, _: usize, _: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self) -> DeviceState {
        self.rng.save()
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), RestoreError> {
        Ok(())
    }
}

fn started(features: u64) -> Driver {
    Driver::started(Box::new(Taker::default()), features)
}

/// Offers the chain at `head`, kicks, and expects the device to stop until it is reset, after
/// which it works again.
fn expect_stop(driver: &mut Driver, head: u16, why: &str) {
    let failures = driver.transport.failures();
    driver.offer(0, head);
    driver.kick_and_turn(0);
    assert!(driver.needs_reset(), "{why}");
    assert_eq!(driver.transport.failures(), failures + 1, "{why}");
    assert!(
        driver.interrupt().is_some_and(|bits| bits & 2 != 0),
        "{why}: config interrupt"
    );
    assert!(driver.transport.take_error().is_some(), "{why}");
    assert!(driver.used(0).is_none(), "{why}");
    driver.start(VERSION_1);
    driver.post(0, &[(BUFFERS, 16, true)]);
    driver.kick_and_turn(0);
    assert_eq!(driver.used(0), Some((0, 16)), "{why}: works after a reset");
    driver.start(VERSION_1);
}

#[test]
fn identifies_itself_and_its_configuration() {
    let mut driver = Driver::new(Box::new(Taker::default()));
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), 4);
    assert_eq!(driver.read(0x10), (1 << 29) | (1 << 5));
    driver.write(0x14, 1);
    assert_eq!(driver.read(0x10), 1);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
    assert_eq!(driver.read(0xb0), u32::MAX);
    assert_eq!(driver.read(0x100), 0x0403_0201);
    assert_eq!(driver.read(0x104), 5);
    assert_eq!(driver.read(0xffc), 0);
    driver.write(0x30, 7);
    assert_eq!(driver.read(0x34), 0);
}

#[test]
fn accesses_of_a_wrong_width_or_place_are_ignored() {
    use crate::bus::BusDevice;
    let mut driver = Driver::new(Box::new(Taker::default()));
    for len in [0, 1, 2, 3, 5, 8, 64] {
        let mut data = vec![0xaa; len];
        driver.transport.read(0, &mut data);
        assert!(data.iter().all(|byte| *byte == 0));
        driver.transport.write(0x70, &vec![1; len]);
    }
    driver.transport.write(0x71, &[1, 0, 0, 0]);
    assert_eq!(driver.status(), 0);
    driver.transport.write(u64::MAX - 1, &[1, 0, 0, 0]);
    driver.transport.read(u64::MAX, &mut [0; 4]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [
        0,
        1 << 5,
        VERSION_1 | 1,
        VERSION_1 | 1 << 28,
        VERSION_1 | 1 << 63,
    ] {
        let mut driver = Driver::new(Box::new(Taker::default()));
        driver.negotiate(features);
        assert_eq!(driver.status(), 3, "{features:#x}");
        driver.set_up_queues();
        driver.write(0x70, 15);
        assert!(driver.needs_reset(), "DRIVER_OK without FEATURES_OK");
        driver.kick_and_turn(0);
        assert!(driver.used(0).is_none());
    }
    let mut driver = Driver::new(Box::new(Taker::default()));
    driver.negotiate(VERSION_1 | EVENT_IDX | 1 << 5);
    assert_eq!(driver.status(), 11);
    // Frozen now.
    driver.write(0x24, 0);
    driver.write(0x20, u32::MAX);
    driver.set_up_queues();
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_status_out_of_order_stops_the_device() {
    for steps in [
        &[2_u32][..],
        &[4],
        &[8],
        &[15],
        &[1, 5],
        &[1, 3, 7],
        &[1, 3, 1],
        &[0x11],
        &[1, 0x21],
        &[0x101],
    ] {
        let mut driver = Driver::new(Box::new(Taker::default()));
        for step in steps {
            driver.write(0x70, *step);
        }
        assert!(driver.needs_reset(), "{steps:?}");
        driver.write(0x70, 0);
        assert_eq!(driver.status(), 0, "{steps:?}");
    }
    // FAILED may be set at any time.
    let mut driver = Driver::new(Box::new(Taker::default()));
    driver.write(0x70, 0x80);
    assert_eq!(driver.status(), 0x80);
}

#[test]
fn a_kick_without_driver_ok_is_nothing() {
    let mut driver = Driver::new(Box::new(Taker::default()));
    driver.kick_and_turn(0);
    driver.negotiate(VERSION_1);
    driver.set_up_queues();
    driver.post(0, &[(BUFFERS, 16, true)]);
    driver.kick_and_turn(0);
    driver.kick(7);
    driver.write(0x50, u32::MAX);
    driver.turn();
    assert!(driver.used(0).is_none());
    assert_eq!(driver.status(), 11);
    // What was posted early is found at DRIVER_OK, without another kick.
    driver.write(0x70, 15);
    driver.turn();
    assert_eq!(driver.used(0), Some((0, 16)));
}

#[test]
fn queues_outside_ram_or_misaligned_stop_the_device() {
    let good = DriverQueue {
        size: 8,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        next_descriptor: 0,
        available_index: 0,
        used_index: 0,
    };
    let mut cases = Vec::new();
    let bad = [
        LOW_RAM,
        LOW_RAM - 16,
        0xd000_0000,
        0xfee0_0000,
        HIGH_BASE - 16,
        HIGH_BASE + HIGH_RAM - 16,
        u64::MAX - 15,
        u64::MAX << 4,
    ];
    for address in bad {
        cases.push(DriverQueue {
            descriptors: address,
            ..good.clone()
        });
        cases.push(DriverQueue {
            available: address,
            ..good.clone()
        });
        cases.push(DriverQueue {
            used: address,
            ..good.clone()
        });
    }
    cases.push(DriverQueue {
        descriptors: 0x1008,
        ..good.clone()
    });
    cases.push(DriverQueue {
        available: 0x2001,
        ..good.clone()
    });
    cases.push(DriverQueue {
        used: 0x3002,
        ..good.clone()
    });
    cases.push(DriverQueue {
        available: 0,
        ..good.clone()
    });
    for case in cases {
        let mut driver = Driver::new(Box::new(Taker::default()));
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, &case);
        driver.write(0x70, 15);
        driver.kick_and_turn(0);
        assert!(driver.needs_reset(), "{case:x?}");
    }
    for size in [0_u32, 3, 16, 0x8000, 0x10000, u32::MAX] {
        let mut driver = Driver::new(Box::new(Taker::default()));
        driver.negotiate(VERSION_1);
        driver.write(0x30, 0);
        driver.write(0x38, size);
        assert!(driver.needs_reset(), "{size}");
    }
}

#[test]
fn queue_registers_are_frozen_while_the_device_runs() {
    let mut driver = started(0);
    driver.write(0x30, 0);
    for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x44] {
        driver.write(register, 0xffff_fff0);
    }
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.read(0x44), 1);
    driver.post(0, &[(BUFFERS, 16, true)]);
    driver.kick_and_turn(0);
    assert_eq!(driver.used(0), Some((0, 16)));
}

#[test]
fn chains_that_loop_stop_the_device() {
    let mut driver = started(0);
    driver.descriptor(0, 0, BUFFERS, 16, NEXT, 0);
    expect_stop(&mut driver, 0, "points at itself");
    driver.descriptor(0, 0, BUFFERS, 16, NEXT, 1);
    driver.descriptor(0, 1, BUFFERS, 16, NEXT, 0);
    expect_stop(&mut driver, 0, "two in a circle");
    for index in 0..8 {
        driver.descriptor(0, index, BUFFERS, 0, NEXT, (index + 1) % 8);
    }
    expect_stop(&mut driver, 3, "all in a circle, without bytes");
}

#[test]
fn indices_outside_the_table_stop_the_device() {
    let mut driver = started(0);
    expect_stop(&mut driver, 8, "head just outside");
    expect_stop(&mut driver, u16::MAX, "head far outside");
    driver.descriptor(0, 0, BUFFERS, 16, NEXT, 8);
    expect_stop(&mut driver, 0, "next outside");
    driver.queues[0].available_index = 9;
    expect_stop(&mut driver, 0, "more chains than the ring is long");
}

#[test]
fn buffers_outside_ram_stop_the_device() {
    let mut driver = started(0);
    let cases = [
        (LOW_RAM, 1),
        (LOW_RAM - 4, 5),
        (0xd000_0000, 4),
        (0xd000_0050, 4),
        (0xfee0_0000, 16),
        (HIGH_BASE - 1, 2),
        (HIGH_BASE + HIGH_RAM - 1, 2),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 3, 4),
    ];
    for (address, len) in cases {
        for flags in [0, WRITE] {
            driver.descriptor(0, 0, address, len, flags, 0);
            expect_stop(&mut driver, 0, &format!("{address:#x}+{len:#x}"));
        }
    }
}

#[test]
fn indirect_wrong_order_and_too_long_chains_stop_the_device() {
    let mut driver = started(0);
    driver.descriptor(0, 0, BUFFERS, 32, INDIRECT, 0);
    expect_stop(&mut driver, 0, "indirect, not offered");
    driver.descriptor(0, 0, BUFFERS, 32, NEXT, 1);
    driver.descriptor(0, 1, BUFFERS, 32, INDIRECT | NEXT, 2);
    expect_stop(&mut driver, 0, "indirect in the middle");
    for len in [0, 16] {
        driver.descriptor(0, 0, BUFFERS, len, WRITE | NEXT, 1);
        driver.descriptor(0, 1, BUFFERS, 16, 0, 0);
        expect_stop(&mut driver, 0, "readable after writable");
    }
}

#[test]
fn more_than_4_gib_in_one_chain_stops_the_device() {
    let len = u32::try_from(LOW_RAM).unwrap();
    let chain = |driver: &mut Driver, count: u16, readable: u16| {
        for index in 0..count {
            let more = if index + 1 < count { NEXT } else { 0 };
            let write = if index < readable { 0 } else { WRITE };
            driver.descriptor(1, index, 0, len, more | write, index + 1);
        }
        driver.offer(1, 0);
        driver.kick_and_turn(1);
    };
    let mut driver = started(0);
    // 63 * 64 MiB: allowed, and costs nothing, since no byte is copied.
    chain(&mut driver, 63, 31);
    assert_eq!(driver.used(1), Some((0, 32 * len)));
    for readable in [0, 32, 64] {
        let mut driver = started(0);
        chain(&mut driver, 64, readable);
        assert!(driver.needs_reset(), "{readable}");
    }
}

#[test]
fn overlapping_buffers_harm_only_the_guest() {
    let mut driver = started(0);
    let table = driver.queues[0].descriptors;
    driver.post(
        0,
        &[
            (BUFFERS, 64, false),
            (BUFFERS + 8, 64, true),
            (BUFFERS, 64, true),
        ],
    );
    driver.post(0, &[(table, 128, true), (table, 128, true)]);
    driver.kick_and_turn(0);
    assert_eq!(driver.used(0).unwrap().1, 128);
    assert_eq!(driver.used(0).unwrap().1, 256);
    assert!(!driver.needs_reset());
}

#[test]
fn interrupts_follow_the_drivers_wish() {
    use vm_memory::{Bytes, GuestAddress};
    // Without EVENT_IDX: the flag in the available ring.
    let mut driver = started(0);
    driver.post(0, &[(BUFFERS, 16, true)]);
    driver.kick_and_turn(0);
    assert_eq!(driver.interrupt(), Some(1));
    let flags = GuestAddress(driver.queues[0].available);
    driver.guest.write_obj(1_u16, flags).unwrap();
    driver.post(0, &[(BUFFERS, 16, true)]);
    driver.kick_and_turn(0);
    assert_eq!(driver.interrupt(), None);
    // With it: the used_event index. The third used buffer is the one the driver waits for.
    let mut driver = started(EVENT_IDX);
    let event = GuestAddress(driver.queues[0].available + 4 + 2 * 8);
    driver.guest.write_obj(2_u16, event).unwrap();
    for expected in [None, None, Some(1), None] {
        driver.post(0, &[(BUFFERS, 16, true)]);
        driver.kick_and_turn(0);
        assert_eq!(driver.interrupt(), expected);
    }
}

#[test]
fn a_saved_device_with_any_nonsense_is_refused() {
    let guest = || crate::devices::virtio::testing::ram();
    let restore =
        |state: &MmioState| MmioTransport::restore(state, guest(), Box::new(Taker::default()));
    let mut driver = started(EVENT_IDX);
    driver.post(0, &[(BUFFERS, 16, true)]);
    driver.kick_and_turn(0);
    driver.transport.pause();
    let state = driver.transport.save();
    let restored = restore(&state).unwrap();
    assert_eq!(restored.save(), state);
    assert!(
        restored.irq_fd().read().is_ok(),
        "an interrupt that was pending is raised again"
    );

    let mut cases: Vec<(&str, MmioState)> = Vec::new();
    let mut case = |what, change: &dyn Fn(&mut MmioState)| {
        let mut changed = state.clone();
        change(&mut changed);
        cases.push((what, changed));
    };
    case("features", &|s| s.driver_features |= 1 << 40);
    case("status", &|s| s.status = 0x1ff);
    case("status order", &|s| s.status = 5);
    case("interrupt", &|s| s.interrupt_status = 4);
    case("queues", &|s| s.queues.truncate(1));
    case("size", &|s| s.queues[0].size = 3);
    case("large size", &|s| s.queues[0].size = 4096);
    case("table", &|s| s.queues[0].descriptors = LOW_RAM);
    case("available", &|s| s.queues[1].available = 0xd000_0000);
    case("used", &|s| s.queues[0].used = u64::MAX - 3);
    for (what, state) in cases {
        assert!(restore(&state).is_err(), "{what}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u32),
    Odd(u64, Vec<u8>),
    Read(u64, usize),
    Start,
    Ring(u64, u64),
    Turn,
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![
        (0_u64..0x40).prop_map(|word| word * 4),
        prop::sample::select(vec![
            0x14_u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70
        ]),
    ];
    let value = prop_oneof![
        0_u32..16,
        any::<u32>(),
        (0_u32..0x40).prop_map(|page| page << 12),
        Just(1),
        Just(3),
        Just(11),
        Just(15),
    ];
    prop_oneof![
        6 => (register, value).prop_map(|(register, value)| Step::Write(register, value)),
        1 => (0_u64..0x1000, prop::collection::vec(any::<u8>(), 0..16))
            .prop_map(|(offset, bytes)| Step::Odd(offset, bytes)),
        1 => (0_u64..0x1010, 0_usize..16).prop_map(|(offset, len)| Step::Read(offset, len)),
        1 => Just(Step::Start),
        4 => (0_u64..0x4000, any::<u64>()).prop_map(|(at, value)| Step::Ring(at * 8, value)),
        2 => Just(Step::Turn),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn no_sequence_of_accesses_breaks_the_device(steps in prop::collection::vec(step(), 1..80)) {
        use crate::bus::BusDevice;
        let mut driver = Driver::new(Box::new(Taker::default()));
        for step in steps {
            match step {
                Step::Write(register, value) => driver.write(register, value),
                Step::Odd(offset, bytes) => driver.transport.write(offset, &bytes),
                Step::Read(offset, len) => driver.transport.read(offset, &mut vec![0; len]),
                Step::Start => driver.start(VERSION_1),
                Step::Ring(at, value) => driver.put(0x1000 + at, &value.to_le_bytes()),
                Step::Turn => driver.turn(),
            }
        }
        // Whatever was done to it, a reset makes it whole.
        driver.start(VERSION_1 | EVENT_IDX);
        driver.post(0, &[(BUFFERS, 16, true)]);
        driver.kick_and_turn(0);
        prop_assert_eq!(driver.used(0), Some((0, 16)));
    }
}
