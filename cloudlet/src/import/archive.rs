//! Tar archives, plain or compressed, as root file systems and as layers.

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::entries::{Entries, Entry, Next, length, number};
use super::spool::{Blob, Spool};
use super::tree::{self, Attributes, Kind as Node, Tree};
use super::unpack;

/// What an archive may have beside the contents of files.
const OVERHEAD_LEN_MAX: u64 = 2 << 30;
/// Names that say what is not there, in layers.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is damaged, cut, or endless.
    #[error("cannot read the archive")]
    Read(#[from] io::Error),
    /// It is something else.
    #[error(transparent)]
    Other(#[from] unpack::Error),
    /// There is nothing in it.
    #[error("the archive has no entries")]
    Nothing,
    /// What should be an entry's header is none.
    #[error("the archive is damaged: an entry's header has a wrong sum")]
    Header,
    /// A field of a header is no number, or one out of range.
    #[error("the archive is damaged: an entry's {0} is no number that can be")]
    Number(&'static str),
    /// Records about an entry are not as pax says.
    #[error("the archive is damaged: the records about an entry are not as they must be")]
    Records,
    /// The map of a sparse file is of a form that is not known, or damaged.
    #[error("the archive is damaged: the map of a sparse file is not as it must be")]
    Sparse,
    /// A name's or an attribute's record is too long.
    #[error("the archive has a record of {0} bytes about one entry")]
    Record(u64),
    /// There is an entry of a kind that is not known here.
    #[error("{path:?} is an entry of kind {kind:?}, which is not known here")]
    Kind {
        /// Its path.
        path: String,
        /// Its kind, as the archive has it.
        kind: char,
    },
    /// It has what no root file system has.
    #[error(transparent)]
    Tree(#[from] tree::Error),
}

/// What an archive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A root file system.
    Whole,
    /// A layer over others, where names can say what is hidden.
    Layer,
}

/// How long an archive may be, unpacked, whose files have `len` bytes.
#[must_use]
pub fn len_max(len: u64) -> u64 {
    len.saturating_mul(2).saturating_add(OVERHEAD_LEN_MAX)
}

/// Reads an archive into `tree`, at most `len_max` bytes of it after decompression.
///
/// # Errors
/// As [`Error`] says. The tree may have a part of it then.
pub fn read(
    source: impl Read,
    tree: &mut Tree,
    spool: &mut dyn Spool,
    kind: Kind,
    len_max: u64,
) -> Result<(), Error> {
    let bounded = Bounded {
        source: unpack::unpack(source)?,
        left: len_max,
    };
    let mut entries = Entries::new(bounded);
    match kind {
        Kind::Whole => {
            if all(&mut entries, tree, spool, kind)? == 0 {
                return Err(Error::Nothing);
            }
        }
        Kind::Layer => {
            tree.begin_layer();
            let read = all(&mut entries, tree, spool, kind);
            tree.end_layer(spool);
            read?;
        }
    }
    Ok(entries.drain()?)
}

/// Puts all entries into the tree, and says how many there were.
fn all(
    entries: &mut Entries<impl Read>,
    tree: &mut Tree,
    spool: &mut dyn Spool,
    kind: Kind,
) -> Result<u64, Error> {
    let mut count = 0;
    while let Some(entry) = entries.next_entry()? {
        place(entry, entries, tree, spool, kind)?;
        count += 1;
    }
    Ok(count)
}

/// Puts one entry at its place in the tree.
fn place(
    mut entry: Entry,
    body: &mut dyn Read,
    tree: &mut Tree,
    spool: &mut dyn Spool,
    kind: Kind,
) -> Result<(), Error> {
    let xattrs = std::mem::take(&mut entry.about.xattrs);
    let header = &entry.header;
    let named = entry.about.sparse.name.take().or(entry.about.path.take());
    let path = named.unwrap_or_else(|| header.path_bytes().into_owned());
    if kind == Kind::Layer && whiteout(&path, tree)? {
        return Ok(());
    }
    let attributes = attributes(header, &entry.about)?;
    let target = || match &entry.about.target {
        Some(target) => target.clone(),
        None => header.link_name_bytes().unwrap_or_default().into_owned(),
    };
    let node = match header.entry_type() {
        EntryType::Directory => {
            tree.put_directory(&path, attributes, spool)?;
            return Ok(tree.set_xattrs(&path, xattrs)?);
        }
        EntryType::Link => return Ok(tree.link(&path, &target(), spool)?),
        // An old archive's directory is a file whose name ends so.
        EntryType::Regular if path.ends_with(b"/") => {
            return Ok(tree.put_directory(&path, attributes, spool)?);
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            Node::File(contents(entry, body, spool)?)
        }
        EntryType::Symlink => Node::Symlink(target()),
        EntryType::Char => device(header).map(|(major, minor)| Node::Character(major, minor))?,
        EntryType::Block => device(header).map(|(major, minor)| Node::Block(major, minor))?,
        EntryType::Fifo => Node::Fifo,
        other => {
            return Err(Error::Kind {
                path: String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned(),
                kind: char::from(other.as_byte()),
            });
        }
    };
    tree.put(&path, attributes, node, spool)?;
    Ok(tree.set_xattrs(&path, xattrs)?)
}

/// Keeps an entry's contents: those of a sparse file are what its map says.
fn contents(entry: Entry, body: &mut dyn Read, spool: &mut dyn Spool) -> Result<Blob, Error> {
    let mut counted = Counted {
        source: body,
        count: 0,
    };
    let map = match entry.map {
        Some(map) => Some(map),
        None => entry.about.sparse.map(&mut counted)?,
    };
    let Some(map) = map else {
        return Ok(spool.store(body, entry.len)?);
    };
    if counted.count.checked_add(map.data_len()) != Some(entry.len) {
        return Err(Error::Sparse);
    }
    Ok(spool.store_sparse(body, map.len, &map.data)?)
}

fn device(header: &Header) -> Result<(u32, u32), Error> {
    let fields = match (header.as_gnu(), header.as_ustar()) {
        (Some(gnu), _) => (&gnu.dev_major, &gnu.dev_minor),
        (_, Some(ustar)) => (&ustar.dev_major, &ustar.dev_minor),
        _ => return Ok((0, 0)),
    };
    let number = |field| {
        let number = length(field, "device")?;
        u32::try_from(number).map_err(|_| Error::Number("device"))
    };
    Ok((number(fields.0)?, number(fields.1)?))
}

fn attributes(header: &Header, about: &Next) -> Result<Attributes, Error> {
    let fields = header.as_old();
    // Some systems have owners below 0, and nobody has one beyond 32 bits.
    let small = |value: i64| match (u32::try_from(value), i32::try_from(value)) {
        (Ok(value), _) => value,
        (_, Ok(negative)) => negative.cast_unsigned(),
        _ => u32::MAX,
    };
    let said = |said: Option<i64>, field, what| match said {
        Some(number) => Ok(small(number)),
        None => number(field, what).map(small),
    };
    let (mtime, nanos) = match about.mtime {
        Some(time) => time,
        None => (number(&fields.mtime, "time")?, 0),
    };
    Ok(Attributes {
        mode: small(number(&fields.mode, "mode")?) & 0o7777,
        uid: said(about.uid, &fields.uid, "owner")?,
        gid: said(about.gid, &fields.gid, "group")?,
        mtime,
        nanos,
    })
}

/// Does what the name says if it is one of those that say what is hidden.
fn whiteout(path: &[u8], tree: &mut Tree) -> Result<bool, Error> {
    let at = path.iter().rposition(|&byte| byte == b'/');
    let (parent, name) = match at {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], path),
    };
    if name == OPAQUE {
        tree.hide_inside(parent)?;
    } else if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        // The rest of that name space belongs to file systems that once used it.
        if !hidden.is_empty() && !hidden.starts_with(WHITEOUT) {
            tree.hide(&[parent, b"/", hidden].concat())?;
        }
    } else {
        return Ok(false);
    }
    Ok(true)
}

/// A source whose bytes are counted.
struct Counted<'a> {
    source: &'a mut dyn Read,
    count: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.count += count as u64;
        Ok(count)
    }
}

/// A source that ends with an error after so many bytes.
struct Bounded<R> {
    source: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.left = self
            .left
            .checked_sub(count as u64)
            .ok_or_else(|| io::Error::other("the archive is longer than what fits (--size)"))?;
        Ok(count)
    }
}

#[cfg(test)]
#[path = "archive_tests.rs"]
mod tests;
