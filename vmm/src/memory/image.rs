//! Writing RAM to a memory image: a sparse file of exactly RAM's length, in which zero pages and
//! pages that were never touched are holes.
//!
//! The VM must be paused. [`Ram::image_pages`] says which pages can hold anything but zeros,
//! [`Ram::write_image_run`] writes some of them; several threads may share the work by splitting
//! the runs. [`Ram::write_image`] does all of it on the calling thread.

use std::fs::File;
use std::io;

use vm_memory::{Bytes, GuestMemoryError};

use super::layout::{LayoutError, PAGE, PAGE_BYTES, PageRun, PageSet, RamPage, to_u64, to_usize};
use super::pieces::Backing;
use super::ram::{OwnPagesError, Ram};
use crate::sparse;

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
    /// The pages to write are not all RAM.
    #[error("cannot write pages that RAM does not have")]
    Outside(#[source] LayoutError),
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
        self.layout().check(run).map_err(ImageError::Outside)?;
        let mut buffer = vec![0u8; to_usize(run.bytes().min(CHUNK_BYTES))];
        let regions = self.layout().regions().iter();
        for mut left in regions.filter_map(|region| run.overlap(&region.run())) {
            while left.count > 0 {
                let count = left.count.min(CHUNK_BYTES / PAGE_BYTES);
                let bytes = &mut buffer[..to_usize(count * PAGE_BYTES)];
                self.read_pages(left.first, bytes)?;
                sparse::write_nonzero(image, left.first.offset(), bytes)
                    .map_err(ImageError::Write)?;
                left = PageRun::new(left.first.0 + count, left.count - count);
            }
        }
        Ok(())
    }

    /// Reads neighbouring pages, as many as `bytes` has room for; they may lie on both sides of
    /// the hole.
    ///
    /// # Errors
    /// [`ImageError::Read`], also if there are no such pages.
    pub fn read_pages(&self, first: RamPage, bytes: &mut [u8]) -> Result<(), ImageError> {
        let read = |source| ImageError::Read {
            page: first.0,
            source,
        };
        let wanted = PageRun::new(first.0, to_u64(bytes.len() / PAGE));
        let mut rest = bytes;
        for run in self
            .layout()
            .regions()
            .iter()
            .filter_map(|region| wanted.overlap(&region.run()))
        {
            let none = GuestMemoryError::InvalidBackendAddress;
            let gpa = self.layout().gpa_of(run.first).ok_or_else(|| read(none))?;
            let (part, after) = rest.split_at_mut(to_usize(run.bytes()));
            self.guest().read_slice(part, gpa).map_err(read)?;
            rest = after;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(read(GuestMemoryError::InvalidBackendAddress))
        }
    }
}

/// Adds the pages of `run` for which the file has data.
fn add_data(file: &File, run: &PageRun, pages: &mut PageSet) -> io::Result<()> {
    for extent in sparse::data(file, run.first.offset()..run.end().offset()) {
        let extent = extent?;
        let first = extent.start / PAGE_BYTES;
        pages.insert_run(&PageRun::new(
            first,
            extent.end.div_ceil(PAGE_BYTES) - first,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::{HOLE_END, HOLE_START, RamLayout};

    fn blocks_bytes(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn untouched_ram_is_a_hole_as_long_as_ram() {
        let layout = RamLayout::new(HOLE_START + (64 << 20)).unwrap();
        let ram = Ram::anonymous(&layout).unwrap();
        let image = tempfile::tempfile().unwrap();
        ram.write_image(&image).unwrap();
        assert_eq!(image.metadata().unwrap().len(), layout.bytes());
        assert_eq!(blocks_bytes(&image), 0);
    }

    #[test]
    fn an_image_round_trips_on_both_sides_of_the_hole() {
        let layout = RamLayout::new(HOLE_START + (8 << 20)).unwrap();
        let ram = Ram::anonymous(&layout).unwrap();
        let spots = [0, 5000, HOLE_START - 8, HOLE_END, HOLE_END + (8 << 20) - 8];
        for gpa in spots {
            ram.guest().write_obj(gpa + 1, GuestAddress(gpa)).unwrap();
        }
        ram.guest().write_obj(0u64, GuestAddress(1 << 20)).unwrap();
        assert_eq!(ram.image_pages().unwrap().count(), 6);
        let image = tempfile::tempfile().unwrap();
        ram.write_image(&image).unwrap();
        assert!(blocks_bytes(&image) <= 64 << 10, "zero pages are holes");

        let clone = Ram::from_image(&layout, &image).unwrap();
        for gpa in spots {
            assert_eq!(
                clone.guest().read_obj::<u64>(GuestAddress(gpa)).unwrap(),
                gpa + 1
            );
        }
        assert!(clone.private_pages().unwrap().is_empty());
        // Data that is not written again comes from the base's file.
        clone
            .guest()
            .write_obj(7u64, GuestAddress(1 << 21))
            .unwrap();
        let second = tempfile::tempfile().unwrap();
        clone.write_image(&second).unwrap();
        let mut bytes = [0; 8];
        for (offset, value) in [(0, 1), (HOLE_START, HOLE_END + 1), (1 << 21, 7)] {
            second.read_exact_at(&mut bytes, offset).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), value);
        }
    }

    #[test]
    fn pages_outside_ram_are_no_part_of_an_image() {
        let ram = Ram::anonymous(&RamLayout::new(16 * PAGE_BYTES).unwrap()).unwrap();
        let image = tempfile::tempfile().unwrap();
        for run in [
            PageRun::new(16, 1),
            PageRun::new(10, 10),
            PageRun::new(u64::MAX, 5),
        ] {
            assert!(ram.write_image_run(&image, &run).is_err(), "{run:?}");
        }
    }
}
