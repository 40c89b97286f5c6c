//! From stored bytes to pages: verified first, then decompressed into the caller's buffer.

use std::cell::RefCell;
use std::io;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

use crate::bytes::to_u64;
use crate::digest::Digest;
use crate::format::{Codec, FormatError, Index, Place, Prefix, SegmentId};
use crate::page::{PAGE_BYTES, PageAt};

/// A part of the file as it is stored.
#[derive(Debug)]
pub(crate) struct StoredPart {
    pub(crate) bytes: Vec<u8>,
    pub(crate) raw_bytes: usize,
    pub(crate) codec: Codec,
    pub(crate) hash: Digest,
}

impl StoredPart {
    /// Compresses `raw`; stored as it is where that is not larger. `buffer` is scratch space
    /// that is worth keeping for the next call.
    pub(crate) fn compress(
        compressor: &mut Compressor<'_>,
        raw: &[u8],
        buffer: &mut Vec<u8>,
    ) -> io::Result<Self> {
        buffer.clear();
        buffer.reserve(compress_bound(raw.len()));
        compressor.compress_to_buffer(raw, buffer)?;
        let (codec, bytes) = if buffer.len() < raw.len() {
            (Codec::Zstd, buffer.as_slice())
        } else {
            (Codec::Raw, raw)
        };
        let hash = Digest::of(bytes);
        Ok(Self {
            bytes: bytes.to_vec(),
            raw_bytes: raw.len(),
            codec,
            hash,
        })
    }
}

thread_local! {
    /// One zstd context a thread for the small parts, which have no decoder of their own.
    static DECOMPRESSOR: RefCell<Decompressor<'static>> = RefCell::default();
}

/// Decompresses a part whose hash has been checked into exactly `out`.
pub(crate) fn decompress(
    place: Place,
    codec: Codec,
    stored: &[u8],
    out: &mut [u8],
) -> Result<(), FormatError> {
    DECOMPRESSOR.with_borrow_mut(|zstd| decompress_with(zstd, place, codec, stored, out))
}

fn decompress_with(
    zstd: &mut Decompressor<'_>,
    place: Place,
    codec: Codec,
    stored: &[u8],
    out: &mut [u8],
) -> Result<(), FormatError> {
    let expected = to_u64(out.len());
    let bytes = match codec {
        Codec::Raw if stored.len() == out.len() => {
            out.copy_from_slice(stored);
            stored.len()
        }
        Codec::Raw => stored.len(),
        Codec::Zstd => zstd
            .decompress_to_buffer(stored, out)
            .map_err(|source| FormatError::Decompress { place, source })?,
    };
    let found = to_u64(bytes);
    if expected != found {
        return Err(FormatError::Length {
            place,
            expected,
            found,
        });
    }
    Ok(())
}

/// Checks length and hash of a stored part, which is all that can be wrong with its transfer.
fn check_stored(
    place: Place,
    stored: &[u8],
    length: u32,
    hash: &Digest,
) -> Result<(), FormatError> {
    let (expected, found) = (u64::from(length), to_u64(stored.len()));
    if expected != found {
        return Err(FormatError::Length {
            place,
            expected,
            found,
        });
    }
    if Digest::of(stored) != *hash {
        return Err(FormatError::Hash { place });
    }
    Ok(())
}

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

    /// The runs of contiguous pages: the place of the first page, and the bytes of all of them.
    pub fn runs(&self) -> impl Iterator<Item = (PageAt, &'a [u8])> + 'a {
        let mut rest = self.bytes;
        self.index.segment_runs(self.id).map(move |(first, pages)| {
            // The runs of a segment add up to its raw length: `Index::parse` made it that way.
            let (run, after) = rest.split_at(pages * PAGE_BYTES);
            rest = after;
            (first, run)
        })
    }
}
