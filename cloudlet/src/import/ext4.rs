//! Writing a tree as an ext4 file system, without privilege and without other programs. The tree is
//! planned first, so that its size is known, then written from the beginning to the end; the same tree
//! gives the same bytes. Structures are those of Documentation/filesystems/ext4 and fs/ext4/ext4.h in
//! Linux; each module names its chapter. All numbers are little-endian, but for the journal's.
//!
//! | module | what |
//! | --- | --- |
//! | [`plan`] | numbers of inodes, holes of files, how much there is |
//! | [`layout`] | groups, and which block is whose |
//! | [`write`] | the order in which all is written |
//! | [`extents`], [`dir`], [`dirhash`], [`inode`], [`xattr`], [`superblock`], [`checksum`] | structures |
//! | [`contents`] | what files have in them |

// Counts and places are far below 2^32, and each module that narrows one says why.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use std::fs::File;
use std::io;
use std::path::Path;

use super::tree::Tree;

mod checksum;
mod contents;
mod dir;
mod dirhash;
mod extents;
mod inode;
mod layout;
mod plan;
mod superblock;
mod write;
mod xattr;

pub use plan::Plan;

/// Bytes of a block.
const BLOCK: usize = 4096;
/// The time of what has none: the release of Debian 12, as in `resources/linux/build-debian`.
const EPOCH: u32 = 1_686_355_200;
/// The identity of all of these file systems.
const UUID: [u8; 16] = [
    0x6b, 0x1c, 0x2f, 0x0e, 0x63, 0x6c, 0x6f, 0x75, 0x64, 0x6c, 0x65, 0x74, 0x0d, 0x0a, 0x1a, 0x0a,
];
/// Numbers of inodes: the root directory, the journal, and the first that is not reserved.
const ROOT_INODE: u32 = 2;
const JOURNAL: u32 = 8;
const FIRST_INODE: u32 = 11;

/// Why there is no file system.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not fit.
    #[error("the root file system needs {needed_mib} MiB (--size {needed_mib})")]
    TooSmall {
        /// The size that it fits into.
        needed_mib: u64,
    },
    /// A file has too many names.
    #[error("a file has {0} names, and ext4 takes 65000")]
    Names(u32),
    /// A directory has too many names.
    #[error("a directory has more names than ext4 takes")]
    Directory,
    /// A file has too long attributes.
    #[error("a file has more extended attributes than fit into a block")]
    Attributes,
    /// A device's numbers are not ones that Linux has.
    #[error("there is no device {major}:{minor}")]
    Device {
        /// Its kind.
        major: u32,
        /// Which of that kind.
        minor: u32,
    },
    /// The plan and what was written disagree.
    #[error("the root file system took more room than was planned")]
    Full,
    /// Contents cannot be read.
    #[error("cannot read a file's contents")]
    Read(#[source] io::Error),
    /// The file system cannot be written.
    #[error("cannot write the root file system")]
    Write(#[source] io::Error),
}

/// Blocks in a row: of the file system, or of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// The first.
    start: u64,
    /// How many.
    len: u64,
}

impl Run {
    fn blocks(self) -> std::ops::Range<u64> {
        self.start..self.start + self.len
    }
}

/// Plans a file system with all of `tree`, whose contents are in `contents`.
///
/// # Errors
/// Something cannot be in any ext4, or cannot be read.
pub fn plan<'a>(tree: &'a Tree, contents: &Path) -> Result<Plan<'a>, Error> {
    Plan::new(tree, contents::Contents::new(contents))
}

impl Plan<'_> {
    /// Writes the file system into `image`, an empty file that gets `len` bytes. `progress` is told how
    /// many bytes of how many are written.
    ///
    /// # Errors
    /// It does not fit, or cannot be written; `image` is of no use then.
    pub fn write(
        &self,
        image: &File,
        len: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), Error> {
        write::write(self, image, len, progress)
    }
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
#[path = "ext4/large_tests.rs"]
mod large_tests;
#[cfg(test)]
#[path = "ext4_tests.rs"]
mod tests;
