//! A whole overlay file checked, from its first byte to its last.

use std::io::{self, Read, Seek, SeekFrom};

use thiserror::Error;

use crate::bytes::{to_u64, to_usize};
use crate::decode::{SegmentDecoder, decode_state};
use crate::digest::{BaseId, OverlayId};
use crate::format::{
    FormatError, Index, PREFIX_BYTES, Place, Prefix, SEGMENT_BYTES_MAX, SegmentId, TRAILER_BYTES,
    check_trailer,
};

/// The first thing that is wrong with an overlay file.
#[derive(Debug, Error)]
pub enum VerifyError {
    /// The file ends too early, or reading it failed.
    #[error("cannot read {place} at offset {offset}")]
    Read {
        /// What was being read.
        place: Place,
        /// Where it begins in the file.
        offset: u64,
        /// The cause; [`io::ErrorKind::UnexpectedEof`] if the file is too short.
        #[source]
        source: io::Error,
    },
    /// A part breaks the format, or does not have its hash.
    #[error("bad overlay at offset {offset}")]
    Format {
        /// Where the part begins in the file.
        offset: u64,
        /// What is wrong.
        #[source]
        source: FormatError,
    },
    /// The file goes on after its trailer.
    #[error("the file goes on after the end of the overlay at offset {offset}")]
    Tail {
        /// Where the overlay ends.
        offset: u64,
    },
}

/// What a good overlay file has in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// Name of the overlay.
    pub id: OverlayId,
    /// Name of the base it is against.
    pub base: BaseId,
    /// Length of the file in bytes.
    pub total_bytes: u64,
    /// Number of segments.
    pub segments: u32,
    /// Pages in the segments.
    pub literal_pages: u64,
    /// Length of the machine state in bytes.
    pub state_bytes: u64,
}

/// The file, and where it is read.
struct Input<'a, R> {
    reader: &'a mut R,
    offset: u64,
}

impl<R: Read + Seek> Input<'_, R> {
    fn read(&mut self, place: Place, into: &mut [u8]) -> Result<(), VerifyError> {
        let offset = self.offset;
        self.reader
            .read_exact(into)
            .map_err(|source| VerifyError::Read {
                place,
                offset,
                source,
            })?;
        self.offset += to_u64(into.len());
        Ok(())
    }

    /// Goes on at `offset`, where `place` begins.
    fn seek(&mut self, place: Place, offset: u64) -> Result<(), VerifyError> {
        self.reader
            .seek(SeekFrom::Start(offset))
            .map_err(|source| VerifyError::Read {
                place,
                offset,
                source,
            })?;
        self.offset = offset;
        Ok(())
    }

    /// Reads a part of `bytes` bytes. Memory grows with what is really there, not with what a
    /// head says.
    fn read_part(&mut self, place: Place, bytes: u64) -> Result<Vec<u8>, VerifyError> {
        let mut part = Vec::new();
        let offset = self.offset;
        let read = self
            .reader
            .by_ref()
            .take(bytes)
            .read_to_end(&mut part)
            .and_then(|read| {
                let whole = to_u64(read) == bytes;
                if whole {
                    Ok(())
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                }
            });
        read.map_err(|source| VerifyError::Read {
            place,
            offset,
            source,
        })?;
        self.offset += bytes;
        Ok(part)
    }
}

/// Reads and checks prefix and index of an overlay in `input`, whose first byte is the overlay's.
///
/// # Errors
/// Reading fails or ends too early, or prefix or index is bad.
pub fn read_head<R: Read + Seek>(input: &mut R) -> Result<(Prefix, Index), VerifyError> {
    head(&mut Input {
        reader: input,
        offset: 0,
    })
}

fn head<R: Read + Seek>(input: &mut Input<'_, R>) -> Result<(Prefix, Index), VerifyError> {
    let mut bytes = [0; PREFIX_BYTES];
    input.seek(Place::Prefix, 0)?;
    input.read(Place::Prefix, &mut bytes)?;
    let prefix =
        Prefix::parse(&bytes).map_err(|source| VerifyError::Format { offset: 0, source })?;
    let offset = prefix.index_offset();
    input.seek(Place::Index, offset)?;
    let bytes = input.read_part(Place::Index, prefix.index_bytes())?;
    let index =
        Index::parse(&prefix, &bytes).map_err(|source| VerifyError::Format { offset, source })?;
    Ok((prefix, index))
}

/// Reads a whole overlay, which `input` holds and nothing else, and checks all of it: prefix, index,
/// machine state, each segment's hash and that it decompresses, trailer, and that nothing follows. `progress` is called with the bytes checked and the length of the file.
///
/// # Errors
/// The first thing that is wrong, and where.
pub fn verify<R: Read + Seek>(
    input: &mut R,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<VerifyReport, VerifyError> {
    let mut input = Input {
        reader: input,
        offset: 0,
    };
    let (prefix, index) = head(&mut input)?;
    let total_bytes = prefix.total_bytes();
    let bad = |offset| move |source| VerifyError::Format { offset, source };

    let offset = prefix.state_offset();
    input.seek(Place::State, offset)?;
    let state = input.read_part(Place::State, prefix.state_stored_bytes())?;
    let state = decode_state(&prefix, &state).map_err(bad(offset))?;
    progress(input.offset, total_bytes);

    let mut decoder = SegmentDecoder::new();
    let mut raw = vec![0; SEGMENT_BYTES_MAX];
    let mut stored = vec![0; SEGMENT_BYTES_MAX];
    let mut literal_pages = 0;
    for (number, segment) in (0..).zip(index.segments()) {
        let offset = input.offset;
        // Not longer than its raw length, which is at most SEGMENT_BYTES_MAX.
        let stored = &mut stored[..to_usize(segment.stored_bytes)];
        input.read(Place::Segment(number), stored)?;
        decoder
            .decode(&index, SegmentId(number), stored, &mut raw)
            .map_err(bad(offset))?;
        literal_pages += u64::from(segment.pages);
        progress(input.offset, total_bytes);
    }

    let offset = prefix.index_offset() + prefix.index_bytes();
    input.seek(Place::Trailer, offset)?;
    let mut trailer = [0; TRAILER_BYTES];
    input.read(Place::Trailer, &mut trailer)?;
    check_trailer(&prefix, &trailer).map_err(bad(offset))?;
    let offset = input.offset;
    match input.reader.read_exact(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Ok(()) => return Err(VerifyError::Tail { offset }),
        Err(source) => {
            return Err(VerifyError::Read {
                place: Place::Trailer,
                offset,
                source,
            });
        }
    }
    progress(total_bytes, total_bytes);
    Ok(VerifyReport {
        id: prefix.id(),
        base: prefix.base(),
        total_bytes,
        segments: prefix.segments(),
        literal_pages,
        state_bytes: to_u64(state.len()),
    })
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
