//! Encode, then decode: the same VM comes out, and what need not be stored is not.

use std::io::Cursor;

use proptest::prelude::*;

use super::*;
use crate::digest::Digest;
use crate::format::{DerivedRun, DerivedSource};
use crate::page::PAGE_BYTES;
use crate::testing::{Pages, apply, base_id, encode_all, hashes, head, page, sample, sizes, spans};
use crate::{LEVEL_STORED, PageContent, Placement, SegmentId, decode_state};

#[test]
fn a_changed_vm_comes_back() {
    let (base, now, bytes) = sample();
    assert_eq!(apply(&base, &bytes), now);
    let (prefix, index) = head(&bytes);
    assert_eq!(prefix.base(), base_id());
    assert_eq!(index.meta(), b"{\"meta\":1}");
    let state_at = usize::try_from(prefix.state_offset()).unwrap();
    let state_end = usize::try_from(prefix.segments_offset()).unwrap();
    let state = decode_state(&prefix, &bytes[state_at..state_end]).unwrap();
    assert_eq!(state, b"machine state machine state machine state");
}

#[test]
fn each_page_is_what_it_should_be() {
    let (_, _, bytes) = sample();
    let (_, index) = head(&bytes);
    let memory = |page| index.lookup(PageAt::memory(page)).unwrap();
    assert_eq!(memory(0), PageContent::Unchanged);
    assert_eq!(memory(3), PageContent::Zero);
    assert_eq!(memory(11), PageContent::BasePage(PageAt::memory(21)));
    // Early pages are in the first segment, sorted by place inside it: 1, 2, 5, 31, 60.
    assert_eq!(
        memory(60),
        PageContent::Literal {
            segment: SegmentId(0),
            slot: 4
        }
    );
    assert_eq!(index.early_segments(), 1);
    // Memory: 30, 32, 80.. in the next one; the disk has its own.
    assert_eq!(
        memory(30),
        PageContent::Literal {
            segment: SegmentId(1),
            slot: 0
        }
    );
    let disk = index.lookup(PageAt::disk(0, 7));
    assert_eq!(
        disk,
        Some(PageContent::Literal {
            segment: SegmentId(2),
            slot: 0
        })
    );
    assert_eq!(index.segments()[2].codec, crate::Codec::Raw);
    assert_eq!(index.segments()[1].codec, crate::Codec::Zstd);
    let places: Vec<_> = index.segment_places(SegmentId(0)).collect();
    let place = |first, slot, pages| Placement { first, slot, pages };
    let memory_place = |page, slot, pages| place(PageAt::memory(page), slot, pages);
    let expected = [
        memory_place(1, 0, 2),
        memory_place(5, 2, 1),
        memory_place(31, 3, 1),
        memory_place(60, 4, 1),
        // Further places: a block of the disk is the same as page 31, page 62 as page 60.
        place(PageAt::disk(0, 9), 3, 1),
        memory_place(62, 4, 1),
    ];
    assert_eq!(places, expected);
    assert_eq!(index.runs_in(Space::Disk(0)).len(), 2);
    // A page of memory that is a block of the base's disk.
    assert_eq!(memory(40), PageContent::BasePage(PageAt::disk(0, 1)));
    assert_eq!(index.runs_in(Space::Disk(1)).len(), 0);
    assert_eq!(index.lookup(PageAt::disk(1, 0)), None);
}

#[test]
fn early_pages_keep_their_order_and_count_once() {
    let mut now = Pages::default();
    now.0.insert(Space::Memory, (0..200).map(page).collect());
    let early: Vec<PageAt> = (0..100).rev().chain(50..60).map(PageAt::memory).collect();
    let (bytes, summary) = encode_all(&Pages::default(), &now, &early, None, Options::default());
    let (_, index) = head(&bytes);
    assert_eq!((summary.early_segments, summary.segments), (7, 8));
    let pages_of = |number| {
        let places = index.segment_places(SegmentId(number));
        places
            .map(|place| (place.first, place.pages))
            .collect::<Vec<_>>()
    };
    assert_eq!(pages_of(0), [(PageAt::memory(84), 16)]);
    assert_eq!(pages_of(6), [(PageAt::memory(0), 4)]);
    assert_eq!(pages_of(7), [(PageAt::memory(100), 100)]);
    assert_eq!(apply(&Pages::default(), &bytes), now);
}

#[test]
fn without_the_base_all_pages_are_stored_and_zeros_behind_it_are_not() {
    let mut base = Pages::default();
    base.0
        .insert(Space::Memory, vec![page(1), page(2), page(3)]);
    let mut now = base.clone();
    now.0.get_mut(&Space::Memory).unwrap()[1] = [0; PAGE_BYTES];
    now.0.get_mut(&Space::Memory).unwrap().push([0; PAGE_BYTES]);
    let (bytes, summary) = encode_all(&base, &now, &[], None, Options::default());
    assert_eq!(
        (
            summary.literal_pages,
            summary.zero_pages,
            summary.unchanged_pages
        ),
        (2, 1, 1)
    );
    assert_eq!(apply(&base, &bytes), now);
}

