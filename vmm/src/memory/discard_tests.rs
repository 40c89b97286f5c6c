//! Discarding pages of each kind: what they read as afterwards, that their memory is gone, and that
//! nothing of it is lost or waited for that should not be.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;

const OLD: u8 = 0xb0;
const NEW: u8 = 0xd0;

fn layout(pages: u64) -> RamLayout {
    RamLayout::new(pages * PAGE_BYTES).unwrap()
}

/// A file whose page `n` is filled with [`OLD`], but for holes.
fn base_file(pages: u64, holes: &[PageRun]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages * PAGE_BYTES).unwrap();
    for page in (0..pages).filter(|page| !holes.iter().any(|hole| hole.contains(RamPage(*page)))) {
        file.write_all_at(&[OLD; PAGE], page * PAGE_BYTES).unwrap();
    }
    file
}

/// The byte that a page is filled with.
fn filling(ram: &Ram, page: u64) -> u8 {
    let mut bytes = [0; PAGE];
    ram.guest()
        .read_slice(&mut bytes, GuestAddress(page * PAGE_BYTES))
        .unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
    bytes[0]
}

fn fill(ram: &Ram, page: u64, byte: u8) {
    ram.guest()
        .write_slice(&[byte; PAGE], GuestAddress(page * PAGE_BYTES))
        .unwrap();
}

fn numbers(pages: &PageSet) -> Vec<u64> {
    pages.iter().map(|page| page.0).collect()
}

fn dirty(ram: &Ram) -> Vec<u64> {
    let mut set = PageSet::new(ram.layout().pages());
    for (slot, region) in ram.slots().iter().zip(ram.guest().iter()) {
        set.insert_bits(slot.first, &region.bitmap().get_and_reset());
    }
    numbers(&set)
}

/// KiB of this process's memory at an address range, from `smaps`.
fn resident(ram: &Ram) -> u64 {
    let slot = ram.slots()[0];
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut sum, mut inside) = (0, false);
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap();
        if let Some((start, _)) = first.split_once('-') {
            let start = u64::from_str_radix(start, 16).unwrap();
            inside = (slot.host..slot.host + slot.len).contains(&start);
        } else if inside && first == "Rss:" {
            sum += line
                .split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u64>()
                .unwrap();
        }
    }
    sum
}

#[test]
fn anonymous_pages_become_zeros_and_their_memory_goes() {
    let ram = Ram::anonymous(&layout(1024)).unwrap();
    (0..1024).for_each(|page| fill(&ram, page, NEW));
    assert!(resident(&ram) >= 4096);
    dirty(&ram);
    let discarder = ram.discarder().unwrap();
    let run = PageRun::new(10, 1000);
    assert_eq!(discarder.discard(&run, Afterwards::Zeros).unwrap(), 1000);
    assert!(resident(&ram) <= 24 * 4, "{} KiB", resident(&ram));
    let own: Vec<u64> = (0..10).chain(1010..1024).collect();
    assert_eq!(numbers(&ram.private_pages().unwrap()), own);
    assert_eq!(dirty(&ram), (10..1010).collect::<Vec<_>>());
    assert_eq!((filling(&ram, 9), filling(&ram, 10)), (NEW, 0));
    assert_eq!((filling(&ram, 1009), filling(&ram, 1010)), (0, NEW));
    fill(&ram, 500, 7);
    assert_eq!(filling(&ram, 500), 7);
}

#[test]
fn written_pages_of_the_base_are_the_bases_again() {
    let ram = Ram::from_image(&layout(64), &base_file(64, &[])).unwrap();
    (0..64).step_by(2).for_each(|page| fill(&ram, page, NEW));
    let discarder = ram.discarder().unwrap();
    let run = PageRun::new(3, 50);
    assert_eq!(discarder.discard(&run, Afterwards::Any).unwrap(), 50);
    let own = [0, 2, 54, 56, 58, 60, 62];
    assert_eq!(numbers(&ram.private_pages().unwrap()), own);
    assert_eq!(numbers(&ram.pages_off_base().unwrap()), own);
    assert_eq!((filling(&ram, 4), filling(&ram, 54)), (OLD, NEW));
}

