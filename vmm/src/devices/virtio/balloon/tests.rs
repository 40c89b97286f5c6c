//! The balloon behind its transport, driven as a guest would, over RAM whose pages can be counted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::testing::{BUFFERS, Driver, EVENT_IDX, VERSION_1};
use crate::devices::virtio::{DeviceState, VirtioDevice};
use crate::memory::{PAGE, PAGE_BYTES, PageRun, PageSet, Ram, RamLayout, RamPage};

const PAGES: u64 = 4096;
/// Frames in the part of RAM that tests give away; rings and buffers lie below.
const FREE: u32 = 2048;
const ALL: u64 = feature::STATS_VQ
    | feature::DEFLATE_ON_OOM
    | feature::FREE_PAGE_HINT
    | feature::REPORTING
    | EVENT_IDX;

struct Bench {
    ram: Ram,
    driver: Driver,
    handle: BalloonHandle,
}

impl Bench {
    fn over(ram: Ram, features: u64) -> Self {
        let mut bench = Self::new(ram);
        bench.driver.start(features | VERSION_1);
        assert_eq!(bench.driver.status(), 15);
        bench
    }

    /// A device that its driver has not found yet.
    fn new(ram: Ram) -> Self {
        let balloon = Balloon::new(ram.discarder().unwrap()).unwrap();
        let handle = balloon.handle();
        let driver = Driver::over(ram.guest().clone(), Box::new(balloon));
        Self {
            ram,
            driver,
            handle,
        }
    }

    fn anonymous(features: u64) -> Self {
        Self::over(Ram::anonymous(&layout()).unwrap(), features)
    }

    /// Fills the free part of RAM.
    fn fill(&self, byte: u8) {
        for frame in u64::from(FREE)..PAGES {
            self.driver.put(frame * PAGE_BYTES, &[byte; PAGE]);
        }
    }

    fn inflate(&mut self, frames: &[u32]) {
        let bytes: Vec<u8> = frames
            .iter()
            .flat_map(|frame| frame.to_le_bytes())
            .collect();
        self.driver.put(BUFFERS, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.driver.post(0, &[(BUFFERS, len, false)]);
        self.driver.kick_and_turn(0);
    }

    /// Reports runs of frames.
    fn report(&mut self, runs: &[(u32, u32)]) {
        let pieces: Vec<(u64, u32, bool)> = runs
            .iter()
            .map(|(first, count)| (u64::from(*first) * PAGE_BYTES, count * 4096, true))
            .collect();
        self.driver.post(4, &pieces);
        self.driver.kick_and_turn(4);
    }

    fn own(&self) -> PageSet {
        self.ram.private_pages().unwrap()
    }

    fn byte(&self, frame: u32) -> u8 {
        self.driver.bytes(u64::from(frame) * PAGE_BYTES, 1)[0]
    }

    fn config(&mut self, at: u64) -> u32 {
        self.driver.read(0x100 + at)
    }
}

fn layout() -> RamLayout {
    RamLayout::new(PAGES * PAGE_BYTES).unwrap()
}

fn base() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGES * PAGE_BYTES).unwrap();
    for page in u64::from(FREE)..PAGES {
        file.write_all_at(&[0xb0; PAGE], page * PAGE_BYTES).unwrap();
    }
    file
}

#[test]
fn inflated_pages_leave_the_hosts_memory() {
    let mut bench = Bench::anonymous(ALL);
    bench.fill(7);
    // In no order, twice, and beside them what is no RAM.
    let frames = [
        FREE + 9,
        FREE + 1,
        FREE,
        FREE + 9,
        0x10_0000,
        u32::MAX,
        FREE + 2,
    ];
    bench.inflate(&frames);
    assert!(bench.driver.used(0).is_some());
    assert_eq!(bench.driver.interrupt(), Some(1));
    let gone: Vec<u32> = (FREE..FREE + 16)
        .filter(|frame| !bench.own().contains(RamPage(u64::from(*frame))))
        .collect();
    assert_eq!(gone, [FREE, FREE + 1, FREE + 2, FREE + 9]);
    let values: Vec<u8> = (FREE..FREE + 4).map(|frame| bench.byte(frame)).collect();
    assert_eq!(values, [0, 0, 0, 7]);
    let status = bench.handle.status();
    assert_eq!(
        (
            status.inflated_pages,
            status.discarded_pages,
            status.refused
        ),
        (4, 4, 2)
    );

    bench.driver.put(BUFFERS, &FREE.to_le_bytes());
    bench.driver.post(1, &[(BUFFERS, 4, false)]);
    bench.driver.kick_and_turn(1);
    assert!(bench.driver.used(1).is_some());
    assert_eq!(bench.handle.status().deflated_pages, 1);
}

