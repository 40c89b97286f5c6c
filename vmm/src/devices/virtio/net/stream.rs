//! Frames over a stream socket, each behind its length as 32 bits in network order: how QEMU and
//! passt talk. There are no offloads, so the header of virtio stays on this side.
//!
//! Frames are read into a buffer of the host's and copied from there, many small ones a call; to the
//! socket they go straight from guest memory, and what it does not take is kept until it does.
//! A length that no frame has ends the connection, as nothing after it can be understood.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;

use super::backend::{Backend, Received, Sent};
use super::device::{FRAME_BYTES_MAX, HEADER_BYTES};
use super::frames;
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::buffers::Buffers;

/// Bytes of a length.
const LENGTH_BYTES: usize = 4;
/// Longest frame on the stream.
const PAYLOAD_BYTES_MAX: usize = FRAME_BYTES_MAX - HEADER_BYTES;
/// Bytes that are read ahead.
const AHEAD_BYTES: usize = 2 * (LENGTH_BYTES + PAYLOAD_BYTES_MAX);

/// Why a stream cannot be understood any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a frame of {0} bytes; they have 1 to {PAYLOAD_BYTES_MAX}")]
pub struct FramingError(u32);

/// Bytes of a stream, and the frames in them.
#[derive(Debug)]
pub struct FrameReader {
    bytes: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self {
            bytes: vec![0; AHEAD_BYTES],
            begin: 0,
            end: 0,
        }
    }
}

impl FrameReader {
    /// The length of the next frame, if all of it is here.
    ///
    /// # Errors
    /// No frame has such a length.
    pub fn next_len(&self) -> Result<Option<usize>, FramingError> {
        let here = self.bytes.get(self.begin..self.end).unwrap_or(&[]);
        let Some((length, rest)) = here.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        if !(1..=PAYLOAD_BYTES_MAX).contains(&len) {
            return Err(FramingError(length));
        }
        Ok((rest.len() >= len).then_some(len))
    }

    /// Takes the next frame off, if all of it is here.
    ///
    /// # Errors
    /// As [`FrameReader::next_len`].
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FramingError> {
        let Some(len) = self.next_len()? else {
            return Ok(None);
        };
        let begin = self.begin + LENGTH_BYTES;
        self.begin = begin + len;
        Ok(self.bytes.get(begin..begin + len))
    }

    /// Reads more of the stream, once; returns how many bytes. There is room for the rest of any
    /// frame once all whole ones are taken off.
    ///
    /// # Errors
    /// The reader's.
    pub fn fill(&mut self, mut from: impl Read) -> io::Result<usize> {
        if self.begin > 0 {
            self.bytes.copy_within(self.begin..self.end, 0);
            self.end -= self.begin;
            self.begin = 0;
        }
        let room = self.bytes.get_mut(self.end..).unwrap_or(&mut []);
        let count = from.read(room)?;
        self.end += count;
        Ok(count)
    }
}

/// A stream socket with such frames.
#[derive(Debug)]
pub struct StreamBackend {
    stream: UnixStream,
    name: String,
    reader: FrameReader,
    /// What the socket has yet to take of the last frame.
    unsent: Vec<u8>,
}

impl StreamBackend {
    /// A backend over a connected socket; `name` is for status reports.
    ///
    /// # Errors
    /// When the socket cannot be set to non-blocking.
    pub fn new(stream: UnixStream, name: &str) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            name: name.to_owned(),
            reader: FrameReader::default(),
            unsent: Vec::new(),
        })
    }
}

/// A failed call, as an answer that stands for it.
fn failed(error: &io::Error) -> Sent {
    match error.kind() {
        ErrorKind::WouldBlock => Sent::Busy,
        _ => Sent::Gone,
    }
}

impl Backend for StreamBackend {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        0
    }

    fn set_up(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, guest: &GuestRam, buffers: &Buffers, overflow: &mut [u8]) -> Received {
        loop {
            match self.reader.next_len() {
                Ok(Some(_)) => break,
                Ok(None) => {}
                Err(_) => return Received::Gone,
            }
            match self.reader.fill(&self.stream) {
                Ok(0) => return Received::Gone,
                Ok(_) => {}
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => return Received::Nothing,
                    _ => return Received::Gone,
                },
            }
        }
        let Ok(Some(frame)) = self.reader.next_frame() else {
            return Received::Gone;
        };
        // The header is all zeros: no checksum to complete, no segments.
        let mut direct = buffers.write_at(guest, 0, &[0; HEADER_BYTES]);
        direct += buffers.write_at(guest, HEADER_BYTES, frame);
        let len = HEADER_BYTES + frame.len();
        // The device offers no buffers that are shorter than a header.
        let rest = frame
            .get(direct.saturating_sub(HEADER_BYTES)..)
            .unwrap_or(&[]);
        for (slot, byte) in overflow.iter_mut().zip(rest) {
            *slot = *byte;
        }
        Received::Frame { len, direct }
    }

    fn send(&mut self, guest: &GuestRam, buffers: &Buffers) -> Sent {
        match self.flush() {
            Sent::Done => {}
            other => return other,
        }
        let len = buffers.len() - HEADER_BYTES;
        let length = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
        let sent = loop {
            match frames::send(guest, &length, buffers, HEADER_BYTES, self.stream.as_fd()) {
                Ok(sent) => break sent,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return failed(&error),
            }
        };
        if sent < LENGTH_BYTES + len {
            self.unsent.extend(length.get(sent..).unwrap_or(&[]));
            let done = sent.saturating_sub(LENGTH_BYTES);
            let from = self.unsent.len();
            self.unsent.resize(from + len - done, 0);
            let rest = self.unsent.get_mut(from..).unwrap_or(&mut []);
            buffers.read_at(guest, HEADER_BYTES + done, rest);
        }
        Sent::Done
    }

    fn flush(&mut self) -> Sent {
        while !self.unsent.is_empty() {
            match (&self.stream).write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return failed(&error),
            }
        }
        Sent::Done
    }
}
