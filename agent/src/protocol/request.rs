//! What the host says.

use super::codec::{Builder, Fields};
use super::{ENTROPY_LEN, Error, Frame, PATH_MAX, PAYLOAD_MAX, Stream, VERSION, WORDS_MAX, kind};
use crate::tree::Entry;

/// The first bytes of a hello.
const MAGIC: [u8; 8] = *b"CLDAGENT";

/// Appends a hello that says `rest` after the version.
pub(super) fn encode_hello(out: &mut Vec<u8>, rest: &[u8]) -> Result<(), Error> {
    let frame = Builder::new(out, kind::HELLO);
    frame.raw(&MAGIC).u32(VERSION).raw(rest).end()
}

/// What a hello of this version says after that. One of another may go on in any way.
pub(super) fn decode_hello(payload: &[u8]) -> Result<&[u8], Error> {
    let Some((version, rest)) = payload
        .strip_prefix(&MAGIC)
        .and_then(<[u8]>::split_first_chunk)
    else {
        return Err(Error::Magic);
    };
    match u32::from_le_bytes(*version) {
        VERSION => Ok(rest),
        other => Err(Error::Version(other)),
    }
}

/// Bytes that nobody can guess and that are used once: what the host gives to the guest's random
/// numbers.
#[derive(Clone, PartialEq, Eq)]
pub struct Entropy(pub [u8; ENTROPY_LEN]);

impl std::fmt::Debug for Entropy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Entropy(..)")
    }
}

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

impl Size {
    fn encode(self, kind: u8, out: &mut Vec<u8>) -> Result<(), Error> {
        let frame = Builder::new(out, kind);
        frame.u16(self.rows).u16(self.columns).end()
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, Error> {
        let (rows, columns) = (fields.u16()?, fields.u16()?);
        Ok(Self { rows, columns })
    }
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec<'a> {
    /// The command and its arguments; at least one.
    pub arguments: Vec<&'a [u8]>,
    /// Variables as `NAME=VALUE`, beside what every command gets.
    pub environment: Vec<&'a [u8]>,
    /// Its directory; the root directory if empty.
    pub directory: &'a [u8],
    /// The size of the terminal it gets, if it gets one.
    pub terminal: Option<Size>,
}

impl<'a> Exec<'a> {
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        let size = self.terminal.unwrap_or_default();
        let mut frame = Builder::new(out, kind::EXEC)
            .flag(self.terminal.is_some())
            .u16(size.rows)
            .u16(size.columns)
            .bytes(self.directory);
        for words in [&self.arguments, &self.environment] {
            frame = frame.count(words.len());
            for word in words {
                frame = frame.bytes(word);
            }
        }
        frame.end()
    }

    fn decode(payload: &'a [u8]) -> Result<Self, Error> {
        let mut fields = Fields::new(payload, "exec");
        let terminal = fields.flag()?;
        let size = Size::decode(&mut fields)?;
        let directory = fields.c_bytes(PATH_MAX)?;
        let arguments = words(&mut fields)?;
        let environment = words(&mut fields)?;
        let variable = |word: &&[u8]| word.iter().skip(1).any(|&byte| byte == b'=');
        let bad_size = !terminal && size != Size::default();
        if bad_size || arguments.is_empty() || !environment.iter().all(variable) {
            return Err(fields.malformed());
        }
        fields.end()?;
        Ok(Self {
            arguments,
            environment,
            directory,
            terminal: terminal.then_some(size),
        })
    }
}

