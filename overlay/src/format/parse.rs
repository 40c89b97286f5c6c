//! Parsing of the index: every number in it checked before anybody follows it.

use super::index::{Placement, Run, RunSource, Segment, SegmentId};
use super::{
    Codec, DERIVED_RUN_BYTES, EARLY_SEGMENT_PAGES, FormatError, KIND_BASE_PAGE, KIND_LITERAL,
    KIND_PARENT_SLOT, KIND_SLOT, KIND_ZERO, LITERAL_RUN_BYTES, Place, Prefix, SEGMENT_ENTRY_BYTES,
    SEGMENT_PAGES, SPACE_ENTRY_BYTES,
};
use crate::bytes::{array_at, to_u64, to_usize, u16_at, u32_at, u64_at};
use crate::digest::Digest;
use crate::page::{PAGE_BYTES, PageAt, SPACE_PAGES_MAX, Space, SpaceSize};

pub(super) fn parse_spaces(bytes: &[u8]) -> Result<Vec<SpaceSize>, FormatError> {
    let mut spaces: Vec<SpaceSize> = Vec::with_capacity(bytes.len() / SPACE_ENTRY_BYTES);
    for (entry, bytes) in (0..).zip(bytes.chunks_exact(SPACE_ENTRY_BYTES)) {
        let code = bytes[0];
        if bytes[1..8] != [0; 7] {
            return Err(FormatError::Reserved {
                place: Place::Index,
            });
        }
        let space = Space::from_code(code)
            .filter(|space| spaces.last().is_none_or(|last| last.space < *space))
            .ok_or(FormatError::SpaceCode { entry, code })?;
        let (pages, base_pages) = (u64_at(bytes, 8), u64_at(bytes, 16));
        for found in [pages, base_pages] {
            if found > SPACE_PAGES_MAX {
                let what = "the size of a space in pages";
                return Err(FormatError::Limit {
                    what,
                    found,
                    limit: SPACE_PAGES_MAX,
                });
            }
        }
        spaces.push(SpaceSize {
            space,
            pages,
            base_pages,
        });
    }
    Ok(spaces)
}

/// A run as both tables have it: kind, first page, length.
fn parse_run(
    spaces: &[SpaceSize],
    run: u32,
    bytes: &[u8],
) -> Result<(u8, PageAt, u64), FormatError> {
    let code = bytes[6];
    let size = Space::from_code(code)
        .and_then(|space| spaces.iter().find(|size| size.space == space))
        .ok_or(FormatError::RunSpace { run, code })?;
    let first = PageAt {
        space: size.space,
        page: u64::from(u32_at(bytes, 0)),
    };
    let pages = u64::from(u16_at(bytes, 4)) + 1;
    if first.page + pages > size.pages {
        return Err(FormatError::RunEnd { run, first, pages });
    }
    Ok((bytes[7], first, pages))
}

/// The literal runs; which slots they are, `parse_segments` says.
pub(super) fn parse_literal_runs(
    spaces: &[SpaceSize],
    bytes: &[u8],
) -> Result<Vec<Placement>, FormatError> {
    let mut runs = Vec::with_capacity(bytes.len() / LITERAL_RUN_BYTES);
    for (run, bytes) in (0..).zip(bytes.chunks_exact(LITERAL_RUN_BYTES)) {
        let (kind, first, pages) = parse_run(spaces, run, bytes)?;
        if kind != KIND_LITERAL {
            return Err(FormatError::Kind { run, kind });
        }
        // At most 2^16.
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let slot = 0;
        runs.push(Placement { first, slot, pages });
    }
    Ok(runs)
}

/// Adds the derived runs to `runs`; gives those that are further places, with their segments.
pub(super) fn parse_derived_runs(
    prefix: &Prefix,
    spaces: &[SpaceSize],
    segments: &[Segment],
    bytes: &[u8],
    runs: &mut Vec<Run>,
) -> Result<Vec<(SegmentId, Placement)>, FormatError> {
    let mut further = Vec::new();
    for (run, bytes) in (prefix.literal_runs..).zip(bytes.chunks_exact(DERIVED_RUN_BYTES)) {
        let (kind, first, pages) = parse_run(spaces, run, bytes)?;
        let (number, code) = (u32_at(bytes, 8), bytes[12]);
        if bytes[13..] != [0; 3] || (kind != KIND_BASE_PAGE && code != 0) {
            return Err(FormatError::Reserved {
                place: Place::RunTable,
            });
        }
        let source = match kind {
            KIND_ZERO if number == 0 => RunSource::Zero,
            KIND_ZERO => {
                return Err(FormatError::Reserved {
                    place: Place::RunTable,
                });
            }
            KIND_BASE_PAGE => base_source(spaces, run, (code, number), pages)?,
            KIND_SLOT => {
                let (segment, place) = slots(segments, run, number, (first, pages))?;
                further.push((segment, place));
                let slot = place.slot;
                RunSource::Literal { segment, slot }
            }
            KIND_PARENT_SLOT => {
                return Err(FormatError::UnsupportedKind {
                    run,
                    name: "same as a page of a parent",
                });
            }
            _ => return Err(FormatError::Kind { run, kind }),
        };
        runs.push(Run {
            first,
            pages,
            source,
        });
    }
    Ok(further)
}

