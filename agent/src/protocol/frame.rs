//! Frames: cut out of a stream of bytes as it comes, without ever holding more than one of the
//! largest and what one read brought.

use std::io::{self, Read};

use super::{Error, kind};

/// Bytes of a header.
pub const HEADER_LEN: usize = 8;
/// Most bytes after a header.
pub const PAYLOAD_MAX: usize = 64 << 10;

/// Bytes asked for in one read.
const READ_LEN: usize = 64 << 10;

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its kind, a known one.
    pub kind: u8,
    /// What it carries, at most [`PAYLOAD_MAX`] bytes.
    pub payload: &'a [u8],
}

/// The header of a frame of `kind` with `length` bytes.
///
/// # Errors
/// When it is longer than a frame may be.
pub fn header(kind: u8, length: usize) -> Result<[u8; HEADER_LEN], Error> {
    let short = u32::try_from(length).ok();
    let length = short
        .filter(|_| length <= PAYLOAD_MAX)
        .ok_or(Error::TooLong(length))?;
    let [a, b, c, d] = length.to_le_bytes();
    Ok([kind, 0, 0, 0, a, b, c, d])
}

/// Reads kind and payload length of a header.
fn parse(header: [u8; HEADER_LEN]) -> Result<(u8, usize), Error> {
    let [kind, zero_0, zero_1, zero_2, a, b, c, d] = header;
    if !kind::is_known(kind) || [zero_0, zero_1, zero_2] != [0; 3] {
        return Err(Error::Kind(kind));
    }
    let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if length > PAYLOAD_MAX {
        return Err(Error::TooLong(length));
    }
    Ok((kind, length))
}

/// Cuts frames out of a stream.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Takes what one read of `source` brings, and says how much that was. To be called when
    /// [`Decoder::has_frame`] says no.
    ///
    /// # Errors
    /// Those of `source`.
    pub fn fill(&mut self, mut source: impl Read) -> io::Result<usize> {
        self.bytes.drain(..self.start);
        self.start = 0;
        let before = self.bytes.len();
        self.bytes.resize(before + READ_LEN, 0);
        let read = source.read(&mut self.bytes[before..]);
        self.bytes
            .truncate(before + read.as_ref().map_or(0, |&read| read));
        read
    }

    /// Where the next frame's payload lies, if all of it is here.
    fn locate(&self) -> Result<Option<(u8, std::ops::Range<usize>)>, Error> {
        let Some((&head, _)) = self.bytes[self.start..].split_first_chunk() else {
            return Ok(None);
        };
        let (kind, length) = parse(head)?;
        let begin = self.start + HEADER_LEN;
        let all_here = self.bytes.len() - begin >= length;
        Ok(all_here.then_some((kind, begin..begin + length)))
    }

    /// Whether a whole frame is here.
    ///
    /// # Errors
    /// When what is here cannot become one.
    pub fn has_frame(&self) -> Result<bool, Error> {
        Ok(self.locate()?.is_some())
    }

    /// The next frame, if all of it is here.
    ///
    /// # Errors
    /// When what is here cannot become one.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, Error> {
        let Some((kind, range)) = self.locate()? else {
            return Ok(None);
        };
        self.start = range.end;
        let payload = &self.bytes[range];
        Ok(Some(Frame { kind, payload }))
    }

    /// Whether there are bytes of a frame that is not whole.
    #[must_use]
    pub fn is_within_frame(&self) -> bool {
        self.start < self.bytes.len()
    }
}
