//! The index: which pages the delta holds and where each of them comes from.

use std::ops::Range;

use super::prefix::run_table_raw;
use super::{
    Codec, DERIVED_RUN_BYTES, EARLY_SEGMENT_PAGES, FormatError, KIND_BASE_DISK, KIND_BASE_PAGE,
    KIND_EARLIER_PAGE, KIND_LITERAL, KIND_ZERO, LITERAL_RUN_BYTES, Place, Prefix,
    SEGMENT_ENTRY_BYTES, SEGMENT_PAGES, SPACE_ENTRY_BYTES, TRAILER_BYTES,
};
use crate::bytes::{array_at, to_u64, to_usize, u16_at, u32_at, u64_at};
use crate::decode::decompress;
use crate::digest::Digest;
use crate::page::{PAGE_BYTES, PageAt, SPACE_PAGES_MAX, Space, SpaceSize};

/// Number of a segment in its overlay, from 0 in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

/// Where a segment is and what it takes to read it.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Length in the file, in bytes; at most [`super::SEGMENT_BYTES_MAX`].
    pub stored_bytes: u32,
    /// Pages that are in it; 1 to [`SEGMENT_PAGES`].
    pub pages: u32,
    /// How it is compressed.
    pub codec: Codec,
    /// Hash of the stored bytes.
    pub hash: Digest,
    runs: Range<u32>,
}

impl Segment {
    /// Length after decompression, in bytes; at most [`super::SEGMENT_BYTES_MAX`].
    #[must_use]
    pub fn raw_bytes(&self) -> usize {
        to_usize(self.pages) * PAGE_BYTES
    }
}

/// Where the content of one page comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// The base's page of the same number; the delta does not mention the page.
    Unchanged,
    /// All bytes are zero.
    Zero,
    /// The base's page of this number in the same space.
    BasePage(u64),
    /// A segment of the overlay.
    Literal {
        /// The segment.
        segment: SegmentId,
        /// Place of the page in the decoded segment, in pages.
        slot: u32,
    },
}

/// Where the content of a run of pages comes from; each page's source is the next one of the
/// page before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunSource {
    /// All bytes are zero.
    Zero,
    /// The base's pages from this number on in the same space.
    BasePages(u64),
    /// A segment of the overlay.
    Literal {
        /// The segment.
        segment: SegmentId,
        /// Place of the first page in the decoded segment, in pages.
        slot: u32,
    },
}

/// Contiguous pages whose content comes from contiguous places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: PageAt,
    /// Number of pages, at least 1.
    pub pages: u64,
    /// Where they come from.
    pub source: RunSource,
}

impl Run {
    /// The page number after the last page.
    fn end(&self) -> u64 {
        self.first.page + self.pages
    }
}

/// The pages of one literal run, as a segment holds them.
#[derive(Clone, Copy, Debug)]
struct SegmentRun {
    first: PageAt,
    pages: u32,
}

/// A checked index. Lookups are binary searches over the runs, sorted by place.
#[derive(Debug)]
pub struct Index {
    spaces: Vec<SpaceSize>,
    segments: Vec<Segment>,
    segment_runs: Vec<SegmentRun>,
    runs: Vec<Run>,
    meta: Vec<u8>,
    early_segments: u32,
}

