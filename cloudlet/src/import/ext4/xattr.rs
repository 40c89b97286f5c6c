//! Extended attributes (Documentation/filesystems/ext4/attributes.rst): behind the inode's fields if
//! they fit there, else in one block.

use super::checksum::Seed;
use super::inode::XATTRS_AT;
use super::layout::INODE_LEN;
use super::{BLOCK, put16, put32};
use crate::import::xattrs::Xattr;

/// `EXT4_XATTR_MAGIC`.
const MAGIC: u32 = 0xea02_0000;
/// Bytes of an entry before its name.
const HEAD_LEN: usize = 16;
/// Bytes of the head of a block (`struct ext4_xattr_header`).
const BLOCK_HEAD_LEN: usize = 32;
/// Bytes that the list ends with.
const END_LEN: usize = 4;
/// Bytes behind an inode's fields, the magic number left out.
const INODE_ROOM: usize = INODE_LEN - XATTRS_AT - 4;
/// Bytes of a block behind its head.
const BLOCK_ROOM: usize = BLOCK - BLOCK_HEAD_LEN;
/// How names begin, and the numbers for that (`EXT4_XATTR_INDEX_*`).
const PREFIXES: [(&[u8], u8); 2] = [(b"user.", 1), (b"security.", 6)];

/// A file's attributes as they are written.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    /// What follows the inode's fields.
    pub(super) inode: Vec<u8>,
    /// A block.
    pub(super) block: Option<Vec<u8>>,
}

/// Whether attributes fit into one block: no others can be written.
pub(super) fn fit(attributes: &[Xattr]) -> bool {
    let entries: Vec<_> = attributes.iter().filter_map(split).collect();
    needed(&entries) <= BLOCK_ROOM
}

/// Writes attributes that [`fit`]; those of a kind that is not written are left out.
pub(super) fn encode(attributes: &[Xattr]) -> Encoded {
    let mut entries: Vec<Entry<'_>> = attributes.iter().filter_map(split).collect();
    entries.sort_by_key(|entry| (entry.prefix, entry.name.len(), entry.name));
    if entries.is_empty() {
        return Encoded::default();
    }
    if needed(&entries) <= INODE_ROOM {
        let mut bytes = vec![0; INODE_LEN - XATTRS_AT];
        put32(&mut bytes, 0, MAGIC);
        // Places of values are counted from the first entry here, and from the beginning of a block.
        let _ = list(&mut bytes[4..], &entries, 0);
        return Encoded {
            inode: bytes,
            block: None,
        };
    }
    let mut block = vec![0; BLOCK];
    let hash = list(&mut block, &entries, BLOCK_HEAD_LEN);
    put32(&mut block, 0, MAGIC);
    // Files that use it, and blocks.
    put32(&mut block, 4, 1);
    put32(&mut block, 8, 1);
    put32(&mut block, 12, hash);
    Encoded {
        inode: Vec::new(),
        block: Some(block),
    }
}

/// Puts the checksum into a block that will be at `place`.
pub(super) fn seal(block: &mut [u8], place: u64, seed: Seed) {
    let checksum = seed.and(&place.to_le_bytes()).over(block);
    put32(block, 16, checksum);
}

struct Entry<'a> {
    prefix: u8,
    name: &'a [u8],
    value: &'a [u8],
}

fn split((name, value): &Xattr) -> Option<Entry<'_>> {
    PREFIXES.iter().find_map(|&(prefix, number)| {
        let name = name.strip_prefix(prefix)?;
        Some(Entry {
            prefix: number,
            name,
            value,
        })
    })
}

fn needed(entries: &[Entry<'_>]) -> usize {
    let one = |entry: &Entry<'_>| {
        (HEAD_LEN + entry.name.len()).next_multiple_of(4) + entry.value.len().next_multiple_of(4)
    };
    entries.iter().map(one).sum::<usize>() + END_LEN
}

/// Writes the list from `start` on, and values from the end of `bytes` back. Returns the hash of all.
fn list(bytes: &mut [u8], entries: &[Entry<'_>], start: usize) -> u32 {
    let (mut at, mut end) = (start, bytes.len());
    let mut all = 0_u32;
    for entry in entries {
        // All of it is less than a block.
        end -= entry.value.len().next_multiple_of(4);
        bytes[end..end + entry.value.len()].copy_from_slice(entry.value);
        let hash = hash(entry);
        all = all.rotate_left(16) ^ hash;
        bytes[at] = entry.name.len() as u8;
        bytes[at + 1] = entry.prefix;
        put16(
            bytes,
            at + 2,
            if entry.value.is_empty() {
                0
            } else {
                end as u16
            },
        );
        put32(bytes, at + 8, entry.value.len() as u32);
        put32(bytes, at + 12, hash);
        at += HEAD_LEN;
        bytes[at..at + entry.name.len()].copy_from_slice(entry.name);
        at = (at + entry.name.len()).next_multiple_of(4);
    }
    all
}

/// `ext4_xattr_hash_entry` of fs/ext4/xattr.c.
fn hash(entry: &Entry<'_>) -> u32 {
    let name = entry.name.iter();
    let name = name.fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    entry.value.chunks(4).fold(name, |hash, chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}
