//! Sparse files, read without touching their holes: an image of a guest with much free memory is
//! mostly holes, and reading one fills the page cache with zeros.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use cloudlet_agent::sparse;

/// A file and where its data lies.
#[derive(Debug)]
pub struct SparseFile {
    file: File,
    len: u64,
    /// Stretches with data, in order.
    data: Vec<Range<u64>>,
}

impl SparseFile {
    /// Looks at `file`, which nobody writes meanwhile. Its position is moved.
    pub fn new(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let data = sparse::data(&file, len).collect::<io::Result<_>>()?;
        Ok(Self { file, len, data })
    }

    /// Fills `buffer` from `offset` on; what is beyond the end is zero.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        let first = self.data.partition_point(|stretch| stretch.end <= offset);
        for stretch in self.data[first..]
            .iter()
            .take_while(|stretch| stretch.start < end)
        {
            let (from, to) = (
                stretch.start.max(offset),
                stretch.end.min(end).min(self.len),
            );
            // Both lie within the buffer, whose length is a usize.
            let part = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
            if from < to {
                self.file
                    .read_exact_at(&mut buffer[part(from)..part(to)], from)?;
            }
        }
        Ok(())
    }

    /// A reader from the beginning to the end.
    #[must_use]
    pub fn reader(&self) -> SparseReader<'_> {
        SparseReader { file: self, at: 0 }
    }
}

/// Reads a [`SparseFile`] in order.
#[derive(Debug)]
pub struct SparseReader<'a> {
    file: &'a SparseFile,
    at: u64,
}

impl Read for SparseReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.file.len - self.at).unwrap_or(usize::MAX);
        let length = left.min(buffer.len());
        self.file.read_at(&mut buffer[..length], self.at)?;
        self.at += length as u64;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_data_and_the_end_read_as_they_are() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 1 << 20).unwrap();
        file.write_all_at(&[9; 3], (3 << 20) + 1).unwrap();
        let mut expected = vec![0; (3 << 20) + 4];
        file.read_exact_at(&mut expected, 0).unwrap();
        let sparse = SparseFile::new(file).unwrap();
        let mut whole = Vec::new();
        sparse.reader().read_to_end(&mut whole).unwrap();
        assert!(whole == expected);
        let mut tail = [1; 8];
        sparse.read_at(&mut tail, 3 << 20).unwrap();
        assert_eq!(tail, [0, 9, 9, 9, 0, 0, 0, 0]);
    }
}
