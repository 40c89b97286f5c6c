//! The superblock (Documentation/filesystems/ext4/super.rst), the groups' descriptors and bitmaps
//! (group_descr.rst, bitmaps.rst), and the journal's own superblock (journal.rst).

use super::checksum::{Seed, low};
use super::dir::HASH_VERSION;
use super::extents::ROOT_LEN;
use super::layout::{Allocator, BLOCK_LEN, BLOCKS_A_GROUP, DESCRIPTOR_LEN, INODE_LEN, Layout};
use super::{BLOCK, EPOCH, FIRST_INODE, JOURNAL, UUID, put16, put32};

/// Bytes of the superblock, and before it in the first block.
const LEN: usize = 1024;
const FIRST_AT: usize = 1024;
const LABEL: &[u8] = b"cloudlet";
/// `EXT4_FEATURE_COMPAT_*`: has_journal, ext_attr, dir_index.
const COMPATIBLE: u32 = 0x4 | 0x8 | 0x20;
/// `EXT4_FEATURE_INCOMPAT_*`: filetype, extents.
const INCOMPATIBLE: u32 = 0x2 | 0x40;
/// `EXT4_FEATURE_RO_COMPAT_*`: sparse_super, large_file, huge_file, dir_nlink, extra_isize,
/// metadata_csum.
const READ_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;
/// `EXT2_FLAGS_UNSIGNED_HASH`.
const UNSIGNED_HASH: u32 = 0x2;
/// Mount options by default, as mke2fs has them: user_xattr, acl.
const MOUNT_OPTIONS: u32 = 0x4 | 0x8;
/// `EXT4_BG_*`: inodes not in use, blocks not in use, table zeroed.
const INODES_UNUSED: u16 = 0x1;
const BLOCKS_UNUSED: u16 = 0x2;
const TABLE_ZEROED: u16 = 0x4;

/// What the superblock and the descriptors say of what is used.
#[derive(Debug)]
pub(super) struct Usage<'a> {
    pub(super) layout: &'a Layout,
    pub(super) allocator: &'a Allocator<'a>,
    /// Inodes in use, reserved ones as well: 1 up to this number.
    pub(super) inodes: u64,
    /// Directories of each group.
    pub(super) directories: &'a [u16],
    /// The journal's place as its inode has it, and its length.
    pub(super) journal: &'a [u8; ROOT_LEN],
    pub(super) seed: Seed,
}

