//! Fields of payloads: little-endian integers, and byte strings behind their length.

use super::{Error, PAYLOAD_MAX, header};

/// Takes fields off the front of a payload; whatever is wrong with one is [`Error::Malformed`].
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(payload: &'a [u8], what: &'static str) -> Self {
        let rest = payload;
        Self { rest, what }
    }

    pub(crate) fn malformed(&self) -> Error {
        Error::Malformed(self.what)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (array, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(Error::Malformed(self.what))?;
        self.rest = rest;
        Ok(*array)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Result<i64, Error> {
        self.array().map(i64::from_le_bytes)
    }

    pub(crate) fn flag(&mut self) -> Result<bool, Error> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(self.malformed()),
        }
    }

    /// A number that is at most `max`.
    pub(crate) fn count(&mut self, max: usize) -> Result<usize, Error> {
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if count > max {
            return Err(self.malformed());
        }
        Ok(count)
    }

    /// A string of at most `max` bytes.
    pub(crate) fn bytes(&mut self, max: usize) -> Result<&'a [u8], Error> {
        let length = self.count(max)?;
        let (bytes, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(Error::Malformed(self.what))?;
        self.rest = rest;
        Ok(bytes)
    }

    /// As [`Fields::bytes`], for what the system takes as a path or a word: no NUL.
    pub(crate) fn c_bytes(&mut self, max: usize) -> Result<&'a [u8], Error> {
        let bytes = self.bytes(max)?;
        if bytes.contains(&0) {
            return Err(self.malformed());
        }
        Ok(bytes)
    }

    /// UTF-8 text of at most `max` bytes.
    pub(crate) fn text(&mut self, max: usize) -> Result<&'a str, Error> {
        std::str::from_utf8(self.bytes(max)?).map_err(|_| self.malformed())
    }

    pub(crate) fn end(&self) -> Result<(), Error> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.malformed())
        }
    }
}

/// Appends one frame to `out`.
pub(crate) struct Builder<'a> {
    out: &'a mut Vec<u8>,
    begin: usize,
    kind: u8,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(out: &'a mut Vec<u8>, kind: u8) -> Self {
        let begin = out.len();
        out.extend_from_slice(&[0; super::HEADER_LEN]);
        Self { out, begin, kind }
    }

    /// Bytes without their length.
    pub(crate) fn raw(self, bytes: &[u8]) -> Self {
        self.out.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn i64(self, value: i64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    pub(crate) fn flag(self, value: bool) -> Self {
        self.raw(&[u8::from(value)])
    }

    /// A number; one that does not fit makes the frame too long in any case.
    pub(crate) fn count(self, count: usize) -> Self {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// A string behind its length.
    pub(crate) fn bytes(self, bytes: &[u8]) -> Self {
        self.count(bytes.len()).raw(bytes)
    }

    /// The frame is whole. One over the limit is taken back.
    pub(crate) fn end(self) -> Result<(), Error> {
        let payload = self.out.len() - self.begin - super::HEADER_LEN;
        match header(self.kind, payload) {
            Ok(header) => {
                self.out[self.begin..self.begin + super::HEADER_LEN].copy_from_slice(&header);
                Ok(())
            }
            Err(error) => {
                self.out.truncate(self.begin);
                Err(error)
            }
        }
    }
}

/// `text`, cut so that it fits a frame.
pub(crate) fn clipped(text: &str, max: usize) -> &str {
    debug_assert!(max <= PAYLOAD_MAX, "no text is longer than a frame");
    &text[..text.floor_char_boundary(max)]
}
