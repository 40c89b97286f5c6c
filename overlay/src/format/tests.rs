//! Forged prefixes and indexes: their hashes are right, their content is not.

mod random;

use super::prefix::run_table_raw;
use super::*;
use crate::bytes::to_usize;
use crate::codec::StoredPart;
use crate::digest::Digest;
use crate::page::{SPACE_PAGES_MAX, Space, SpaceSize};
use crate::testing::{base_id, sample};

/// What a forger puts into an index; [`Forge::good`] is accepted.
#[derive(Clone, Debug)]
struct Forge {
    spaces: Vec<SpaceSize>,
    literal: Vec<[u8; LITERAL_RUN_BYTES]>,
    derived: Vec<[u8; DERIVED_RUN_BYTES]>,
    segments: Vec<SegmentEntry>,
    early_segments: u32,
}

fn literal(page: u32, pages: u16, space: u8, kind: u8) -> [u8; LITERAL_RUN_BYTES] {
    let mut out = [0, 0, 0, 0, 0, 0, space, kind];
    out[..4].copy_from_slice(&page.to_le_bytes());
    out[4..6].copy_from_slice(&(pages - 1).to_le_bytes());
    out
}

fn derived(page: u32, pages: u16, space: u8, kind: u8, source: u32) -> [u8; DERIVED_RUN_BYTES] {
    let mut out = [0; DERIVED_RUN_BYTES];
    out[..LITERAL_RUN_BYTES].copy_from_slice(&literal(page, pages, space, kind));
    out[8..12].copy_from_slice(&source.to_le_bytes());
    if kind == KIND_BASE_PAGE {
        out[12] = space;
    }
    out
}

fn segment(stored_bytes: u32, runs: u16, codec: Codec) -> SegmentEntry {
    SegmentEntry {
        stored_bytes,
        runs,
        codec,
        hash: Digest([7; 32]),
    }
}

impl Forge {
    fn good() -> Self {
        let size = |space, pages, base_pages| SpaceSize {
            space,
            pages,
            base_pages,
        };
        Self {
            spaces: vec![size(Space::Memory, 1000, 900), size(Space::Disk(1), 50, 60)],
            literal: vec![
                literal(100, 10, 0, KIND_LITERAL),
                literal(40, 10, 2, KIND_LITERAL),
                literal(500, 256, 0, KIND_LITERAL),
            ],
            derived: vec![
                derived(0, 100, 0, KIND_ZERO, 0),
                derived(990, 10, 0, KIND_BASE_PAGE, 890),
                derived(0, 40, 2, KIND_BASE_PAGE, 20),
            ],
            segments: vec![
                segment(65536, 1, Codec::Zstd),
                segment(4096, 1, Codec::Zstd),
                segment(256 * 4096, 1, Codec::Raw),
            ],
            early_segments: 0,
        }
        .with(|forge| forge.segments[0].stored_bytes = 10 * 4096 - 1)
    }

    fn with(mut self, edit: impl FnOnce(&mut Self)) -> Self {
        edit(&mut self);
        self
    }

    /// Prefix and index, one behind the other.
    fn head(&self) -> Result<(Vec<u8>, Prefix), FormatError> {
        let bytes = [self.literal.as_flattened(), self.derived.as_flattened()].concat();
        let raw_bytes = bytes.len();
        let run_table = StoredPart {
            hash: Digest::of(&bytes),
            bytes,
            raw_bytes,
            codec: Codec::Raw,
        };
        let state = StoredPart {
            hash: Digest::of(b""),
            bytes: vec![],
            raw_bytes: 0,
            codec: Codec::Raw,
        };
        Tables {
            base: base_id(),
            spaces: &self.spaces,
            meta: b"meta",
            literal_runs: u32::try_from(self.literal.len()).unwrap(),
            derived_runs: u32::try_from(self.derived.len()).unwrap(),
            run_table: &run_table,
            state: &state,
            early_segments: self.early_segments,
        }
        .index(&self.segments)
        .map(|(index, prefix)| ([&prefix.to_bytes()[..], &index].concat(), prefix))
    }