#[test]
fn the_target_reaches_the_driver_and_its_answer_the_host() {
    let mut bench = Bench::new(Ram::anonymous(&layout()).unwrap());
    bench.handle.set_wanted_pages(5);
    assert!(!bench.handle.status().has(feature::STATS_VQ));
    bench.driver.start(ALL | VERSION_1);
    assert_eq!(
        bench.config(0),
        5,
        "what was wished before there was a driver"
    );
    while bench.driver.interrupt().is_some() {}
    let generation = bench.driver.read(0xfc);
    bench.handle.set_wanted_pages(u64::MAX);
    bench.driver.turn();
    assert_eq!(bench.driver.interrupt(), Some(2), "a configuration change");
    assert_ne!(bench.driver.read(0xfc), generation);
    assert_eq!(u64::from(bench.config(0)), PAGES);
    // A wish that changes nothing is not announced.
    bench.handle.set_wanted_pages(PAGES);
    bench.driver.turn();
    assert_eq!(bench.driver.interrupt(), None);

    bench.driver.write(0x104, 77);
    assert_eq!(bench.handle.status().actual_pages, 77);
    // All other fields are not the driver's, and nothing lies behind them.
    for at in [0x100, 0x108, 0x10c, 0x110, 0x1fc] {
        bench.driver.write(at, 0xffff_ffff);
    }
    bench.driver.transport_write(0x106, &[0xff; 8]);
    assert_eq!(u64::from(bench.config(0)), PAGES);
    assert_eq!(bench.config(4), 0xffff_004d);
    assert_eq!((bench.config(8), bench.config(12)), (0, 0));
    bench.driver.write(0x70, 0);
    assert_eq!(bench.handle.status().actual_pages, 0);
    assert_eq!(
        u64::from(bench.config(0)),
        PAGES,
        "the host's wish outlives the driver"
    );
}

