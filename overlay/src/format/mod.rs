//! The layout of an overlay file, its limits, and how a bad one is refused.
//!
//! All integers are little-endian. The parts follow each other without gaps:
//!
//! ```text
//! prefix     PREFIX_BYTES; see `prefix.rs`. Its BLAKE3 is the overlay's name
//! state      one part of opaque bytes: the machine state
//! segments   slots, a page each; first the early ones in the order in which they are needed
//! index      spaces      24 bytes each: code u8, 7 zero, pages u64, pages of the base u64
//!            segments    40 bytes each: stored length u32, runs u16, codec u8, zero u8, BLAKE3
//!            run table   compressed by itself, raw: literal runs, then derived runs
//!              literal    8 bytes each: page u32, pages - 1 u16, space u8, kind u8
//!              derived   16 bytes each: page u32, pages - 1 u16, space u8, kind u8,
//!                        source u32, space of the source u8, 3 zero
//!            meta        opaque bytes of whoever made the overlay
//! trailer    TRAILER_BYTES: magic, length of the file, BLAKE3 of the prefix
//! ```
//!
//! A segment stands alone: whoever makes one needs to know nothing of those that follow, and its
//! hash covers its payload. So the index, which says where the slots go, comes last, and a file is
//! written in one pass. The prefix, written when all else is there, has the hash of the index: with
//! the prefix and the index, the end of the file but for the trailer, every other byte can be
//! verified on its own.
//!
//! Literal runs stand in the order of the segments they are in, so that neither segment nor slot
//! is written down: segment n takes the next `runs` of them, and its raw length is the sum of
//! their pages. In the same way a segment begins where the one before it ends. Slots are numbered
//! through all segments. A derived run is one of these kinds:
//!
//! | kind | contents | source |
//! | --- | --- | --- |
//! | 2 | zero | 0 |
//! | 3 | pages of the base, of any space | page number in the space of the source |
//! | 4 | slots of one segment, which so have a further place | number of the first slot |
//! | 5 | reserved: slots of a parent, which is an overlay that this one is a delta against | |
//!
//! What is not written cannot be wrong; what is written is checked by [`Prefix::parse`] and
//! [`Index::parse`]: a page is in at most one run and inside its space, a source is inside the base
//! or a segment, lengths are inside the limits below and add up to the length of the file. So
//! whoever applies an overlay writes each page of its spaces at most once, whatever the index says.

mod index;
mod parse;
mod prefix;
mod tables;

use std::fmt;
use std::io;

use thiserror::Error;

use crate::page::{PAGE_BYTES, PageAt};

pub use index::{Index, PageContent, Placement, Run, RunSource, Segment, SegmentId};
pub use prefix::{Prefix, check_trailer};
pub use tables::{DerivedRun, DerivedSource};
pub(crate) use tables::{RunTable, SegmentEntry, Tables, write_trailer};

/// First eight bytes of an overlay file.
pub const MAGIC: [u8; 8] = *b"CLDOVLY\n";
/// First eight bytes of the trailer.
pub const TRAILER_MAGIC: [u8; 8] = *b"CLDOEND\n";
/// Version of the layout that this code writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 2;
/// Length of the prefix in bytes.
pub const PREFIX_BYTES: usize = 160;
/// Length of the trailer in bytes.
pub const TRAILER_BYTES: usize = 48;

