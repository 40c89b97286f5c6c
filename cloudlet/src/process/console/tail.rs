//! The end of what the guest wrote to its console, from which every client is served at its own pace.
//! A client that falls too far behind loses the oldest bytes, alone, and is told how many; the memory
//! is bounded however many there are.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use event_manager::{EventOps, EventSet, Events};

/// Bytes a client may be behind.
pub(super) const KEPT_MAX: usize = 1 << 20;
/// Bytes of past output that a client sees when it attaches.
pub(super) const REPLAY_LEN_MAX: usize = 16 << 10;
/// Bytes read from a client at a time: one receive FIFO of a 16550A.
const INPUT_LEN: usize = 16;

/// The last bytes of the output, which are numbered from the guest's first one on.
#[derive(Debug, Default)]
pub(super) struct Tail {
    bytes: VecDeque<u8>,
    begin: u64,
}

impl Tail {
    /// The number of the next byte that the guest will write.
    pub(super) fn end(&self) -> u64 {
        self.begin + self.bytes.len() as u64
    }

    /// Where a client begins that attaches now.
    pub(super) fn replay_begin(&self) -> u64 {
        let shown = self.bytes.len().min(REPLAY_LEN_MAX);
        self.end() - shown as u64
    }

    /// Appends what the guest wrote; of what there is then, the last [`KEPT_MAX`] bytes stay.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        let excess = self.bytes.len().saturating_sub(KEPT_MAX);
        self.forget(excess);
    }

    /// Forgets what comes before `needed` and is of no use to a client that attaches later.
    pub(super) fn release(&mut self, needed: u64) {
        let from = needed.min(self.replay_begin());
        let unused = from.saturating_sub(self.begin);
        self.forget(usize::try_from(unused).unwrap_or(usize::MAX));
        if self.bytes.len() <= REPLAY_LEN_MAX && self.bytes.capacity() > 4 * REPLAY_LEN_MAX {
            self.bytes.shrink_to(2 * REPLAY_LEN_MAX);
        }
    }

    fn forget(&mut self, count: usize) {
        let count = count.min(self.bytes.len());
        self.bytes.drain(..count);
        self.begin += count as u64;
    }

    /// Some of the bytes from number `at` on; none if there are no more.
    fn from(&self, at: u64) -> &[u8] {
        let skip = usize::try_from(at.saturating_sub(self.begin)).unwrap_or(usize::MAX);
        let (front, back) = self.bytes.as_slices();
        let of_back = skip.saturating_sub(front.len());
        match front.get(skip..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => back.get(of_back..).unwrap_or_default(),
        }
    }
}

/// What a client is told in place of bytes that it has lost.
fn note_of(dropped: u64) -> String {
    format!("\n[cloudlet: {dropped} bytes of console output dropped: they were not read in time]\n")
}

/// Whether a client has got everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fed {
    /// It has.
    All,
    /// Its socket takes nothing more for now.
    Behind,
    /// Nobody reads there any more.
    Gone,
}

/// Whether a client has typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Typed {
    /// It has, and there may be more.
    Something,
    /// There is nothing now, or nothing any more.
    Nothing,
}

/// A client of the console.
#[derive(Debug)]
pub(super) struct Client {
    /// Its connection, which does not block.
    pub(super) stream: UnixStream,
    /// The number of the next byte that it gets.
    at: u64,
    /// How many bytes before that it has lost and not been told of.
    lost: u64,
    /// What it is told of them, and how much of that it has got.
    note: Vec<u8>,
    note_sent: usize,
    /// Nobody reads there any more.
    gone: bool,
    /// Nothing will be typed any more.
    typed_all: bool,
    /// What its connection is watched for.
    watched: EventSet,
}

impl Client {
    /// A client that sees the output from number `at` on; to be watched for what it types.
    pub(super) fn new(stream: UnixStream, at: u64) -> Self {
        Self {
            stream,
            at,
            lost: 0,
            note: Vec::new(),
            note_sent: 0,
            gone: false,
            typed_all: false,
            watched: EventSet::IN,
        }
    }

