//! The fixed prefix of an overlay file, and the trailer that repeats its hash.
//!
//! ```text
//! offset  bytes  field
//!      0      8  magic
//!      8      4  format version
//!     12      4  number of spaces
//!     16     32  name of the base
//!     48     32  BLAKE3 of the index
//!     80     32  BLAKE3 of the machine state as stored
//!    112      8  length of the file
//!    120      4  length of the meta
//!    124      4  number of segments
//!    128      4  how many of them are early ones
//!    132      4  number of literal runs
//!    136      4  number of derived runs
//!    140      4  stored length of the run table
//!    144      4  stored length of the machine state
//!    148      4  raw length of the machine state
//!    152      1  codec of the run table
//!    153      1  codec of the machine state
//!    154      1  number of parents: overlays between this one and the base. 0 in this version
//!    155      5  zero
//! ```

use super::{
    Codec, DERIVED_RUN_BYTES, FORMAT_VERSION, FormatError, LITERAL_RUN_BYTES, MAGIC,
    META_BYTES_MAX, PREFIX_BYTES, Place, RUNS_MAX, SEGMENT_ENTRY_BYTES, SEGMENTS_MAX,
    SPACE_ENTRY_BYTES, STATE_BYTES_MAX, TRAILER_BYTES, TRAILER_MAGIC,
};
use crate::bytes::{array_at, to_u64, to_usize, u32_at, u64_at};
use crate::digest::{BaseId, Digest, OverlayId};
use crate::page::DISKS_MAX;

/// The prefix, with all its numbers inside their limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub(super) id: OverlayId,
    pub(super) base: BaseId,
    pub(super) index_hash: Digest,
    pub(super) total_bytes: u64,
    pub(super) spaces: u32,
    pub(super) meta_bytes: u32,
    pub(super) segments: u32,
    pub(super) early_segments: u32,
    pub(super) literal_runs: u32,
    pub(super) derived_runs: u32,
    pub(super) run_table_stored: u32,
    pub(super) run_table_codec: Codec,
    pub(crate) state_stored: u32,
    pub(crate) state_raw: u32,
    pub(crate) state_codec: Codec,
    pub(crate) state_hash: Digest,
}

