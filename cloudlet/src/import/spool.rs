//! Contents of files, apart from their names: numbered, counted, and limited in all. Holes of sparse
//! files take no room: on disk a file's contents have the holes that they had.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What contents are counted in, as they are laid out in the file system.
const BLOCK_LEN: u64 = 4096;
/// Longest file in an ext4 of such blocks, which are numbered by 32 bits.
const FILE_LEN_MAX: u64 = BLOCK_LEN * ((1 << 32) - 1);
/// Most stretches of data in a sparse file that are told apart.
pub const STRETCHES_MAX: usize = 1 << 20;

/// A file's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// The number it is found by.
    pub number: u64,
    /// Its length, holes included.
    pub len: u64,
    /// Bytes of the blocks that hold its data.
    pub taken: u64,
}

/// Where contents go.
pub trait Spool {
    /// Keeps the `len` bytes that `source` gives.
    ///
    /// # Errors
    /// It gives fewer, the limit of all bytes is passed, or they cannot be written.
    fn store(&mut self, source: &mut dyn Read, len: u64) -> io::Result<Blob> {
        self.store_sparse(source, len, std::slice::from_ref(&(0..len)))
    }

    /// Keeps `len` bytes that are zero but for the stretches `data`, which are in order: `source` gives
    /// one after the other. What is between them stays a hole.
    ///
    /// # Errors
    /// As [`Spool::store`], and if the stretches are not in order or lead out of the file.
    fn store_sparse(
        &mut self,
        source: &mut dyn Read,
        len: u64,
        data: &[Range<u64>],
    ) -> io::Result<Blob>;

    /// The contents again, if they are not longer than `len_max`.
    ///
    /// # Errors
    /// They are longer or cannot be read.
    fn load(&self, blob: Blob, len_max: u64) -> io::Result<Vec<u8>>;

    /// Contents that no name leads to any more.
    fn forget(&mut self, blob: Blob);
}

/// Contents in files named by their numbers; what they have of holes are holes there.
#[derive(Debug)]
pub struct FileSpool {
    dir: PathBuf,
    next: u64,
    free: u64,
}

impl FileSpool {
    /// A spool in `dir`, which is empty, for at most `len_max` bytes.
    #[must_use]
    pub fn new(dir: &Path, len_max: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            next: 0,
            free: len_max,
        }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where contents are.
    #[must_use]
    pub fn path(&self, blob: Blob) -> PathBuf {
        self.dir.join(blob.number.to_string())
    }
}

impl Spool for FileSpool {
    fn store_sparse(
        &mut self,
        source: &mut dyn Read,
        len: u64,
        data: &[Range<u64>],
    ) -> io::Result<Blob> {
        let taken = take_from(&mut self.free, len, data)?;
        let number = self.next;
        self.next += 1;
        let mut file = File::create_new(self.dir.join(number.to_string()))?;
        for stretch in data {
            let wanted = stretch.end - stretch.start;
            file.seek(SeekFrom::Start(stretch.start))?;
            complete(io::copy(&mut source.take(wanted), &mut file)?, wanted)?;
        }
        if data.last().is_none_or(|stretch| stretch.end < len) {
            file.set_len(len)?;
        }
        Ok(Blob { number, len, taken })
    }

    fn load(&self, blob: Blob, len_max: u64) -> io::Result<Vec<u8>> {
        short_enough(blob, len_max)?;
        std::fs::read(self.path(blob))
    }

    fn forget(&mut self, blob: Blob) {
        self.free += blob.taken;
        // One that stays takes space until the whole directory goes.
        let _ = std::fs::remove_file(self.path(blob));
    }
}

/// Stretches of data with their offsets.
type Parts = Vec<(u64, Vec<u8>)>;

/// Contents in memory, for tests and fuzzers.
#[derive(Debug)]
pub struct MemorySpool {
    blobs: Vec<Option<Parts>>,
    free: u64,
}

impl MemorySpool {
    /// A spool for at most `len_max` bytes.
    #[must_use]
    pub fn new(len_max: u64) -> Self {
        Self {
            blobs: Vec::new(),
            free: len_max,
        }
    }
}

impl Spool for MemorySpool {
    fn store_sparse(
        &mut self,
        source: &mut dyn Read,
        len: u64,
        data: &[Range<u64>],
    ) -> io::Result<Blob> {
        let taken = take_from(&mut self.free, len, data)?;
        let mut parts = Vec::new();
        for stretch in data {
            let wanted = stretch.end - stretch.start;
            let mut bytes = Vec::new();
            source.take(wanted).read_to_end(&mut bytes)?;
            complete(bytes.len() as u64, wanted)?;
            parts.push((stretch.start, bytes));
        }
        self.blobs.push(Some(parts));
        let number = self.blobs.len() as u64 - 1;
        Ok(Blob { number, len, taken })
    }