impl Index {
    /// Parses the index that follows the prefix: [`Prefix::index_bytes`] bytes.
    ///
    /// # Errors
    /// The hash is wrong, or anything in it breaks a rule of the format (see the
    /// [module](super)).
    pub fn parse(prefix: &Prefix, bytes: &[u8]) -> Result<Self, FormatError> {
        let (expected, found) = (prefix.index_bytes(), to_u64(bytes.len()));
        if expected != found {
            return Err(FormatError::Length {
                place: Place::Index,
                expected,
                found,
            });
        }
        if Digest::of(bytes) != prefix.index_hash {
            return Err(FormatError::Hash {
                place: Place::Index,
            });
        }
        // The lengths below add up to `index_bytes`, so each split is inside.
        let (spaces, rest) = bytes.split_at(to_usize(prefix.spaces) * SPACE_ENTRY_BYTES);
        let (segments, rest) = rest.split_at(to_usize(prefix.segments) * SEGMENT_ENTRY_BYTES);
        let (table, meta) = rest.split_at(to_usize(prefix.run_table_stored));

        let spaces = parse_spaces(spaces)?;
        let mut raw = vec![0; run_table_raw(prefix.literal_runs, prefix.derived_runs)];
        decompress(Place::RunTable, prefix.run_table_codec, table, &mut raw)?;
        let (literal, derived) = raw.split_at(to_usize(prefix.literal_runs) * LITERAL_RUN_BYTES);
        let segment_runs = parse_literal_runs(&spaces, literal)?;
        let segments = parse_segments(prefix, segments, &segment_runs)?;
        let mut runs = Vec::with_capacity(segment_runs.len() + to_usize(prefix.derived_runs));
        for (number, segment) in (0..).zip(&segments) {
            push_literal_runs(&mut runs, SegmentId(number), segment, &segment_runs);
        }
        parse_derived_runs(&spaces, prefix.literal_runs, derived, &mut runs)?;
        runs.sort_unstable_by_key(|run| run.first);
        check_overlap(&runs)?;
        let (meta, early_segments) = (meta.to_vec(), prefix.early_segments);
        Ok(Self {
            spaces,
            segments,
            segment_runs,
            runs,
            meta,
            early_segments,
        })
    }

    /// The spaces of the VM, with their sizes.
    #[must_use]
    pub fn spaces(&self) -> &[SpaceSize] {
        &self.spaces
    }

    /// Size of one space, if the VM has it.
    #[must_use]
    pub fn space(&self, space: Space) -> Option<&SpaceSize> {
        self.spaces.iter().find(|size| size.space == space)
    }

    /// The opaque bytes that whoever made the overlay gave it.
    #[must_use]
    pub fn meta(&self) -> &[u8] {
        &self.meta
    }

    /// All segments in the order of the file; [`SegmentId`] is the position here.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// One segment.
    #[must_use]
    pub fn segment(&self, id: SegmentId) -> Option<&Segment> {
        self.segments.get(to_usize(id.0))
    }

    /// How many segments, the first ones, hold what is needed early.
    #[must_use]
    pub fn early_segments(&self) -> u32 {
        self.early_segments
    }

    /// The runs of contiguous pages in a segment, in the order in which the decoded segment has
    /// them. Nothing for a segment that does not exist.
    pub fn segment_runs(&self, id: SegmentId) -> impl Iterator<Item = (PageAt, usize)> + '_ {
        let runs = self.segment(id).map_or(&[][..], |segment| {
            &self.segment_runs[to_usize(segment.runs.start)..to_usize(segment.runs.end)]
        });
        runs.iter().map(|run| (run.first, to_usize(run.pages)))
    }

    /// All runs, sorted by place. No two of them have a page in common.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The runs of one space, sorted by place.
    #[must_use]
    pub fn runs_in(&self, space: Space) -> &[Run] {
        let start = self.runs.partition_point(|run| run.first.space < space);
        let end = self.runs.partition_point(|run| run.first.space <= space);
        &self.runs[start..end]
    }

    /// The run that a page is in, if the delta mentions the page.
    #[must_use]
    pub fn run_at(&self, at: PageAt) -> Option<&Run> {
        let after = self.runs.partition_point(|run| run.first <= at);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (run.first.space == at.space && at.page < run.end()).then_some(run)
    }

    /// Where the content of a page comes from; none if the VM has no such page.
    #[must_use]
    pub fn lookup(&self, at: PageAt) -> Option<PageContent> {
        let size = self.space(at.space).filter(|size| at.page < size.pages)?;
        let Some(run) = self.run_at(at) else {
            let in_base = at.page < size.base_pages;
            return Some(if in_base {
                PageContent::Unchanged
            } else {
                PageContent::Zero
            });
        };
        let inside = at.page - run.first.page;
        Some(match run.source {
            RunSource::Zero => PageContent::Zero,
            RunSource::BasePages(first) => PageContent::BasePage(first + inside),
            RunSource::Literal { segment, slot } => {
                // Inside a segment, so far below 2^32.
                let inside = u32::try_from(inside).unwrap_or(u32::MAX);
                PageContent::Literal {
                    segment,
                    slot: slot.saturating_add(inside),
                }
            }
        })
    }
}

