//! Tar archives, plain, gzip or zstd: GNU's long names and pax records are read here, within limits,
//! before anything is kept. Extended attributes are left out.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use tar::{EntryType, Header, PaxExtensions};

use super::spool::Spool;
use super::tree::{self, Attributes, Kind as Node, Tree};

/// Longest name that a record of its own gives: a path with its final zero.
const NAME_LEN_MAX: u64 = 4097;
/// Longest set of pax records.
const PAX_LEN_MAX: u64 = 1 << 20;
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
    let mut source = BufReader::with_capacity(256 << 10, source);
    let start = source.fill_buf()?;
    let unpacked: Box<dyn Read + '_> = match start {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(source)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(source)?),
        _ => Box::new(source),
    };
    let bounded = Bounded {
        source: unpacked,
        left: len_max,
    };
    if kind == Kind::Layer {
        tree.begin_layer();
    }
    let mut archive = tar::Archive::new(bounded);
    let mut next = Next::default();
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let header = entry.header().clone();
        match header.entry_type() {
            EntryType::GNULongName => next.path = Some(name_of(&mut entry, &header)?),
            EntryType::GNULongLink => next.target = Some(name_of(&mut entry, &header)?),
            EntryType::XHeader => next.add(&record(&mut entry, &header, PAX_LEN_MAX)?)?,
            EntryType::XGlobalHeader => {}
            _ => {
                let about = std::mem::take(&mut next);
                place(&mut entry, &header, about, tree, spool, kind)?;
            }
        }
    }
    Ok(())
}

/// What records say about the entry that follows them.
#[derive(Debug, Default)]
struct Next {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    sparse: bool,
}

impl Next {
    /// Takes over pax records.
    fn add(&mut self, records: &[u8]) -> Result<(), Error> {
        for record in PaxExtensions::new(records) {
            let record = record?;
            let value = record.value_bytes();
            let number = || std::str::from_utf8(value).ok()?.parse().ok();
            match record.key_bytes() {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.target = Some(value.to_vec()),
                b"size" => self.size = number(),
                b"uid" => self.uid = number(),
                b"gid" => self.gid = number(),
                b"mtime" => self.mtime = time(value),
                key if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Reads the record that an entry is.
fn record(entry: &mut impl Read, header: &Header, len_max: u64) -> Result<Vec<u8>, Error> {
    let len = header.entry_size()?;
    if len > len_max {
        return Err(Error::Record(len));
    }
    let mut bytes = Vec::new();
    entry.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn name_of(entry: &mut impl Read, header: &Header) -> Result<Vec<u8>, Error> {
    let mut name = record(entry, header, NAME_LEN_MAX)?;
    let end = name.iter().position(|&byte| byte == 0);
    name.truncate(end.unwrap_or(name.len()));
    Ok(name)
}

/// Puts one entry at its place in the tree.
fn place(
    entry: &mut dyn Read,
    header: &Header,
    about: Next,
    tree: &mut Tree,
    spool: &mut dyn Spool,
    kind: Kind,
) -> Result<(), Error> {
    let path = match &about.path {
        Some(path) => path.clone(),
        None => header.path_bytes().into_owned(),
    };
    if kind == Kind::Layer && whiteout(&path, tree, spool)? {
        return Ok(());
    }
    let attributes = attributes(header, &about)?;
    let target = || match &about.target {
        Some(target) => target.clone(),
        None => header.link_name_bytes().unwrap_or_default().into_owned(),
    };
    let device = || -> Result<(u32, u32), Error> {
        let major = header.device_major()?.unwrap_or(0);
        Ok((major, header.device_minor()?.unwrap_or(0)))
    };
    let unknown = || Error::Kind {
        path: String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned(),
        kind: char::from(header.entry_type().as_byte()),
    };
    let node = match header.entry_type() {
        EntryType::Directory => return Ok(tree.put_directory(&path, attributes, spool)?),
        EntryType::Link => return Ok(tree.link(&path, &target(), spool)?),
        EntryType::Regular | EntryType::Continuous => {
            let len = header.entry_size()?;
            if about.sparse || about.size.is_some_and(|size| size != len) {
                return Err(unknown());
            }
            // An old archive's directory is a file whose name ends so.
            if path.ends_with(b"/") {
                return Ok(tree.put_directory(&path, attributes, spool)?);
            }
            Node::File(spool.store(entry, len)?)
        }
        EntryType::Symlink => Node::Symlink(target()),
        EntryType::Char => device().map(|(major, minor)| Node::Character(major, minor))?,
        EntryType::Block => device().map(|(major, minor)| Node::Block(major, minor))?,
        EntryType::Fifo => Node::Fifo,
        _ => return Err(unknown()),
    };
    Ok(tree.put(&path, attributes, node, spool)?)
}

fn attributes(header: &Header, about: &Next) -> Result<Attributes, Error> {
    let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    // A time before 1970 is a negative number of as many bits.
    let (mtime, nanos) = match about.mtime {
        Some(time) => time,
        None => (header.mtime()?.cast_signed(), 0),
    };
    Ok(Attributes {
        mode: header.mode()? & 0o7777,
        uid: small(about.uid.map_or_else(|| header.uid(), Ok)?),
        gid: small(about.gid.map_or_else(|| header.gid(), Ok)?),
        mtime,
        nanos,
    })
}

/// A time as pax records have it, decimal seconds with a fraction: whole seconds before it, and the
/// nanoseconds from there.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    const NANOS: u32 = 1_000_000_000;
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let nanos = format!("{fraction:0<9.9}").parse().ok()?;
    match (text.starts_with('-'), nanos) {
        (true, 1..) => Some((seconds.checked_sub(1)?, NANOS - nanos)),
        _ => Some((seconds, nanos)),
    }
}

/// Does what the name says if it is one of those that say what is hidden.
fn whiteout(path: &[u8], tree: &mut Tree, spool: &mut dyn Spool) -> Result<bool, Error> {
    let at = path.iter().rposition(|&byte| byte == b'/');
    let (parent, name) = match at {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], path),
    };
    if name == OPAQUE {
        tree.hide_inside(parent, spool)?;
    } else if let Some(hidden) = name.strip_prefix(WHITEOUT) {
        // The rest of that name space belongs to file systems that once used it.
        if !hidden.is_empty() && !hidden.starts_with(WHITEOUT) {
            tree.hide(&[parent, b"/", hidden].concat(), spool)?;
        }
    } else {
        return Ok(false);
    }
    Ok(true)
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