    fn load(&self, blob: Blob, len_max: u64) -> io::Result<Vec<u8>> {
        short_enough(blob, len_max)?;
        let at = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
        let parts = self.blobs.get(at(blob.number)?).and_then(Option::as_ref);
        let mut bytes = vec![0; at(blob.len)?];
        for (offset, part) in parts.ok_or(io::ErrorKind::NotFound)? {
            bytes[at(*offset)?..][..part.len()].copy_from_slice(part);
        }
        Ok(bytes)
    }

    fn forget(&mut self, blob: Blob) {
        self.free += blob.taken;
        if let Some(slot) = usize::try_from(blob.number)
            .ok()
            .and_then(|number| self.blobs.get_mut(number))
        {
            *slot = None;
        }
    }
}

/// The one gate for what is kept: stretches are in order and within the file, and there is room for
/// the blocks that they lie in, which is taken.
fn take_from(free: &mut u64, len: u64, data: &[Range<u64>]) -> io::Result<u64> {
    if len > FILE_LEN_MAX {
        let words = format!("a file of {len} bytes is longer than any in an ext4 file system");
        return Err(io::Error::other(words));
    }
    let mut taken = 0;
    let (mut end, mut counted) = (0, 0);
    for stretch in data {
        if stretch.start < end || stretch.end < stretch.start || stretch.end > len {
            let words = "the map of a sparse file is not in order";
            return Err(io::Error::new(io::ErrorKind::InvalidData, words));
        }
        end = stretch.end;
        if stretch.is_empty() {
            continue;
        }
        let first = (stretch.start / BLOCK_LEN * BLOCK_LEN).max(counted);
        counted = stretch.end.next_multiple_of(BLOCK_LEN);
        taken += counted - first;
    }
    *free = free.checked_sub(taken).ok_or_else(|| {
        io::Error::other("the files do not fit into the root file system (--size)")
    })?;
    Ok(taken)
}

fn complete(written: u64, len: u64) -> io::Result<()> {
    if written == len {
        return Ok(());
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

fn short_enough(blob: Blob, len_max: u64) -> io::Result<()> {
    if blob.len <= len_max {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "a file of {} bytes is longer than {len_max}",
        blob.len
    )))
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    clippy::reversed_empty_ranges,
    reason = "maps of one stretch, and such as lie"
)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const PARTS: [Range<u64>; 3] = [5..8, 1 << 20..(1 << 20) + 2, 2 << 20..2 << 20];

    fn spools(dir: &Path, len_max: u64) -> [Box<dyn Spool>; 2] {
        [
            Box::new(FileSpool::new(dir, len_max)),
            Box::new(MemorySpool::new(len_max)),
        ]
    }

    #[test]
    fn what_is_sparse_stays_so_and_only_its_blocks_count() {
        let dir = tempfile::tempdir().unwrap();
        for mut spool in spools(dir.path(), 2 * BLOCK_LEN) {
            let len = (2 << 20) + 7;
            let blob = spool.store_sparse(&mut &b"abcde"[..], len, &PARTS).unwrap();
            assert_eq!((blob.len, blob.taken), (len, 2 * BLOCK_LEN));
            let bytes = spool.load(blob, len).unwrap();
            let mut expected = vec![0; usize::try_from(len).unwrap()];
            expected[5..8].copy_from_slice(b"abc");
            expected[1 << 20..(1 << 20) + 2].copy_from_slice(b"de");
            assert!(bytes == expected);
            assert!(spool.store(&mut &b"x"[..], 1).is_err());
            // A hole of any length takes nothing.
            spool
                .store_sparse(&mut io::empty(), 200 << 30, &[])
                .unwrap();
            spool.forget(blob);
            spool.store(&mut &b"x"[..], 1).unwrap();
        }
        let on_disk = |number: u32| dir.path().join(number.to_string()).metadata().unwrap();
        assert_eq!((on_disk(1).len(), on_disk(1).blocks()), (200 << 30, 0));
    }

    #[test]
    fn maps_that_lie_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for mut spool in spools(dir.path(), 1 << 20) {
            for (len, map) in [
                (9, vec![5..8, 7..9]),
                (9, vec![5..8, 0..2]),
                (9, vec![5..10]),
                (9, vec![5..4]),
                (9, vec![u64::MAX - 1..u64::MAX]),
                (u64::MAX, vec![]),
                (FILE_LEN_MAX, vec![0..FILE_LEN_MAX]),
            ] {
                let stored = spool.store_sparse(&mut io::repeat(7), len, &map);
                assert!(stored.is_err(), "{len} {map:?}");
            }
            assert!(spool.store(&mut &b"few"[..], 4).is_err());
        }
    }
}
