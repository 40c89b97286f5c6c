//! Indexes of any content: those that are accepted are sound, and none breaks the reader.

use proptest::prelude::*;

use super::*;

/// What must hold for every index that was accepted.
fn check_index(index: &Index) {
    let mut last = None;
    for run in index.runs() {
        assert!(run.pages > 0);
        let size = index.space(run.first.space).unwrap();
        assert!(run.first.page + run.pages <= size.pages);
        if let Some((space, end)) = last
            && space == run.first.space
        {
            assert!(run.first.page >= end);
        }
        last = Some((run.first.space, run.first.page + run.pages));
        for at in [run.first, run.first.plus(run.pages - 1)] {
            assert_eq!(index.run_at(at), Some(run));
            match index.lookup(at).unwrap() {
                PageContent::Unchanged => panic!("a run says something of its pages"),
                PageContent::Zero => assert_eq!(run.source, RunSource::Zero),
                PageContent::BasePage(at) => {
                    assert!(at.page < index.space(at.space).unwrap().base_pages);
                }
                PageContent::Literal { segment, slot } => {
                    assert!(slot < index.segment(segment).unwrap().pages);
                }
            }
        }
    }
    for (number, segment) in (0..).zip(index.segments()) {
        let mut slots = 0;
        for place in index.segment_places(SegmentId(number)) {
            assert!(place.pages > 0 && place.slot + place.pages <= segment.pages);
            let id = SegmentId(number);
            let content = index.lookup(place.first);
            let slot = place.slot;
            assert_eq!(content, Some(PageContent::Literal { segment: id, slot }));
            // Its own places come first and cover all slots.
            if slots < segment.pages {
                assert_eq!(place.slot, slots);
                slots += place.pages;
            }
        }
        assert_eq!(slots, segment.pages);
        assert!(segment.raw_bytes() <= SEGMENT_BYTES_MAX);
        assert!(to_usize(segment.stored_bytes) <= segment.raw_bytes());
    }
}

fn any_forge() -> impl Strategy<Value = Forge> {
    let run = (0u32..1010, 1u16..30, 0u8..4, 0u8..8, 0u32..1000);
    let literals = prop::collection::vec((0u32..1000, 1u16..20, 0u8..3), 0..12);
    let deriveds = prop::collection::vec(run, 0..12);
    (
        literals,
        deriveds,
        prop::collection::vec((any::<u32>(), 0u16..4), 0..8),
        0u32..4,
    )
        .prop_map(|(literals, deriveds, segments, early_segments)| Forge {
            literal: literals
                .into_iter()
                .map(|(page, pages, space)| literal(page, pages, space & 2, KIND_LITERAL))
                .collect(),
            derived: deriveds
                .into_iter()
                .map(|(page, pages, space, kind, source)| derived(page, pages, space, kind, source))
                .collect(),
            segments: segments
                .into_iter()
                .map(|(stored, runs)| segment(stored % 4096 + 1, runs, Codec::Zstd))
                .collect(),
            early_segments,
            ..Forge::good()
        })
}

/// Forgeries that are right by construction except perhaps in one place.
fn nearly_good() -> impl Strategy<Value = Forge> {
    let run = prop::collection::vec((1u16..16, 0u32..6, 0u8..4), 1..20);
    (
        run,
        prop::option::of((any::<prop::sample::Index>(), 0usize..8, any::<u8>())),
    )
        .prop_map(|(runs, damage)| {
            let mut forge = Forge {
                literal: vec![],
                derived: vec![],
                segments: vec![],
                ..Forge::good()
            };
            let mut page = 0;
            for (pages, gap, kind) in runs {
                page += gap;
                match kind {
                    0 => {
                        forge.literal.push(literal(page, pages, 0, KIND_LITERAL));
                        forge.segments.push(segment(100, 1, Codec::Zstd));
                    }
                    1 => forge.derived.push(derived(page, pages, 0, KIND_ZERO, 0)),
                    2 => forge
                        .derived
                        .push(derived(page, pages, 0, KIND_SLOT, page / 4)),
                    _ => forge
                        .derived
                        .push(derived(page, pages, 0, KIND_BASE_PAGE, page / 2)),
                }
                page += u32::from(pages);
            }
            if let Some((which, byte, value)) = damage {
                let count = forge.literal.len() + forge.derived.len();
                let which = which.index(count);
                match forge.literal.get_mut(which) {
                    Some(run) => run[byte] = value,
                    None => forge.derived[which - forge.literal.len()][byte] = value,
                }
            }
            forge
        })
}

proptest! {
    #[test]
    fn an_accepted_index_keeps_its_promises(forge in any_forge()) {
        if let Ok(index) = forge.parse() {
            check_index(&index);
        }
    }

    #[test]
    fn a_nearly_good_index_is_refused_or_keeps_its_promises(forge in nearly_good()) {
        if let Ok(index) = forge.parse() {
            check_index(&index);
        }
    }

    #[test]
    fn noise_in_the_index_never_panics(
        edits in prop::collection::vec((0usize..400, any::<u8>()), 1..6)
    ) {
        let result = edited(|bytes| {
            for (at, value) in edits {
                let at = at % bytes.len();
                bytes[at] = value;
            }
        });
        if let Ok(index) = result {
            check_index(&index);
        }
    }
}
