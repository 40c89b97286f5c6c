//! What the agent says.

use super::codec::{Builder, Fields, clipped};
use super::request::{decode_hello, encode_hello};
use super::{Error, Frame, PATH_MAX, Stream, TEXT_MAX, WINDOW, kind};
use crate::tree::Entry;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
    /// It never ran: there is no such program.
    NotFound,
    /// It never ran: the program, or the directory, cannot be used.
    NotRun,
}

impl End {
    /// The exit code that a shell would give.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
            Self::NotRun => 126,
            Self::NotFound => 127,
        }
    }
}

/// What trimming a file system came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trimmed<'a> {
    /// Where it is mounted.
    pub path: &'a [u8],
    /// Bytes trimmed.
    pub bytes: u64,
    /// Why not, if it was not; empty otherwise.
    pub error: &'a str,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// Who is there: the first frame.
    Hello,
    /// Output of the command.
    Output(Stream, &'a [u8]),
    /// So many bytes of standard input were passed on.
    Taken(usize),
    /// The command has ended: nothing follows. The text says why it never ran, if so.
    Exit(End, &'a str),
    /// One file system was looked at.
    Trimmed(Trimmed<'a>),
    /// The request was carried out: nothing follows.
    Done,
    /// It was not, and why: nothing follows.
    Error(&'a str),
    /// A part of a tree.
    Tree(Entry<'a>),
}

impl<'a> Reply<'a> {
    /// Appends the reply to `out`, as one frame. Texts that are too long are cut.
    ///
    /// # Errors
    /// When it is longer than a frame may be.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        let text = |text| clipped(text, TEXT_MAX).as_bytes();
        match self {
            Self::Hello => encode_hello(out, &[]),
            Self::Output(Stream::Stdout, bytes) => Builder::new(out, kind::STDOUT).raw(bytes).end(),
            Self::Output(Stream::Stderr, bytes) => Builder::new(out, kind::STDERR).raw(bytes).end(),
            Self::Taken(bytes) => Builder::new(out, kind::TAKEN_STDIN).count(*bytes).end(),
            Self::Exit(end, why) => {
                let (how, number) = match *end {
                    End::Code(code) => (0, code),
                    End::Signal(signal) => (1, signal),
                    End::NotFound => (2, 0),
                    End::NotRun => (3, 0),
                };
                let frame = Builder::new(out, kind::EXIT).raw(&[how, number]);
                frame.bytes(text(why)).end()
            }
            Self::Trimmed(trimmed) => Builder::new(out, kind::TRIMMED)
                .bytes(trimmed.path)
                .u64(trimmed.bytes)
                .bytes(text(trimmed.error))
                .end(),
            Self::Done => Builder::new(out, kind::DONE).end(),
            Self::Error(why) => Builder::new(out, kind::ERROR).bytes(text(why)).end(),
            Self::Tree(entry) => entry.encode(out),
        }
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// When it is no reply, or one out of bounds.
    pub fn decode(frame: Frame<'a>) -> Result<Self, Error> {
        let fields = |what| Fields::new(frame.payload, what);
        let (reply, fields) = match frame.kind {
            kind::HELLO => (
                Self::Hello,
                Fields::new(decode_hello(frame.payload)?, "hello"),
            ),
            kind::STDOUT => return Ok(Self::Output(Stream::Stdout, frame.payload)),
            kind::STDERR => return Ok(Self::Output(Stream::Stderr, frame.payload)),
            kind::TAKEN_STDIN => {
                let mut fields = fields("taken");
                (Self::Taken(fields.count(WINDOW)?), fields)
            }
            kind::EXIT => {
                let mut fields = fields("exit");
                let [how, number] = fields.u16()?.to_le_bytes();
                let end = match (how, number) {
                    (0, code) => End::Code(code),
                    (1, signal @ 1..=64) => End::Signal(signal),
                    (2, 0) => End::NotFound,
                    (3, 0) => End::NotRun,
                    _ => return Err(fields.malformed()),
                };
                (Self::Exit(end, fields.text(TEXT_MAX)?), fields)
            }
            kind::TRIMMED => {
                let mut fields = fields("trimmed");
                let trimmed = Trimmed {
                    path: fields.c_bytes(PATH_MAX)?,
                    bytes: fields.u64()?,
                    error: fields.text(TEXT_MAX)?,
                };
                (Self::Trimmed(trimmed), fields)
            }
            kind::DONE => (Self::Done, fields("done")),
            kind::ERROR => {
                let mut fields = fields("error");
                (Self::Error(fields.text(TEXT_MAX)?), fields)
            }
            _ => return Entry::decode(frame).map(Self::Tree),
        };
        fields.end()?;
        Ok(reply)
    }
}
