//! Maps of sparse files in tar archives, in the forms that GNU tar has had: in the header and blocks
//! behind it, and of pax records 0.0 (a record a number), 0.1 (all in one record) and 1.0 (before the
//! data). The archive's author writes them: their length is limited, and whoever keeps the contents
//! holds them against order and the file's length.

use std::io::Read;
use std::ops::Range;

use super::archive::Error;
use super::entries::length;
use super::spool::STRETCHES_MAX;

/// Where the header of the old form has its four stretches, the mark of more, and the file's length.
const HEADER_STRETCHES: Range<usize> = 386..482;
const HEADER_MORE: usize = 482;
const HEADER_LEN: Range<usize> = 483..495;
/// Where a block behind it has 21 more, and the mark of yet more.
const BLOCK_STRETCHES: Range<usize> = 0..504;
const BLOCK_MORE: usize = 504;
/// A stretch: offset and length, 12 bytes each.
const STRETCH_LEN: usize = 24;
/// Longest number, as digits.
const DIGITS_MAX: usize = 20;

/// Where a file has data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    /// The file's length.
    pub len: u64,
    /// Its stretches of data, in the order in which the archive has them.
    pub data: Vec<Range<u64>>,
}

impl Map {
    fn push(&mut self, offset: u64, len: u64) -> Result<(), Error> {
        push(&mut self.data, offset, len)
    }

    /// How many bytes of data there are.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        let lens = self.data.iter().map(|stretch| stretch.end - stretch.start);
        lens.fold(0, u64::saturating_add)
    }
}

fn push(data: &mut Vec<Range<u64>>, offset: u64, len: u64) -> Result<(), Error> {
    if data.len() == STRETCHES_MAX {
        return Err(Error::Sparse);
    }
    let end = offset.checked_add(len).ok_or(Error::Sparse)?;
    // The file's end is marked by one that is empty.
    if len > 0 {
        data.push(offset..end);
    }
    Ok(())
}

/// The map of the old form: what the header has, and `more` gives the blocks behind it.
///
/// # Errors
/// It is not as it must be, or those of `more`.
pub fn of_header(
    header: &[u8; 512],
    mut more: impl FnMut() -> Result<[u8; 512], Error>,
) -> Result<Map, Error> {
    let mut map = Map {
        len: length(&header[HEADER_LEN], "real size")?,
        data: Vec::new(),
    };
    add(&mut map, &header[HEADER_STRETCHES])?;
    let mut is_more = header[HEADER_MORE] != 0;
    // A block that adds nothing must not go on for ever.
    let mut blocks = 0;
    while is_more {
        blocks += 1;
        if blocks > STRETCHES_MAX {
            return Err(Error::Sparse);
        }
        let block = more()?;
        add(&mut map, &block[BLOCK_STRETCHES])?;
        is_more = block[BLOCK_MORE] != 0;
    }
    Ok(map)
}

fn add(map: &mut Map, stretches: &[u8]) -> Result<(), Error> {
    for stretch in stretches.chunks_exact(STRETCH_LEN) {
        let (offset, len) = stretch.split_at(STRETCH_LEN / 2);
        // What is not used is zero.
        if offset[0] == 0 {
            break;
        }
        map.push(length(offset, "map")?, length(len, "map")?)?;
    }
    Ok(())
}

/// What pax records say of a sparse file.
#[derive(Debug, Default)]
pub struct Records {
    /// Its path, where the entry's own is made up.
    pub name: Option<Vec<u8>>,
    /// Whether there is a map, or one before the data.
    is_sparse: bool,
    is_in_data: bool,
    len: Option<u64>,
    offset: Option<u64>,
    data: Vec<Range<u64>>,
}

impl Records {
    /// Takes over the record `GNU.sparse.` and `key`.
    ///
    /// # Errors
    /// It is not as it must be, or of a form that is not known.
    pub fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        self.is_sparse = true;
        match key {
            b"major" => match decimal(value)? {
                0 => {}
                1 => self.is_in_data = true,
                _ => return Err(Error::Sparse),
            },
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.len = Some(decimal(value)?),
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or(Error::Sparse)?;
                push(&mut self.data, offset, decimal(value)?)?;
            }
            b"map" => {
                let mut numbers = value.split(|&byte| byte == b',');
                while let Some(offset) = numbers.next() {
                    let len = numbers.next().ok_or(Error::Sparse)?;
                    push(&mut self.data, decimal(offset)?, decimal(len)?)?;
                }
            }
            // The number of stretches, and a minor version, which changes nothing.
            _ => {}
        }
        Ok(())
    }

    /// The map, if there is one; where it is before the data, it is read from `body`.
    ///
    /// # Errors
    /// It is not as it must be.
    pub fn map(self, body: &mut dyn Read) -> Result<Option<Map>, Error> {
        if !self.is_sparse {
            return Ok(None);
        }
        let mut map = Map {
            len: self.len.ok_or(Error::Sparse)?,
            data: self.data,
        };
        if self.is_in_data {
            let mut numbers = Numbers {
                body,
                block: [0; 512],
                at: 512,
            };
            for _ in 0..numbers.next()? {
                let offset = numbers.next()?;
                map.push(offset, numbers.next()?)?;
            }
        }
        Ok(Some(map))
    }
}

/// Decimal numbers, a line each, in blocks of which the last one is padded.
struct Numbers<'a> {
    body: &'a mut dyn Read,
    block: [u8; 512],
    at: usize,
}

impl Numbers<'_> {
    fn next(&mut self) -> Result<u64, Error> {
        let mut digits = Vec::new();
        loop {
            if self.at == self.block.len() {
                self.body.read_exact(&mut self.block)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' => return decimal(&digits),
                _ if digits.len() == DIGITS_MAX => return Err(Error::Sparse),
                _ => digits.push(byte),
            }
        }
    }
}

fn decimal(digits: &[u8]) -> Result<u64, Error> {
    let text = std::str::from_utf8(digits).ok();
    text.and_then(|text| text.parse().ok()).ok_or(Error::Sparse)
}