impl Usage<'_> {
    fn free_blocks(&self, group: u64) -> u64 {
        self.layout.data(group).len - self.allocator.used(group)
    }

    /// Inodes of a group that are in use.
    fn used_inodes(&self, group: u64) -> u64 {
        let each = self.layout.inodes_a_group;
        self.inodes.saturating_sub(group * each).min(each)
    }

    /// Bitmaps of blocks and of inodes, where there is something to say.
    pub(super) fn bitmaps(&self, group: u64) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
        let (used, inodes) = (self.allocator.used(group), self.used_inodes(group));
        let is_last = group + 1 == self.layout.groups;
        // The bits behind the group's end are set.
        let bitmap = |used, end| {
            let mut bytes = vec![0; BLOCK];
            set(&mut bytes, 0, used);
            set(&mut bytes, end, BLOCKS_A_GROUP);
            bytes
        };
        let blocks = (used > 0 || is_last).then(|| {
            bitmap(
                self.layout.overhead(group) + used,
                self.layout.group_len(group),
            )
        });
        let inodes = (inodes > 0).then(|| bitmap(inodes, self.layout.inodes_a_group));
        (blocks, inodes)
    }

    /// The table of descriptors, whole blocks of it.
    pub(super) fn descriptors(&self, bitmaps: &[(u32, u32)]) -> Vec<u8> {
        let mut table = Vec::new();
        for (group, checksums) in (0..self.layout.groups).zip(bitmaps) {
            table.extend_from_slice(&self.descriptor(group, *checksums));
        }
        table.resize(table.len().next_multiple_of(BLOCK), 0);
        table
    }

    /// The checksums of a group's bitmaps; of what is not written, 0.
    pub(super) fn checksums(&self, bitmaps: &(Option<Vec<u8>>, Option<Vec<u8>>)) -> (u32, u32) {
        let inodes_len = (self.layout.inodes_a_group / 8) as usize;
        let blocks = bitmaps.0.as_ref().map_or(0, |bytes| self.seed.over(bytes));
        let inodes = bitmaps.1.as_ref();
        let inodes = inodes.map_or(0, |bytes| self.seed.over(&bytes[..inodes_len]));
        (blocks, inodes)
    }

    /// `struct ext4_group_desc`. What is counted is at most 2^15, and places are below 2^32.
    fn descriptor(
        &self,
        group: u64,
        (blocks, inodes): (u32, u32),
    ) -> [u8; DESCRIPTOR_LEN as usize] {
        let mut bytes = [0; DESCRIPTOR_LEN as usize];
        let used = self.used_inodes(group);
        let unused = (self.layout.inodes_a_group - used) as u16;
        let is_last = group + 1 == self.layout.groups;
        let mut flags = TABLE_ZEROED;
        if used == 0 {
            flags |= INODES_UNUSED;
        }
        if self.allocator.used(group) == 0 && !is_last {
            flags |= BLOCKS_UNUSED;
        }
        put32(&mut bytes, 0x00, self.layout.bitmap(group) as u32);
        put32(&mut bytes, 0x04, self.layout.bitmap(group) as u32 + 1);
        put32(&mut bytes, 0x08, self.layout.table(group) as u32);
        put16(&mut bytes, 0x0c, self.free_blocks(group) as u16);
        put16(&mut bytes, 0x0e, unused);
        put16(&mut bytes, 0x10, self.directories[group as usize]);
        put16(&mut bytes, 0x12, flags);
        put16(&mut bytes, 0x18, low(blocks));
        put16(&mut bytes, 0x1a, low(inodes));
        put16(&mut bytes, 0x1c, unused);
        // A group's number is below 2^32 as well.
        let checksum = self.seed.and(&(group as u32).to_le_bytes()).over(&bytes);
        put16(&mut bytes, 0x1e, low(checksum));
        bytes
    }

    /// The superblock, or its copy in another group, with what is before and after it in its block.
    pub(super) fn superblock(&self, group: u64) -> Vec<u8> {
        let layout = self.layout;
        let each =
            |count: fn(&Self, u64) -> u64| (0..layout.groups).map(|at| count(self, at)).sum();
        let free: u64 = each(Self::free_blocks);
        let overhead: u64 = (0..layout.groups).map(|group| layout.overhead(group)).sum();
        let inodes = layout.inodes_a_group * layout.groups;
        let mut bytes = [0; LEN];
        // Counts of blocks and inodes are below 2^32 here.
        for (at, value) in [
            (0x00, inodes as u32),
            (0x04, layout.blocks as u32),
            (0x0c, free as u32),
            (0x10, (inodes - self.inodes) as u32),
            // The sizes of a block and of a cluster, as powers of two from 1024 on.
            (0x18, 2),
            (0x1c, 2),
            (0x20, BLOCKS_A_GROUP as u32),
            (0x24, BLOCKS_A_GROUP as u32),
            (0x28, layout.inodes_a_group as u32),
            (0x30, EPOCH),
            (0x40, EPOCH),
            (0x4c, 1),
            (0x54, FIRST_INODE),
            (0x5c, COMPATIBLE),
            (0x60, INCOMPATIBLE),
            (0x64, READ_COMPATIBLE),
            (0xe0, JOURNAL),
            (0x100, MOUNT_OPTIONS),
            (0x108, EPOCH),
            (0x160, UNSIGNED_HASH),
            (0x248, (overhead + layout.journal) as u32),
        ] {
            put32(&mut bytes, at, value);
        }
        for (at, value) in [
            // Never to be checked because of its mounts.
            (0x36, u16::MAX),
            (0x38, 0xef53),
            // Sound, and to go on after an error.
            (0x3a, 1),
            (0x3c, 1),
            (0x58, INODE_LEN as u16),
            // Which copy it is.
            (0x5a, group as u16),
            (0x15c, 32),
            (0x15e, 32),
        ] {
            put16(&mut bytes, at, value);
        }
        bytes[0x68..0x78].copy_from_slice(&UUID);
        bytes[0x78..0x78 + LABEL.len()].copy_from_slice(LABEL);
        bytes[0xec..0xfc].copy_from_slice(&UUID);
        bytes[0xfc] = HASH_VERSION;
        // There is a copy of the journal's place and length.
        bytes[0xfd] = 1;
        bytes[0x10c..0x10c + ROOT_LEN].copy_from_slice(self.journal);
        put32(
            &mut bytes,
            0x10c + ROOT_LEN + 4,
            (layout.journal * BLOCK_LEN) as u32,
        );
        // Checksums are CRC-32C.
        bytes[0x175] = 1;
        let checksum = Seed::EMPTY.over(&bytes[..LEN - 4]);
        put32(&mut bytes, LEN - 4, checksum);
        let mut block = vec![0; BLOCK];
        let at = if group == 0 { FIRST_AT } else { 0 };
        block[at..at + LEN].copy_from_slice(&bytes);
        block
    }
}

/// Sets the bits from `start` up to `end`.
fn set(bytes: &mut [u8], start: u64, end: u64) {
    for bit in start..end {
        bytes[(bit / 8) as usize] |= 1 << (bit % 8);
    }
}

/// The first block of a journal of `blocks`, which is empty: `struct journal_superblock_s`.
pub(super) fn journal(blocks: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    for (at, value) in [
        (0x00, 0xc03b_3998),
        // It is a superblock of the second version.
        (0x04, 4),
        (0x0c, BLOCK as u32),
        (0x10, blocks as u32),
        // Where the log begins, the first number of a transaction, and the file systems that use it.
        (0x14, 1),
        (0x18, 1),
        (0x40, 1),
    ] {
        block[at..at + 4].copy_from_slice(&u32::to_be_bytes(value));
    }
    block[0x30..0x40].copy_from_slice(&UUID);
    block
}
