//! What the file system will have: the numbers of inodes, and how many blocks they take.

use std::collections::HashMap;

use super::contents::Contents;
use super::dir::{Blocks, Entry};
use super::extents::tree_blocks_max;
use super::inode::{self, DIRECTORY_KIND};
use super::layout::{BLOCK_LEN, Layout, MIB};
use super::{Error, FIRST_INODE, ROOT_INODE, Run, UUID, xattr};
use crate::import::tree::{Kind, NodeId, ROOT, Tree};

/// The directory that e2fsck puts what it finds into: it is to have blocks before they are needed.
const LOST_AND_FOUND: &[u8] = b"lost+found";
const LOST_AND_FOUND_BLOCKS: usize = 4;
/// Longest target of a symbolic link that lies in the inode.
pub(super) const INLINE_TARGET_MAX: usize = 59;
/// Most names of a file (`EXT4_LINK_MAX`).
const NAMES_MAX: u32 = 65_000;

/// An inode that will be written.
#[derive(Debug)]
pub(super) struct Planned {
    /// What it is of; nothing for a lost+found of our own.
    pub(super) node: Option<NodeId>,
    /// Of a directory, the number of the one that it is in.
    pub(super) parent: u32,
    /// Of a file, the runs of blocks that it has.
    pub(super) runs: Box<[Run]>,
}

/// A file system before it has a size.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(super) tree: &'a Tree,
    pub(super) contents: Contents,
    /// The root directory, then inodes from the first free number on.
    pub(super) inodes: Vec<Planned>,
    numbers: HashMap<NodeId, u32>,
    /// Blocks for data.
    pub(super) blocks: u64,
    /// Bytes of files, holes left out.
    pub(super) bytes: u64,
}

/// The number of the inode at a place of the list.
pub(super) fn number(at: usize) -> u32 {
    // A tree has fewer names than 2^32.
    if at == 0 {
        ROOT_INODE
    } else {
        FIRST_INODE + at as u32 - 1
    }
}

impl<'a> Plan<'a> {
    /// Plans a file system with all of `tree`.
    ///
    /// # Errors
    /// Something cannot be in any ext4, or cannot be read.
    pub(super) fn new(tree: &'a Tree, contents: Contents) -> Result<Self, Error> {
        let mut plan = Self {
            tree,
            contents,
            inodes: Vec::new(),
            numbers: HashMap::new(),
            blocks: 0,
            bytes: 0,
        };
        plan.number_all();
        for at in 0..plan.inodes.len() {
            plan.measure(at)?;
        }
        Ok(plan)
    }

    /// Bytes of the smallest file system with all of it, in whole MiB.
    #[must_use]
    pub fn smallest(&self) -> u64 {
        Layout::smallest(self.blocks, self.inode_count())
    }

    /// How a file system of `len` bytes is cut.
    pub(super) fn layout(&self, len: u64) -> Result<Layout, Error> {
        Layout::new(len, self.inode_count())
            .filter(|layout| layout.room() >= self.blocks)
            .ok_or_else(|| Error::TooSmall {
                needed_mib: self.smallest() / MIB,
            })
    }

    /// Inodes in use, reserved ones as well.
    pub(super) fn inode_count(&self) -> u64 {
        u64::from(number(self.inodes.len())) - 1
    }

    /// Numbers what is in a directory in a row, then what is in the directories in it.
    fn number_all(&mut self) {
        self.add(Some(ROOT), ROOT_INODE);
        let mut directories = vec![(ROOT, ROOT_INODE)];
        let lost = self.lost_and_found();
        self.add(lost, ROOT_INODE);
        directories.extend(lost.map(|id| (id, FIRST_INODE)));
        let mut next = 0;
        while let Some(&(id, own)) = directories.get(next) {
            next += 1;
            for (name, child) in self.tree.names(id) {
                let is_numbered = self.numbers.contains_key(&child);
                if is_numbered || (id == ROOT && name == LOST_AND_FOUND) {
                    continue;
                }
                let number = self.add(Some(child), own);
                if matches!(self.tree.node(child).kind, Kind::Directory(_)) {
                    directories.push((child, number));
                }
            }
        }
    }

    fn add(&mut self, node: Option<NodeId>, parent: u32) -> u32 {
        let number = number(self.inodes.len());
        self.numbers.extend(node.map(|id| (id, number)));
        self.inodes.push(Planned {
            node,
            parent,
            runs: Box::default(),
        });
        number
    }

    /// The tree's own lost+found. What is no directory has to go.
    fn lost_and_found(&self) -> Option<NodeId> {
        let found = self
            .tree
            .names(ROOT)
            .find(|(name, _)| *name == LOST_AND_FOUND)?;
        matches!(self.tree.node(found.1).kind, Kind::Directory(_)).then_some(found.1)
    }

    /// A directory's blocks.
    pub(super) fn directory(&self, at: usize) -> Result<Blocks<'a>, Error> {
        let own = self.inodes[at].node;
        let (tree, is_root) = (self.tree, own == Some(ROOT));
        let names = own.into_iter().flat_map(|id| tree.names(id));
        let others = names.filter(|(name, _)| !is_root || *name != LOST_AND_FOUND);
        let entry = |(name, id): (&'a [u8], NodeId)| Entry {
            name,
            inode: self.numbers[&id],
            kind: inode::kind(&tree.node(id).kind).1,
        };
        let mut entries: Vec<Entry<'a>> = others.map(entry).collect();
        if is_root {
            entries.push(Entry {
                name: LOST_AND_FOUND,
                inode: FIRST_INODE,
                kind: DIRECTORY_KIND,
            });
        }
        let is_lost_and_found = number(at) == FIRST_INODE;
        let blocks_min = if is_lost_and_found {
            LOST_AND_FOUND_BLOCKS
        } else {
            1
        };
        Blocks::new(entries, blocks_min, &UUID)
    }

    /// Counts the blocks of an inode, and finds the holes of a file.
    fn measure(&mut self, at: usize) -> Result<(), Error> {
        let Some(id) = self.inodes[at].node else {
            self.count(1, LOST_AND_FOUND_BLOCKS as u64);
            return Ok(());
        };
        let node = self.tree.node(id);
        let is_directory = matches!(node.kind, Kind::Directory(_));
        if node.names > NAMES_MAX && !is_directory {
            return Err(Error::Names(node.names));
        }
        if !xattr::fit(&node.xattrs) {
            return Err(Error::Attributes);
        }
        self.blocks += u64::from(xattr::encode(&node.xattrs).block.is_some());
        match &node.kind {
            Kind::Directory(_) => {
                let blocks = self.directory(at)?.count() as u64;
                self.count(1, blocks);
            }
            Kind::File(blob) => {
                let runs = self.contents.runs(*blob).map_err(Error::Read)?;
                let blocks = runs.iter().map(|run| run.len).sum();
                self.bytes += blocks * BLOCK_LEN;
                self.inodes[at].runs = runs.into();
                self.count(self.inodes[at].runs.len() as u64, blocks);
            }
            Kind::Symlink(target) if target.len() > INLINE_TARGET_MAX => self.count(1, 1),
            Kind::Character(major, minor) | Kind::Block(major, minor) => {
                inode::device(*major, *minor)?;
            }
            Kind::Symlink(_) | Kind::Fifo => {}
        }
        Ok(())
    }

    fn count(&mut self, runs: u64, blocks: u64) {
        self.blocks += blocks + tree_blocks_max(runs, blocks);
    }
}