impl Prefix {
    /// Parses the first [`PREFIX_BYTES`] of an overlay file.
    ///
    /// # Errors
    /// It is not an overlay of a known version, or a number is over its limit or contradicts
    /// another one.
    pub fn parse(bytes: &[u8; PREFIX_BYTES]) -> Result<Self, FormatError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(FormatError::Magic);
        }
        let version = u32_at(bytes, 8);
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { found: version });
        }
        if bytes[154] != 0 {
            return Err(FormatError::UnsupportedParents { count: bytes[154] });
        }
        if bytes[155..] != [0; 5] {
            return Err(FormatError::Reserved {
                place: Place::Prefix,
            });
        }
        let spaces = limited(
            "the number of spaces",
            u32_at(bytes, 12),
            u32::from(DISKS_MAX) + 1,
        )?;
        let meta_bytes = limited("the length of the meta", u32_at(bytes, 120), META_BYTES_MAX)?;
        let segments = limited("the number of segments", u32_at(bytes, 124), SEGMENTS_MAX)?;
        let early_segments = limited("the number of early segments", u32_at(bytes, 128), segments)?;
        let literal_runs = limited("the number of literal runs", u32_at(bytes, 132), RUNS_MAX)?;
        let derived_runs = u32_at(bytes, 136);
        limited(
            "the number of derived runs",
            derived_runs,
            RUNS_MAX - literal_runs,
        )?;
        let state_raw = limited(
            "the length of the machine state",
            u32_at(bytes, 148),
            STATE_BYTES_MAX,
        )?;
        let (run_table_stored, state_stored) = (u32_at(bytes, 140), u32_at(bytes, 144));
        // At most RUNS_MAX * 16, which fits.
        let table_raw = run_table_raw(literal_runs, derived_runs);
        let table_raw = u32::try_from(table_raw).unwrap_or(u32::MAX);
        let prefix = Self {
            id: OverlayId(Digest::of(bytes)),
            base: BaseId(Digest(array_at(bytes, 16))),
            index_hash: Digest(array_at(bytes, 48)),
            total_bytes: u64_at(bytes, 112),
            spaces,
            meta_bytes,
            segments,
            early_segments,
            literal_runs,
            derived_runs,
            run_table_stored,
            run_table_codec: Codec::check(
                Place::RunTable,
                bytes[152],
                run_table_stored,
                table_raw,
            )?,
            state_stored,
            state_raw,
            state_codec: Codec::check(Place::State, bytes[153], state_stored, state_raw)?,
            state_hash: Digest(array_at(bytes, 80)),
        };
        let least = prefix.segments_offset() + prefix.index_bytes() + to_u64(TRAILER_BYTES);
        if prefix.total_bytes < least {
            let (expected, found) = (least, prefix.total_bytes);
            return Err(FormatError::Length {
                place: Place::Prefix,
                expected,
                found,
            });
        }
        Ok(prefix)
    }

    /// Name of the overlay.
    #[must_use]
    pub fn id(&self) -> OverlayId {
        self.id
    }

    /// Name of the base that the overlay is a delta against.
    #[must_use]
    pub fn base(&self) -> BaseId {
        self.base
    }

    /// Length of the whole file in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Length of the index. Bounded by the limits to about 110 MB, so that it can be read in one
    /// piece.
    #[must_use]
    pub fn index_bytes(&self) -> u64 {
        let spaces = u64::from(self.spaces) * to_u64(SPACE_ENTRY_BYTES);
        let segments = u64::from(self.segments) * to_u64(SEGMENT_ENTRY_BYTES);
        spaces + segments + u64::from(self.run_table_stored) + u64::from(self.meta_bytes)
    }

    /// Offset of the index in the file: it ends where the trailer begins.
    #[must_use]
    pub fn index_offset(&self) -> u64 {
        // `parse` has checked that the file is long enough.
        self.total_bytes
            .saturating_sub(self.index_bytes() + to_u64(TRAILER_BYTES))
    }

    /// Offset of the machine state in the file.
    #[must_use]
    pub fn state_offset(&self) -> u64 {
        to_u64(PREFIX_BYTES)
    }

    /// Length of the machine state as stored, in bytes.
    #[must_use]
    pub fn state_stored_bytes(&self) -> u64 {
        u64::from(self.state_stored)
    }

    /// Length of the machine state, in bytes.
    #[must_use]
    pub fn state_bytes(&self) -> u64 {
        u64::from(self.state_raw)
    }

    /// Offset of the first segment in the file.
    #[must_use]
    pub fn segments_offset(&self) -> u64 {
        self.state_offset() + u64::from(self.state_stored)
    }

    /// Bytes that are needed to start a VM: all but segments and trailer.
    #[must_use]
    pub fn head_bytes(&self) -> u64 {
        self.segments_offset() + self.index_bytes()
    }

    /// Number of segments.
    #[must_use]
    pub fn segments(&self) -> u32 {
        self.segments
    }

    /// How many segments, the first ones, hold what is needed early.
    #[must_use]
    pub fn early_segments(&self) -> u32 {
        self.early_segments
    }

    /// The bytes of the prefix and, in the result, its hash. Inverse of [`Prefix::parse`].
    pub(crate) fn to_bytes(&self) -> [u8; PREFIX_BYTES] {
        let mut out = [0; PREFIX_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &FORMAT_VERSION.to_le_bytes());
        put(12, &self.spaces.to_le_bytes());
        put(16, &self.base.0.0);
        put(48, &self.index_hash.0);
        put(80, &self.state_hash.0);
        put(112, &self.total_bytes.to_le_bytes());
        put(120, &self.meta_bytes.to_le_bytes());
        put(124, &self.segments.to_le_bytes());
        put(128, &self.early_segments.to_le_bytes());
        put(132, &self.literal_runs.to_le_bytes());
        put(136, &self.derived_runs.to_le_bytes());
        put(140, &self.run_table_stored.to_le_bytes());
        put(144, &self.state_stored.to_le_bytes());
        put(148, &self.state_raw.to_le_bytes());
        put(152, &[self.run_table_codec.code(), self.state_codec.code()]);
        out
    }
}

/// Raw length of the run table in bytes.
pub(super) fn run_table_raw(literal_runs: u32, derived_runs: u32) -> usize {
    to_usize(literal_runs) * LITERAL_RUN_BYTES + to_usize(derived_runs) * DERIVED_RUN_BYTES
}

fn limited(what: &'static str, found: u32, limit: impl TryInto<u64>) -> Result<u32, FormatError> {
    let limit = limit.try_into().unwrap_or(u64::MAX);
    let value = u64::from(found);
    if value > limit {
        return Err(FormatError::Limit {
            what,
            found: value,
            limit,
        });
    }
    Ok(found)
}

/// Checks the last [`TRAILER_BYTES`] of a file against its prefix: that it was written to its
/// end, and is the file that the prefix begins.
///
/// # Errors
/// [`FormatError::Trailer`] if not.
pub fn check_trailer(prefix: &Prefix, bytes: &[u8; TRAILER_BYTES]) -> Result<(), FormatError> {
    let right = bytes.starts_with(&TRAILER_MAGIC)
        && u64_at(bytes, 8) == prefix.total_bytes
        && bytes[16..] == prefix.id.0.0;
    if right {
        Ok(())
    } else {
        Err(FormatError::Trailer)
    }
}