#[test]
fn wrong_hashes_cost_space_and_nothing_else() {
    let (base, now, _) = sample();
    let mut other = base.clone();
    other.0.get_mut(&Space::Memory).unwrap().reverse();
    other
        .0
        .get_mut(&Space::Memory)
        .unwrap()
        .extend((3000..3050).map(page));
    other.0.get_mut(&Space::Disk(0)).unwrap().reverse();
    let wrong = hashes(&other);
    let content = BaseContent {
        pages: &base,
        hashes: Some(&wrong),
    };
    let (bytes, summary) = encode_all(&base, &now, &[], Some(content), Options::default());
    assert_eq!(summary.base_pages, 0);
    assert_eq!(apply(&base, &bytes), now);
}

#[test]
fn the_same_input_gives_the_same_file_on_any_number_of_threads() {
    let mut now = Pages::default();
    now.0.insert(
        Space::Memory,
        (0..3000).map(|n| page(n * n % 2000)).collect(),
    );
    let early: Vec<PageAt> = (0..999).map(|n| PageAt::memory(n * 7 % 3000)).collect();
    let encoded = |threads| {
        encode_all(
            &Pages::default(),
            &now,
            &early,
            None,
            Options { level: 1, threads },
        )
    };
    let (one, four) = (encoded(1), encoded(4));
    assert_eq!(one.0, four.0);
    assert_eq!(one.1.id, four.1.id);
    assert_eq!(apply(&Pages::default(), &one.0), now);
}

/// Puts pages together from segments and derived runs alone, as they come: no index, no file.
#[derive(Default)]
struct Wire {
    slots: Vec<[u8; PAGE_BYTES]>,
    placed: std::collections::BTreeMap<PageAt, [u8; PAGE_BYTES]>,
    derived: Vec<DerivedRun>,
}

impl Sink for Wire {
    fn segment(&mut self, segment: &SealedSegment) -> io::Result<()> {
        let place = crate::Place::Segment(segment.number);
        assert_eq!(Digest::of(segment.stored()), segment.hash());
        let mut raw = vec![0; usize::try_from(segment.pages()).unwrap() * PAGE_BYTES];
        crate::codec::decompress(place, segment.codec(), segment.stored(), &mut raw).unwrap();
        let places = segment.runs.iter().flat_map(|run| run.places());
        for (at, page) in places.zip(raw.as_chunks().0) {
            assert_eq!(self.placed.insert(at, *page), None);
            self.slots.push(*page);
        }
        Ok(())
    }

    fn derived(&mut self, run: &DerivedRun) -> io::Result<()> {
        self.derived.push(*run);
        Ok(())
    }
}

#[test]
fn segments_stand_alone() {
    let (base, now, _) = sample();
    let (spaces, changed, known) = (sizes(&base, &now), spans(&now), hashes(&base));
    let delta = Delta {
        spaces: &spaces,
        early: &[PageAt::memory(60), PageAt::memory(31)],
        changed: &changed,
        pages: &now,
        base: Some(BaseContent {
            pages: &base,
            hashes: Some(&known),
        }),
    };
    let mut wire = Wire::default();
    delta
        .send(&mut wire, Options::default(), &mut |_| {})
        .unwrap();
    let mut got = base.clone();
    let memory = got.0.get_mut(&Space::Memory).unwrap();
    memory.resize(now.0[&Space::Memory].len(), [0; PAGE_BYTES]);
    for run in &wire.derived {
        for (nth, at) in (0..).zip(run.pages.places()) {
            let page = match run.source {
                DerivedSource::Zero => [0; PAGE_BYTES],
                DerivedSource::BasePages(first) => base.get(first.plus(nth)),
                DerivedSource::Slots(first) => {
                    wire.slots[usize::try_from(u64::from(first) + nth).unwrap()]
                }
            };
            assert_eq!(wire.placed.insert(at, page), None);
        }
    }
    for (at, page) in wire.placed {
        let pages = got.0.get_mut(&at.space).unwrap();
        pages[usize::try_from(at.page).unwrap()] = page;
    }
    assert_eq!(got, now);
}

/// Counts how often each page is read.
struct Counting<'a>(
    &'a Pages,
    std::sync::Mutex<std::collections::BTreeMap<PageAt, u32>>,
);

impl PageReader for Counting<'_> {
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        *self.1.lock().unwrap().entry(at).or_default() += 1;
        self.0.read(at, into)
    }
}