fn words<'a>(fields: &mut Fields<'a>) -> Result<Vec<&'a [u8]>, Error> {
    let count = fields.count(WORDS_MAX)?;
    let mut words = Vec::new();
    for _ in 0..count {
        words.push(fields.c_bytes(PAYLOAD_MAX)?);
    }
    Ok(words)
}

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Who is there: the first frame. The agent gives the bytes to the guest's random numbers before it
    /// looks at what follows.
    Hello(Entropy),
    /// Run a command.
    Exec(Exec<'a>),
    /// Take a tree, to be at `path`, or in it as `name` if it is a directory.
    Put {
        /// Where to.
        path: &'a [u8],
        /// The name in a directory; empty if the tree's contents are to be the directory's.
        name: &'a [u8],
    },
    /// Send the tree at this path.
    Get(&'a [u8]),
    /// Trim disks and drop caches.
    Sync,
    /// The serial console has this size.
    Console(Size),
    /// The guest goes on in another machine than it ran in before: it was restored or cloned.
    Renew,
    /// Shut the guest down, as its init does it.
    PowerOff,
    /// More of the command's standard input.
    Stdin(&'a [u8]),
    /// Its end.
    StdinEnd,
    /// So many bytes of a stream were passed on.
    Taken(Stream, usize),
    /// A signal for the command's process group.
    Signal(u32),
    /// The terminal has another size.
    Resize(Size),
    /// A part of a tree.
    Tree(Entry<'a>),
}

impl<'a> Request<'a> {
    /// Appends the request to `out`, as one frame.
    ///
    /// # Errors
    /// When it is longer than a frame may be.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), Error> {
        match self {
            Self::Hello(Entropy(bytes)) => encode_hello(out, bytes),
            Self::Exec(exec) => exec.encode(out),
            Self::Put { path, name } => Builder::new(out, kind::PUT).bytes(path).bytes(name).end(),
            Self::Get(path) => Builder::new(out, kind::GET).bytes(path).end(),
            Self::Sync => Builder::new(out, kind::SYNC).end(),
            Self::Renew => Builder::new(out, kind::RENEW).end(),
            Self::PowerOff => Builder::new(out, kind::POWER_OFF).end(),
            Self::Stdin(bytes) => Builder::new(out, kind::STDIN).raw(bytes).end(),
            Self::StdinEnd => Builder::new(out, kind::STDIN_END).end(),
            Self::Taken(Stream::Stdout, bytes) => {
                Builder::new(out, kind::TAKEN_STDOUT).count(*bytes).end()
            }
            Self::Taken(Stream::Stderr, bytes) => {
                Builder::new(out, kind::TAKEN_STDERR).count(*bytes).end()
            }
            Self::Signal(signal) => Builder::new(out, kind::SIGNAL).u32(*signal).end(),
            Self::Console(size) => size.encode(kind::CONSOLE, out),
            Self::Resize(size) => size.encode(kind::RESIZE, out),
            Self::Tree(entry) => entry.encode(out),
        }
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// When it is no request, or one out of bounds.
    pub fn decode(frame: Frame<'a>) -> Result<Self, Error> {
        let fields = |what| Fields::new(frame.payload, what);
        let (request, fields) = match frame.kind {
            kind::HELLO => {
                let entropy = decode_hello(frame.payload)?.try_into();
                let entropy = entropy.map_err(|_| Error::Malformed("hello"))?;
                return Ok(Self::Hello(Entropy(entropy)));
            }
            kind::EXEC => return Exec::decode(frame.payload).map(Self::Exec),
            kind::STDIN => return Ok(Self::Stdin(frame.payload)),
            kind::PUT => {
                let mut fields = fields("put");
                let path = fields.c_bytes(PATH_MAX)?;
                let name = fields.c_bytes(PATH_MAX)?;
                (Self::Put { path, name }, fields)
            }
            kind::GET => {
                let mut fields = fields("get");
                (Self::Get(fields.c_bytes(PATH_MAX)?), fields)
            }
            kind::SYNC => (Self::Sync, fields("sync")),
            kind::RENEW => (Self::Renew, fields("renew")),
            kind::POWER_OFF => (Self::PowerOff, fields("power off")),
            kind::STDIN_END => (Self::StdinEnd, fields("stdin end")),
            kind::TAKEN_STDOUT | kind::TAKEN_STDERR => {
                let mut fields = fields("taken");
                let bytes = fields.count(super::WINDOW)?;
                let stream = match frame.kind {
                    kind::TAKEN_STDOUT => Stream::Stdout,
                    _ => Stream::Stderr,
                };
                (Self::Taken(stream, bytes), fields)
            }
            kind::SIGNAL => {
                let mut fields = fields("signal");
                (Self::Signal(fields.u32()?), fields)
            }
            kind::CONSOLE => {
                let mut fields = fields("console");
                (Self::Console(Size::decode(&mut fields)?), fields)
            }
            kind::RESIZE => {
                let mut fields = fields("resize");
                (Self::Resize(Size::decode(&mut fields)?), fields)
            }
            _ => return Entry::decode(frame).map(Self::Tree),
        };
        fields.end()?;
        Ok(request)
    }
}
