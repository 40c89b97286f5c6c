//! Inodes (Documentation/filesystems/ext4/inodes.rst; `struct ext4_inode` of fs/ext4/ext4.h).

use super::checksum::{Seed, high, low};
use super::extents::ROOT_LEN;
use super::layout::INODE_LEN;
use super::{BLOCK, EPOCH, Error, put16, put32};
use crate::import::tree::{Attributes, Kind};

/// A directory's kind in an entry (`EXT4_FT_DIR`).
pub(super) const DIRECTORY_KIND: u8 = 2;
/// Its inode uses extents (`EXT4_EXTENTS_FL`), and a directory's has a tree (`EXT4_INDEX_FL`).
const EXTENTS: u32 = 0x8_0000;
pub(super) const INDEX: u32 = 0x1000;
/// Bytes of fields beyond the first 128.
const EXTRA_LEN: u16 = 32;
/// Where extended attributes begin.
pub(super) const XATTRS_AT: usize = 128 + EXTRA_LEN as usize;
/// Bytes of a unit of lengths on disks.
const SECTOR_LEN: u64 = 512;
/// The times that can be said: 32 bits from 1901 on, and two more for what comes after.
const TIME_MIN: i64 = i32::MIN as i64;
const TIME_MAX: i64 = TIME_MIN + (1 << 34) - 1;
/// The greatest numbers of a device.
const MAJOR_MAX: u32 = 0xfff;
const MINOR_MAX: u32 = 0xf_ffff;

/// What an inode is made of.
#[derive(Debug)]
pub(super) struct Inode<'a> {
    /// Kind and permissions.
    pub(super) mode: u16,
    /// Owner, group, times.
    pub(super) attributes: Attributes,
    /// Names; of a directory with more of them than fit, 1.
    pub(super) links: u16,
    /// Length of the contents.
    pub(super) len: u64,
    /// Blocks of its own: contents, tree, attributes.
    pub(super) blocks: u64,
    /// Flags beside that for extents.
    pub(super) flags: u32,
    /// Where the contents are.
    pub(super) place: Place,
    /// What follows its fields.
    pub(super) xattrs: &'a [u8],
    /// The block with more attributes, or 0.
    pub(super) xattr_block: u64,
}

/// Where contents are, or what is in their place.
#[derive(Debug)]
pub(super) enum Place {
    /// The root of a tree of extents.
    Extents([u8; ROOT_LEN]),
    /// The contents themselves, or a device's numbers.
    Inline([u8; ROOT_LEN]),
}

impl Inode<'_> {
    /// Its bytes; `seed` is its own.
    pub(super) fn encode(&self, seed: Seed) -> [u8; INODE_LEN] {
        let mut bytes = [0; INODE_LEN];
        let Attributes { uid, gid, .. } = self.attributes;
        put16(&mut bytes, 0x00, self.mode);
        put16(&mut bytes, 0x02, low(uid));
        put16(&mut bytes, 0x78, high(uid));
        put16(&mut bytes, 0x18, low(gid));
        put16(&mut bytes, 0x7a, high(gid));
        put32(&mut bytes, 0x04, self.len as u32);
        put32(&mut bytes, 0x6c, (self.len >> 32) as u32);
        put16(&mut bytes, 0x1a, self.links);
        let sectors = self.blocks * (BLOCK as u64 / SECTOR_LEN);
        put32(&mut bytes, 0x1c, sectors as u32);
        put16(&mut bytes, 0x74, (sectors >> 32) as u16);
        // Times: of the last read, of the last change of the inode, of its making, of its contents.
        let fixed = time(i64::from(EPOCH), 0);
        let changed = time(self.attributes.mtime, self.attributes.nanos);
        for (at, extra_at, (seconds, extra)) in [
            (0x08, 0x8c, fixed),
            (0x0c, 0x84, fixed),
            (0x90, 0x94, fixed),
            (0x10, 0x88, changed),
        ] {
            put32(&mut bytes, at, seconds);
            put32(&mut bytes, extra_at, extra);
        }
        let (place, flag) = match &self.place {
            Place::Extents(root) => (root, EXTENTS),
            Place::Inline(inline) => (inline, 0),
        };
        put32(&mut bytes, 0x20, self.flags | flag);
        bytes[0x28..0x28 + ROOT_LEN].copy_from_slice(place);
        put32(&mut bytes, 0x68, self.xattr_block as u32);
        put16(&mut bytes, 0x80, EXTRA_LEN);
        bytes[XATTRS_AT..XATTRS_AT + self.xattrs.len()].copy_from_slice(self.xattrs);
        let checksum = seed.over(&bytes);
        put16(&mut bytes, 0x7c, low(checksum));
        put16(&mut bytes, 0x82, high(checksum));
        bytes
    }
}

/// Seconds and nanoseconds as the two fields of a time; what cannot be said is the nearest that can.
fn time(seconds: i64, nanos: u32) -> (u32, u32) {
    let seconds = seconds.clamp(TIME_MIN, TIME_MAX);
    // The low half is a signed number, and the rest counts how often it went round.
    let low = seconds as i32;
    let rounds = (seconds - i64::from(low)) >> 32;
    (low as u32, nanos << 2 | rounds as u32)
}

/// The kind of file that a node is: the bits of its mode, and what an entry says of it.
pub(super) fn kind(kind: &Kind) -> (u16, u8) {
    match kind {
        Kind::File(_) => (0o100_000, 1),
        Kind::Directory(_) => (0o40000, DIRECTORY_KIND),
        Kind::Character(..) => (0o20000, 3),
        Kind::Block(..) => (0o60000, 4),
        Kind::Fifo => (0o10000, 5),
        Kind::Symlink(_) => (0o120_000, 7),
    }
}

/// A device's numbers, as the kernel's `old_encode_dev` and `new_encode_dev` have them.
pub(super) fn device(major: u32, minor: u32) -> Result<[u8; ROOT_LEN], Error> {
    if major > MAJOR_MAX || minor > MINOR_MAX {
        return Err(Error::Device { major, minor });
    }
    let mut place = [0; ROOT_LEN];
    if major < 256 && minor < 256 {
        put32(&mut place, 0, major << 8 | minor);
    } else {
        put32(
            &mut place,
            4,
            minor & 0xff | major << 8 | (minor & !0xff) << 12,
        );
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_go_from_1901_to_2446() {
        // The table of Documentation/filesystems/ext4/inodes.rst.
        for (seconds, fields) in [
            (0, (0, 0)),
            (-1, (0xffff_ffff, 0)),
            (-0x8000_0000, (0x8000_0000, 0)),
            (0x7fff_ffff, (0x7fff_ffff, 0)),
            (0x8000_0000, (0x8000_0000, 1)),
            (0x1_0000_0000, (0, 1)),
            (0x3_7fff_ffff, (0x7fff_ffff, 3)),
            (i64::MAX, (0x7fff_ffff, 3)),
            (i64::MIN, (0x8000_0000, 0)),
        ] {
            assert_eq!(time(seconds, 0), fields, "{seconds}");
        }
        assert_eq!(time(0, 999_999_999).1, 999_999_999 << 2);
    }
}
