//! The index: which pages the delta holds and where each of them comes from.

use std::ops::Range;

use super::parse::{
    check_overlap, further_places, literal_run, parse_derived_runs, parse_literal_runs,
    parse_segments, parse_spaces,
};
use super::prefix::run_table_raw;
use super::{
    Codec, FormatError, LITERAL_RUN_BYTES, Place, Prefix, SEGMENT_ENTRY_BYTES, SPACE_ENTRY_BYTES,
};
use crate::bytes::{to_u64, to_usize};
use crate::codec::decompress;
use crate::digest::Digest;
use crate::page::{PAGE_BYTES, PageAt, Space, SpaceSize};

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
    /// Number of its first slot, counted through all segments.
    pub(super) slot: u32,
    /// Its own places, in the list of all.
    pub(super) runs: Range<u32>,
    /// The further places of its slots, in the list of all.
    pub(super) further: Range<u32>,
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
    /// This page of the base.
    BasePage(PageAt),
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
    /// The base's pages from this one on.
    BasePages(PageAt),
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
    pub(super) fn end(&self) -> u64 {
        self.first.page + self.pages
    }
}

/// Contiguous pages that contiguous slots of one segment go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The first page.
    pub first: PageAt,
    /// Place of the first slot in the decoded segment, in pages.
    pub slot: u32,
    /// Number of pages, at least 1.
    pub pages: u32,
}

/// A checked index. Lookups are binary searches over the runs, sorted by place.
#[derive(Debug)]
pub struct Index {
    spaces: Vec<SpaceSize>,
    segments: Vec<Segment>,
    /// A place for each slot, in the order of the slots.
    own_places: Vec<Placement>,
    /// The other places of slots, in the order of the slots too.
    further_places: Vec<Placement>,
    runs: Vec<Run>,
    meta: Vec<u8>,
    early_segments: u32,
}

impl Index {
    /// Parses the index: the [`Prefix::index_bytes`] bytes at [`Prefix::index_offset`].
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
        let mut own_places = parse_literal_runs(&spaces, literal)?;
        let mut segments = parse_segments(prefix, segments, &mut own_places)?;
        let mut runs = Vec::with_capacity(own_places.len() + to_usize(prefix.derived_runs));
        for (number, segment) in (0..).zip(&segments) {
            let places = &own_places[to_usize(segment.runs.start)..to_usize(segment.runs.end)];
            let id = SegmentId(number);
            runs.extend(places.iter().map(|place| literal_run(id, place)));
        }
        let further = parse_derived_runs(prefix, &spaces, &segments, derived, &mut runs)?;
        let further_places = further_places(&mut segments, further);
        runs.sort_unstable_by_key(|run| run.first);
        check_overlap(&runs)?;
        let (meta, early_segments) = (meta.to_vec(), prefix.early_segments);
        Ok(Self {
            spaces,
            segments,
            own_places,
            further_places,
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

    /// Where the slots of a segment go: first each slot's own place, in the order of the slots, then
    /// the further ones. Nothing for a segment that does not exist.
    pub fn segment_places(&self, id: SegmentId) -> impl Iterator<Item = Placement> + '_ {
        let (own, further) = self.segment(id).map_or((0..0, 0..0), |segment| {
            (segment.runs.clone(), segment.further.clone())
        });
        let inside = |range: Range<u32>| to_usize(range.start)..to_usize(range.end);
        let own = &self.own_places[inside(own)];
        own.iter()
            .chain(&self.further_places[inside(further)])
            .copied()
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
            RunSource::BasePages(first) => PageContent::BasePage(first.plus(inside)),
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
