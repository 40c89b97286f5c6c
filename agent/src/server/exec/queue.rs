//! Bytes that wait for a descriptor which does not take them at once.

use std::io::{self, Write};

use super::is_transient;
use crate::protocol::{Error, Reply};

/// Bytes on their way out.
#[derive(Debug, Default)]
pub(super) struct Queue {
    bytes: Vec<u8>,
    start: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.make_room();
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn reply(&mut self, reply: &Reply<'_>) -> Result<(), Error> {
        self.make_room();
        reply.encode(&mut self.bytes)
    }

    /// Forgets what is out, when that is worth moving the rest.
    fn make_room(&mut self) {
        if self.start > self.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    /// Writes what `sink` takes now.
    pub(super) fn write_to(&mut self, mut sink: impl Write) -> io::Result<()> {
        while !self.is_empty() {
            match sink.write(&self.bytes[self.start..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.start += written,
                Err(error) if is_transient(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time, then none.
    struct Narrow(Vec<u8>, usize);

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.1 == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let taken = bytes.len().min(self.1).min(3);
            self.0.extend_from_slice(&bytes[..taken]);
            self.1 -= taken;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_is_not_taken_waits_in_order() {
        let mut queue = Queue::default();
        let mut sink = Narrow(Vec::new(), 0);
        let mut expected = Vec::new();
        for round in 0..100_u8 {
            queue.push(&[round; 7]);
            expected.extend_from_slice(&[round; 7]);
            sink.1 = usize::from(round) % 11;
            queue.write_to(&mut sink).unwrap();
            assert_eq!(sink.0, expected[..sink.0.len()]);
            assert_eq!(queue.len(), expected.len() - sink.0.len());
        }
        sink.1 = usize::MAX;
        queue.write_to(&mut sink).unwrap();
        assert!(queue.is_empty());
        assert_eq!(sink.0, expected);
    }
}