    fn parse(&self) -> Result<Index, FormatError> {
        let (bytes, prefix) = self.head()?;
        Index::parse(&prefix, &bytes[PREFIX_BYTES..])
    }
}

/// The error of a forgery that differs from the good one by `edit`.
fn refused(edit: impl FnOnce(&mut Forge)) -> FormatError {
    Forge::good().with(edit).parse().unwrap_err()
}

#[test]
fn the_unedited_forgery_is_accepted() {
    let index = Forge::good().parse().unwrap();
    assert_eq!(index.runs().len(), 6);
    assert_eq!(index.meta(), b"meta");
    let at = |page| index.lookup(PageAt::memory(page)).unwrap();
    assert_eq!(at(995), PageContent::BasePage(PageAt::memory(895)));
    assert_eq!(at(450), PageContent::Unchanged);
    assert_eq!(at(950), PageContent::Zero);
    assert_eq!(
        at(755),
        PageContent::Literal {
            segment: SegmentId(2),
            slot: 255
        }
    );
    let total: u64 = index
        .segments()
        .iter()
        .map(|segment| u64::from(segment.stored_bytes))
        .sum();
    let first = index.segments()[0].offset;
    let last = index.segments().last().unwrap();
    assert_eq!(last.offset + u64::from(last.stored_bytes), first + total);
}

#[test]
fn spaces_are_checked() {
    let swapped = refused(|forge| forge.spaces.reverse());
    assert!(matches!(
        swapped,
        FormatError::SpaceCode { entry: 1, code: 0 }
    ));
    let twice = refused(|forge| forge.spaces[1].space = Space::Memory);
    assert!(matches!(
        twice,
        FormatError::SpaceCode { entry: 1, code: 0 }
    ));
    let unknown = refused(|forge| forge.spaces[1].space = Space::Disk(crate::page::DISKS_MAX));
    assert!(matches!(
        unknown,
        FormatError::SpaceCode {
            entry: 1,
            code: 255
        }
    ));
    let large = refused(|forge| forge.spaces[0].pages = SPACE_PAGES_MAX + 1);
    assert!(matches!(large, FormatError::Limit { .. }));
    let large = refused(|forge| forge.spaces[0].base_pages = u64::MAX);
    assert!(matches!(large, FormatError::Limit { .. }));
}

#[test]
fn runs_are_checked() {
    let outside = refused(|forge| forge.derived[1] = derived(991, 10, 0, KIND_ZERO, 0));
    assert!(matches!(outside, FormatError::RunEnd { run: 4, .. }));
    let far = refused(|forge| forge.literal[0] = literal(u32::MAX, 10, 0, KIND_LITERAL));
    assert!(matches!(far, FormatError::RunEnd { run: 0, .. }));
    let nowhere = refused(|forge| forge.derived[0] = derived(0, 1, 1, KIND_ZERO, 0));
    assert!(matches!(nowhere, FormatError::RunSpace { run: 3, code: 1 }));
    let overlap = refused(|forge| forge.derived[0] = derived(0, 101, 0, KIND_ZERO, 0));
    assert!(matches!(overlap, FormatError::Overlap { at } if at == PageAt::memory(100)));
    let inside = refused(|forge| forge.derived[0] = derived(600, 1, 0, KIND_ZERO, 0));
    assert!(matches!(inside, FormatError::Overlap { .. }));
    let source = refused(|forge| forge.derived[1] = derived(990, 10, 0, KIND_BASE_PAGE, 891));
    assert!(matches!(
        source,
        FormatError::Source { run: 4, first, .. } if first == PageAt::memory(891)
    ));
    let source = refused(|forge| forge.derived[1] = derived(990, 10, 0, KIND_BASE_PAGE, u32::MAX));
    assert!(matches!(source, FormatError::Source { .. }));
    let zero = refused(|forge| forge.derived[0] = derived(0, 1, 0, KIND_ZERO, 5));
    assert!(matches!(
        zero,
        FormatError::Reserved {
            place: Place::RunTable
        }
    ));
}

