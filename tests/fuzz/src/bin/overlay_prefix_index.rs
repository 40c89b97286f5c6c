//! Prefix and index of an overlay, raw and with right hashes: refused, or every promise kept.

#![no_main]

use cloudlet_fuzz::{Forged, Input};
use cloudlet_overlay::{Index, PREFIX_BYTES, PageContent, Prefix, RunSource, SegmentId};
use libfuzzer_sys::fuzz_target;

fn check(head: &[u8]) {
    let Some((prefix, index)) = head.split_first_chunk::<PREFIX_BYTES>() else {
        return;
    };
    let Ok(prefix) = Prefix::parse(prefix) else {
        return;
    };
    let Ok(index) = Index::parse(&prefix, index) else {
        return;
    };
    let mut end_last = None;
    for run in index.runs() {
        let size = index.space(run.first.space).expect("a run is in a space");
        assert!(run.pages > 0 && run.first.page + run.pages <= size.pages);
        if let Some((space, end)) = end_last {
            assert!(space != run.first.space || run.first.page >= end);
        }
        end_last = Some((run.first.space, run.first.page + run.pages));
        for at in [run.first, run.first.plus(run.pages - 1)] {
            match index.lookup(at).expect("a page of a run is in its space") {
                PageContent::Unchanged => panic!("a run says something of its pages"),
                PageContent::Zero => assert_eq!(run.source, RunSource::Zero),
                PageContent::BasePage(at) => {
                    let source = index.space(at.space).expect("a source is in a space");
                    assert!(at.page < source.base_pages);
                }
                PageContent::Literal { segment, slot } => {
                    assert!(slot < index.segment(segment).expect("a run's segment").pages);
                }
            }
        }
    }
    let mut offset = prefix.segments_offset();
    for (number, segment) in (0..).zip(index.segments()) {
        assert_eq!(segment.offset, offset);
        offset += u64::from(segment.stored_bytes);
        let mut own = 0;
        for place in index.segment_places(SegmentId(number)) {
            assert!(place.pages > 0 && place.slot + place.pages <= segment.pages);
            let (id, slot) = (SegmentId(number), place.slot);
            let content = Some(PageContent::Literal { segment: id, slot });
            assert_eq!(index.lookup(place.first), content);
            // Its own places come first and cover all slots.
            if own < segment.pages {
                assert_eq!(place.slot, own);
                own += place.pages;
            }
        }
        assert_eq!(own, segment.pages);
    }
    assert_eq!(offset, prefix.index_offset());
    assert_eq!(offset + prefix.index_bytes() + 48, prefix.total_bytes());
}

/// A space of 2000 pages over 1000 of the base, now and then of other sizes.
fn space(input: &mut Input<'_>, code: u8) -> [u8; 24] {
    let mut entry = [0; 24];
    entry[0] = code;
    entry[8..16].copy_from_slice(&2000_u64.to_le_bytes());
    entry[16..24].copy_from_slice(&1000_u64.to_le_bytes());
    if input.byte() > 200 {
        let [at, value] = input.array();
        entry[usize::from(at % 24)] = value;
    }
    entry
}

/// Entries of the run table that follow each other, now and then with a byte that does not fit.
fn run<const N: usize>(input: &mut Input<'_>, next: &mut u32, kind: u8) -> [u8; N] {
    let [gap, pages, space, odd] = input.array();
    let page = *next + u32::from(gap % 4);
    *next = page + u32::from(pages % 8) + 1;
    let mut entry = [0; N];
    entry[..4].copy_from_slice(&page.to_le_bytes());
    entry[4] = pages % 8;
    entry[6] = u8::from(space > 200);
    entry[7] = kind;
    if odd > 200 {
        let [at, value] = input.array();
        entry[usize::from(at) % N] = value;
    }
    entry
}

/// A head whose lengths and hashes are right, and most of the rest as well.
fn forged(mut input: Input<'_>) -> Vec<u8> {
    let mut forged = Forged {
        early_segments: input.byte() % 4,
        ..Forged::default()
    };
    for code in 0..=input.byte() % 3 {
        let entry = space(&mut input, code);
        forged.spaces.push(entry);
    }
    let table_as_it_comes = input.byte() > 240;
    let mut next = 0;
    for _ in 0..input.byte() % 8 {
        let [runs, stored, odd] = input.array();
        let mut entry = [0; 40];
        entry[0] = stored;
        entry[4] = runs % 4 + 1;
        entry[6] = 1;
        for _ in 0..entry[4] {
            forged
                .run_table
                .extend_from_slice(&run::<8>(&mut input, &mut next, 1));
            forged.literal_runs += 1;
        }
        if odd > 200 {
            let [at, value] = input.array();
            entry[usize::from(at % 8)] = value;
        }
        forged.segments.push(entry);
    }
    forged.derived_runs = input.byte() % 16;
    for _ in 0..forged.derived_runs {
        let [kind, source, space] = input.array();
        let mut entry = run::<16>(&mut input, &mut next, 2 + kind % 3);
        if kind % 3 > 0 {
            entry[8] = entry[8].wrapping_add(source);
        }
        if kind % 3 == 1 {
            entry[12] = entry[12].wrapping_add(space % 3);
        }
        forged.run_table.extend_from_slice(&entry);
    }
    if table_as_it_comes {
        forged.run_table_codec = 1;
        forged.run_table = input.0.to_vec();
    } else {
        forged.meta = input.0.to_vec();
    }
    forged.head()
}

fuzz_target!(|data: &[u8]| {
    match data.split_first() {
        Some((mode, rest)) if mode % 2 == 0 => check(&forged(Input(rest))),
        Some((_, rest)) => check(rest),
        None => {}
    }
});
