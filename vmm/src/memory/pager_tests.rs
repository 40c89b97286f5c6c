//! The pager against real userfaultfds, with threads of this process in the place of vCPUs. No KVM.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;

/// What each page of RAM must read as: the byte it is filled with, but for its number in front.
fn contents(page: u64, kind: u8) -> [u8; PAGE] {
    let mut bytes = [kind; PAGE];
    if kind != 0 {
        bytes[..8].copy_from_slice(&page.to_le_bytes());
    }
    bytes
}

const BASE: u8 = 0xb0;
const DELTA: u8 = 0xd0;

fn base_file(pages: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all_at(&contents(page, BASE), page * PAGE_BYTES)
            .unwrap();
    }
    file
}

fn layout(pages: u64) -> RamLayout {
    RamLayout::new(pages * PAGE_BYTES).unwrap()
}

fn read_page(guest: &GuestRam, page: u64) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    guest
        .read_slice(&mut bytes, GuestAddress(page * PAGE_BYTES))
        .unwrap();
    bytes
}

/// Delta contents for a run, in one piece.
fn delta_bytes(run: &PageRun) -> Vec<u8> {
    (run.first.0..run.end().0)
        .flat_map(|page| contents(page, DELTA))
        .collect()
}

type Answer = dyn Fn(RamPage, &Placer) -> Result<(), SourceError> + Send + Sync;

/// A source made of a closure.
struct Source(Box<Answer>);

impl PageSource for Source {
    fn on_fault(&self, page: RamPage, placer: &Placer) -> Result<(), SourceError> {
        (self.0)(page, placer)
    }
}

fn source(
    answer: impl Fn(RamPage, &Placer) -> Result<(), SourceError> + Send + Sync + 'static,
) -> Arc<Source> {
    Arc::new(Source(Box::new(answer)))
}

/// Answers every fault with the page alone.
fn one_page() -> Arc<Source> {
    source(|page, placer| Ok(placer.place(page, &contents(page.0, DELTA)).map(|_| ())?))
}