#[test]
fn what_is_stored_is_read_once() {
    let (base, now, _) = sample();
    let (spaces, changed) = (sizes(&base, &now), spans(&now));
    let spec = DeltaSpec {
        base: base_id(),
        spaces: &spaces,
        early: &[PageAt::memory(3), PageAt::memory(31), PageAt::memory(62)],
        changed: &changed,
        state: &[],
        meta: &[],
    };
    let counting = Counting(&now, std::sync::Mutex::default());
    let content = BaseContent {
        pages: &base,
        hashes: None,
    };
    let mut out = Cursor::new(Vec::new());
    let options = Options::default();
    encode(
        &spec,
        &counting,
        Some(content),
        &mut out,
        options,
        &mut |_| {},
    )
    .unwrap();
    let (_, index) = head(out.get_ref());
    for (at, times) in counting.1.into_inner().unwrap() {
        // Page 3 is early and zero: it comes again with the rest.
        let twice = at == PageAt::memory(3);
        assert_eq!(times, if twice { 2 } else { 1 }, "{at}");
        assert!(index.lookup(at).is_some());
    }
}

#[test]
fn the_same_contents_take_one_slot_up_to_a_number_of_places() {
    let mut now = Pages::default();
    now.0.insert(Space::Memory, vec![page(1); 1000]);
    now.0.insert(Space::Disk(0), vec![page(1); 24]);
    let early = [PageAt::memory(999), PageAt::disk(0, 3), PageAt::memory(0)];
    let (bytes, summary) = encode_all(&Pages::default(), &now, &early, None, Options::default());
    assert_eq!(summary.literal_pages, 1024 / u64::from(slots::PLACES_MAX));
    assert_eq!(summary.repeated_pages, 1024 - summary.literal_pages);
    assert_eq!(apply(&Pages::default(), &bytes), now);
    let (_, index) = head(&bytes);
    let places = |number| -> u32 {
        let places = index.segment_places(SegmentId(number));
        places.map(|place| place.pages).sum()
    };
    assert_eq!(places(0), slots::PLACES_MAX);
}

#[test]
fn stored_as_it_is_takes_no_codec() {
    let (base, now, _) = sample();
    let options = Options {
        level: LEVEL_STORED,
        ..Options::default()
    };
    let (bytes, _) = encode_all(&base, &now, &[], None, options);
    let (_, index) = head(&bytes);
    let all_raw = index
        .segments()
        .iter()
        .all(|s| s.codec == crate::Codec::Raw);
    assert!(all_raw);
    assert_eq!(apply(&base, &bytes), now);
}

#[test]
fn nothing_at_all_is_an_overlay_too() {
    let nothing = Pages::default();
    let spec = DeltaSpec {
        base: base_id(),
        spaces: &[],
        early: &[],
        changed: &Vec::new(),
        state: &[],
        meta: &[],
    };
    let mut out = Cursor::new(Vec::new());
    encode(
        &spec,
        &nothing,
        None,
        &mut out,
        Options::default(),
        &mut |_| {},
    )
    .unwrap();
    let (prefix, index) = head(out.get_ref());
    assert!(index.runs().is_empty());
    assert_eq!(decode_state(&prefix, &[]).unwrap(), Vec::<u8>::new());
    assert_eq!(
        out.get_ref().len(),
        crate::PREFIX_BYTES + crate::TRAILER_BYTES
    );
}

/// One page.
fn one(first: PageAt) -> PageSpan {
    PageSpan { first, pages: 1 }
}

/// Fails to read one page.
struct Hole<'a>(&'a Pages, PageAt);

