//! The writing side of the format: tables of runs and segments, laid out as bytes.

use std::io;

use super::{
    Codec, DERIVED_RUN_BYTES, KIND_BASE_PAGE, KIND_LITERAL, KIND_SLOT, KIND_ZERO,
    LITERAL_RUN_BYTES, Prefix, SEGMENT_ENTRY_BYTES, SPACE_ENTRY_BYTES, TRAILER_BYTES,
    TRAILER_MAGIC,
};
use crate::bytes::to_u64;
use crate::codec::StoredPart;
use crate::digest::{BaseId, Digest, OverlayId};
use crate::page::{PageAt, PageSpan, SpaceSize};

/// Where the contents of pages come from that have no slot of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DerivedSource {
    /// They are zero.
    Zero,
    /// The base's pages from this one on.
    BasePages(PageAt),
    /// The slots from this number on, all in one segment; counted through all segments.
    Slots(u32),
}

/// Contiguous pages without slots of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DerivedRun {
    /// The pages.
    pub pages: PageSpan,
    /// Where their contents come from.
    pub source: DerivedSource,
}

/// What is known of a segment once it has been compressed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentEntry {
    pub(crate) stored_bytes: u32,
    pub(crate) runs: u16,
    pub(crate) codec: Codec,
    pub(crate) hash: Digest,
}

/// The run table before compression, as it is collected. Counts, page numbers and spaces are inside
/// their limits: the encoder has checked the spaces and split the runs.
#[derive(Debug, Default)]
pub(crate) struct RunTable {
    literal: Vec<u8>,
    derived: Vec<u8>,
}

impl RunTable {
    pub(crate) fn push_literal(&mut self, run: &PageSpan) {
        put_run(&mut self.literal, run, KIND_LITERAL);
    }

    pub(crate) fn push_derived(&mut self, run: &DerivedRun) {
        let (kind, source, space) = match run.source {
            DerivedSource::Zero => (KIND_ZERO, 0, 0),
            DerivedSource::BasePages(at) => (
                KIND_BASE_PAGE,
                page_number(at.page),
                at.space.code().unwrap_or(u8::MAX),
            ),
            DerivedSource::Slots(slot) => (KIND_SLOT, slot, 0),
        };
        put_run(&mut self.derived, &run.pages, kind);
        self.derived.extend_from_slice(&source.to_le_bytes());
        self.derived.extend_from_slice(&[space, 0, 0, 0]);
    }

    pub(crate) fn literal_runs(&self) -> u32 {
        count(self.literal.len() / LITERAL_RUN_BYTES)
    }

    pub(crate) fn derived_runs(&self) -> u32 {
        count(self.derived.len() / DERIVED_RUN_BYTES)
    }

    /// The table in one piece.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        let mut bytes = self.literal;
        bytes.extend_from_slice(&self.derived);
        bytes
    }
}

fn put_run(out: &mut Vec<u8>, run: &PageSpan, kind: u8) {
    out.extend_from_slice(&page_number(run.first.page).to_le_bytes());
    let last = u16::try_from(run.pages.saturating_sub(1)).unwrap_or(u16::MAX);
    out.extend_from_slice(&last.to_le_bytes());
    out.push(run.first.space.code().unwrap_or(u8::MAX));
    out.push(kind);
}

/// A page number as it is stored; below `SPACE_PAGES_MAX`, so it fits.
fn page_number(page: u64) -> u32 {
    u32::try_from(page).unwrap_or(u32::MAX)
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// All that goes into prefix and index, but for the segments.
pub(crate) struct Tables<'a> {
    pub(crate) base: BaseId,
    pub(crate) spaces: &'a [SpaceSize],
    pub(crate) meta: &'a [u8],
    pub(crate) literal_runs: u32,
    pub(crate) derived_runs: u32,
    pub(crate) run_table: &'a StoredPart,
    pub(crate) state: &'a StoredPart,
    pub(crate) early_segments: u32,
}

impl Tables<'_> {
    /// The index as bytes, and the prefix that belongs to it.
    ///
    /// # Errors
    /// A count is over its limit; nothing that this makes would be refused by a reader.
    pub(crate) fn index(
        &self,
        segments: &[SegmentEntry],
    ) -> Result<(Vec<u8>, Prefix), super::FormatError> {
        let mut index = Vec::with_capacity(
            self.spaces.len() * SPACE_ENTRY_BYTES
                + segments.len() * SEGMENT_ENTRY_BYTES
                + self.run_table.bytes.len()
                + self.meta.len(),
        );
        for size in self.spaces {
            index.push(size.space.code().unwrap_or(u8::MAX));
            index.extend_from_slice(&[0; 7]);
            index.extend_from_slice(&size.pages.to_le_bytes());
            index.extend_from_slice(&size.base_pages.to_le_bytes());
        }
        let mut segment_bytes = 0;
        for segment in segments {
            segment_bytes += u64::from(segment.stored_bytes);
            index.extend_from_slice(&segment.stored_bytes.to_le_bytes());
            index.extend_from_slice(&segment.runs.to_le_bytes());
            index.extend_from_slice(&[segment.codec.code(), 0]);
            index.extend_from_slice(&segment.hash.0);
        }
        index.extend_from_slice(&self.run_table.bytes);
        index.extend_from_slice(self.meta);

        let mut prefix = Prefix {
            id: OverlayId(Digest([0; 32])),
            base: self.base,
            index_hash: Digest::of(&index),
            total_bytes: 0,
            spaces: count(self.spaces.len()),
            meta_bytes: count(self.meta.len()),
            segments: count(segments.len()),
            early_segments: self.early_segments,
            literal_runs: self.literal_runs,
            derived_runs: self.derived_runs,
            run_table_stored: count(self.run_table.bytes.len()),
            run_table_codec: self.run_table.codec,
            state_stored: count(self.state.bytes.len()),
            state_raw: count(self.state.raw_bytes),
            state_codec: self.state.codec,
            state_hash: self.state.hash,
        };
        prefix.total_bytes = prefix.head_bytes() + segment_bytes + to_u64(TRAILER_BYTES);
        Ok((index, Prefix::parse(&prefix.to_bytes())?))
    }
}

/// Writes the trailer that belongs to `prefix`.
pub(crate) fn write_trailer(out: &mut dyn io::Write, prefix: &Prefix) -> io::Result<()> {
    out.write_all(&TRAILER_MAGIC)?;
    out.write_all(&prefix.total_bytes.to_le_bytes())?;
    out.write_all(&prefix.id.0.0)
}
