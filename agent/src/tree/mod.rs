//! Files and directories as a sequence of entries, and back.
//!
//! ```text
//! size?  directory  (file capability? (data | hole)* data(empty) | link | directory ... up)*  up
//! size?  file capability? (data | hole)* data(empty)
//! ```
//!
//! The outermost entry has no name: whoever receives it says what it is to be called. All others have
//! one of a single component, so that no path is ever resolved: the receiver holds its directories
//! open, makes everything beside them by name, and follows no link. Modes, times of change and the
//! capabilities of files go along; owners do not, and hard links become files of their own. Files that are
//! neither data, directory nor symbolic link are left out and counted, and so are other extended
//! attributes.

pub mod capability;
mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use crate::protocol::{Error as ProtocolError, Frame, PATH_MAX};
use crate::protocol::{codec, kind};

pub use receive::{Received, Receiver};
pub use send::send;

/// Directories in one another.
pub const DEPTH_MAX: usize = 128;
/// Longest name.
pub const NAME_MAX: usize = 255;
/// All bits of a mode that are sent.
const MODE_MASK: u16 = 0o7777;
const NANOS: u32 = 1_000_000_000;

/// What cannot be in a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// A name that is empty, too long, `.` or `..`, or that has a slash or NUL in it.
    #[error("a name that could lead out of its directory")]
    Name,
    /// Too many directories in one another.
    #[error("more than {DEPTH_MAX} directories in one another")]
    Depth,
    /// An entry that cannot come at this place.
    #[error("entries out of order")]
    Order,
}

/// Why a tree was not sent or not received.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("cannot {doing} {path:?}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Of what; below the tree's root, if it is not the root itself.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Neither file nor directory, where one of them must be.
    #[error("{0:?} is neither a file nor a directory")]
    Special(PathBuf),
    /// A file whose destination is a directory's name.
    #[error("{0:?} ends with a slash, but a file is to be copied there")]
    Slash(PathBuf),
    /// A tree that cannot be.
    #[error("the tree is not as it must be")]
    Invalid(#[from] Invalid),
}

/// What is kept of a file's attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permissions; at most `0o7777`.
    pub mode: u16,
    /// Time of the last change, seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds, below a second.
    pub nanos: u32,
}

/// How much there is to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of all files, holes included.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
    /// What is left out.
    pub skipped: u64,
    /// Files and directories that have extended attributes which are left out.
    pub stripped: u64,
}

/// A part of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// What is to come, for whoever shows progress: nothing relies on it.
    Extent(Extent),
    /// A directory; what follows is in it, until [`Entry::Up`].
    Directory {
        /// Its name.
        name: &'a [u8],
        /// Its attributes.
        meta: Meta,
    },
    /// A file; its data follow.
    File {
        /// Its name.
        name: &'a [u8],
        /// Its attributes.
        meta: Meta,
    },
    /// A symbolic link.
    Link {
        /// Its name.
        name: &'a [u8],
        /// Its time of change.
        meta: Meta,
        /// Where it points.
        target: &'a [u8],
    },
    /// The file's capabilities, as the kernel keeps them; before its data.
    Capability(&'a [u8]),
    /// Data of the file; none: its end.
    Data(&'a [u8]),
    /// So many zeros of the file, which take no room; at least one.
    Hole(u64),
    /// The end of the directory.
    Up,
}

impl<'a> Entry<'a> {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
        let new = |out, kind| codec::Builder::new(out, kind);
        let named = |out, kind, meta: &Meta, name| {
            codec::Builder::new(out, kind)
                .u16(meta.mode)
                .i64(meta.seconds)
                .u32(meta.nanos)
                .bytes(name)
        };
        match self {
            Self::Extent(extent) => new(out, kind::TREE_EXTENT)
                .u64(extent.bytes)
                .u64(extent.entries)
                .u64(extent.skipped)
                .u64(extent.stripped)
                .end(),
            Self::Directory { name, meta } => named(out, kind::TREE_DIRECTORY, meta, name).end(),
            Self::File { name, meta } => named(out, kind::TREE_FILE, meta, name).end(),
            Self::Link { name, meta, target } => {
                named(out, kind::TREE_LINK, meta, name).bytes(target).end()
            }
            Self::Capability(value) => new(out, kind::TREE_CAPABILITY).raw(value).end(),
            Self::Data(bytes) => new(out, kind::TREE_DATA).raw(bytes).end(),
            Self::Hole(length) => new(out, kind::TREE_HOLE).u64(*length).end(),
            Self::Up => new(out, kind::TREE_UP).end(),
        }
    }

    pub(crate) fn decode(frame: Frame<'a>) -> Result<Self, ProtocolError> {
        let mut fields = codec::Fields::new(frame.payload, "tree");
        let entry = match frame.kind {
            kind::TREE_EXTENT => Self::Extent(Extent {
                bytes: fields.u64()?,
                entries: fields.u64()?,
                skipped: fields.u64()?,
                stripped: fields.u64()?,
            }),
            kind::TREE_DIRECTORY => {
                let (meta, name) = named(&mut fields)?;
                Self::Directory { name, meta }
            }
            kind::TREE_FILE => {
                let (meta, name) = named(&mut fields)?;
                Self::File { name, meta }
            }
            kind::TREE_LINK => {
                let (meta, name) = named(&mut fields)?;
                let target = fields.c_bytes(PATH_MAX)?;
                if target.is_empty() {
                    return Err(fields.malformed());
                }
                Self::Link { name, meta, target }
            }
            kind::TREE_CAPABILITY if capability::is_one(frame.payload) => {
                return Ok(Self::Capability(frame.payload));
            }
            kind::TREE_CAPABILITY => return Err(fields.malformed()),
            kind::TREE_DATA => return Ok(Self::Data(frame.payload)),
            kind::TREE_HOLE => match fields.u64()? {
                0 => return Err(fields.malformed()),
                length => Self::Hole(length),
            },
            kind::TREE_UP => Self::Up,
            other => return Err(ProtocolError::Kind(other)),
        };
        fields.end()?;
        Ok(entry)
    }
}

fn named<'a>(fields: &mut codec::Fields<'a>) -> Result<(Meta, &'a [u8]), ProtocolError> {
    let meta = Meta {
        mode: fields.u16()?,
        seconds: fields.i64()?,
        nanos: fields.u32()?,
    };
    if meta.mode & !MODE_MASK != 0 || meta.nanos >= NANOS {
        return Err(fields.malformed());
    }
    let name = fields.bytes(NAME_MAX)?;
    if !name.is_empty() {
        check_name(name)?;
    }
    Ok((meta, name))
}

/// Whether `name` is one component and no way out.
fn check_name(name: &[u8]) -> Result<(), Invalid> {
    let bad = name.is_empty()
        || name.len() > NAME_MAX
        || matches!(name, b"." | b"..")
        || name.iter().any(|byte| matches!(byte, 0 | b'/'));
    if bad { Err(Invalid::Name) } else { Ok(()) }
}