/// The base's pages that a run names by a space's code and a page number.
fn base_source(
    spaces: &[SpaceSize],
    run: u32,
    (code, page): (u8, u32),
    pages: u64,
) -> Result<RunSource, FormatError> {
    let size = Space::from_code(code)
        .and_then(|space| spaces.iter().find(|size| size.space == space))
        .ok_or(FormatError::SourceSpace { run, code })?;
    let first = PageAt {
        space: size.space,
        page: u64::from(page),
    };
    let base_pages = size.base_pages;
    if first.page + pages > base_pages {
        return Err(FormatError::Source {
            run,
            first,
            pages,
            base_pages,
        });
    }
    Ok(RunSource::BasePages(first))
}

/// The segment that has the slots from `number` on, and their further place.
fn slots(
    segments: &[Segment],
    run: u32,
    number: u32,
    (first, pages): (PageAt, u64),
) -> Result<(SegmentId, Placement), FormatError> {
    let after = segments.partition_point(|segment| segment.slot <= number);
    let found = after.checked_sub(1).and_then(|at| {
        let segment = &segments[at];
        let slot = number - segment.slot;
        let inside = u64::from(slot) + pages <= u64::from(segment.pages);
        // At most SEGMENT_PAGES and SEGMENTS_MAX here.
        let (id, pages) = (u32::try_from(at).ok()?, u32::try_from(pages).ok()?);
        inside.then_some((SegmentId(id), Placement { first, slot, pages }))
    });
    found.ok_or(FormatError::Slot {
        run,
        slot: number,
        pages,
    })
}

/// Sorts the further places by their slots, and tells each segment which are its own.
pub(super) fn further_places(
    segments: &mut [Segment],
    mut further: Vec<(SegmentId, Placement)>,
) -> Vec<Placement> {
    further.sort_unstable_by_key(|(id, place)| (*id, place.slot, place.first));
    let mut end = 0;
    for of_one in further.chunk_by(|one, next| one.0 == next.0) {
        let start = end;
        // At most RUNS_MAX in all.
        end += u32::try_from(of_one.len()).unwrap_or(u32::MAX);
        if let Some(segment) = segments.get_mut(to_usize(of_one[0].0.0)) {
            segment.further = start..end;
        }
    }
    further.into_iter().map(|(_, place)| place).collect()
}

pub(super) fn parse_segments(
    prefix: &Prefix,
    bytes: &[u8],
    runs: &mut [Placement],
) -> Result<Vec<Segment>, FormatError> {
    let mut segments = Vec::with_capacity(bytes.len() / SEGMENT_ENTRY_BYTES);
    let mut offset = prefix.segments_offset();
    let (mut run_next, mut slot_next): (u32, u32) = (0, 0);
    for (segment, bytes) in (0..).zip(bytes.chunks_exact(SEGMENT_ENTRY_BYTES)) {
        if bytes[7] != 0 {
            return Err(FormatError::Reserved {
                place: Place::Index,
            });
        }
        let count = u32::from(u16_at(bytes, 4));
        // Below 2^32: run_next is at most the number of runs, which is at most RUNS_MAX.
        let mine = run_next..run_next + count;
        let listed = runs
            .get_mut(to_usize(mine.start)..to_usize(mine.end))
            .unwrap_or(&mut []);
        let pages: u64 = listed.iter().map(|run| u64::from(run.pages)).sum();
        let early = segment < prefix.early_segments;
        let pages_max = to_u64(if early {
            EARLY_SEGMENT_PAGES
        } else {
            SEGMENT_PAGES
        });
        if pages == 0 || pages > pages_max {
            return Err(FormatError::SegmentRuns {
                segment,
                runs: count,
                pages,
            });
        }
        // Both at most SEGMENT_PAGES and SEGMENT_BYTES_MAX here.
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        let raw = u32::try_from(to_usize(pages) * PAGE_BYTES).unwrap_or(u32::MAX);
        let mut slot = 0;
        for run in listed {
            run.slot = slot;
            slot += run.pages;
        }
        let stored_bytes = u32_at(bytes, 0);
        let codec = Codec::check(Place::Segment(segment), bytes[6], stored_bytes, raw)?;
        let hash = Digest(array_at(bytes, 8));
        run_next = mine.end;
        segments.push(Segment {
            offset,
            stored_bytes,
            pages,
            codec,
            hash,
            slot: slot_next,
            runs: mine,
            further: 0..0,
        });
        offset += u64::from(stored_bytes);
        // At most SEGMENTS_MAX * SEGMENT_PAGES.
        slot_next += pages;
    }
    let count = prefix.literal_runs - run_next;
    if count != 0 {
        return Err(FormatError::LooseRuns { count });
    }
    let (expected, found) = (offset, prefix.index_offset());
    if expected != found {
        return Err(FormatError::Length {
            place: Place::Prefix,
            expected,
            found,
        });
    }
    Ok(segments)
}

pub(super) fn literal_run(segment: SegmentId, place: &Placement) -> Run {
    let slot = place.slot;
    Run {
        first: place.first,
        pages: u64::from(place.pages),
        source: RunSource::Literal { segment, slot },
    }
}

/// Sorted runs must not have a page in common.
pub(super) fn check_overlap(runs: &[Run]) -> Result<(), FormatError> {
    for pair in runs.windows(2) {
        let (one, next) = (&pair[0], &pair[1]);
        if one.first.space == next.first.space && next.first.page < one.end() {
            return Err(FormatError::Overlap { at: next.first });
        }
    }
    Ok(())
}