    /// Feeds it, and has its connection watched for what is still to be done.
    pub(super) fn serve(&mut self, tail: &Tail, ops: &mut EventOps) {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::OUT, self.feed(tail) == Fed::Behind);
        wanted.set(EventSet::IN, !self.typed_all);
        if wanted != self.watched {
            ops.modify(Events::new(&self.stream, wanted))
                .expect("a watched descriptor is known");
            self.watched = wanted;
        }
    }

    /// The number of the oldest byte that it still needs; none if it needs none.
    pub(super) fn needs(&self) -> Option<u64> {
        (!self.gone).then_some(self.at)
    }

    /// Passes on what it has not got yet, as far as it takes it without waiting.
    pub(super) fn feed(&mut self, tail: &Tail) -> Fed {
        while !self.gone {
            if self.note_sent == 0 && self.at < tail.begin {
                self.lost += tail.begin - self.at;
                self.at = tail.begin;
                self.note = note_of(self.lost).into_bytes();
            }
            let note = &self.note[self.note_sent..];
            let is_note = !note.is_empty();
            let next = match is_note {
                true => note,
                false => tail.from(self.at),
            };
            if next.is_empty() {
                return Fed::All;
            }
            match self.stream.write(next) {
                Ok(length) if is_note => self.sent_of_note(length),
                Ok(length) => self.at += length as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Fed::Behind,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What it typed before it left counts all the same: the connection stays until
                // that is read.
                Err(_) => self.gone = true,
            }
        }
        Fed::Gone
    }

    fn sent_of_note(&mut self, length: usize) {
        self.note_sent += length;
        if self.note_sent == self.note.len() {
            (self.lost, self.note_sent) = (0, 0);
            self.note.clear();
        }
    }

    /// Appends some of what it typed to `input`.
    pub(super) fn read(&mut self, input: &mut Vec<u8>) -> Typed {
        let mut bytes = [0; INPUT_LEN];
        match self.stream.read(&mut bytes) {
            Ok(length) if length > 0 => {
                input.extend_from_slice(&bytes[..length]);
                Typed::Something
            }
            Err(error) if is_transient(&error) => Typed::Nothing,
            _ => {
                self.typed_all = true;
                Typed::Nothing
            }
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(at: u64) -> (Client, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Client::new(ours, at), theirs)
    }

    fn read_all(stream: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let error = stream.read_to_end(&mut bytes).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        bytes
    }

    /// Bytes that tell their number.
    fn text(numbers: std::ops::Range<u32>) -> Vec<u8> {
        numbers.flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn a_slow_client_gets_every_byte_that_is_kept() {
        let mut tail = Tail::default();
        let (mut client, mut reader) = pair(0);
        let all = text(0..200_000);
        let mut got = Vec::new();
        for piece in all.chunks(100_000) {
            tail.push(piece);
            client.feed(&tail);
            tail.release(client.needs().unwrap());
        }
        assert_eq!(client.feed(&tail), Fed::Behind);
        while got.len() < all.len() {
            got.extend(read_all(&mut reader));
            client.feed(&tail);
        }
        assert!(got == all, "{} bytes", got.len());
        assert_eq!(client.feed(&tail), Fed::All);
        tail.release(client.needs().unwrap());
        assert_eq!(tail.bytes.len(), REPLAY_LEN_MAX);
        assert!(tail.bytes.capacity() <= 4 * REPLAY_LEN_MAX);
    }

    #[test]
    fn a_client_that_reads_too_late_loses_the_oldest_and_is_told() {
        let mut tail = Tail::default();
        let (mut slow, mut slow_reader) = pair(0);
        let (mut quick, mut quick_reader) = pair(0);
        let all = text(0..400_000);
        let mut got = Vec::new();
        for piece in all.chunks(50_000) {
            tail.push(piece);
            slow.feed(&tail);
            while quick.feed(&tail) == Fed::Behind {
                got.extend(read_all(&mut quick_reader));
            }
            got.extend(read_all(&mut quick_reader));
            tail.release(slow.needs().min(quick.needs()).unwrap());
        }
        assert!(got == all, "the other client's bytes: {}", got.len());
        assert_eq!(tail.bytes.len(), KEPT_MAX);

        let mut got = Vec::new();
        loop {
            got.extend(read_all(&mut slow_reader));
            if slow.feed(&tail) == Fed::All {
                got.extend(read_all(&mut slow_reader));
                break;
            }
        }
        let mark = b"\n[cloudlet: ";
        let at = got.windows(mark.len()).position(|part| part == mark);
        let (before, rest) = got.split_at(at.unwrap());
        let after = &rest[rest.len() - KEPT_MAX..];
        let note = String::from_utf8_lossy(&rest[..rest.len() - KEPT_MAX]);
        let dropped = all.len() - before.len() - after.len();
        assert!(dropped > 0);
        assert_eq!(note, note_of(dropped as u64));
        assert!(before == &all[..before.len()]);
        assert!(after == &all[all.len() - KEPT_MAX..]);
    }

    #[test]
    fn a_client_that_has_left_needs_nothing() {
        let mut tail = Tail::default();
        let (mut client, reader) = pair(0);
        drop(reader);
        tail.push(b"text");
        assert_eq!(client.feed(&tail), Fed::Gone);
        assert_eq!(client.needs(), None);
    }
}