#[test]
fn sources_in_other_spaces_are_checked() {
    let from = |space: u8, source: u32| {
        let mut run = derived(990, 10, 0, KIND_BASE_PAGE, source);
        run[12] = space;
        run
    };
    let index = Forge::good()
        .with(|forge| forge.derived[1] = from(2, 50))
        .parse()
        .unwrap();
    let content = index.lookup(PageAt::memory(995)).unwrap();
    assert_eq!(content, PageContent::BasePage(PageAt::disk(1, 55)));
    let outside = refused(|forge| forge.derived[1] = from(2, 51));
    let text = "run 4 is the same as 10 pages from page 0x33 of disk 1 of the base, which has 60";
    assert_eq!(outside.to_string(), text);
    for space in [1, 3, 255] {
        let nowhere = refused(|forge| forge.derived[1] = from(space, 0));
        assert!(matches!(nowhere, FormatError::SourceSpace { run: 4, code } if code == space));
    }
    for at in 13..DERIVED_RUN_BYTES {
        let error = refused(|forge| forge.derived[1][at] = 1);
        assert!(matches!(error, FormatError::Reserved { .. }));
    }
    let zero = refused(|forge| forge.derived[0][12] = 2);
    assert!(matches!(zero, FormatError::Reserved { .. }));
}

#[test]
fn slots_have_further_places_and_are_checked() {
    let index = Forge::good()
        .with(|forge| {
            forge.derived[0] = derived(0, 2, 0, KIND_SLOT, 18);
            forge.derived[1] = derived(990, 10, 0, KIND_SLOT, 0);
            forge.derived[2] = derived(0, 40, 2, KIND_SLOT, 236);
        })
        .parse()
        .unwrap();
    let at = |at| index.lookup(at).unwrap();
    let literal = |segment, slot| PageContent::Literal {
        segment: SegmentId(segment),
        slot,
    };
    assert_eq!(at(PageAt::memory(1)), literal(1, 9));
    assert_eq!(at(PageAt::memory(999)), literal(0, 9));
    assert_eq!(at(PageAt::disk(1, 0)), literal(2, 216));
    let places: Vec<_> = index
        .segment_places(SegmentId(1))
        .map(|place| (place.first, place.slot, place.pages))
        .collect();
    assert_eq!(
        places,
        [(PageAt::disk(1, 40), 0, 10), (PageAt::memory(0), 8, 2)]
    );
    for (slot, pages) in [(9, 2), (19, 2), (275, 2), (276, 1), (u32::MAX, 1)] {
        let error = refused(|forge| forge.derived[0] = derived(0, pages, 0, KIND_SLOT, slot));
        assert!(matches!(error, FormatError::Slot { run: 3, .. }), "{slot}");
    }
    let error = refused(|forge| {
        forge.literal.clear();
        forge.segments.clear();
        forge.derived[0] = derived(0, 1, 0, KIND_SLOT, 0);
    });
    assert!(matches!(
        error,
        FormatError::Slot {
            run: 0,
            slot: 0,
            ..
        }
    ));
    // Two places are never the same page.
    let overlap = refused(|forge| forge.derived[0] = derived(99, 2, 0, KIND_SLOT, 0));
    assert!(matches!(overlap, FormatError::Overlap { .. }));
}

#[test]
fn kinds_and_versions_that_are_unknown_are_refused_by_name() {
    let error = refused(|forge| forge.derived[0] = derived(0, 1, 0, KIND_PARENT_SLOT, 5));
    let text = "run 3 is of kind same as a page of a parent, which this program does not support";
    assert_eq!(error.to_string(), text);
    for kind in [0, KIND_LITERAL, 6, 255] {
        let error = refused(|forge| forge.derived[0] = derived(0, 1, 0, kind, 5));
        assert!(matches!(error, FormatError::Kind { run: 3, .. }));
    }
    for kind in [0, KIND_ZERO, KIND_BASE_PAGE, KIND_SLOT, 255] {
        let error = refused(|forge| forge.literal[0] = literal(100, 10, 0, kind));
        assert!(matches!(error, FormatError::Kind { run: 0, .. }));
    }
    let text = "overlay format version 1, this program reads version 2: make the overlay anew with \
                `cloudlet overlay create`";
    assert_eq!(put(8, 1).unwrap_err().to_string(), text);
    let text = "this overlay stands on 3 others, which this program does not support";
    assert_eq!(put(152, 3 << 16).unwrap_err().to_string(), text);
}

