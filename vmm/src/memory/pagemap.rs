//! Which pages of a private mapping are this process's own, from `/proc/self/pagemap`.
//!
//! The format is in the kernel's `Documentation/admin-guide/mm/pagemap.rst`: 8 bytes a page of
//! address space, in native byte order; bit 63: present, bit 62: swapped out, bit 61: the page
//! belongs to a file (or to shared memory). So in a private mapping a page that is present or
//! swapped out and no file's is a copy of our own: written through a file mapping, or touched in
//! anonymous memory. Guest writes count like any other, since KVM takes the fault on behalf of
//! this process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::layout::{PAGE_BYTES, PageRun, PageSet, RamPage, to_u64, to_usize};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;

const ENTRY_BYTES: usize = 8;
/// Entries that one read takes: 64 KiB of them tell about 32 MiB of memory.
const ENTRIES_MAX: u64 = 8192;

/// Why the page map cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// It cannot be opened.
    #[error("cannot open /proc/self/pagemap, which tells what a VM has changed: is /proc mounted?")]
    Open(#[source] io::Error),
    /// It cannot be read.
    #[error("cannot read {pages} entries of /proc/self/pagemap")]
    Read {
        /// Pages asked about.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The open page map of this process.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens it. Done when RAM is built, before the process gives up the right to open files.
    pub(super) fn open() -> Result<Self, PagemapError> {
        File::open("/proc/self/pagemap")
            .map(|file| Self { file })
            .map_err(PagemapError::Open)
    }

    /// Adds to `set` the pages of `run`, which starts at `host` in this process, that are our own.
    pub(super) fn add_own(
        &self,
        host: u64,
        run: &PageRun,
        set: &mut PageSet,
    ) -> Result<(), PagemapError> {
        let mut buffer = vec![0u8; to_usize(run.count.min(ENTRIES_MAX)) * ENTRY_BYTES];
        let mut done = 0;
        while done < run.count {
            let pages = (run.count - done).min(ENTRIES_MAX);
            let bytes = &mut buffer[..to_usize(pages) * ENTRY_BYTES];
            let entry = host / PAGE_BYTES + done;
            self.file
                .read_exact_at(bytes, entry * to_u64(ENTRY_BYTES))
                .map_err(|source| PagemapError::Read { pages, source })?;
            for own in own_runs(bytes) {
                let first = RamPage(run.first.0 + done + own.first.0);
                set.insert_run(&PageRun {
                    first,
                    count: own.count,
                });
            }
            done += pages;
        }
        Ok(())
    }
}

/// Whether an entry stands for a page of our own.
fn is_own(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0
}

/// The runs of own pages among entries.
fn own_runs(bytes: &[u8]) -> impl Iterator<Item = PageRun> + '_ {
    let mut entries = bytes.chunks_exact(ENTRY_BYTES).map(|chunk| {
        let mut entry = [0; ENTRY_BYTES];
        entry.copy_from_slice(chunk);
        is_own(u64::from_ne_bytes(entry))
    });
    let mut at = 0;
    std::iter::from_fn(move || {
        let skipped = to_u64(entries.by_ref().position(|own| own)?);
        let first = at + skipped;
        let mut count = 1;
        let mut ended = false;
        for own in entries.by_ref() {
            if !own {
                ended = true;
                break;
            }
            count += 1;
        }
        at = first + count + u64::from(ended);
        Some(PageRun::new(first, count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_pages_are_told_from_file_pages_and_holes() {
        let entries = [
            0,
            PRESENT,
            SWAPPED,
            PRESENT | FILE,
            SWAPPED | FILE,
            PRESENT | 0x1234,
            PRESENT | (1 << 55),
            FILE,
            PRESENT,
        ];
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry: &u64| entry.to_ne_bytes())
            .collect();
        let runs: Vec<_> = own_runs(&bytes).collect();
        assert_eq!(
            runs,
            [PageRun::new(1, 2), PageRun::new(5, 2), PageRun::new(8, 1)]
        );
        assert_eq!(own_runs(&[]).count(), 0);
    }
}
