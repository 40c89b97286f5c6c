//! Pages as the delta engine reads them: from an image's files, or from a paused VM.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use cloudlet_overlay::{PAGE_BYTES, PageAt, PageReader, Space};

use crate::image::{self, Image};

const PAGE_LEN: u64 = PAGE_BYTES as u64;

impl Image {
    /// Its spaces with their sizes in pages; a last piece of a page counts as one.
    #[must_use]
    pub fn spaces(&self) -> Vec<(Space, u64)> {
        let memory = (
            Space::Memory,
            self.description.memory_bytes.div_ceil(PAGE_LEN),
        );
        let disks = (0..).zip(&self.description.disks);
        let disks = disks.map(|(index, disk)| (Space::Disk(index), disk.bytes.div_ceil(PAGE_LEN)));
        std::iter::once(memory).chain(disks).collect()
    }
}

/// The pages in an image's files.
#[derive(Debug)]
pub struct ImagePages {
    memory: File,
    disks: Vec<File>,
}

impl ImagePages {
    /// Of `image`.
    pub fn open(image: &Image) -> Result<Self, image::Error> {
        Ok(Self {
            memory: image.memory()?,
            disks: image.disks()?,
        })
    }

    fn file(&self, space: Space) -> io::Result<&File> {
        match space {
            Space::Memory => Some(&self.memory),
            Space::Disk(index) => self.disks.get(usize::from(index)),
        }
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no {space}")))
    }
}

impl PageReader for ImagePages {
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        self.read_run(at, into)
    }

    fn read_run(&self, first: PageAt, into: &mut [u8]) -> io::Result<()> {
        let file = self.file(first.space)?;
        let mut offset = first.page * PAGE_LEN;
        let mut rest = into;
        while !rest.is_empty() {
            match file.read_at(rest, offset) {
                // A disk whose size is no multiple of a page ends in zeros.
                Ok(0) => {
                    rest.fill(0);
                    return Ok(());
                }
                Ok(length) => {
                    offset += length as u64;
                    rest = &mut rest[length..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
