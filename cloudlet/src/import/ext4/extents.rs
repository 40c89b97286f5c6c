//! Which blocks a file's contents lie in (Documentation/filesystems/ext4/ifork.rst): up to four
//! extents in the inode, or a tree of blocks of them.

use super::checksum::Seed;
use super::layout::{Allocator, BLOCK_LEN, BLOCKS_A_GROUP};
use super::{BLOCK, Error, Run, put16, put32};

/// `EXT4_EXT_MAGIC`.
const MAGIC: u16 = 0xf30a;
/// Bytes of a node's head, and of each entry in it.
const PART_LEN: usize = 12;
/// Bytes of the place in an inode.
pub(super) const ROOT_LEN: usize = 60;
/// Entries in an inode.
const ROOT_ENTRIES: usize = ROOT_LEN / PART_LEN - 1;
/// Entries in a block, which ends with a checksum of 4 bytes.
const BLOCK_ENTRIES: usize = (BLOCK - PART_LEN) / PART_LEN;
/// Longest extent (`EXT_INIT_MAX_LEN`); no run is longer, since none leaves its group.
const EXTENT_LEN_MAX: u64 = 1 << 15;
/// A group has at least so many blocks for data, but for a small last one.
const GROUP_DATA_MIN: u64 = BLOCKS_A_GROUP - (2 + 64 + 2 + 2048);

/// Blocks of a file that lie in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// The first of them, counted from the file's beginning.
    pub(super) logical: u32,
    /// Where they lie.
    pub(super) place: Run,
}

/// The most blocks that the tree of a file takes whose contents have `runs` and `blocks`.
pub(super) fn tree_blocks_max(runs: u64, blocks: u64) -> u64 {
    let mut entries = runs + blocks / GROUP_DATA_MIN + 1;
    let mut all = 0;
    while entries > ROOT_ENTRIES as u64 {
        entries = entries.div_ceil(BLOCK_ENTRIES as u64);
        all += entries;
    }
    all
}

/// Finds places for the runs of a file, which are counted in blocks from its beginning.
pub(super) fn allocate(runs: &[Run], allocator: &mut Allocator<'_>) -> Result<Vec<Extent>, Error> {
    let mut extents = Vec::with_capacity(runs.len());
    for run in runs {
        let mut done = 0;
        while done < run.len {
            let len = (run.len - done).min(EXTENT_LEN_MAX);
            let place = allocator.take(len).ok_or(Error::Full)?;
            let logical = u32::try_from(run.start + done).map_err(|_| Error::Full)?;
            extents.push(Extent { logical, place });
            done += place.len;
        }
    }
    Ok(extents)
}

/// A node's entry, and what is in a file's inode and in which blocks.
type Entry = [u8; PART_LEN];

/// The tree over a file's extents.
#[derive(Debug)]
pub(super) struct Tree {
    /// What the inode has of it.
    pub(super) root: [u8; ROOT_LEN],
    /// Blocks with their places.
    pub(super) blocks: Vec<(u64, Vec<u8>)>,
}

/// Makes the tree; `seed` is the inode's.
pub(super) fn tree(
    extents: &[Extent],
    allocator: &mut Allocator<'_>,
    seed: Seed,
) -> Result<Tree, Error> {
    let mut entries: Vec<Entry> = extents.iter().map(leaf).collect();
    let mut blocks = Vec::new();
    let mut depth = 0;
    while entries.len() > ROOT_ENTRIES {
        let mut above = Vec::with_capacity(entries.len() / BLOCK_ENTRIES + 1);
        for part in entries.chunks(BLOCK_ENTRIES) {
            let place = allocator.take(1).ok_or(Error::Full)?.start;
            let mut block = vec![0; BLOCK];
            node(&mut block, part, BLOCK_ENTRIES, depth);
            let end = PART_LEN * (BLOCK_ENTRIES + 1);
            let checksum = seed.over(&block[..end]);
            put32(&mut block, end, checksum);
            blocks.push((place, block));
            above.push(index(&part[0], place));
        }
        entries = above;
        depth += 1;
    }
    let mut root = [0; ROOT_LEN];
    node(&mut root, &entries, ROOT_ENTRIES, depth);
    Ok(Tree { root, blocks })
}

/// `struct ext4_extent`. Places are below 2^32 blocks.
fn leaf(extent: &Extent) -> Entry {
    let mut entry = [0; PART_LEN];
    put32(&mut entry, 0, extent.logical);
    // At most 2^15.
    put16(&mut entry, 4, extent.place.len as u16);
    put32(&mut entry, 8, extent.place.start as u32);
    entry
}

/// `struct ext4_extent_idx`, for a block whose first entry is `first`.
fn index(first: &Entry, place: u64) -> Entry {
    let mut entry = [0; PART_LEN];
    entry[..4].copy_from_slice(&first[..4]);
    put32(&mut entry, 4, place as u32);
    entry
}

/// `struct ext4_extent_header` and what follows it.
fn node(bytes: &mut [u8], entries: &[Entry], room: usize, depth: u16) {
    put16(bytes, 0, MAGIC);
    // At most 340.
    put16(bytes, 2, entries.len() as u16);
    put16(bytes, 4, room as u16);
    put16(bytes, 6, depth);
    for (at, entry) in entries.iter().enumerate() {
        let start = PART_LEN * (at + 1);
        bytes[start..start + PART_LEN].copy_from_slice(entry);
    }
}

const _: () = assert!(BLOCK as u64 == BLOCK_LEN);
