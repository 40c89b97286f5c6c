//! From stored bytes to pages: verified first, then decompressed into the caller's buffer.

use zstd::bulk::Decompressor;

use crate::bytes::{to_u64, to_usize};
use crate::codec::{check_stored, decompress, decompress_with};
use crate::format::{FormatError, Index, Place, Prefix, SegmentId};
use crate::page::{PAGE_BYTES, PageAt};

/// Verifies and decompresses the machine state, the [`Prefix::state_stored_bytes`] bytes at
/// [`Prefix::state_offset`].
///
/// # Errors
/// The length or the hash is wrong, or the bytes do not decompress to the length in the prefix.
pub fn decode_state(prefix: &Prefix, stored: &[u8]) -> Result<Vec<u8>, FormatError> {
    check_stored(
        Place::State,
        stored,
        prefix.state_stored,
        &prefix.state_hash,
    )?;
    // At most STATE_BYTES_MAX, as the prefix was parsed.
    let mut state = vec![0; usize::try_from(prefix.state_bytes()).unwrap_or(usize::MAX)];
    decompress(Place::State, prefix.state_codec, stored, &mut state)?;
    Ok(state)
}

/// Decodes segments one after the other, reusing what the codec needs. One a thread.
#[derive(Default)]
pub struct SegmentDecoder {
    zstd: Decompressor<'static>,
}

impl std::fmt::Debug for SegmentDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentDecoder").finish_non_exhaustive()
    }
}

impl SegmentDecoder {
    /// A decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Verifies the stored bytes of a segment against the hash in the index, then decompresses
    /// them into the beginning of `out`, which has room for [`crate::Segment::raw_bytes`]; room
    /// for [`crate::format::SEGMENT_BYTES_MAX`] is enough for any segment.
    ///
    /// # Errors
    /// There is no such segment, `out` is too small, length or hash are wrong, or the bytes do
    /// not decompress to the length in the index. What `out` holds then is of no use.
    pub fn decode<'a>(
        &mut self,
        index: &'a Index,
        id: SegmentId,
        stored: &[u8],
        out: &'a mut [u8],
    ) -> Result<DecodedSegment<'a>, FormatError> {
        let place = Place::Segment(id.0);
        let limit = to_u64(index.segments().len());
        let segment = index.segment(id).ok_or(FormatError::Limit {
            what: "the number of the segment",
            found: u64::from(id.0),
            limit,
        })?;
        check_stored(place, stored, segment.stored_bytes, &segment.hash)?;
        let raw_bytes = segment.raw_bytes();
        let found = to_u64(out.len());
        let out = out.get_mut(..raw_bytes).ok_or(FormatError::Length {
            place,
            expected: to_u64(raw_bytes),
            found,
        })?;
        decompress_with(&mut self.zstd, place, segment.codec, stored, out)?;
        Ok(DecodedSegment {
            index,
            id,
            bytes: out,
        })
    }
}

/// The pages of a segment.
#[derive(Debug)]
pub struct DecodedSegment<'a> {
    index: &'a Index,
    id: SegmentId,
    bytes: &'a [u8],
}

impl<'a> DecodedSegment<'a> {
    /// All pages of the segment, slot after slot.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Where the pages go: the first page of each run of contiguous ones, and the bytes of all of
    /// them. First each slot's own place, in the order of the slots, then its further ones.
    pub fn runs(&self) -> impl Iterator<Item = (PageAt, &'a [u8])> + 'a {
        let bytes = self.bytes;
        self.index.segment_places(self.id).map(move |run| {
            // Inside of the segment: `Index::parse` made it that way.
            let start = to_usize(run.slot) * PAGE_BYTES;
            (
                run.first,
                &bytes[start..start + to_usize(run.pages) * PAGE_BYTES],
            )
        })
    }
}