#[test]
fn segments_are_checked() {
    let empty = refused(|forge| forge.segments[0].runs = 0);
    assert!(matches!(
        empty,
        FormatError::SegmentRuns {
            segment: 0,
            runs: 0,
            pages: 0
        }
    ));
    let greedy = refused(|forge| forge.segments[2].runs = 2);
    assert!(matches!(
        greedy,
        FormatError::SegmentRuns {
            segment: 2,
            runs: 2,
            ..
        }
    ));
    let greedy = refused(|forge| forge.segments[0].runs = u16::MAX);
    assert!(matches!(
        greedy,
        FormatError::SegmentRuns { segment: 0, .. }
    ));
    let long = refused(|forge| forge.literal[2] = literal(500, 257, 0, KIND_LITERAL));
    assert!(matches!(
        long,
        FormatError::SegmentRuns {
            segment: 2,
            pages: 257,
            ..
        }
    ));
    let long = refused(|forge| forge.early_segments = 3);
    assert!(matches!(
        long,
        FormatError::SegmentRuns {
            segment: 2,
            pages: 256,
            ..
        }
    ));
    let many = refused(|forge| forge.early_segments = 4);
    assert!(matches!(many, FormatError::Limit { .. }));
    let loose = refused(|forge| forge.segments.truncate(2));
    assert!(matches!(loose, FormatError::LooseRuns { count: 1 }));
    Forge::good()
        .with(|forge| forge.early_segments = 2)
        .parse()
        .unwrap();
}

#[test]
fn stored_lengths_are_checked() {
    for (stored, codec) in [(0, Codec::Zstd), (40960, Codec::Zstd), (40959, Codec::Raw)] {
        let error = refused(|forge| {
            forge.segments[0].stored_bytes = stored;
            forge.segments[0].codec = codec;
        });
        assert!(matches!(
            error,
            FormatError::Stored {
                place: Place::Segment(0),
                ..
            }
        ));
    }
}

/// Parses the good forgery after an edit of its bytes, with hash of the index made right.
fn edited(edit: impl FnOnce(&mut Vec<u8>)) -> Result<Index, FormatError> {
    let (mut bytes, _) = Forge::good().head().unwrap();
    edit(&mut bytes);
    let hash = Digest::of(&bytes[PREFIX_BYTES..]);
    bytes[48..80].copy_from_slice(&hash.0);
    let prefix = Prefix::parse(bytes.first_chunk().unwrap())?;
    Index::parse(&prefix, &bytes[PREFIX_BYTES..])
}

fn put(at: usize, value: u32) -> Result<Index, FormatError> {
    edited(|bytes| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()))
}

#[test]
fn prefix_numbers_are_checked() {
    assert!(matches!(put(0, 0), Err(FormatError::Magic)));
    assert!(matches!(put(8, 3), Err(FormatError::Version { found: 3 })));
    for (at, limit) in [
        (12, 33),
        (120, 1 << 20),
        (124, 1 << 20),
        (132, 1 << 22),
        (148, 64 << 20),
    ] {
        assert!(
            matches!(put(at, limit + 1), Err(FormatError::Limit { .. })),
            "field at {at}"
        );
        assert!(
            matches!(put(at, u32::MAX), Err(FormatError::Limit { .. })),
            "field at {at}"
        );
    }
    assert!(matches!(
        put(136, RUNS_MAX - 2),
        Err(FormatError::Limit { .. })
    ));
    assert!(matches!(
        put(136, 2),
        Err(FormatError::Stored {
            place: Place::RunTable,
            ..
        })
    ));
    assert!(matches!(
        put(140, 1),
        Err(FormatError::Stored {
            place: Place::RunTable,
            ..
        })
    ));
    assert!(matches!(
        put(144, 1),
        Err(FormatError::Stored {
            place: Place::State,
            ..
        })
    ));
    assert!(matches!(
        put(152, 9),
        Err(FormatError::Codec {
            place: Place::RunTable,
            code: 9
        })
    ));
    assert!(matches!(
        put(152, 0x900),
        Err(FormatError::Codec {
            place: Place::State,
            code: 9
        })
    ));
    assert!(matches!(
        put(156, 1),
        Err(FormatError::Reserved {
            place: Place::Prefix
        })
    ));
    assert!(matches!(
        put(112, 500),
        Err(FormatError::Length {
            place: Place::Prefix,
            ..
        })
    ));
    assert!(matches!(
        put(116, 1),
        Err(FormatError::Length {
            place: Place::Prefix,
            ..
        })
    ));
    assert!(matches!(
        put(120, 5),
        Err(FormatError::Length {
            place: Place::Index,
            ..
        })
    ));
}

