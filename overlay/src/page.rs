//! The words: pages of 4 KiB in spaces, which are the guest's memory and its disks.

use std::fmt;
use std::io;

use crate::bytes::to_u64;

/// Size of a page of memory and of a block of a disk, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Largest number of disks; the VMM has fewer device slots than that.
pub const DISKS_MAX: u8 = 31;
/// Most pages in one space: 2^40 bytes (1 TiB).
pub const SPACE_PAGES_MAX: u64 = 1 << 28;

/// What pages belong to: the guest's memory, or one of its disks.
///
/// A page of `Memory` is numbered by its place in the memory image, where all RAM regions are
/// back to back; a block of a disk by its offset on the disk. Both in units of [`PAGE_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Space {
    /// The guest's RAM.
    Memory,
    /// The disk with this number, below [`DISKS_MAX`].
    Disk(u8),
}

impl Space {
    /// The byte that stands for the space in a file: 0 for memory, 1 + n for disk n.
    pub(crate) fn code(self) -> Option<u8> {
        match self {
            Self::Memory => Some(0),
            Self::Disk(number) if number < DISKS_MAX => Some(number + 1),
            Self::Disk(_) => None,
        }
    }

    /// The space that `code` stands for.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Memory),
            _ if code <= DISKS_MAX => Some(Self::Disk(code - 1)),
            _ => None,
        }
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Disk(number) => write!(f, "disk {number}"),
        }
    }
}

/// Place of one page. Ordered by space, then by page number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageAt {
    /// The space the page is in.
    pub space: Space,
    /// Number of the page in its space.
    pub page: u64,
}

impl PageAt {
    /// A page of the guest's memory.
    #[must_use]
    pub fn memory(page: u64) -> Self {
        Self {
            space: Space::Memory,
            page,
        }
    }

    /// A block of a disk.
    #[must_use]
    pub fn disk(disk: u8, page: u64) -> Self {
        Self {
            space: Space::Disk(disk),
            page,
        }
    }

    /// The page that many pages later in the same space.
    #[must_use]
    pub fn plus(self, pages: u64) -> Self {
        Self {
            space: self.space,
            page: self.page.saturating_add(pages),
        }
    }
}

impl fmt::Display for PageAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x} of {}", self.page, self.space)
    }
}

/// Contiguous pages of one space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSpan {
    /// The first of them.
    pub first: PageAt,
    /// How many, at least 1.
    pub pages: u64,
}

impl PageSpan {
    /// The page number after the last page.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first.page.saturating_add(self.pages)
    }

    /// The places of its pages, in order.
    pub fn places(self) -> impl Iterator<Item = PageAt> {
        (0..self.pages).map(move |page| self.first.plus(page))
    }
}

/// Size of a space, now and in the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceSize {
    /// Which space.
    pub space: Space,
    /// Pages that the VM has in it.
    pub pages: u64,
    /// Pages that the base has in it; 0 where the base does not have the space. A page of the
    /// VM that a delta does not mention is the base's page of that number, and zero from here on.
    pub base_pages: u64,
}

/// Where the pages of a VM or of a base are read from. Shared by the encoder's threads.
pub trait PageReader: Sync {
    /// Reads one page.
    ///
    /// # Errors
    /// The page could not be read, or there is none of that number.
    fn read(&self, at: PageAt, into: &mut [u8; PAGE_BYTES]) -> io::Result<()>;

    /// Reads contiguous pages, as many as fit `into`, whose length is a multiple of
    /// [`PAGE_BYTES`]. One system call or copy is better than many: override where that is so.
    ///
    /// # Errors
    /// As [`PageReader::read`].
    fn read_run(&self, first: PageAt, into: &mut [u8]) -> io::Result<()> {
        let (pages, _) = into.as_chunks_mut::<PAGE_BYTES>();
        for (number, page) in pages.iter_mut().enumerate() {
            self.read(first.plus(to_u64(number)), page)?;
        }
        Ok(())
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    page.as_chunks::<32>()
        .0
        .iter()
        .all(|chunk| *chunk == [0; 32])
}
