//! Directories (Documentation/filesystems/ext4/directory.rst). One that fits into a block is a list of
//! names. A larger one is a tree over blocks that are sorted by the hash of their names: without it a
//! guest reads half of the directory for each name that it looks up, and all of it for one that is
//! not there.

use super::checksum::Seed;
use super::dirhash::half_md4;
use super::layout::BLOCK_LEN;
use super::{BLOCK, Error, put16, put32};

/// Bytes of an entry before its name.
const HEAD_LEN: usize = 8;
/// Bytes at a block's end with its checksum, which looks like an entry without a name.
const TAIL_LEN: usize = 12;
/// What that entry has as its kind (`EXT4_FT_DIR_CSUM`).
const TAIL_KIND: u8 = 0xde;
/// Bytes of a block for entries.
const ROOM: usize = BLOCK - TAIL_LEN;
/// Bytes of the entries `.` and `..`.
const DOT_LEN: usize = 12;
/// Where the root of the tree has its list: after `.`, `..` and `struct dx_root_info`.
const ROOT_LIST: usize = 2 * DOT_LEN + 8;
/// Where other nodes have theirs: after an empty entry.
const NODE_LIST: usize = HEAD_LEN;
/// Bytes of a place in a list, and of the checksum behind it (`struct dx_tail`).
const PLACE_LEN: usize = 8;
/// Places in the root, and in other nodes.
const ROOT_PLACES: usize = (BLOCK - ROOT_LIST) / PLACE_LEN - 1;
const NODE_PLACES: usize = (BLOCK - NODE_LIST) / PLACE_LEN - 1;
/// `DX_HASH_HALF_MD4`; the superblock's flag says that it is the unsigned form.
pub(super) const HASH_VERSION: u8 = 1;

/// A name, and what it leads to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    /// The name.
    pub(super) name: &'a [u8],
    /// The inode's number.
    pub(super) inode: u32,
    /// What it is (`EXT4_FT_*`).
    pub(super) kind: u8,
}

impl Entry<'_> {
    fn len(&self) -> usize {
        (HEAD_LEN + self.name.len()).next_multiple_of(4)
    }
}

/// A directory cut into blocks.
#[derive(Debug)]
pub(super) struct Blocks<'a> {
    /// The entries, in the order in which they are written.
    entries: Vec<Entry<'a>>,
    /// Of each block of entries its first one, and what the tree says of it.
    leaves: Vec<(usize, u32)>,
    /// Blocks of the tree between root and leaves.
    nodes: usize,
    /// Empty blocks at the end.
    spare: usize,
    is_indexed: bool,
}

impl<'a> Blocks<'a> {
    /// Cuts a directory with these entries, `.` and `..` left out, into `blocks_min` blocks at least.
    pub(super) fn new(
        entries: Vec<Entry<'a>>,
        blocks_min: usize,
        seed: &[u8; 16],
    ) -> Result<Self, Error> {
        let len: usize = entries.iter().map(Entry::len).sum();
        let is_indexed = 2 * DOT_LEN + len > ROOM;
        let mut blocks = Self {
            entries,
            leaves: vec![(0, 0)],
            nodes: 0,
            spare: 0,
            is_indexed,
        };
        if is_indexed {
            blocks.sort(seed);
            if blocks.leaves.len() > ROOT_PLACES {
                blocks.nodes = blocks.leaves.len().div_ceil(NODE_PLACES);
            }
            if blocks.nodes > ROOT_PLACES {
                return Err(Error::Directory);
            }
        }
        blocks.spare = blocks_min.saturating_sub(blocks.count());
        Ok(blocks)
    }

    /// Sorts entries by their hashes and cuts them into leaves. Where the hash of a leaf's last name is
    /// that of the next one's first, the tree has a mark.
    fn sort(&mut self, seed: &[u8; 16]) {
        let hashed = self
            .entries
            .iter()
            .map(|entry| (half_md4(entry.name, seed), *entry));
        let mut hashed: Vec<_> = hashed.collect();
        hashed.sort_by_key(|&(hash, entry)| (hash, entry.name));
        let (mut room, mut last) = (ROOM, 0);
        for (at, ((hash, _), entry)) in hashed.iter().enumerate() {
            if entry.len() > room {
                self.leaves.push((at, hash | u32::from(*hash == last)));
                room = ROOM;
            }
            room -= entry.len();
            last = *hash;
        }
        self.entries = hashed.into_iter().map(|(_, entry)| entry).collect();
    }

    /// Whether it has a tree (`EXT4_INDEX_FL`).
    pub(super) fn is_indexed(&self) -> bool {
        self.is_indexed
    }

    /// Number of blocks.
    pub(super) fn count(&self) -> usize {
        usize::from(self.is_indexed) + self.nodes + self.leaves.len() + self.spare
    }

    /// Bytes of the directory.
    pub(super) fn len(&self) -> u64 {
        self.count() as u64 * BLOCK_LEN
    }

