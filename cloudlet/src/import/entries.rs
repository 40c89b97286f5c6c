//! The entries of a tar archive: headers, the records before them that say more (GNU's long names, pax),
//! and contents. Every length is held against a limit before anything of that length is kept.
//!
//! Formats: POSIX.1-2017 (pax, ustar), GNU tar's manual, "Basic Tar Format" and "Sparse Formats".

use std::io::{self, Read};
use std::str::FromStr;

use tar::{EntryType, Header};

use super::archive::Error;
use super::sniff;
use super::sparse::{self, Map};
use super::xattrs::Xattr;

/// Longest name that a record of its own gives: a path with its final zero.
const NAME_LEN_MAX: u64 = 4097;
/// Longest set of pax records.
const PAX_LEN_MAX: u64 = 1 << 20;
/// What everything is padded to.
const BLOCK_LEN: u64 = 512;

/// What an archive says about one entry, in its header and the records before it.
#[derive(Debug)]
pub struct Entry {
    /// The header itself.
    pub header: Header,
    /// What records say instead.
    pub about: Next,
    /// The bytes that follow.
    pub len: u64,
    /// The map of a sparse file of GNU's old form.
    pub map: Option<Map>,
}

/// What records say about the entry that follows them.
#[derive(Debug, Default)]
pub struct Next {
    /// Its path.
    pub path: Option<Vec<u8>>,
    /// Where a link points.
    pub target: Option<Vec<u8>>,
    /// Bytes that follow it.
    pub size: Option<u64>,
    /// Its owner.
    pub uid: Option<i64>,
    /// Its group.
    pub gid: Option<i64>,
    /// Time of the last change: seconds, nanoseconds.
    pub mtime: Option<(i64, u32)>,
    /// The map of a sparse file.
    pub sparse: sparse::Records,
    /// Extended attributes.
    pub xattrs: Vec<Xattr>,
}

impl Next {
    /// Takes over pax records: lines of `LENGTH KEY=VALUE`, where the length counts all of the line, so
    /// that values may have line feeds.
    fn add(&mut self, mut records: &[u8]) -> Result<(), Error> {
        // Zeros at the end are padding.
        while records.first().is_some_and(|&byte| byte != 0) {
            let (key, value, rest) = split_record(records).ok_or(Error::Records)?;
            records = rest;
            let wrong = |what| move || Error::Number(what);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.target = Some(value.to_vec()),
                b"size" => self.size = Some(decimal(value).ok_or_else(wrong("size"))?),
                b"uid" => self.uid = Some(decimal(value).ok_or_else(wrong("owner"))?),
                b"gid" => self.gid = Some(decimal(value).ok_or_else(wrong("group"))?),
                b"mtime" => self.mtime = Some(time(value).ok_or_else(wrong("time"))?),
                key => {
                    if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                        self.sparse.add(key, value)?;
                    } else if let Some(name) = xattr_name(key) {
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }
}

/// The extended attribute that a record is about: star, GNU tar and bsdtar agree on the first form, and
/// have records of their own for lists and labels.
fn xattr_name(key: &[u8]) -> Option<&[u8]> {
    match key {
        b"SCHILY.acl.access" => Some(b"system.posix_acl_access"),
        b"SCHILY.acl.default" => Some(b"system.posix_acl_default"),
        b"RHT.security.selinux" => Some(b"security.selinux"),
        key => key.strip_prefix(b"SCHILY.xattr."),
    }
}

fn decimal<T: FromStr>(value: &[u8]) -> Option<T> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Key, value and what follows of the first of some records.
fn split_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().take(20).position(|&byte| byte == b' ')?;
    let len: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let (record, rest) = records.split_at_checked(len)?;
    let line = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = line.iter().position(|&byte| byte == b'=')?;
    Some((&line[..equals], &line[equals + 1..], rest))
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

/// A number of a header: octal digits, or where the first bit is set, a binary number with a sign.
pub fn number(field: &[u8], what: &'static str) -> Result<i64, Error> {
    let number = match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            // The bit below is the sign.
            let high = i128::from((first << 1).cast_signed() >> 1);
            let all = rest
                .iter()
                .fold(high, |all, &byte| all << 8 | i128::from(byte));
            i64::try_from(all).ok()
        }
        _ => {
            let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
            let digits = field.iter().skip_while(|byte| is_blank(byte));
            let digits: Vec<u8> = digits.copied().take_while(|byte| !is_blank(byte)).collect();
            digits.iter().try_fold(0_i64, |all, &byte| match byte {
                b'0'..=b'7' => all.checked_mul(8)?.checked_add((byte - b'0').into()),
                _ => None,
            })
        }
    };
    number.ok_or(Error::Number(what))
}