impl PageReader for Hole<'_> {
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        if at == self.1 {
            Err(io::ErrorKind::Other.into())
        } else {
            self.0.read(at, into)
        }
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let (base, now, _) = sample();
    let spaces = sizes(&base, &now);
    let good = DeltaSpec {
        base: base_id(),
        spaces: &spaces,
        early: &[],
        changed: &vec![one(PageAt::memory(1))],
        state: &[],
        meta: &[],
    };
    let run = |spec: &DeltaSpec<'_>, pages: &dyn PageReader| {
        let mut out = Cursor::new(Vec::new());
        encode(spec, pages, None, &mut out, Options::default(), &mut |_| {}).unwrap_err()
    };
    let outside = vec![one(PageAt::memory(3)), one(PageAt::memory(100))];
    let error = run(
        &DeltaSpec {
            changed: &outside,
            ..good
        },
        &now,
    );
    assert_eq!(error.to_string(), "the VM has no page 0x64 of memory");
    let elsewhere = [PageAt::disk(3, 0)];
    let error = run(
        &DeltaSpec {
            early: &elsewhere,
            ..good
        },
        &now,
    );
    assert!(matches!(error, EncodeError::NoSuchPage { .. }));
    let unordered = vec![one(PageAt::memory(3)), one(PageAt::memory(3))];
    let error = run(
        &DeltaSpec {
            changed: &unordered,
            ..good
        },
        &now,
    );
    assert!(matches!(error, EncodeError::Order { at } if at == PageAt::memory(3)));
    let twice = [spaces[0], spaces[0]];
    let error = run(
        &DeltaSpec {
            spaces: &twice,
            ..good
        },
        &now,
    );
    assert!(matches!(error, EncodeError::Space { .. }));
    let large = [SpaceSize {
        pages: SPACE_PAGES_MAX + 1,
        ..spaces[0]
    }];
    let error = run(
        &DeltaSpec {
            spaces: &large,
            ..good
        },
        &now,
    );
    assert!(matches!(error, EncodeError::Space { .. }));
    let meta = vec![0; META_BYTES_MAX + 1];
    let error = run(
        &DeltaSpec {
            meta: &meta,
            ..good
        },
        &now,
    );
    assert!(matches!(
        error,
        EncodeError::Limit {
            what: "the length of the meta",
            ..
        }
    ));
    let error = run(&good, &Hole(&now, PageAt::memory(1)));
    assert!(matches!(error, EncodeError::Read { .. }));
}

#[test]
fn levels_that_do_not_exist_are_refused() {
    let (_, now, _) = sample();
    let spec = DeltaSpec {
        base: base_id(),
        spaces: &[],
        early: &[],
        changed: &Vec::new(),
        state: &[],
        meta: &[],
    };
    for level in [20, -1] {
        let mut out = Cursor::new(Vec::new());
        let options = Options { level, threads: 1 };
        let error = encode(&spec, &now, None, &mut out, options, &mut |_| {}).unwrap_err();
        assert!(matches!(error, EncodeError::Level { .. }));
        assert!(out.get_ref().is_empty());
    }
}

#[test]
fn progress_comes_to_its_end() {
    let (base, now, _) = sample();
    let (spaces, changed) = (sizes(&base, &now), spans(&now));
    let spec = DeltaSpec {
        base: base_id(),
        spaces: &spaces,
        early: &[],
        changed: &changed,
        state: &[],
        meta: &[],
    };
    let mut seen = Vec::new();
    let mut out = Cursor::new(Vec::new());
    let mut note = |progress| seen.push(progress);
    let summary = encode(&spec, &now, None, &mut out, Options::default(), &mut note).unwrap();
    let total = summary.listed_pages;
    assert_eq!(seen.first(), Some(&Progress { done: 0, total }));
    assert_eq!(seen.last(), Some(&Progress { done: total, total }));
}

/// A VM whose pages are given by small numbers, so that equal pages are common; 0 is zero.
fn pages_of(numbers: &[Vec<u8>]) -> Pages {
    let spaces = [Space::Memory, Space::Disk(0), Space::Disk(30)];
    let content = |n: &u8| {
        if *n == 0 {
            [0; PAGE_BYTES]
        } else {
            page(u64::from(*n))
        }
    };
    let space =
        |(space, numbers): (Space, &Vec<u8>)| (space, numbers.iter().map(content).collect());
    Pages(spaces.into_iter().zip(numbers).map(space).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_vm_comes_back_from_any_base(
        base in prop::collection::vec(prop::collection::vec(0u8..12, 0..40), 3),
        now in prop::collection::vec(prop::collection::vec(0u8..16, 0..60), 3),
        early in prop::collection::vec((0usize..3, 0u64..60), 0..80),
        with_base in any::<bool>(),
        with_hashes in any::<bool>(),
    ) {
        let (base, now) = (pages_of(&base), pages_of(&now));
        let spaces = [Space::Memory, Space::Disk(0), Space::Disk(30)];
        let early: Vec<PageAt> = early
            .into_iter()
            .map(|(space, page)| PageAt { space: spaces[space], page })
            .filter(|at| at.page < now.count(at.space))
            .collect();
        let hashes = hashes(&base);
        let content =
            BaseContent { pages: &base, hashes: with_hashes.then_some(&hashes) };
        let content = with_base.then_some(content);
        let (bytes, summary) = encode_all(&base, &now, &early, content, Options::default());
        prop_assert_eq!(apply(&base, &bytes), now);
        prop_assert_eq!(summary.total_bytes, bytes.len() as u64);
        let counted = summary.unchanged_pages
            + summary.zero_pages
            + summary.base_pages
            + summary.repeated_pages
            + summary.literal_pages;
        prop_assert_eq!(summary.listed_pages, counted);
        crate::verify(&mut Cursor::new(bytes), &mut |_, _| {}).unwrap();
    }
}
