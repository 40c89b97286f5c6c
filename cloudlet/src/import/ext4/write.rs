//! Writing a planned file system: inode after inode with its contents, then what says where they are.
//! What is not written stays a hole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::checksum::Seed;
use super::dir::Blocks;
use super::extents::{self, Extent, ROOT_LEN};
use super::inode::{self, INDEX, Inode, Place};
use super::layout::{Allocator, BLOCK_LEN, INODE_LEN, INODES_A_BLOCK, Layout};
use super::plan::{INLINE_TARGET_MAX, Plan, number};
use super::superblock::{self, Usage};
use super::{BLOCK, Error, JOURNAL, Run, UUID, xattr};
use crate::import::spool::Blob;
use crate::import::tree::{Attributes, Kind};
use crate::import::xattrs::Xattr;

/// Bytes that are copied in one go.
const CHUNK_LEN: u64 = 1 << 20;
/// A directory with more names of directories has 1 in place of their number (`EXT4_LINK_MAX`).
const LINKS_MAX: u64 = 65_000;
/// Attributes of what no source has.
const OWN: Attributes = Attributes {
    mode: 0o700,
    uid: 0,
    gid: 0,
    mtime: super::EPOCH as i64,
    nanos: 0,
};

/// Writes `plan` into `image`, which is empty and gets `len` bytes.
pub(super) fn write(
    plan: &Plan<'_>,
    image: &File,
    len: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let layout = plan.layout(len)?;
    image.set_len(len).map_err(Error::Write)?;
    let mut writer = Writer {
        plan,
        image,
        allocator: Allocator::new(&layout),
        layout: &layout,
        seed: Seed::of(&UUID),
        table: Table::default(),
        directories: vec![0; layout.groups as usize],
        chunk: vec![0; CHUNK_LEN as usize],
        done: 0,
        progress,
    };
    let journal = writer.journal()?;
    for at in 0..plan.inodes.len() {
        writer.inode(at)?;
    }
    writer.flush_table()?;
    writer.finish(&journal)
}

/// A block of the inode table that is not written yet.
#[derive(Default)]
struct Table {
    place: u64,
    bytes: Vec<u8>,
}

struct Writer<'a> {
    plan: &'a Plan<'a>,
    image: &'a File,
    layout: &'a Layout,
    allocator: Allocator<'a>,
    seed: Seed,
    table: Table,
    /// Directories of each group.
    directories: Vec<u16>,
    chunk: Vec<u8>,
    /// Bytes of files that are written.
    done: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

/// Where an inode's contents are, and how many blocks that takes.
struct Contents {
    place: Place,
    len: u64,
    blocks: u64,
    links: u16,
    flags: u32,
}

impl Contents {
    /// Contents without blocks.
    fn inline(place: [u8; ROOT_LEN], len: u64) -> Self {
        Self {
            place: Place::Inline(place),
            len,
            blocks: 0,
            links: 1,
            flags: 0,
        }
    }
}

