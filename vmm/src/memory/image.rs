//! Writing RAM to a memory image: a sparse file of exactly RAM's length, in which zero pages and
//! pages that were never touched are holes.
//!
//! The VM must be paused. [`Ram::image_pages`] says which pages can hold anything but zeros,
//! [`Ram::write_image_run`] writes some of them; several threads may share the work by splitting
//! the runs. [`Ram::write_image`] does all of it on the calling thread.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryError};

use super::layout::{PAGE, PAGE_BYTES, PageRun, PageSet, RamPage, to_u64, to_usize};
use super::pieces::Backing;
use super::ram::{OwnPagesError, Ram};

/// Bytes that are read and written in one go.
const CHUNK_BYTES: u64 = 256 << 10;

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be said which pages hold anything.
    #[error("cannot tell which pages of RAM are in use")]
    Pages(#[source] OwnPagesError),
    /// The base's memory file cannot be searched for data.
    #[error("cannot find the data in the base's memory file")]
    Base(#[source] io::Error),
    /// RAM cannot be read.
    #[error("cannot read page {page} of guest RAM")]
    Read {
        /// The page.
        page: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// A page is outside RAM.
    #[error("page {page} is outside guest RAM")]
    Outside {
        /// The page.
        page: u64,
    },
    /// The file cannot be written.
    #[error("cannot write the memory image")]
    Write(#[source] io::Error),
}

impl Ram {
    /// Writes all of RAM to `image`, whose former contents are dropped, and gives it RAM's length.
    /// Does not sync.
    ///
    /// # Errors
    /// [`ImageError`]; the file is then incomplete.
    pub fn write_image(&self, image: &File) -> Result<(), ImageError> {
        let pages = self.image_pages()?;
        self.start_image(image)?;
        pages
            .runs()
            .try_for_each(|run| self.write_image_run(image, &run))
    }

    /// Empties `image` and gives it RAM's length, all holes: before any
    /// [`Ram::write_image_run`].
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn start_image(&self, image: &File) -> Result<(), ImageError> {
        image.set_len(0).map_err(ImageError::Write)?;
        image
            .set_len(self.layout().bytes())
            .map_err(ImageError::Write)
    }

    /// The pages that can hold anything but zeros: touched ones, and what the base's file has data
    /// for.
    ///
    /// # Errors
    /// [`ImageError::Pages`] (among others if pages are still missing), [`ImageError::Base`].
    pub fn image_pages(&self) -> Result<PageSet, ImageError> {
        let mut pages = self.private_pages().map_err(ImageError::Pages)?;
        if let Some(base) = self.base() {
            for run in self.runs_of(Backing::Base) {
                add_data(base, &run, &mut pages).map_err(ImageError::Base)?;
            }
        }
        Ok(pages)
    }

    /// Writes the pages of `run` that are not zero to their places in `image`.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn write_image_run(&self, image: &File, run: &PageRun) -> Result<(), ImageError> {
        let mut buffer = vec![0u8; to_usize(run.bytes().min(CHUNK_BYTES))];
        let mut at = run.first;
        while at < run.end() {
            let left = PageRun {
                first: at,
                count: run.end().0 - at.0,
            };
            let part = PageRun {
                first: at,
                count: left.count.min(CHUNK_BYTES / PAGE_BYTES),
            };
            let part = self.in_one_region(&part)?;
            let bytes = &mut buffer[..to_usize(part.bytes())];
            self.read_pages(at, bytes)?;
            write_nonzero(image, at.offset(), bytes).map_err(ImageError::Write)?;
            at = part.end();
        }
        Ok(())
    }

    /// The part of `run` from its start on that lies in one region.
    fn in_one_region(&self, run: &PageRun) -> Result<PageRun, ImageError> {
        let mut parts = self
            .layout()
            .regions()
            .iter()
            .map(|region| run.overlap(&region.run()));
        let outside = ImageError::Outside { page: run.first.0 };
        parts
            .find_map(|part| part.filter(|part| part.first == run.first))
            .ok_or(outside)
    }

    /// Reads neighbouring pages of one region.
    fn read_pages(&self, first: RamPage, bytes: &mut [u8]) -> Result<(), ImageError> {
        let gpa = self
            .layout()
            .gpa_of(first)
            .ok_or(ImageError::Outside { page: first.0 })?;
        self.guest()
            .read_slice(bytes, gpa)
            .map_err(|source| ImageError::Read {
                page: first.0,
                source,
            })
    }
}

/// Writes whole pages, but not those that are zero, with one write for neighbours.
fn write_nonzero(image: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut start = 0;
    while start < bytes.len() {
        let zero = is_zero(&bytes[start..start + PAGE]);
        let mut end = start + PAGE;
        while end < bytes.len() && is_zero(&bytes[end..end + PAGE]) == zero {
            end += PAGE;
        }
        if !zero {
            image.write_all_at(&bytes[start..end], offset + to_u64(start))?;
        }
        start = end;
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(64)
        .all(|line| line.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// Adds the pages of `run` for which the file has data. Moves the file's offset, which nothing
/// here relies on.
fn add_data(file: &File, run: &PageRun, pages: &mut PageSet) -> io::Result<()> {
    let end = run.end().offset();
    let mut at = run.first.offset();
    while at < end {
        let Some(data) = seek(file, at, libc::SEEK_DATA)?.filter(|data| *data < end) else {
            return Ok(());
        };
        let hole = seek(file, data, libc::SEEK_HOLE)?
            .unwrap_or(end)
            .clamp(data + 1, end);
        let first = data / PAGE_BYTES;
        pages.insert_run(&PageRun::new(first, hole.div_ceil(PAGE_BYTES) - first));
        at = hole;
    }
    Ok(())
}

/// `lseek`; `None` if there is nothing of the kind behind `at`.
fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let at =
        libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: lseek touches no memory.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) {
        Ok(None)
    } else {
        Err(error)
    }
}