/// Most segments in an overlay: 1 TiB in segments of 1 MiB.
pub const SEGMENTS_MAX: u32 = 1 << 20;
/// Most runs of pages in an overlay, of both kinds together. Bounds what reading an index takes
/// in memory to some 350 MB in the worst case; a guest of 32 GiB in which every second page has
/// changed stays below it.
pub const RUNS_MAX: u32 = 1 << 22;
/// Most pages in one derived run; longer ones are split.
pub const RUN_PAGES_MAX: u64 = 1 << 16;
/// Most pages in a segment of the early part (64 KiB): what one demand fetch brings.
pub const EARLY_SEGMENT_PAGES: usize = 16;
/// Most pages in any other segment (1 MiB).
pub const SEGMENT_PAGES: usize = 256;
/// Longest segment, raw, in bytes. A buffer of this size serves for each of them.
pub const SEGMENT_BYTES_MAX: usize = SEGMENT_PAGES * PAGE_BYTES;
/// Longest machine state, raw, in bytes.
pub const STATE_BYTES_MAX: usize = 64 << 20;
/// Longest meta, in bytes.
pub const META_BYTES_MAX: usize = 1 << 20;

pub(crate) const SPACE_ENTRY_BYTES: usize = 24;
pub(crate) const SEGMENT_ENTRY_BYTES: usize = 40;
pub(crate) const LITERAL_RUN_BYTES: usize = 8;
pub(crate) const DERIVED_RUN_BYTES: usize = 16;

pub(crate) const KIND_LITERAL: u8 = 1;
pub(crate) const KIND_ZERO: u8 = 2;
pub(crate) const KIND_BASE_PAGE: u8 = 3;
pub(crate) const KIND_SLOT: u8 = 4;
/// Reserved: same content as a slot of a parent.
pub(crate) const KIND_PARENT_SLOT: u8 = 5;

/// How a part of the file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Not at all; for what does not get smaller.
    Raw,
    /// One zstd frame, smaller than what is in it.
    Zstd,
}

impl Codec {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
        }
    }

    /// The codec of a part, if its lengths are possible for that codec.
    pub(crate) fn check(
        place: Place,
        code: u8,
        stored: u32,
        raw: u32,
    ) -> Result<Self, FormatError> {
        let (codec, possible) = match code {
            0 => (Self::Raw, stored == raw),
            1 => (Self::Zstd, stored < raw && stored > 0),
            _ => return Err(FormatError::Codec { place, code }),
        };
        if !possible {
            return Err(FormatError::Stored { place, stored, raw });
        }
        Ok(codec)
    }
}

/// A part of an overlay file, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The fixed prefix.
    Prefix,
    /// The index as a whole.
    Index,
    /// The table of runs in the index.
    RunTable,
    /// The machine state.
    State,
    /// The segment with this number, from 0.
    Segment(u32),
    /// The trailer.
    Trailer,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefix => f.write_str("the prefix"),
            Self::Index => f.write_str("the index"),
            Self::RunTable => f.write_str("the run table"),
            Self::State => f.write_str("the machine state"),
            Self::Segment(number) => write!(f, "segment {number}"),
            Self::Trailer => f.write_str("the trailer"),
        }
    }
}