#[test]
fn statistics_are_asked_for_and_read() {
    let mut bench = Bench::anonymous(ALL);
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let put = |bench: &mut Bench, free: u64| {
        // An unknown tag, one twice, and half an entry.
        let bytes = [
            entry(4, 1),
            entry(4, free),
            entry(900, 3),
            entry(5, 10),
            vec![6, 0, 1],
        ];
        let bytes = bytes.concat();
        bench.driver.put(BUFFERS, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        bench.driver.post(2, &[(BUFFERS, len, false)]);
        bench.driver.kick_and_turn(2);
    };
    put(&mut bench, 1000);
    assert!(
        bench.driver.used(2).is_none(),
        "the buffer stays with the device"
    );
    let said = |bench: &Bench| bench.handle.status().statistics.unwrap().0;
    let read: Vec<_> = said(&bench).iter().collect();
    assert_eq!(read, [("free_bytes", 1000), ("total_bytes", 10)]);
    for free in [2000, 3000] {
        assert!(bench.handle.poll_statistics());
        bench.driver.turn();
        assert!(
            bench.driver.used(2).is_some(),
            "the buffer comes back as the question"
        );
        // With EVENT_IDX: the driver kicks for the very next buffer.
        let ring = &bench.driver.queues[2];
        let event = bench
            .driver
            .bytes(ring.used + 4 + 8 * u64::from(ring.size), 2);
        assert_eq!(event, ring.available_index.to_le_bytes());
        assert!(bench.handle.poll_statistics(), "asked twice");
        bench.driver.turn();
        put(&mut bench, free);
        assert_eq!(said(&bench).get("free_bytes"), Some(free));
    }
    let mut bench = Bench::anonymous(feature::REPORTING);
    assert!(!bench.handle.poll_statistics());
    put(&mut bench, 1);
    assert_eq!(bench.handle.status().statistics, None);
}

#[test]
fn reported_pages_leave_memory_and_delta() {
    let ram = Ram::from_image(&layout(), &base()).unwrap();
    let mut bench = Bench::over(ram, ALL);
    bench.fill(7);
    bench.report(&[(FREE, 512), (FREE + 1024, 512)]);
    assert!(bench.driver.used(4).is_some());
    let off = bench.ram.pages_off_base().unwrap();
    let kept = |page: u64| off.contains(RamPage(u64::from(FREE) + page));
    assert!((0..512).all(|page| !kept(page)) && (1024..1536).all(|page| !kept(page)));
    assert!((512..1024).all(kept) && (1536..2048).all(kept));
    assert_eq!((bench.byte(FREE), bench.byte(FREE + 512)), (0xb0, 7));
    let status = bench.handle.status();
    assert_eq!(
        (status.reported_pages, status.discarded_pages),
        (1024, 1024)
    );
}

#[test]
fn parts_of_pages_stay() {
    let mut bench = Bench::anonymous(ALL);
    bench.fill(7);
    let at = u64::from(FREE) * PAGE_BYTES;
    bench.driver.post(
        4,
        &[
            (at + 1, 3 * 4096 - 2, true),
            (at + 8 * PAGE_BYTES, 4095, true),
        ],
    );
    bench.driver.kick_and_turn(4);
    assert!(bench.driver.used(4).is_some());
    let values: Vec<u8> = (FREE..FREE + 9).map(|frame| bench.byte(frame)).collect();
    assert_eq!(values, [7, 0, 7, 7, 7, 7, 7, 7, 7]);
}

#[test]
fn what_the_driver_poisons_reads_as_that() {
    let poison = |value: u32| {
        let ram = Ram::from_image(&layout(), &base()).unwrap();
        let mut bench = Bench::new(ram);
        bench
            .driver
            .negotiate(ALL | feature::PAGE_POISON | VERSION_1);
        bench.driver.set_up_queues();
        bench.driver.write(0x10c, value);
        bench.driver.write(0x70, 15);
        bench.driver.turn();
        // Too late: the value stands.
        bench.driver.write(0x10c, 0x5555_5555);
        let byte = value.to_le_bytes()[0];
        bench.fill(byte);
        // Here the base has no data.
        let hole = u64::from(FREE - 512) * PAGE_BYTES;
        bench.driver.put(hole, &vec![byte; 512 * PAGE]);
        bench.report(&[(FREE - 512, 1024)]);
        assert!(bench.driver.used(4).is_some());
        for frame in FREE - 512..FREE + 512 {
            assert_eq!(bench.byte(frame), byte, "frame {frame}");
        }
        assert!(!bench.handle.can_hint());
        bench.handle.status().discarded_pages
    };
    assert_eq!(poison(0), 512);
    assert_eq!(poison(0xaaaa_aaaa), 0);
}

/// A report that is longer than a turn is done over several, and acknowledged when all is done.
#[test]
fn long_reports_take_turns() {
    let pages = 3 * (16 << 10) + 2048;
    let layout = RamLayout::new(pages * PAGE_BYTES).unwrap();
    let mut bench = Bench::over(Ram::anonymous(&layout).unwrap(), ALL);
    for page in u64::from(FREE)..pages {
        bench
            .driver
            .guest
            .write_obj(1u8, GuestAddress(page * PAGE_BYTES))
            .unwrap();
    }
    let len = u32::try_from((pages - u64::from(FREE)) * PAGE_BYTES).unwrap();
    bench
        .driver
        .post(4, &[(u64::from(FREE) * PAGE_BYTES, len, true)]);
    bench.driver.kick(4);
    let mut turns = 0;
    while bench.driver.used(4).is_none() {
        assert_eq!(bench.driver.manager.run_with_timeout(0).unwrap(), 1);
        turns += 1;
    }
    assert_eq!(turns, 3);
    assert!(bench.own().runs().all(|run| run.end().0 <= u64::from(FREE)));
    assert_eq!(
        bench.handle.status().reported_pages,
        pages - u64::from(FREE)
    );
}

#[test]
fn hints_are_collected_for_the_command_that_holds() {
    let mut bench = Bench::anonymous(ALL);
    bench.fill(7);
    let hint = |bench: &mut Bench, page: u32| {
        let at = u64::from(FREE + page) * PAGE_BYTES;
        bench.driver.post(3, &[(at, 4096, true)]);
        bench.driver.kick_and_turn(3);
        assert!(bench.driver.used(3).is_some());
    };
    let command = |bench: &mut Bench, id: u32| {
        bench.driver.put(BUFFERS, &id.to_le_bytes());
        bench.driver.post(3, &[(BUFFERS, 4, false)]);
        bench.driver.kick_and_turn(3);
        assert!(bench.driver.used(3).is_some());
    };
    hint(&mut bench, 0);
    assert_eq!(bench.handle.hints(), None);
    assert!(bench.handle.can_hint());
    bench.handle.start_hints();
    bench.driver.turn();
    assert_eq!(bench.driver.interrupt(), Some(3));
    let id = bench.config(8);
    assert!(id >= 2);
    hint(&mut bench, 1);
    command(&mut bench, id + 1);
    hint(&mut bench, 2);
    command(&mut bench, 0);
    assert!(!bench.handle.hints_finished(), "that was another command's");
    command(&mut bench, id);
    hint(&mut bench, 3);
    hint(&mut bench, 4);
    command(&mut bench, 0);
    assert!(bench.handle.hints_finished());
    hint(&mut bench, 5);
    let hints = bench.handle.hints().unwrap();
    let runs: Vec<_> = hints.pages.runs().collect();
    assert_eq!(runs, [PageRun::new(u64::from(FREE) + 3, 2)]);
    // The device itself discards none of them: they may be in use again.
    assert!((0..6).all(|page| bench.byte(FREE + page) == 7));
    while bench.driver.interrupt().is_some() {}
    bench.handle.end_hints();
    bench.driver.turn();
    assert_eq!(bench.driver.interrupt(), Some(2));
    assert_eq!(bench.config(8), 1, "done");
    bench.handle.start_hints();
    bench.driver.turn();
    assert!(bench.config(8) > id, "no command twice");
    // A driver that goes takes its hints along.
    let next = bench.config(8);
    command(&mut bench, next);
    hint(&mut bench, 3);
    bench.driver.write(0x70, 0);
    assert!(bench.handle.hints_finished() && bench.handle.hints().is_none());
    assert_eq!(bench.config(8), 0);
}

#[test]
fn a_saved_balloon_goes_on() {
    let mut bench = Bench::anonymous(ALL);
    bench.handle.set_wanted_pages(9);
    bench.driver.turn();
    bench.driver.write(0x104, 4);
    bench.handle.start_hints();
    bench.driver.turn();
    bench.driver.transport.pause();
    let state = bench.driver.transport.save();

    let again = Balloon::new(bench.ram.discarder().unwrap()).unwrap();
    let handle = again.handle();
    let guest = Arc::clone(bench.ram.guest());
    let transport = MmioTransport::restore(&state, guest.clone(), Box::new(again)).unwrap();
    let mut driver = Driver::with(guest, transport);
    driver.queues = bench.driver.queues.clone();
    while driver.interrupt().is_some() {}
    driver.transport.resume();
    driver.turn();
    assert_eq!(driver.interrupt(), Some(2), "the driver has to look");
    assert_eq!(driver.read(0x100), 9);
    assert_eq!(driver.read(0x108), 1, "nobody waits for its hints any more");
    let status = handle.status();
    assert_eq!((status.wanted_pages, status.actual_pages), (9, 4));
    driver.put(BUFFERS, &FREE.to_le_bytes());
    driver.post(0, &[(BUFFERS, 4, false)]);
    driver.kick_and_turn(0);
    assert_eq!(handle.status().inflated_pages, 1);
}

#[test]
fn a_saved_balloon_with_nonsense_is_refused() {
    let bench = Bench::anonymous(ALL);
    let saved = |num_pages: u32, command: u32| -> DeviceState {
        let bytes = postcard::to_stdvec(&(num_pages, 0u32, 0u32, command, 1u32)).unwrap();
        DeviceState::Balloon(postcard::from_bytes(&bytes).unwrap())
    };
    let restored = |state: &DeviceState| {
        let mut balloon = Balloon::new(bench.ram.discarder().unwrap()).unwrap();
        balloon.restore(state).is_ok()
    };
    let pages = u32::try_from(PAGES).unwrap();
    assert!(restored(&saved(pages, 1)));
    assert!(!restored(&saved(pages + 1, 1)));
    assert!(!restored(&saved(0, 2)));
    let other = crate::devices::virtio::rng::Rng::new().save();
    assert!(!restored(&other));
}

#[test]
fn queues_of_features_that_were_not_accepted_are_left_alone() {
    let mut bench = Bench::anonymous(EVENT_IDX);
    bench.fill(7);
    for queue in 2..5 {
        bench
            .driver
            .post(queue, &[(u64::from(FREE) * PAGE_BYTES, 4096, true)]);
        bench.driver.kick_and_turn(queue);
        assert!(bench.driver.used(queue).is_none(), "queue {queue}");
    }
    assert_eq!(bench.byte(FREE), 7);
    assert!(!bench.handle.can_hint());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever comes through the queues, nothing breaks, and pages that were never named keep what
    /// they hold.
    #[test]
    fn no_chain_breaks_the_device(
        chains in prop::collection::vec(
            (0..5usize, prop::collection::vec((0..PAGES * PAGE_BYTES, 0..70000u32, any::<bool>()), 1..5)),
            1..20,
        ),
        words in prop::collection::vec(any::<u32>(), 16),
    ) {
        let mut bench = Bench::anonymous(ALL);
        bench.handle.start_hints();
        bench.driver.turn();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        for (queue, mut pieces) in chains {
            bench.driver.put(BUFFERS, &bytes);
            // Rings are not for the guest to discard if it wants to go on.
            for piece in &mut pieces {
                piece.0 = piece.0.max(u64::from(FREE) * PAGE_BYTES);
                piece.1 = piece.1.min(u32::try_from(PAGES * PAGE_BYTES - piece.0).unwrap());
            }
            pieces.sort_by_key(|piece| piece.2);
            bench.driver.post(queue, &pieces);
            bench.driver.kick_and_turn(queue);
            prop_assert!(!bench.driver.needs_reset());
        }
    }
}