fn parse_spaces(bytes: &[u8]) -> Result<Vec<SpaceSize>, FormatError> {
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

/// A run as both tables have it: kind, size of its space, first page, length.
fn parse_run<'a>(
    spaces: &'a [SpaceSize],
    run: u32,
    bytes: &[u8],
) -> Result<(u8, &'a SpaceSize, PageAt, u64), FormatError> {
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
    Ok((bytes[7], size, first, pages))
}

fn parse_literal_runs(spaces: &[SpaceSize], bytes: &[u8]) -> Result<Vec<SegmentRun>, FormatError> {
    let mut runs = Vec::with_capacity(bytes.len() / LITERAL_RUN_BYTES);
    for (run, bytes) in (0..).zip(bytes.chunks_exact(LITERAL_RUN_BYTES)) {
        let (kind, _, first, pages) = parse_run(spaces, run, bytes)?;
        if kind != KIND_LITERAL {
            return Err(FormatError::Kind { run, kind });
        }
        // At most 2^16.
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        runs.push(SegmentRun { first, pages });
    }
    Ok(runs)
}

fn parse_derived_runs(
    spaces: &[SpaceSize],
    number_first: u32,
    bytes: &[u8],
    runs: &mut Vec<Run>,
) -> Result<(), FormatError> {
    for (run, bytes) in (number_first..).zip(bytes.chunks_exact(DERIVED_RUN_BYTES)) {
        let (kind, size, first, pages) = parse_run(spaces, run, bytes)?;
        let source_page = u64::from(u32_at(bytes, 8));
        let source = match kind {
            KIND_ZERO if source_page == 0 => RunSource::Zero,
            KIND_ZERO => {
                return Err(FormatError::Reserved {
                    place: Place::RunTable,
                });
            }
            KIND_BASE_PAGE => {
                let base_pages = size.base_pages;
                if source_page + pages > base_pages {
                    let space = size.space;
                    return Err(FormatError::Source {
                        run,
                        space,
                        source_page,
                        pages,
                        base_pages,
                    });
                }
                RunSource::BasePages(source_page)
            }
            KIND_BASE_DISK => {
                return Err(FormatError::UnsupportedKind {
                    run,
                    name: "same as a base disk block",
                });
            }
            KIND_EARLIER_PAGE => {
                return Err(FormatError::UnsupportedKind {
                    run,
                    name: "same as an earlier page",
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
    Ok(())
}

fn parse_segments(
    prefix: &Prefix,
    bytes: &[u8],
    runs: &[SegmentRun],
) -> Result<Vec<Segment>, FormatError> {
    let mut segments = Vec::with_capacity(bytes.len() / SEGMENT_ENTRY_BYTES);
    let mut offset = prefix.segments_offset();
    let mut run_next: u32 = 0;
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
            .get(to_usize(mine.start)..to_usize(mine.end))
            .unwrap_or(&[]);
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
            runs: mine,
        });
        offset += u64::from(stored_bytes);
    }
    let count = prefix.literal_runs - run_next;
    if count != 0 {
        return Err(FormatError::LooseRuns { count });
    }
    let (expected, found) = (offset + to_u64(TRAILER_BYTES), prefix.total_bytes);
    if expected != found {
        return Err(FormatError::Length {
            place: Place::Prefix,
            expected,
            found,
        });
    }
    Ok(segments)
}

fn push_literal_runs(
    runs: &mut Vec<Run>,
    id: SegmentId,
    segment: &Segment,
    segment_runs: &[SegmentRun],
) {
    let mut slot = 0;
    for run in &segment_runs[to_usize(segment.runs.start)..to_usize(segment.runs.end)] {
        let source = RunSource::Literal { segment: id, slot };
        runs.push(Run {
            first: run.first,
            pages: u64::from(run.pages),
            source,
        });
        slot += run.pages;
    }
}

/// Sorted runs must not have a page in common.
fn check_overlap(runs: &[Run]) -> Result<(), FormatError> {
    for pair in runs.windows(2) {
        let (one, next) = (&pair[0], &pair[1]);
        if one.first.space == next.first.space && next.first.page < one.end() {
            return Err(FormatError::Overlap { at: next.first });
        }
    }
    Ok(())
}