impl Writer<'_> {
    /// An empty journal. It comes first, so that it lies in one piece if it fits into the first group.
    fn journal(&mut self) -> Result<[u8; ROOT_LEN], Error> {
        let run = Run {
            start: 0,
            len: self.layout.journal,
        };
        let extents = extents::allocate(&[run], &mut self.allocator)?;
        self.put(extents[0].place.start, &superblock::journal(run.len))?;
        let contents = self.placed(JOURNAL, &extents, run.len * BLOCK_LEN)?;
        let Place::Extents(root) = contents.place else {
            unreachable!("as `placed` has made it");
        };
        let attributes = Attributes { mode: 0o600, ..OWN };
        self.put_inode(JOURNAL, 0o100_600, attributes, contents, &[])?;
        Ok(root)
    }

    fn inode(&mut self, at: usize) -> Result<(), Error> {
        let own = number(at);
        let Some(id) = self.plan.inodes[at].node else {
            let contents = self.directory(at, &self.plan.directory(at)?)?;
            return self.put_inode(own, 0o40_700, OWN, contents, &[]);
        };
        let node = self.plan.tree.node(id);
        let mut contents = match &node.kind {
            Kind::Directory(_) => self.directory(at, &self.plan.directory(at)?)?,
            Kind::File(blob) => self.file(at, *blob)?,
            Kind::Symlink(target) => self.symlink(own, target)?,
            Kind::Character(major, minor) | Kind::Block(major, minor) => {
                Contents::inline(inode::device(*major, *minor)?, 0)
            }
            Kind::Fifo => Contents::inline([0; ROOT_LEN], 0),
        };
        let (kind, _) = inode::kind(&node.kind);
        let permissions = match &node.kind {
            Kind::Directory(_) => node.attributes.mode,
            kind => {
                // The plan has looked that there are not too many.
                contents.links = node.names as u16;
                // A symbolic link's permissions mean nothing, and are all set.
                if matches!(kind, Kind::Symlink(_)) {
                    0o777
                } else {
                    node.attributes.mode
                }
            }
        };
        let mode = kind | (permissions & 0o7777) as u16;
        self.put_inode(own, mode, node.attributes, contents, &node.xattrs)
    }

    fn directory(&mut self, at: usize, blocks: &Blocks<'_>) -> Result<Contents, Error> {
        let own = number(at);
        let run = Run {
            start: 0,
            len: blocks.count() as u64,
        };
        let extents = extents::allocate(&[run], &mut self.allocator)?;
        let mut places = extents.iter().flat_map(|extent| extent.place.blocks());
        let parent = self.plan.inodes[at].parent;
        blocks.write(own, parent, self.seed.inode(own), &mut |block| {
            self.put(places.next().ok_or(Error::Full)?, block)
        })?;
        let mut contents = self.placed(own, &extents, blocks.len())?;
        // `.` of each directory in it, its own and its name.
        let links = blocks.directories() + 2;
        contents.links = if links > LINKS_MAX { 1 } else { links as u16 };
        contents.flags = if blocks.is_indexed() { INDEX } else { 0 };
        let group = u64::from(own - 1) / self.layout.inodes_a_group;
        self.directories[group as usize] += 1;
        Ok(contents)
    }

    fn file(&mut self, at: usize, blob: Blob) -> Result<Contents, Error> {
        let extents = extents::allocate(&self.plan.inodes[at].runs, &mut self.allocator)?;
        if !extents.is_empty() {
            let file = self.plan.contents.open(blob).map_err(Error::Read)?;
            for extent in &extents {
                self.copy(&file, *extent, blob.len)?;
            }
        }
        self.placed(number(at), &extents, blob.len)
    }

    /// Copies the blocks of an extent out of a file of `len` bytes, the last of which may end earlier.
    fn copy(&mut self, file: &File, extent: Extent, len: u64) -> Result<(), Error> {
        let start = u64::from(extent.logical) * BLOCK_LEN;
        let end = (start + extent.place.len * BLOCK_LEN).min(len);
        let mut at = start;
        while at < end {
            let count = (end - at).min(CHUNK_LEN);
            let chunk = &mut self.chunk[..count as usize];
            file.read_exact_at(chunk, at).map_err(Error::Read)?;
            let to = extent.place.start * BLOCK_LEN + (at - start);
            self.image.write_all_at(chunk, to).map_err(Error::Write)?;
            at += count;
            self.done += count;
            (self.progress)(self.done, self.plan.bytes.max(self.done));
        }
        Ok(())
    }

    fn symlink(&mut self, own: u32, target: &[u8]) -> Result<Contents, Error> {
        if target.len() <= INLINE_TARGET_MAX {
            let mut place = [0; ROOT_LEN];
            place[..target.len()].copy_from_slice(target);
            return Ok(Contents::inline(place, target.len() as u64));
        }
        let run = Run { start: 0, len: 1 };
        let extents = extents::allocate(&[run], &mut self.allocator)?;
        self.put(extents[0].place.start, target)?;
        self.placed(own, &extents, target.len() as u64)
    }

    /// Writes the tree over extents.
    fn placed(&mut self, own: u32, extents: &[Extent], len: u64) -> Result<Contents, Error> {
        let tree = extents::tree(extents, &mut self.allocator, self.seed.inode(own))?;
        for (place, block) in &tree.blocks {
            self.put(*place, block)?;
        }
        let blocks: u64 = extents.iter().map(|extent| extent.place.len).sum();
        Ok(Contents {
            place: Place::Extents(tree.root),
            len,
            blocks: blocks + tree.blocks.len() as u64,
            links: 1,
            flags: 0,
        })
    }

    fn put_inode(
        &mut self,
        own: u32,
        mode: u16,
        attributes: Attributes,
        contents: Contents,
        xattrs: &[Xattr],
    ) -> Result<(), Error> {
        let encoded = xattr::encode(xattrs);
        let mut xattr_block = 0;
        if let Some(mut block) = encoded.block {
            xattr_block = self.allocator.take(1).ok_or(Error::Full)?.start;
            xattr::seal(&mut block, xattr_block, self.seed);
            self.put(xattr_block, &block)?;
        }
        let inode = Inode {
            mode,
            attributes,
            links: contents.links,
            len: contents.len,
            blocks: contents.blocks + u64::from(xattr_block != 0),
            flags: contents.flags,
            place: contents.place,
            xattrs: &encoded.inode,
            xattr_block,
        };
        let bytes = inode.encode(self.seed.inode(own));
        let at = u64::from(own - 1);
        let (group, at) = (
            at / self.layout.inodes_a_group,
            at % self.layout.inodes_a_group,
        );
        let place = self.layout.table(group) + at / INODES_A_BLOCK;
        if place != self.table.place {
            self.flush_table()?;
            // The journal's inode is written first, and lies behind the root's.
            self.table = Table {
                place,
                bytes: vec![0; BLOCK],
            };
        }
        let start = (at % INODES_A_BLOCK) as usize * INODE_LEN;
        self.table.bytes[start..start + INODE_LEN].copy_from_slice(&bytes);
        Ok(())
    }

    fn flush_table(&mut self) -> Result<(), Error> {
        self.put(self.table.place, &self.table.bytes)
    }

    /// Writes bitmaps, descriptors, superblock and their copies.
    fn finish(&self, journal: &[u8; ROOT_LEN]) -> Result<(), Error> {
        let usage = Usage {
            layout: self.layout,
            allocator: &self.allocator,
            inodes: self.plan.inode_count(),
            directories: &self.directories,
            journal,
            seed: self.seed,
        };
        let mut checksums = Vec::new();
        for group in 0..self.layout.groups {
            let bitmaps = usage.bitmaps(group);
            checksums.push(usage.checksums(&bitmaps));
            for (bytes, place) in [bitmaps.0, bitmaps.1]
                .iter()
                .zip(self.layout.bitmap(group)..)
            {
                if let Some(bytes) = bytes {
                    self.put(place, bytes)?;
                }
            }
        }
        let descriptors = usage.descriptors(&checksums);
        for group in (0..self.layout.groups).filter(|&group| Layout::has_super(group)) {
            self.put(Layout::start(group), &usage.superblock(group))?;
            self.put(Layout::start(group) + 1, &descriptors)?;
        }
        Ok(())
    }

    fn put(&self, place: u64, bytes: &[u8]) -> Result<(), Error> {
        let written: io::Result<()> = self.image.write_all_at(bytes, place * BLOCK_LEN);
        written.map_err(Error::Write)
    }
}
