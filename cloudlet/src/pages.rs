//! Pages as the delta engine reads them: from an image's files, or from a paused VM.

use std::io;

use cloudlet_overlay::{PAGE_BYTES, PageAt, PageReader, Space};

use crate::image::Image;
use crate::sparse::SparseFile;
use crate::store::Error;

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
    memory: SparseFile,
    disks: Vec<SparseFile>,
}

impl ImagePages {
    /// Of `image`.
    pub fn open(image: &Image) -> Result<Self, Error> {
        let sparse = |file| {
            SparseFile::new(file).map_err(|source| Error::Io {
                path: image.dir().to_owned(),
                source,
            })
        };
        Ok(Self {
            memory: sparse(image.memory()?)?,
            disks: image
                .disks()?
                .into_iter()
                .map(sparse)
                .collect::<Result<_, _>>()?,
        })
    }

    fn file(&self, space: Space) -> io::Result<&SparseFile> {
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
        // A disk whose size is no multiple of a page ends in zeros.
        self.file(first.space)?.read_at(into, first.page * PAGE_LEN)
    }
}
