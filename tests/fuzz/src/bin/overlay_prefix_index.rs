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
                PageContent::BasePage(page) => assert!(page < size.base_pages),
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
        let pages: usize = index
            .segment_runs(SegmentId(number))
            .map(|(_, pages)| pages)
            .sum();
        assert_eq!(pages, segment.pages as usize);
    }
    assert_eq!(offset + 48, prefix.total_bytes());
}

/// A head whose lengths and hashes are right, and in which segments are given right raw lengths.
fn forged(mut input: Input<'_>) -> Vec<u8> {
    let mut forged = Forged {
        early_segments: input.byte() % 4,
        ..Forged::default()
    };
    for _ in 0..input.byte() % 4 {
        let mut entry = input.array();
        entry[1..8].fill(0);
        // Sizes that runs with small numbers fit into; the top byte lets them be wrong.
        entry[11..15].fill(0);
        entry[19..23].fill(0);
        forged.spaces.push(entry);
    }
    for _ in 0..input.byte() % 8 {
        let mut entry = [0; 40];
        let [stored_low, stored_high, runs, codec] = input.array();
        entry[0] = stored_low;
        entry[1] = stored_high;
        entry[4] = runs % 8;
        entry[6] = codec % 3;
        forged.segments.push(entry);
    }
    let mode = input.byte();
    forged.literal_runs = input.byte() % 32;
    forged.derived_runs = input.byte() % 32;
    if mode % 4 == 0 {
        forged.run_table_codec = 1;
        forged.run_table = input.0.to_vec();
    } else {
        for _ in 0..forged.literal_runs {
            forged.run_table.extend_from_slice(&input.array::<8>());
        }
        for _ in 0..forged.derived_runs {
            forged.run_table.extend_from_slice(&input.array::<12>());
        }
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