fn hooks(record: bool) -> (PagerHooks, mpsc::Receiver<PagerError>) {
    let (errors, seen) = mpsc::channel();
    let hooks = PagerHooks {
        on_start: Box::new(|| Ok(())),
        on_error: Box::new(move |error| errors.send(error).unwrap()),
        record,
    };
    (hooks, seen)
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Touches a page from the kernel, which gets EFAULT where a thread would get SIGSEGV.
fn touch_in_kernel(host: u64) -> io::Result<()> {
    let (_reader, writer) = io::pipe().unwrap();
    let address = std::ptr::with_exposed_provenance::<libc::c_void>(usize::try_from(host).unwrap());
    // SAFETY: write only reads the address, and says EFAULT if it cannot.
    let written = unsafe { libc::write(writer.as_raw_fd(), address, 8) };
    if written < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[test]
fn faults_are_answered_and_the_pager_ends_with_the_last_page() {
    let base = base_file(64);
    let delta = [PageRun::new(10, 4)];
    let (ram, placer) = Ram::with_delta(&layout(64), Some(&base), &delta, &[]).unwrap();
    let (hooks, errors) = hooks(false);
    let pager = Pager::spawn(placer.clone(), one_page(), hooks).unwrap();
    for page in [12, 9, 14, 10, 11] {
        let kind = if delta[0].contains(RamPage(page)) {
            DELTA
        } else {
            BASE
        };
        assert_eq!(read_page(ram.guest(), page), contents(page, kind));
    }
    wait_until("all pages but one", || placer.remaining() == 1);
    assert!(
        !placer
            .wait_complete(Some(Duration::from_millis(5)))
            .unwrap()
    );
    ram.guest()
        .write_obj(1u8, GuestAddress(13 * PAGE_BYTES))
        .unwrap();
    assert!(placer.wait_complete(None).unwrap());
    wait_until("the end of the pager", || pager.is_finished());
    assert!(placer.finish().unwrap());
    assert_eq!(pager.first_touch(), [12, 10, 11, 13].map(RamPage));
    let stats = pager.stats();
    assert_eq!((stats.faults, stats.immediate, stats.failed), (4, 4, 0));
    assert_eq!(placer.stats().placed, 4);
    // All there: placing again changes nothing.
    let again = placer.place(RamPage(10), &[1; 4 * PAGE]).unwrap();
    assert_eq!(
        again,
        Placed {
            new: 0,
            redundant: 4
        }
    );
    assert_eq!(read_page(ram.guest(), 10), contents(10, DELTA));
    assert!(errors.try_recv().is_err());
}

#[test]
fn contents_that_nobody_waits_for_are_refused() {
    let base = base_file(64);
    let delta = [PageRun::new(10, 4), PageRun::new(16, 4)];
    let (ram, placer) =
        Ram::with_delta(&layout(64), Some(&base), &delta, &[PageRun::new(20, 3)]).unwrap();
    let page = [7; PAGE];
    for first in [0, 9, 14, 15, 20, 63, 64, u64::MAX] {
        let refused = placer.place(RamPage(first), &page);
        assert!(
            matches!(refused, Err(PlaceError::Outside { .. })),
            "page {first}"
        );
    }
    for run in [
        PageRun::new(14, 1),
        PageRun::new(9, 2),
        PageRun::new(10, 0),
        PageRun::new(0, 64),
    ] {
        assert!(
            matches!(placer.zero(&run), Err(PlaceError::Outside { .. })),
            "{run:?}"
        );
    }
    for (first, pages) in [(9, 2), (13, 2), (10, 10), (19, 2)] {
        assert!(
            placer
                .place(RamPage(first), &vec![7; pages * PAGE])
                .is_err()
        );
    }
    for bytes in [0, 1, PAGE - 1, PAGE + 1] {
        let refused = placer.place(RamPage(10), &vec![7; bytes]);
        assert!(
            matches!(refused, Err(PlaceError::Ragged { .. })),
            "{bytes} bytes"
        );
    }
    assert_eq!(placer.remaining(), 13);
    assert!(!placer.is_placed(RamPage(10)) && placer.is_placed(RamPage(9)));
    assert!(!placer.is_placed(RamPage(64)));
    placer.zero(&PageRun::new(20, 3)).unwrap();
    placer.zero(&PageRun::new(10, 1)).unwrap();
    assert_eq!(read_page(ram.guest(), 20), [0; PAGE]);
    assert_eq!(placer.remaining(), 9);
    assert!(ram.private_pages().is_err());
}

#[test]
fn pages_between_delta_pages_come_from_the_base_or_are_zero() {
    let base = base_file(100);
    let delta = [
        PageRun::new(10, 4),
        PageRun::new(16, 4),
        PageRun::new(30, 40),
    ];
    let zero = [PageRun::new(20, 10)];
    let (ram, placer) = Ram::with_delta(&layout(100), Some(&base), &delta, &zero).unwrap();
    let (hooks, _errors) = hooks(false);
    let pager = Pager::spawn(placer.clone(), one_page(), hooks).unwrap();
    assert_eq!(read_page(ram.guest(), 14), contents(14, BASE));
    assert_eq!(read_page(ram.guest(), 29), [0; PAGE]);
    assert_eq!(pager.stats().absorbed, 2);
    wait_until("two pages", || placer.remaining() == 58);
    let mut taken = 0;
    loop {
        match placer.place_base_pages(5).unwrap() {
            0 => break,
            pages => taken += pages,
        }
    }
    assert_eq!(taken, 12);
    assert_eq!(placer.remaining(), 48);
    for run in &delta {
        placer.place(run.first, &delta_bytes(run)).unwrap();
    }
    assert!(placer.wait_complete(Some(Duration::from_secs(10))).unwrap());
    assert_eq!(read_page(ram.guest(), 15), contents(15, BASE));
    assert_eq!(read_page(ram.guest(), 22), [0; PAGE]);
    assert_eq!(read_page(ram.guest(), 45), contents(45, DELTA));
    let stats = placer.stats();
    assert_eq!(
        (stats.placed, stats.base, stats.zero, stats.redundant),
        (48, 2, 10, 2)
    );
    assert_eq!(
        ram.private_pages().unwrap().runs().collect::<Vec<_>>(),
        [PageRun::new(10, 60)]
    );
}

#[test]
fn recording_places_one_page_a_fault() {
    let delta = [PageRun::new(0, 32)];
    let (ram, placer) = Ram::with_delta(&layout(32), None, &delta, &[]).unwrap();
    let whole = source(move |page, placer| {
        // A source that hands over everything it has, and some of it elsewhere.
        placer.place(RamPage(0), &delta_bytes(&PageRun::new(0, 32)))?;
        placer.zero(&PageRun::new(page.0, 1))?;
        Ok(())
    });
    let (hooks, _errors) = hooks(true);
    let pager = Pager::spawn(placer.clone(), whole, hooks).unwrap();
    let order = [5, 31, 4, 6, 0, 7, 5, 31];
    for page in order {
        assert_eq!(read_page(ram.guest(), page), contents(page, DELTA));
    }
    assert_eq!(pager.first_touch(), [5, 31, 4, 6, 0, 7].map(RamPage));
    wait_until("six pages", || placer.remaining() == 32 - 6);
    assert_eq!(placer.stats().placed + placer.stats().zero, 6);
}

#[test]
fn a_demand_may_be_met_later_by_another_thread() {
    let delta = [PageRun::new(0, 16)];
    let (ram, placer) = Ram::with_delta(&layout(16), None, &delta, &[]).unwrap();
    let (demands, asked) = mpsc::channel();
    let demands = Mutex::new(demands);
    let note = source(move |page, _| Ok(demands.lock().unwrap().send(page)?));
    let (hooks, _errors) = hooks(false);
    let pager = Pager::spawn(placer.clone(), note, hooks).unwrap();
    let touch = |page| {
        let guest = Arc::clone(ram.guest());
        thread::spawn(move || read_page(&guest, page))
    };
    let touchers = [touch(3), touch(3), touch(9)];
    wait_until("three faults", || pager.stats().faults == 3);
    let mut pages = [asked.recv().unwrap(), asked.recv().unwrap()];
    pages.sort();
    assert_eq!(pages, [RamPage(3), RamPage(9)]);
    assert!(asked.try_recv().is_err(), "a page is asked for once");
    assert_eq!(pager.stats().repeated, 1);
    for page in pages {
        placer.place(page, &contents(page.0, DELTA)).unwrap();
    }
    let seen = touchers.map(|toucher| toucher.join().unwrap());
    assert_eq!(
        seen,
        [contents(3, DELTA), contents(3, DELTA), contents(9, DELTA)]
    );
}

#[test]
fn stopping_leaves_waiting_threads_where_they_are() {
    let delta = [PageRun::new(0, 16)];
    let (ram, placer) = Ram::with_delta(&layout(16), None, &delta, &[]).unwrap();
    let (hooks, _errors) = hooks(false);
    let mut pager = Pager::spawn(placer.clone(), source(|_, _| Ok(())), hooks).unwrap();
    let guest = Arc::clone(ram.guest());
    let toucher = thread::spawn(move || read_page(&guest, 3));
    wait_until("a fault", || pager.stats().faults == 1);
    pager.stop();
    assert!(pager.is_finished());
    thread::sleep(Duration::from_millis(20));
    assert!(
        !toucher.is_finished(),
        "a stopped pager must not let anybody through"
    );
    placer.place(RamPage(3), &contents(3, DELTA)).unwrap();
    assert_eq!(toucher.join().unwrap(), contents(3, DELTA));
}

#[test]
fn an_error_is_reported_and_nobody_runs_on_a_hole() {
    let delta = [PageRun::new(4, 8)];
    let (ram, placer) = Ram::with_delta(&layout(64), None, &delta, &[]).unwrap();
    let bad = source(|page, placer| match page.0 {
        4 => Err("the mirror has burnt down".into()),
        5 => Ok(placer.place(RamPage(0), &[0; PAGE]).map(|_| ())?),
        6 => Ok(placer.place(page, &[0; 100]).map(|_| ())?),
        _ => Ok(placer.place(page, &contents(page.0, DELTA)).map(|_| ())?),
    });
    let (hooks, errors) = hooks(false);
    let pager = Pager::spawn(placer.clone(), bad, hooks).unwrap();
    let host = ram.slots()[0].host;
    let touchers: Vec<_> = [4, 5, 6]
        .map(|page| thread::spawn(move || touch_in_kernel(host + page * PAGE_BYTES)))
        .into_iter()
        .collect();
    wait_until("three failures", || pager.stats().failed == 3);
    let error = errors.recv().unwrap();
    assert!(matches!(error, PagerError::Source { .. }), "{error}");
    assert!(
        errors.try_recv().is_err(),
        "only the first error is reported"
    );
    // The pager still answers what it can.
    assert_eq!(read_page(ram.guest(), 7), contents(7, DELTA));
    assert!(touchers.iter().all(|toucher| !toucher.is_finished()));
    // Everything that knows the userfaultfd goes, but the memory stays mapped.
    let guest = Arc::clone(ram.guest());
    drop((ram, pager, placer));
    for toucher in touchers {
        let error = toucher.join().unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
    assert_eq!(
        guest
            .read_obj::<u64>(GuestAddress(60 * PAGE_BYTES))
            .unwrap(),
        0,
        "other pieces stay usable"
    );
}

#[test]
fn a_thread_that_cannot_be_prepared_is_no_pager() {
    let (_ram, placer) = Ram::with_delta(&layout(16), None, &[PageRun::new(0, 1)], &[]).unwrap();
    let (mut hooks, _errors) = hooks(false);
    hooks.on_start = Box::new(|| Err("no filter".into()));
    let error = Pager::spawn(placer.clone(), one_page(), hooks).unwrap_err();
    assert!(matches!(error, PagerError::Start(_)), "{error}");

    let (mut hooks, _errors) = self::hooks(false);
    hooks.on_start = Box::new(|| panic!("the filter is broken"));
    assert!(matches!(
        Pager::spawn(placer, one_page(), hooks),
        Err(PagerError::Start(_))
    ));
}

#[test]
fn ram_without_missing_pages_is_complete_from_the_start() {
    let (ram, placer) = Ram::with_delta(&layout(16), None, &[], &[]).unwrap();
    assert!(placer.wait_complete(Some(Duration::ZERO)).unwrap());
    let (hooks, _errors) = hooks(false);
    let pager = Pager::spawn(placer, one_page(), hooks).unwrap();
    wait_until("the end of the pager", || pager.is_finished());
    assert!(ram.private_pages().unwrap().is_empty());
}

#[test]
fn each_page_is_placed_by_exactly_one_thread() {
    const PAGES: u64 = 512;
    const THREADS: u8 = 4;
    let (ram, placer) =
        Ram::with_delta(&layout(PAGES), None, &[PageRun::new(0, PAGES)], &[]).unwrap();
    let new = AtomicU64::new(0);
    let redundant = AtomicU64::new(0);
    thread::scope(|scope| {
        for mark in 1..=THREADS {
            let (placer, new, redundant) = (&placer, &new, &redundant);
            scope.spawn(move || {
                // Each in its own step, so that runs meet in their middle.
                let step = [3, 16, 64, 512][usize::from(mark - 1)];
                for first in (0..PAGES).step_by(step) {
                    let count = u64::try_from(step).unwrap().min(PAGES - first);
                    let bytes = vec![mark; usize::try_from(count).unwrap() * PAGE];
                    let placed = placer.place(RamPage(first), &bytes).unwrap();
                    assert_eq!(placed.new + placed.redundant, count);
                    new.fetch_add(placed.new, Ordering::Relaxed);
                    redundant.fetch_add(placed.redundant, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(new.into_inner(), PAGES);
    assert_eq!(redundant.into_inner(), PAGES * u64::from(THREADS - 1));
    assert_eq!(placer.remaining(), 0);
    for page in 0..PAGES {
        let bytes = read_page(ram.guest(), page);
        assert!((1..=THREADS).contains(&bytes[0]) && bytes.iter().all(|&byte| byte == bytes[0]));
    }
}

#[test]
fn runs_across_the_hole_are_placed_on_both_sides() {
    let layout = RamLayout::new(HOLE_START + 64 * PAGE_BYTES).unwrap();
    let edge = HOLE_START / PAGE_BYTES;
    let run = PageRun::new(edge - 8, 16);
    let (ram, placer) = Ram::with_delta(&layout, None, &[run], &[]).unwrap();
    let placed = placer.place(run.first, &delta_bytes(&run)).unwrap();
    assert_eq!(
        placed,
        Placed {
            new: 16,
            redundant: 0
        }
    );
    let mut bytes = [0; PAGE];
    for page in [edge - 8, edge - 1, edge, edge + 7] {
        let gpa = layout.gpa_of(RamPage(page)).unwrap();
        ram.guest().read_slice(&mut bytes, gpa).unwrap();
        assert_eq!(bytes, contents(page, DELTA));
    }
    assert!(placer.finish().unwrap());
    assert_eq!(
        ram.private_pages().unwrap().runs().collect::<Vec<_>>(),
        [run]
    );
}

/// What each page is: 0 rest, 1 delta, 2 zero.
fn kinds(pages: u64, cuts: &[(u64, u8)]) -> Vec<u8> {
    let cuts: BTreeMap<u64, u8> = cuts.iter().copied().collect();
    let mut kind = 0;
    (0..pages)
        .map(|page| {
            kind = cuts.get(&page).copied().unwrap_or(kind);
            kind
        })
        .collect()
}

fn runs_of(kinds: &[u8], kind: u8) -> Vec<PageRun> {
    let mut set = PageSet::new(u64::try_from(kinds.len()).unwrap());
    for (page, _) in (0..).zip(kinds).filter(|(_, have)| **have == kind) {
        set.insert(RamPage(page));
    }
    set.runs().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random layouts; threads touch pages in random order while others stream them.
    #[test]
    fn memory_is_what_it_should_be_byte_for_byte(
        pages in 1u64..600,
        has_base: bool,
        cuts in prop::collection::vec((0u64..600, 0u8..3), 0..60),
        touches in prop::collection::vec(any::<prop::sample::Index>(), 0..80),
        neighbours in 0u64..20,
        stream: bool,
    ) {
        let kinds = kinds(pages, &cuts);
        let at = |page: u64| kinds[usize::try_from(page).unwrap()];
        let want = |page: u64| match at(page) {
            1 => contents(page, DELTA),
            0 if has_base => contents(page, BASE),
            _ => [0; PAGE],
        };
        let base = has_base.then(|| base_file(pages));
        let (delta, zero) = (runs_of(&kinds, 1), runs_of(&kinds, 2));
        let (ram, placer) = Ram::with_delta(&layout(pages), base.as_ref(), &delta, &zero).unwrap();
        let runs = delta.clone();
        let near = source(move |page, placer| {
            let run = runs.iter().find(|run| run.contains(page)).ok_or("not in the delta")?;
            let around = PageRun::new(page.0.saturating_sub(neighbours), 2 * neighbours + 1);
            let part = run.overlap(&around).ok_or("no overlap")?;
            Ok(placer.place(part.first, &delta_bytes(&part)).map(|_| ())?)
        });
        let (hooks, errors) = hooks(false);
        let _pager = Pager::spawn(placer.clone(), near, hooks).unwrap();
        thread::scope(|scope| {
            let half = touches.len() / 2;
            for touches in [&touches[..half], &touches[half..]] {
                let (guest, want) = (ram.guest(), &want);
                scope.spawn(move || for touch in touches {
                    let page = u64::try_from(touch.index(usize::try_from(pages).unwrap())).unwrap();
                    assert!(read_page(guest, page) == want(page), "page {page}");
                });
            }
            if stream {
                scope.spawn(|| {
                    for run in &delta {
                        placer.place(run.first, &delta_bytes(run)).unwrap();
                    }
                });
                scope.spawn(|| while placer.place_base_pages(7).unwrap() > 0 {});
            }
        });
        for page in 0..pages {
            prop_assert!(read_page(ram.guest(), page) == want(page), "page {}", page);
        }
        prop_assert!(errors.try_recv().is_err());
        // A page is there a moment before it is counted.
        prop_assert!(placer.wait_complete(Some(Duration::from_secs(20))).unwrap());

        let off_base = ram.pages_off_base().unwrap();
        for page in (0..pages).map(RamPage) {
            let differs = at(page.0) == 1 || (has_base && at(page.0) == 2);
            prop_assert!(!differs || off_base.contains(page), "page {} differs", page.0);
        }
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(b"old contents", pages * PAGE_BYTES + 5).unwrap();
        ram.write_image(&image).unwrap();
        prop_assert_eq!(image.metadata().unwrap().len(), pages * PAGE_BYTES);
        let mut bytes = [0; PAGE];
        for page in 0..pages {
            image.read_exact_at(&mut bytes, page * PAGE_BYTES).unwrap();
            prop_assert!(bytes == want(page), "page {} of the image", page);
        }
    }
}