/// Reads a number that is a count or a length.
pub fn length(field: &[u8], what: &'static str) -> Result<u64, Error> {
    u64::try_from(number(field, what)?).map_err(|_| Error::Number(what))
}

/// Reads an archive entry by entry; as a reader it gives what follows the last header.
#[derive(Debug)]
pub struct Entries<R> {
    source: R,
    /// What is left of the bytes that follow the last header, and of their padding.
    left: u64,
    padding: u64,
}

impl<R: Read> Read for Entries<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX);
        let len = len.min(buffer.len());
        let count = self.source.read(&mut buffer[..len])?;
        if count == 0 && len > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

impl<R: Read> Entries<R> {
    /// The entries of an archive that is not compressed.
    pub fn new(source: R) -> Self {
        Self {
            source,
            left: 0,
            padding: 0,
        }
    }

    /// The next entry, with all that is said about it; none at the archive's end, which is two blocks of
    /// zeros or the end of the source.
    ///
    /// # Errors
    /// It is damaged or cut, or a record is over its limit.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Error> {
        let mut next = Next::default();
        let mut zeros = 0;
        loop {
            self.skip()?;
            let Some(block) = self.block()? else {
                return Ok(None);
            };
            if block.iter().all(|&byte| byte == 0) {
                zeros += 1;
                if zeros == 2 {
                    return Ok(None);
                }
                continue;
            }
            zeros = 0;
            if !sniff::is_header(&block) {
                return Err(Error::Header);
            }
            let header = Header::from_byte_slice(&block).clone();
            let len = length(&header.as_old().size, "size")?;
            match header.entry_type() {
                EntryType::GNULongName => next.path = Some(self.name(len)?),
                EntryType::GNULongLink => next.target = Some(self.name(len)?),
                EntryType::XHeader => next.add(&self.record(len, PAX_LEN_MAX)?)?,
                EntryType::XGlobalHeader => self.begin(len),
                kind => {
                    let map = match kind {
                        EntryType::GNUSparse => Some(sparse::of_header(&block, || {
                            self.block()?.ok_or_else(|| cut().into())
                        })?),
                        _ => None,
                    };
                    let len = match kind {
                        // Nothing follows a hard link, whatever the size of the file.
                        EntryType::Link => 0,
                        _ => next.size.unwrap_or(len),
                    };
                    self.begin(len);
                    return Ok(Some(Entry {
                        header,
                        about: next,
                        len,
                        map,
                    }));
                }
            }
        }
    }

    /// Reads the source to its end, so that whoever writes it is not cut off, and sums are checked.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn drain(mut self) -> io::Result<()> {
        io::copy(&mut self.source, &mut io::sink()).map(drop)
    }

    fn begin(&mut self, len: u64) {
        self.left = len;
        self.padding = len.wrapping_neg() % BLOCK_LEN;
    }

    /// Passes over what was not read of the last entry.
    fn skip(&mut self) -> io::Result<()> {
        let rest = self.left.saturating_add(self.padding);
        self.begin(0);
        let skipped = io::copy(&mut (&mut self.source).take(rest), &mut io::sink())?;
        if skipped < rest {
            return Err(cut());
        }
        Ok(())
    }

    /// The next block; none at the source's end.
    fn block(&mut self) -> io::Result<Option<[u8; 512]>> {
        let mut block = Vec::with_capacity(512);
        (&mut self.source).take(BLOCK_LEN).read_to_end(&mut block)?;
        match <[u8; 512]>::try_from(block) {
            Ok(block) => Ok(Some(block)),
            Err(part) if part.is_empty() => Ok(None),
            Err(_) => Err(cut()),
        }
    }

    /// The whole of a record about the next entry.
    fn record(&mut self, len: u64, len_max: u64) -> Result<Vec<u8>, Error> {
        if len > len_max {
            return Err(Error::Record(len));
        }
        self.begin(len);
        let mut bytes = Vec::new();
        self.by_ref().take(len).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn name(&mut self, len: u64) -> Result<Vec<u8>, Error> {
        let mut name = self.record(len, NAME_LEN_MAX)?;
        let end = name.iter().position(|&byte| byte == 0);
        name.truncate(end.unwrap_or(name.len()));
        Ok(name)
    }
}

fn cut() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

#[cfg(test)]
#[path = "entries_tests.rs"]
mod tests;