/// What is wrong with an overlay, and where.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The file does not begin with [`MAGIC`].
    #[error("not an overlay file (wrong magic)")]
    Magic,
    /// The layout has a version that this code does not know.
    #[error(
        "overlay format version {found}, this program reads version {FORMAT_VERSION}: make the \
         overlay anew with `cloudlet overlay create`"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// A part does not have the length that it must have.
    #[error("{place} has {found} bytes and should have {expected}")]
    Length {
        /// Which part.
        place: Place,
        /// Length by what was parsed before, in bytes.
        expected: u64,
        /// Length that is there, in bytes.
        found: u64,
    },
    /// A number is larger than its limit.
    #[error("{what} is {found}, the limit is {limit}")]
    Limit {
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// Its limit.
        limit: u64,
    },
    /// A field that must be zero is not.
    #[error("a reserved field of {place} is not zero")]
    Reserved {
        /// In which part.
        place: Place,
    },
    /// A part does not have the BLAKE3 hash that is written down for it.
    #[error("{place} is damaged or forged (wrong hash)")]
    Hash {
        /// Which part.
        place: Place,
    },
    /// A space code is unknown or stands in the wrong order.
    #[error("entry {entry} of the spaces has code {code}, which is unknown or out of order")]
    SpaceCode {
        /// Number of the entry.
        entry: u32,
        /// The code found.
        code: u8,
    },
    /// A run is in a space that the overlay does not have.
    #[error("run {run} is in a space with code {code}, which this overlay does not have")]
    RunSpace {
        /// Number of the run in the table.
        run: u32,
        /// The code found.
        code: u8,
    },
    /// A run goes past the end of its space.
    #[error("run {run} ({pages} pages from {first}) goes past the end of its space")]
    RunEnd {
        /// Number of the run in the table.
        run: u32,
        /// Its first page.
        first: PageAt,
        /// Its length in pages.
        pages: u64,
    },
    /// Two runs have a page in common.
    #[error("{at} is in two runs")]
    Overlap {
        /// The first such page.
        at: PageAt,
    },
    /// A kind of run that a later version of this program may know.
    #[error("run {run} is of kind {name}, which this program does not support")]
    UnsupportedKind {
        /// Number of the run in the table.
        run: u32,
        /// Name of the kind.
        name: &'static str,
    },
    /// A kind of run that does not exist, or not in this half of the table.
    #[error("run {run} is of kind {kind}, which has no meaning here")]
    Kind {
        /// Number of the run in the table.
        run: u32,
        /// The kind found.
        kind: u8,
    },
    /// A run says to be the same as pages that the base does not have.
    #[error(
        "run {run} is the same as {pages} pages from {first} of the base, which has {base_pages}"
    )]
    Source {
        /// Number of the run in the table.
        run: u32,
        /// First page of the source.
        first: PageAt,
        /// Length in pages.
        pages: u64,
        /// Pages that the base has in this space.
        base_pages: u64,
    },
    /// A run says to be the same as pages of a space that the base does not have.
    #[error("run {run} has its source in a space with code {code}, which the base does not have")]
    SourceSpace {
        /// Number of the run in the table.
        run: u32,
        /// The code found.
        code: u8,
    },
    /// A run is a further place of slots that are not all in one segment.
    #[error("run {run} is the same as {pages} slots from {slot}, which are not in one segment")]
    Slot {
        /// Number of the run in the table.
        run: u32,
        /// The first slot.
        slot: u32,
        /// Length in pages.
        pages: u64,
    },
    /// The overlay is a delta against other overlays, which a later version may know.
    #[error("this overlay stands on {count} others, which this program does not support")]
    UnsupportedParents {
        /// How many.
        count: u8,
    },
    /// A segment has no runs, more pages than its part of the file allows, or more runs than are
    /// left in the table.
    #[error("segment {segment} has {runs} runs with {pages} pages, which cannot be")]
    SegmentRuns {
        /// Number of the segment.
        segment: u32,
        /// Runs that it claims.
        runs: u32,
        /// Pages in the runs that there are.
        pages: u64,
    },
    /// Literal runs are left over after the last segment.
    #[error("{count} literal runs belong to no segment")]
    LooseRuns {
        /// How many.
        count: u32,
    },
    /// The codec is unknown.
    #[error("{place} is compressed with codec {code}, which this program does not support")]
    Codec {
        /// Which part.
        place: Place,
        /// The code found.
        code: u8,
    },
    /// The stored length cannot be right for the raw length and the codec.
    #[error("{place} cannot have {stored} stored bytes for {raw}")]
    Stored {
        /// Which part.
        place: Place,
        /// Stored length in bytes.
        stored: u32,
        /// Raw length in bytes.
        raw: u32,
    },
    /// The codec refused the bytes.
    #[error("{place} does not decompress")]
    Decompress {
        /// Which part.
        place: Place,
        /// What the codec says.
        #[source]
        source: io::Error,
    },
    /// The file ends with something else than the trailer that belongs to its prefix.
    #[error("the trailer does not belong to this overlay: the file was not written to its end")]
    Trailer,
}

#[cfg(test)]
mod tests;
