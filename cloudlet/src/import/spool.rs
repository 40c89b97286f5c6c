//! Contents of files, apart from their names: numbered, counted, and limited in all.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// A file's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// The number it is found by.
    pub number: u64,
    /// Its length.
    pub len: u64,
}

/// Where contents go.
pub trait Spool {
    /// Keeps the `len` bytes that `source` gives.
    ///
    /// # Errors
    /// It gives fewer, the limit of all bytes is passed, or they cannot be written.
    fn store(&mut self, source: &mut dyn Read, len: u64) -> io::Result<Blob>;

    /// The contents again, if they are not longer than `len_max`.
    ///
    /// # Errors
    /// They are longer or cannot be read.
    fn load(&self, blob: Blob, len_max: u64) -> io::Result<Vec<u8>>;

    /// Contents that no name leads to any more.
    fn forget(&mut self, blob: Blob);
}

/// Contents in files named by their numbers.
#[derive(Debug)]
pub struct FileSpool {
    dir: PathBuf,
    next: u64,
    free: u64,
    len_max: u64,
}

impl FileSpool {
    /// A spool in `dir`, which is empty, for at most `len_max` bytes.
    #[must_use]
    pub fn new(dir: &Path, len_max: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            next: 0,
            free: len_max,
            len_max,
        }
    }

    /// How many bytes it takes in all.
    #[must_use]
    pub fn len_max(&self) -> u64 {
        self.len_max
    }
}

impl Spool for FileSpool {
    fn store(&mut self, source: &mut dyn Read, len: u64) -> io::Result<Blob> {
        take_from(&mut self.free, len)?;
        let number = self.next;
        self.next += 1;
        let mut file = File::create_new(self.dir.join(number.to_string()))?;
        let written = io::copy(&mut source.take(len), &mut file)?;
        complete(written, len)?;
        Ok(Blob { number, len })
    }

    fn load(&self, blob: Blob, len_max: u64) -> io::Result<Vec<u8>> {
        short_enough(blob, len_max)?;
        std::fs::read(self.dir.join(blob.number.to_string()))
    }

    fn forget(&mut self, blob: Blob) {
        self.free += blob.len;
        // One that stays takes space until the whole directory goes.
        let _ = std::fs::remove_file(self.dir.join(blob.number.to_string()));
    }
}

/// Contents in memory, for tests and fuzzers.
#[derive(Debug)]
pub struct MemorySpool {
    blobs: Vec<Option<Vec<u8>>>,
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
    fn store(&mut self, source: &mut dyn Read, len: u64) -> io::Result<Blob> {
        take_from(&mut self.free, len)?;
        let mut bytes = Vec::new();
        source.take(len).read_to_end(&mut bytes)?;
        complete(bytes.len() as u64, len)?;
        self.blobs.push(Some(bytes));
        let number = self.blobs.len() as u64 - 1;
        Ok(Blob { number, len })
    }

    fn load(&self, blob: Blob, len_max: u64) -> io::Result<Vec<u8>> {
        short_enough(blob, len_max)?;
        usize::try_from(blob.number)
            .ok()
            .and_then(|number| self.blobs.get(number)?.clone())
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn forget(&mut self, blob: Blob) {
        self.free += blob.len;
        if let Some(slot) = usize::try_from(blob.number)
            .ok()
            .and_then(|number| self.blobs.get_mut(number))
        {
            *slot = None;
        }
    }
}

fn take_from(free: &mut u64, len: u64) -> io::Result<()> {
    *free = free.checked_sub(len).ok_or_else(|| {
        io::Error::other("the files do not fit into the root file system (--size)")
    })?;
    Ok(())
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
