//! What is said between the host and the agent, one session a connection.
//!
//! ```text
//! host                                     agent
//!   | -- hello, with entropy; request -----> |
//!   | <- hello ----------------------------- |
//!   exec: output, taken, exit <------------- |     stdin, stdin end, taken, signal, resize -->
//!   put:  entries and data ----------------> |     <-- done
//!   get:  <-- size, entries and data         |
//!   sync: <-- one line a file system, done   |
//!   console, renew, power off: <-- done      |
//!   any:  <-- error, which ends the session  |
//! ```
//!
//! A frame is 8 bytes (kind, three zero bytes, length of what follows; little-endian) and at most
//! [`PAYLOAD_MAX`] bytes. Of each stream of a command (stdin, stdout, stderr) at most [`WINDOW`] bytes
//! are under way: the receiver says with `taken` what it has passed on. So both sides can always read
//! the connection, and a stream that nobody reads holds up neither the others nor a signal.
//!
//! A frame of another version is refused with both versions named: there is no negotiation. Within a
//! version requests may be added: an agent that does not know one says so in words.

pub(crate) mod codec;
mod frame;
mod reply;
mod request;
#[cfg(test)]
mod tests;

pub use frame::{Decoder, Frame, HEADER_LEN, PAYLOAD_MAX, header};
pub use reply::{End, Reply, Trimmed};
pub use request::{Entropy, Exec, Request, Size};

use crate::tree;

/// The vsock port of the agent.
pub const PORT: u32 = 25_452;
/// The protocol's version.
pub const VERSION: u32 = 2;
/// Bytes of a hello that the host draws for the guest: 256 bits, as many as Linux seeds its generator
/// with (`drivers/char/random.c`).
pub const ENTROPY_LEN: usize = 32;
/// Most bytes of one stream of a command that are under way.
pub const WINDOW: usize = 256 << 10;
/// A receiver says that it has passed bytes on when it is so many.
pub const TAKEN_STEP: usize = WINDOW / 4;
/// Most bytes of stream data in one frame.
pub const CHUNK_MAX: usize = 32 << 10;
/// Most arguments of a command, and most variables of its environment.
pub const WORDS_MAX: usize = 4096;
/// Longest path.
pub const PATH_MAX: usize = 4095;
/// Longest text of an error.
pub const TEXT_MAX: usize = 4096;

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A header of no known kind, or with reserved bytes.
    #[error("a frame of unknown kind {0:#x}")]
    Kind(u8),
    /// A frame over the limit.
    #[error("a frame of {0} bytes, more than {PAYLOAD_MAX}")]
    TooLong(usize),
    /// A payload that ends early, goes on, or holds a field out of bounds.
    #[error("a malformed `{0}` frame")]
    Malformed(&'static str),
    /// The other side is not of this protocol.
    #[error("the other side does not speak the agent's protocol")]
    Magic,
    /// The other side is of another version.
    #[error("the other side speaks version {0} of the agent's protocol, this side {VERSION}")]
    Version(u32),
    /// More of a stream than was granted.
    #[error("the other side sent more than it was granted")]
    Window,
    /// A name that could lead out of a directory, a tree too deep, or entries in no sensible order.
    #[error(transparent)]
    Tree(#[from] tree::Invalid),
}

/// The streams of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output (of a command on a terminal: all output).
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// 0 or 1.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }
}

/// What both sides of a session may say.
pub(crate) mod kind {
    pub(crate) const HELLO: u8 = 0x01;
    pub(crate) const EXEC: u8 = 0x02;
    pub(crate) const PUT: u8 = 0x03;
    pub(crate) const GET: u8 = 0x04;
    pub(crate) const SYNC: u8 = 0x05;
    pub(crate) const CONSOLE: u8 = 0x06;
    pub(crate) const RENEW: u8 = 0x07;
    pub(crate) const POWER_OFF: u8 = 0x08;
    pub(crate) const STDIN: u8 = 0x10;
    pub(crate) const STDIN_END: u8 = 0x11;
    pub(crate) const TAKEN_STDOUT: u8 = 0x12;
    pub(crate) const TAKEN_STDERR: u8 = 0x13;
    pub(crate) const SIGNAL: u8 = 0x14;
    pub(crate) const RESIZE: u8 = 0x15;
    pub(crate) const TREE_EXTENT: u8 = 0x20;
    pub(crate) const TREE_DIRECTORY: u8 = 0x21;
    pub(crate) const TREE_FILE: u8 = 0x22;
    pub(crate) const TREE_LINK: u8 = 0x23;
    pub(crate) const TREE_DATA: u8 = 0x24;
    pub(crate) const TREE_UP: u8 = 0x25;
    pub(crate) const TREE_HOLE: u8 = 0x26;
    pub(crate) const TREE_CAPABILITY: u8 = 0x27;
    pub(crate) const STDOUT: u8 = 0x80;
    pub(crate) const STDERR: u8 = 0x81;
    pub(crate) const TAKEN_STDIN: u8 = 0x82;
    pub(crate) const EXIT: u8 = 0x83;
    pub(crate) const TRIMMED: u8 = 0x84;
    pub(crate) const DONE: u8 = 0x8e;
    pub(crate) const ERROR: u8 = 0x8f;

    /// Whether a frame may be of `kind`.
    pub(crate) fn is_known(kind: u8) -> bool {
        matches!(
            kind,
            HELLO..=POWER_OFF | STDIN..=RESIZE | TREE_EXTENT..=TREE_CAPABILITY | STDOUT..=TRIMMED | DONE | ERROR
        )
    }
}