#[test]
fn index_bytes_are_checked() {
    let reserved = |at: usize| edited(|bytes| bytes[PREFIX_BYTES + at] = 1);
    assert!(matches!(
        reserved(3),
        Err(FormatError::Reserved {
            place: Place::Index
        })
    ));
    let segments = 2 * SPACE_ENTRY_BYTES;
    assert!(matches!(
        reserved(segments + 7),
        Err(FormatError::Reserved {
            place: Place::Index
        })
    ));
    let codec = edited(|bytes| bytes[PREFIX_BYTES + segments + 6] = 2);
    assert!(matches!(
        codec,
        Err(FormatError::Codec {
            place: Place::Segment(0),
            code: 2
        })
    ));
    let (mut bytes, prefix) = Forge::good().head().unwrap();
    bytes[PREFIX_BYTES] ^= 1;
    let damaged = Index::parse(&prefix, &bytes[PREFIX_BYTES..]);
    assert!(matches!(
        damaged,
        Err(FormatError::Hash {
            place: Place::Index
        })
    ));
    let short = Index::parse(&prefix, &bytes[PREFIX_BYTES..bytes.len() - 1]);
    assert!(matches!(
        short,
        Err(FormatError::Length {
            place: Place::Index,
            ..
        })
    ));
}

/// A few bytes that decompress to more than the counts of the prefix say are refused without
/// being decompressed further.
#[test]
fn a_run_table_that_swells_is_refused() {
    let mut zstd = zstd::bulk::Compressor::new(3).unwrap();
    let swollen = zstd.compress(&vec![0; 10 << 20]).unwrap();
    let table_at = PREFIX_BYTES + 2 * SPACE_ENTRY_BYTES + 3 * SEGMENT_ENTRY_BYTES;
    let many = u32::try_from(swollen.len()).unwrap();
    let runs = many.div_ceil(16) + 10;
    let result = edited(|edited| {
        edited.truncate(table_at);
        edited.extend_from_slice(&swollen);
        edited.extend_from_slice(b"meta");
        edited[136..140].copy_from_slice(&runs.to_le_bytes());
        edited[140..144].copy_from_slice(&many.to_le_bytes());
        edited[152] = 1;
    });
    assert!(matches!(
        result,
        Err(FormatError::Decompress {
            place: Place::RunTable,
            ..
        })
    ));
    assert!(run_table_raw(3, runs) < 10 << 20);
}

#[test]
fn prefixes_go_both_ways() {
    let (_, _, bytes) = sample();
    let prefix = Prefix::parse(bytes.first_chunk().unwrap()).unwrap();
    assert_eq!(prefix.to_bytes()[..], bytes[..PREFIX_BYTES]);
    assert_eq!(prefix.total_bytes(), bytes.len() as u64);
    let trailer = bytes.last_chunk().unwrap();
    check_trailer(&prefix, trailer).unwrap();
    for at in 0..TRAILER_BYTES {
        let mut bad = *trailer;
        bad[at] ^= 1;
        assert!(matches!(
            check_trailer(&prefix, &bad),
            Err(FormatError::Trailer)
        ));
    }
}