#[test]
fn where_only_zeros_will_do_the_base_stays_covered() {
    let hole = PageRun::new(20, 10);
    let ram = Ram::from_image(&layout(64), &base_file(64, &[hole])).unwrap();
    (0..64).for_each(|page| fill(&ram, page, 0));
    let discarder = ram.discarder().unwrap();
    let run = PageRun::new(0, 64);
    assert_eq!(discarder.discard(&run, Afterwards::Zeros).unwrap(), 10);
    assert_eq!(ram.private_pages().unwrap().count(), 54);
    assert!((0..64).all(|page| filling(&ram, page) == 0));
}

#[test]
fn runs_outside_ram_are_refused_and_both_sides_of_the_hole_reached() {
    let layout = RamLayout::new(HOLE_START + (1 << 20)).unwrap();
    let ram = Ram::anonymous(&layout).unwrap();
    let discarder = ram.discarder().unwrap();
    let last_low = HOLE_START / PAGE_BYTES - 1;
    for gpa in [HOLE_START - PAGE_BYTES, HOLE_END] {
        ram.guest().write_obj(1u8, GuestAddress(gpa)).unwrap();
    }
    let run = PageRun::new(last_low, 2);
    assert_eq!(discarder.discard(&run, Afterwards::Any).unwrap(), 2);
    assert!(ram.private_pages().unwrap().is_empty());
    for (first, count) in [(0, 0), (last_low, 1000), (u64::MAX, 1), (1, u64::MAX)] {
        let refused = discarder.discard(&PageRun::new(first, count), Afterwards::Any);
        assert!(matches!(refused, Err(DiscardError::Outside(_))));
    }
}

#[test]
fn missing_pages_are_given_up_and_placed_ones_stay() {
    let base = base_file(64, &[]);
    let delta = [PageRun::new(16, 16)];
    let (ram, placer) = Ram::with_delta(&layout(64), Some(&base), &delta, &[]).unwrap();
    let discarder = ram.discarder().unwrap();
    placer.place(RamPage(16), &[NEW; 4 * PAGE]).unwrap();
    let run = PageRun::new(16, 8);
    assert_eq!(discarder.discard(&run, Afterwards::Any).unwrap(), 4);
    assert_eq!(placer.remaining(), 8);
    // What comes now is too late for the pages that were given up.
    let placed = placer.place(RamPage(16), &[NEW; 16 * PAGE]).unwrap();
    assert_eq!((placed.new, placed.redundant), (8, 8));
    let expected = |page| if (20..24).contains(&page) { 0 } else { NEW };
    assert!((16..32).all(|page| filling(&ram, page) == expected(page)));

    // Until userfaultfd has let go, what is there stays there.
    assert_eq!(discarder.discard(&delta[0], Afterwards::Any).unwrap(), 0);
    assert!(placer.finish().unwrap());
    assert_eq!(discarder.discard(&delta[0], Afterwards::Any).unwrap(), 16);
    assert!((16..32).all(|page| filling(&ram, page) == 0));
    // They hide pages of the base, so they are part of the delta whether touched or not.
    discarder.discard(&delta[0], Afterwards::Any).unwrap();
    assert!(ram.private_pages().unwrap().is_empty());
    assert_eq!(
        numbers(&ram.pages_off_base().unwrap()),
        (16..32).collect::<Vec<_>>()
    );
}

#[test]
fn zero_pages_are_found_and_nothing_else_is_touched() {
    let ram = Ram::anonymous(&layout(256)).unwrap();
    for page in 0..200 {
        fill(&ram, page, if page % 3 == 0 { NEW } else { 0 });
    }
    ram.guest()
        .write_obj(1u8, GuestAddress(40 * PAGE_BYTES + 4095))
        .unwrap();
    let discarder = ram.discarder().unwrap();
    let zeros = (0..200).filter(|page| page % 3 != 0 && *page != 40).count();
    let given = discarder.discard_zeros(&PageRun::new(0, 256)).unwrap();
    assert_eq!(given, u64::try_from(zeros).unwrap());
    assert_eq!(ram.private_pages().unwrap().count(), 200 - given);
    assert_eq!((filling(&ram, 0), filling(&ram, 1)), (NEW, 0));
    let holes = [PageRun::new(5, 2)];
    let over_base = Ram::from_image(&layout(8), &base_file(8, &holes)).unwrap();
    fill(&over_base, 3, 0);
    fill(&over_base, 5, 0);
    fill(&over_base, 6, NEW);
    let discarder = over_base.discarder().unwrap();
    // Where the base has no data there are zeros behind them.
    assert_eq!(discarder.discard_zeros(&PageRun::new(0, 8)).unwrap(), 1);
    assert_eq!(numbers(&over_base.private_pages().unwrap()), [3, 6]);
    let values = [3, 5, 6].map(|page| filling(&over_base, page));
    assert_eq!(values, [0, 0, NEW]);
}