    /// Directories in it.
    pub(super) fn directories(&self) -> u64 {
        self.entries
            .iter()
            .filter(|entry| entry.kind == super::inode::DIRECTORY_KIND)
            .count() as u64
    }

    /// Hands the blocks to `sink`, in their order; `seed` is the inode's.
    pub(super) fn write(
        &self,
        own: u32,
        parent: u32,
        seed: Seed,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.is_indexed {
            self.index(own, parent, seed, sink)?;
        }
        for (at, &(first, _)) in self.leaves.iter().enumerate() {
            let end = self
                .leaves
                .get(at + 1)
                .map_or(self.entries.len(), |next| next.0);
            let dots = (!self.is_indexed).then_some((own, parent));
            sink(&list(dots, &self.entries[first..end], seed))?;
        }
        for _ in 0..self.spare {
            sink(&list(None, &[], seed))?;
        }
        Ok(())
    }

    /// The root and the other nodes.
    fn index(
        &self,
        own: u32,
        parent: u32,
        seed: Seed,
        sink: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let places = self.leaves.iter().zip(1 + self.nodes..);
        // There are fewer blocks than 2^32.
        let places: Vec<_> = places.map(|(&(_, hash), at)| (hash, at as u32)).collect();
        let parts: Vec<_> = places.chunks(NODE_PLACES).collect();
        let mut root = vec![0; BLOCK];
        dots(&mut root, own, parent, BLOCK);
        root[2 * DOT_LEN + 4] = HASH_VERSION;
        root[2 * DOT_LEN + 5] = (ROOT_LIST - 2 * DOT_LEN) as u8;
        root[2 * DOT_LEN + 6] = u8::from(self.nodes > 0);
        if self.nodes == 0 {
            places_into(&mut root, ROOT_LIST, ROOT_PLACES, &places, seed);
            return sink(&root);
        }
        let above: Vec<_> = parts
            .iter()
            .zip(1..)
            .map(|(part, at)| (part[0].0, at))
            .collect();
        places_into(&mut root, ROOT_LIST, ROOT_PLACES, &above, seed);
        sink(&root)?;
        for part in parts {
            let mut node = vec![0; BLOCK];
            put16(&mut node, 4, BLOCK as u16);
            places_into(&mut node, NODE_LIST, NODE_PLACES, part, seed);
            sink(&node)?;
        }
        Ok(())
    }
}

/// A list of places and its checksum. The first place's hash is understood to be the least.
fn places_into(block: &mut [u8], list: usize, room: usize, places: &[(u32, u32)], seed: Seed) {
    for (at, &(hash, place)) in places.iter().enumerate() {
        let start = list + at * PLACE_LEN;
        put32(block, start, hash);
        put32(block, start + 4, place);
    }
    // At most 510.
    put16(block, list, room as u16);
    put16(block, list + 2, places.len() as u16);
    let used = seed.and(&block[..list + places.len() * PLACE_LEN]);
    let checksum = used.over(&[0; PLACE_LEN]);
    put32(block, list + room * PLACE_LEN + 4, checksum);
}

/// A block of entries.
fn list(own_and_parent: Option<(u32, u32)>, entries: &[Entry<'_>], seed: Seed) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    let (mut at, mut last) = (0, 0);
    if let Some((own, parent)) = own_and_parent {
        dots(&mut block, own, parent, ROOM);
        (at, last) = (2 * DOT_LEN, DOT_LEN);
    }
    for entry in entries {
        // The one before ends here and not at the block's end.
        put16(&mut block, last + 4, (at - last) as u16);
        put(&mut block, at, entry, ROOM - at);
        last = at;
        at += entry.len();
    }
    if at == 0 {
        put16(&mut block, 4, ROOM as u16);
    }
    put16(&mut block, ROOM + 4, TAIL_LEN as u16);
    block[ROOM + 7] = TAIL_KIND;
    let checksum = seed.over(&block[..ROOM]);
    put32(&mut block, ROOM + 8, checksum);
    block
}

/// `.` and `..`, the latter up to `end`.
fn dots(block: &mut [u8], own: u32, parent: u32, end: usize) {
    let kind = super::inode::DIRECTORY_KIND;
    let dot = |name, inode| Entry { name, inode, kind };
    put(block, 0, &dot(b".", own), DOT_LEN);
    put(block, DOT_LEN, &dot(b"..", parent), end - DOT_LEN);
}

/// `struct ext4_dir_entry_2` of `len` bytes.
fn put(block: &mut [u8], at: usize, entry: &Entry<'_>, len: usize) {
    put32(block, at, entry.inode);
    // At most a block, and a name of at most 255 bytes.
    put16(block, at + 4, len as u16);
    block[at + 6] = entry.name.len() as u8;
    block[at + 7] = entry.kind;
    block[at + HEAD_LEN..at + HEAD_LEN + entry.name.len()].copy_from_slice(entry.name);
}
