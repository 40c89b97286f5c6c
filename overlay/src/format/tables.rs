//! The writing side of the format: tables of runs and segments, laid out as bytes.

use std::io;

use super::prefix::run_table_raw;
use super::{
    Codec, KIND_BASE_PAGE, KIND_LITERAL, KIND_ZERO, PREFIX_BYTES, Prefix, SEGMENT_ENTRY_BYTES,
    SPACE_ENTRY_BYTES, TRAILER_BYTES, TRAILER_MAGIC,
};
use crate::bytes::{to_u64, to_usize};
use crate::decode::StoredPart;
use crate::digest::{BaseId, Digest, OverlayId};
use crate::page::{PageAt, SpaceSize};

/// Pages that follow each other in their space and in a segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LiteralRun {
    pub(crate) first: PageAt,
    pub(crate) pages: u64,
}

/// Pages that no segment holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DerivedRun {
    pub(crate) first: PageAt,
    pub(crate) pages: u64,
    /// First page of the base with the same content; none if the pages are zero.
    pub(crate) base_page: Option<u64>,
}

/// What is known of a segment once it has been compressed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentEntry {
    pub(crate) stored_bytes: u32,
    pub(crate) runs: u16,
    pub(crate) codec: Codec,
    pub(crate) hash: Digest,
}

/// All that goes into prefix and index. The run table is compressed already, so the length of
/// the index is known before the first segment is compressed.
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

/// The run table before compression. Counts, page numbers and spaces are inside their limits:
/// the encoder has checked the spaces and split the runs.
pub(crate) fn run_table(literal: &[LiteralRun], derived: &[DerivedRun]) -> Vec<u8> {
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(run_table_raw(count(literal.len()), count(derived.len())));
    for run in literal {
        put_run(&mut out, run.first, run.pages, KIND_LITERAL);
    }
    for run in derived {
        let kind = if run.base_page.is_some() {
            KIND_BASE_PAGE
        } else {
            KIND_ZERO
        };
        put_run(&mut out, run.first, run.pages, kind);
        out.extend_from_slice(&page_number(run.base_page.unwrap_or(0)).to_le_bytes());
    }
    out
}

fn put_run(out: &mut Vec<u8>, first: PageAt, pages: u64, kind: u8) {
    out.extend_from_slice(&page_number(first.page).to_le_bytes());
    let last = u16::try_from(pages.saturating_sub(1)).unwrap_or(u16::MAX);
    out.extend_from_slice(&last.to_le_bytes());
    out.push(first.space.code().unwrap_or(u8::MAX));
    out.push(kind);
}

/// A page number as it is stored; below `SPACE_PAGES_MAX`, so it fits.
fn page_number(page: u64) -> u32 {
    u32::try_from(page).unwrap_or(u32::MAX)
}

impl Tables<'_> {
    /// Length of the index that [`Tables::head`] will make with `segments` segments.
    pub(crate) fn index_bytes(&self, segments: usize) -> usize {
        self.spaces.len() * SPACE_ENTRY_BYTES
            + segments * SEGMENT_ENTRY_BYTES
            + self.run_table.bytes.len()
            + self.meta.len()
    }

    /// Prefix and index as bytes, and the prefix parsed back from them.
    ///
    /// # Errors
    /// A count is over its limit; nothing that this makes would be refused by a reader.
    pub(crate) fn head(
        &self,
        segments: &[SegmentEntry],
    ) -> Result<(Vec<u8>, Prefix), super::FormatError> {
        let mut index = Vec::with_capacity(self.index_bytes(segments.len()));
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

        let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
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
        prefix.total_bytes = prefix.segments_offset() + segment_bytes + to_u64(TRAILER_BYTES);
        let bytes = prefix.to_bytes();
        let parsed = Prefix::parse(&bytes)?;
        let mut head = Vec::with_capacity(PREFIX_BYTES + to_usize(count(index.len())));
        head.extend_from_slice(&bytes);
        head.extend_from_slice(&index);
        Ok((head, parsed))
    }
}

/// Writes the trailer that belongs to `prefix`.
pub(crate) fn write_trailer(out: &mut dyn io::Write, prefix: &Prefix) -> io::Result<()> {
    out.write_all(&TRAILER_MAGIC)?;
    out.write_all(&prefix.total_bytes.to_le_bytes())?;
    out.write_all(&prefix.id.0.0)
}