/// Pages are discarded while others place, fault, read and finish: nobody hangs, every page is its
/// contents or zeros, and pages that nobody discards are whole.
#[test]
fn discards_race_with_placements_and_faults() {
    const PAGES: u64 = 512;
    struct Delta;
    impl PageSource for Delta {
        fn on_fault(&self, page: RamPage, placer: &Placer) -> Result<(), SourceError> {
            Ok(placer.place(page, &[NEW; PAGE]).map(drop)?)
        }
    }
    for _ in 0..10 {
        let base = base_file(PAGES, &[]);
        let delta = [PageRun::new(0, PAGES)];
        let (ram, placer) = Ram::with_delta(&layout(PAGES), Some(&base), &delta, &[]).unwrap();
        let hooks = PagerHooks {
            on_start: Box::new(|| Ok(())),
            on_error: Box::new(|error| panic!("{error}")),
            record: false,
        };
        let pager = Pager::spawn(placer.clone(), Arc::new(Delta), hooks).unwrap();
        let discarder = ram.discarder().unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for first in (0..PAGES).step_by(8) {
                    placer.place(RamPage(first), &[NEW; 8 * PAGE]).unwrap();
                }
                placer.finish().unwrap();
            });
            scope.spawn(|| {
                // Odd pages only; even ones are in use.
                for _ in 0..3 {
                    for page in (0..PAGES).rev().filter(|page| page % 2 == 1) {
                        let run = PageRun::new(page, 1);
                        discarder.discard(&run, Afterwards::Any).unwrap();
                    }
                }
                done.store(true, Ordering::Release);
            });
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    for page in 0..PAGES {
                        if page % 2 == 0 {
                            assert_eq!(filling(&ram, page), NEW);
                        } else {
                            // It may go between one byte and the next.
                            let at = GuestAddress(page * PAGE_BYTES);
                            let byte: u8 = ram.guest().read_obj(at).unwrap();
                            assert!([0, NEW].contains(&byte), "page {page}: {byte:#x}");
                        }
                    }
                }
            });
        });
        assert!(placer.wait_complete(Some(Duration::from_secs(10))).unwrap());
        assert!((0..PAGES).step_by(2).all(|page| filling(&ram, page) == NEW));
        drop(pager);
    }
}

proptest! {
    /// Whatever a guest names, only whole pages of RAM come out, each once.
    #[test]
    fn ranges_and_frames_stay_inside_ram(
        gpa in prop_oneof![any::<u64>(), 0..(5u64 << 30)],
        len in prop_oneof![any::<u64>(), 0..(3u64 << 30)],
        frames in prop::collection::vec(prop_oneof![any::<u32>(), 0xb_fff0..0xc_0010u32, 0..16u32], 0..40),
    ) {
        let layout = RamLayout::new(HOLE_START + (1 << 20)).unwrap();
        for run in whole_pages(&layout, gpa, len) {
            prop_assert!(layout.check(&run).is_ok());
            let start = layout.gpa_of(run.first).unwrap().0;
            prop_assert!(start >= gpa && start - gpa + run.bytes() <= len);
        }
        let (runs, outside) = pages_of_frames(&layout, &frames);
        let mut pages = PageSet::new(layout.pages());
        for run in &runs {
            prop_assert!(layout.check(run).is_ok());
            pages.insert_run(run);
        }
        prop_assert_eq!(pages.count(), runs.iter().map(|run| run.count).sum::<u64>());
        let in_ram = |frame: &&u32| layout.page_at(GuestAddress(u64::from(**frame) << 12)).is_some();
        prop_assert_eq!(outside, (frames.len() - frames.iter().filter(in_ram).count()) as u64);
        for frame in frames.iter().filter(in_ram) {
            let page = layout.page_at(GuestAddress(u64::from(*frame) << 12)).unwrap();
            prop_assert!(pages.contains(page));
        }
    }
}
