//! Where what lies (Documentation/filesystems/ext4/blockgroup.rst): the file system is cut into
//! groups of 128 MiB, each with its bitmaps and its part of the inode table at its beginning, some
//! with a copy of superblock and descriptors before that, and data behind it. Data and inodes are
//! given out in order, so that what is used is a beginning of each and no map of it is kept.
//!
//! Groups stand alone: those of mke2fs share the place of their tables (`flex_bg`), which saves a
//! rotating disk its seeks, and no extent reaches over 128 MiB in either way.

use super::Run;

/// Bytes of a block.
pub(super) const BLOCK_LEN: u64 = 4096;
/// Blocks of a group: as many as a block has bits.
pub(super) const BLOCKS_A_GROUP: u64 = 8 * BLOCK_LEN;
/// Bytes of an inode.
pub(super) const INODE_LEN: usize = 256;
/// Inodes of a block of their table.
pub(super) const INODES_A_BLOCK: u64 = BLOCK_LEN / INODE_LEN as u64;
/// Bytes of a group's descriptor (without the feature 64bit, for file systems below 16 TiB).
pub(super) const DESCRIPTOR_LEN: u64 = 32;
/// Most inodes of a group: as many as a block has bits.
const INODES_A_GROUP_MAX: u64 = 8 * BLOCK_LEN;
/// Bytes of the file system an inode: what mke2fs takes by itself.
const BYTES_AN_INODE: u64 = 16384;
/// A last group with fewer blocks for data is left out, as by mke2fs.
const LAST_GROUP_MIN: u64 = 50;
/// Journals are small: what a guest writes to one is in its overlays, and goes round in it.
const JOURNAL_LEN_MIN: u64 = 4 << 20;
const JOURNAL_LEN_MAX: u64 = 32 << 20;
/// Bytes of the file system a byte of its journal.
const BYTES_A_JOURNAL_BYTE: u64 = 32;
/// What sizes are counted in.
pub(super) const MIB: u64 = 1 << 20;

/// The cut of a file system.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// All blocks.
    pub(super) blocks: u64,
    /// All groups.
    pub(super) groups: u64,
    /// Inodes of each group.
    pub(super) inodes_a_group: u64,
    /// Blocks of the journal.
    pub(super) journal: u64,
}

impl Layout {
    /// A file system of `len` bytes with at least `inodes`, if so many are possible.
    pub(super) fn new(len: u64, inodes: u64) -> Option<Self> {
        let inodes = inodes.max(len / BYTES_AN_INODE);
        let journal = (len / BYTES_A_JOURNAL_BYTE).clamp(JOURNAL_LEN_MIN, JOURNAL_LEN_MAX);
        let mut layout = Self {
            blocks: len / BLOCK_LEN,
            groups: 0,
            inodes_a_group: 0,
            journal: journal / BLOCK_LEN,
        };
        loop {
            layout.groups = layout.blocks.div_ceil(BLOCKS_A_GROUP);
            if layout.groups == 0 {
                return None;
            }
            let share = inodes.div_ceil(layout.groups);
            layout.inodes_a_group = share.next_multiple_of(INODES_A_BLOCK);
            if layout.inodes_a_group > INODES_A_GROUP_MAX {
                return None;
            }
            let last = layout.groups - 1;
            if layout.group_len(last) >= layout.overhead(last) + LAST_GROUP_MIN {
                return Some(layout);
            }
            layout.blocks = last * BLOCKS_A_GROUP;
        }
    }

    /// The bytes of the smallest file system, in whole MiB, that has room for `blocks` of data and for
    /// `inodes`.
    pub(super) fn smallest(blocks: u64, inodes: u64) -> u64 {
        let mut len = (blocks * BLOCK_LEN).next_multiple_of(MIB);
        loop {
            let room = Self::new(len, inodes).map_or(0, |layout| layout.room());
            let Some(missing) = blocks.checked_sub(room).filter(|&missing| missing > 0) else {
                return len;
            };
            // Half of it at a time: room grows in step with the length, but for the tables.
            len += (missing.min(blocks / 64 + 1) * BLOCK_LEN).next_multiple_of(MIB);
        }
    }

    /// Blocks for data beside the journal.
    pub(super) fn room(&self) -> u64 {
        let all: u64 = (0..self.groups).map(|group| self.data(group).len).sum();
        all.saturating_sub(self.journal)
    }

    /// Whether a group has a copy of superblock and descriptors (`sparse_super`).
    pub(super) fn has_super(group: u64) -> bool {
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group <= 1 || [3, 5, 7].into_iter().any(is_power)
    }

    /// Blocks of the table of descriptors.
    pub(super) fn descriptor_blocks(&self) -> u64 {
        (self.groups * DESCRIPTOR_LEN).div_ceil(BLOCK_LEN)
    }

    /// The first block of a group.
    pub(super) fn start(group: u64) -> u64 {
        group * BLOCKS_A_GROUP
    }

    /// Blocks of a group.
    pub(super) fn group_len(&self, group: u64) -> u64 {
        (self.blocks - Self::start(group)).min(BLOCKS_A_GROUP)
    }

    /// The block with the bitmap of a group's blocks; that of its inodes is the next.
    pub(super) fn bitmap(&self, group: u64) -> u64 {
        let copy = 1 + self.descriptor_blocks();
        Self::start(group) + if Self::has_super(group) { copy } else { 0 }
    }

    /// The first block of a group's part of the inode table.
    pub(super) fn table(&self, group: u64) -> u64 {
        self.bitmap(group) + 2
    }

    /// Blocks of a group before its data.
    pub(super) fn overhead(&self, group: u64) -> u64 {
        self.table(group) + self.inodes_a_group / INODES_A_BLOCK - Self::start(group)
    }

    /// The blocks of a group that are for data.
    pub(super) fn data(&self, group: u64) -> Run {
        let overhead = self.overhead(group);
        Run {
            start: Self::start(group) + overhead,
            len: self.group_len(group) - overhead,
        }
    }
}

/// Gives out the blocks for data, in order.
#[derive(Debug)]
pub(super) struct Allocator<'a> {
    layout: &'a Layout,
    group: u64,
    /// Blocks of that group's data that are given out.
    used: u64,
}

impl<'a> Allocator<'a> {
    pub(super) fn new(layout: &'a Layout) -> Self {
        Self {
            layout,
            group: 0,
            used: 0,
        }
    }

    /// The next blocks in a row, at most `len`; nothing if all are given out.
    pub(super) fn take(&mut self, len: u64) -> Option<Run> {
        while self.group < self.layout.groups {
            let data = self.layout.data(self.group);
            if self.used < data.len {
                let run = Run {
                    start: data.start + self.used,
                    len: len.min(data.len - self.used),
                };
                self.used += run.len;
                return Some(run);
            }
            self.group += 1;
            self.used = 0;
        }
        None
    }

    /// Blocks of a group's data that are given out.
    pub(super) fn used(&self, group: u64) -> u64 {
        match group.cmp(&self.group) {
            std::cmp::Ordering::Less => self.layout.data(group).len,
            std::cmp::Ordering::Equal => self.used,
            std::cmp::Ordering::Greater => 0,
        }
    }
}
