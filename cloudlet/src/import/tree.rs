//! A file system's names and attributes in memory. Paths are allegations: each is taken apart here,
//! and symbolic links on the way are followed inside of the tree, as a kernel would that has the tree
//! as its root.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::spool::{Blob, Spool};
use super::xattrs::{self, LeftOut, Xattr};

/// Most names, of all kinds together.
const NAMES_MAX: usize = 2_000_000;
/// Longest path, as Linux has it.
const PATH_LEN_MAX: usize = 4096;
/// Longest name in a directory.
const NAME_LEN_MAX: usize = 255;
/// Longest target of a symbolic link: less than a block.
const TARGET_LEN_MAX: usize = 4000;
/// Most symbolic links on the way of one path.
const LINKS_MAX: u32 = 40;
/// Most bytes of extended attributes, of all files together.
const XATTRS_LEN_MAX: usize = 64 << 20;
/// Deepest directory.
const DEPTH_MAX: usize = 256;

/// What a root file system cannot have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A path or name is too long, or has bytes that it cannot have.
    #[error("{0:?} is no path that a root file system can have")]
    Path(String),
    /// A path leads through something that is no directory.
    #[error("{0:?} leads through what is no directory, round in circles, or too deep")]
    NotThere(String),
    /// A hard link to nothing, or to a directory.
    #[error("{0:?} is a hard link to nothing")]
    Link(String),
    /// There is no end of names.
    #[error("there are more than {NAMES_MAX} names")]
    TooMany,
    /// There is no end of extended attributes.
    #[error("there are more than {XATTRS_LEN_MAX} bytes of extended attributes")]
    Attributes,
    /// Contents could not be kept.
    #[error("cannot keep a file's contents")]
    Contents(#[from] io::Error),
}

/// Owner, permissions, time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change, seconds since 1970; before that, less than 0.
    pub mtime: i64,
    /// And nanoseconds, below a second.
    pub nanos: u32,
}

/// A number that stands for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(usize);

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub struct Name {
    node: NodeId,
    /// The last layer that had this name, or anything below it. Layers are of names and not of files:
    /// another name of a lower file is its own layer's.
    layer: u32,
}

/// What a name leads to.
#[derive(Debug)]
pub enum Kind {
    /// A directory with its names.
    Directory(BTreeMap<Vec<u8>, Name>),
    /// A file.
    File(Blob),
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A character device.
    Character(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A node: what it is, and how many names it has.
#[derive(Debug)]
pub struct Node {
    /// Owner, permissions, time.
    pub attributes: Attributes,
    /// What it is.
    pub kind: Kind,
    /// Number of names that lead to it.
    pub names: u32,
    /// Extended attributes, names and values.
    pub xattrs: Vec<Xattr>,
}

/// A tree. Nodes without names stay until the end: there are no more of them than names were given.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// Names given so far, those that are gone as well.
    names: usize,
    layer: u32,
    /// Bytes of extended attributes given so far.
    xattrs_len: usize,
    left_out: LeftOut,
    /// What this layer hides: hard links of the same layer still find it.
    hidden: HashMap<(NodeId, Vec<u8>), NodeId>,
}

/// The directory that everything is in.
pub const ROOT: NodeId = NodeId(0);

/// A path leads to nothing, or has no end.
struct Astray;

const DIRECTORY: Attributes = Attributes {
    mode: 0o755,
    uid: 0,
    gid: 0,
    mtime: 0,
    nanos: 0,
};

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// An empty directory.
    #[must_use]
    pub fn new() -> Self {
        let root = Node {
            attributes: DIRECTORY,
            kind: Kind::Directory(BTreeMap::new()),
            names: 1,
            xattrs: Vec::new(),
        };
        Self {
            nodes: vec![root],
            names: 0,
            layer: 0,
            xattrs_len: 0,
            left_out: LeftOut::default(),
            hidden: HashMap::new(),
        }
    }

    /// What comes from now on lies over what has come so far.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
    }

    /// Lets go of what the layer has hidden and nothing leads to.
    pub fn end_layer(&mut self, spool: &mut dyn Spool) {
        for (_, id) in std::mem::take(&mut self.hidden) {
            self.release(id, spool);
        }
    }

    /// A node.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// The names of a directory; none if it is none.
    pub fn names(&self, id: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let children = match &self.nodes[id.0].kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        };
        children
            .into_iter()
            .flatten()
            .map(|(name, there)| (name.as_slice(), there.node))
    }

    /// What `path` leads to, symbolic links followed.
    #[must_use]
    pub fn find(&self, path: &[u8]) -> Option<NodeId> {
        let names = split(path).ok()?;
        self.walk(&names, true, false).ok()?.last().copied()
    }

    /// Makes a directory, or gives one that is there new attributes.
    ///
    /// # Errors
    /// The path cannot be.
    pub fn put_directory(
        &mut self,
        path: &[u8],
        attributes: Attributes,
        spool: &mut dyn Spool,
    ) -> Result<(), Error> {
        let names = split(path)?;
        let Some((name, parents)) = names.split_last() else {
            self.nodes[ROOT.0].attributes = attributes;
            return Ok(());
        };
        let parent = self.directory(parents, path)?;
        if let Some(there) = self.child(parent, name)
            && matches!(self.nodes[there.0].kind, Kind::Directory(_))
        {
            self.nodes[there.0].attributes = attributes;
            self.mark(parent, name);
            return Ok(());
        }
        self.remove_child(parent, name, spool);
        self.add(parent, name, attributes, Kind::Directory(BTreeMap::new()))
    }

    /// Puts anything but a directory in place of what is there.
    ///
    /// # Errors
    /// The path cannot be.
    pub fn put(
        &mut self,
        path: &[u8],
        attributes: Attributes,
        kind: Kind,
        spool: &mut dyn Spool,
    ) -> Result<(), Error> {
        if let Kind::Symlink(target) = &kind
            && (target.is_empty() || target.len() > TARGET_LEN_MAX || target.contains(&0))
        {
            return Err(bad(target));
        }
        let names = split(path)?;
        let (name, parents) = names.split_last().ok_or_else(|| bad(path))?;
        let parent = self.directory(parents, path)?;
        self.remove_child(parent, name, spool);
        self.add(parent, name, attributes, kind)
    }

    /// Makes `path` another name of what `target` leads to.
    ///
    /// # Errors
    /// There is no such file, or the path cannot be.
    pub fn link(&mut self, path: &[u8], target: &[u8], spool: &mut dyn Spool) -> Result<(), Error> {
        let names = split(target)?;
        let found = self.walk(&names, false, true).ok();
        let id = found
            .and_then(|way| way.last().copied())
            .filter(|id| !matches!(self.nodes[id.0].kind, Kind::Directory(_)))
            .ok_or_else(|| Error::Link(lossy(path)))?;
        let names = split(path)?;
        let (name, parents) = names.split_last().ok_or_else(|| bad(path))?;
        let parent = self.directory(parents, path)?;
        if self.child(parent, name) == Some(id) {
            self.mark(parent, name);
            return Ok(());
        }
        self.count_name()?;
        // Before the name is taken from another, which may be all that holds it.
        self.nodes[id.0].names += 1;
        self.remove_child(parent, name, spool);
        self.insert(parent, name, id);
        Ok(())
    }

    /// Gives what `path` leads to extended attributes in place of those that it has: those that are kept
    /// (see [`super::xattrs`]); the others are counted.
    ///
    /// # Errors
    /// It leads to nothing, or there is no end of attributes.
    pub fn set_xattrs(&mut self, path: &[u8], xattrs: Vec<Xattr>) -> Result<(), Error> {
        let names = split(path)?;
        let found = self.walk(&names, false, false).ok();
        let id = found.and_then(|way| way.last().copied());
        let node = &mut self.nodes[id.ok_or_else(|| not_there(path))?.0];
        node.xattrs = xattrs::keep(&node.kind, xattrs, &mut self.left_out);
        let lens = node
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len());
        self.xattrs_len += lens.sum::<usize>();
        if self.xattrs_len > XATTRS_LEN_MAX {
            return Err(Error::Attributes);
        }
        Ok(())
    }

    /// What was left out of what the source has.
    #[must_use]
    pub fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    /// Removes what earlier layers have of a name: a whiteout.
    ///
    /// # Errors
    /// The path cannot be.
    pub fn hide(&mut self, path: &[u8]) -> Result<(), Error> {
        let names = split(path)?;
        let (name, parents) = names.split_last().ok_or_else(|| bad(path))?;
        if let Some(parent) = self.lower(parents) {
            self.hide_child(parent, name);
        }
        Ok(())
    }

    /// Removes what earlier layers have in a directory: an opaque whiteout.
    ///
    /// # Errors
    /// The path cannot be.
    pub fn hide_inside(&mut self, path: &[u8]) -> Result<(), Error> {
        let names = split(path)?;
        if let Some(id) = self.lower(&names) {
            self.hide_children(id);
        }
        Ok(())
    }

    /// What is there where `names` lead to.
    fn lower(&self, names: &[&[u8]]) -> Option<NodeId> {
        self.walk(names, true, false).ok()?.last().copied()
    }

    /// Depth is limited by [`Tree::directory`], so that this may recurse.
    fn hide_children(&mut self, id: NodeId) {
        let inside: Vec<Vec<u8>> = self.names(id).map(|(name, _)| name.to_vec()).collect();
        for name in inside {
            self.hide_child(id, &name);
        }
    }

    fn hide_child(&mut self, parent: NodeId, name: &[u8]) {
        let Kind::Directory(children) = &mut self.nodes[parent.0].kind else {
            return;
        };
        match children.get(name).copied() {
            Some(there) if there.layer == self.layer => self.hide_children(there.node),
            Some(there) => {
                children.remove(name);
                self.hidden.insert((parent, name.to_vec()), there.node);
            }
            None => {}
        }
    }

    /// The directory that `names` lead to; what is missing is made, at the end of symbolic links too,
    /// as engines do inside of their root.
    fn directory(&mut self, names: &[&[u8]], path: &[u8]) -> Result<NodeId, Error> {
        let mut rest: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        let mut way = vec![ROOT];
        let mut links = 0;
        while let Some(name) = rest.pop() {
            let here = way[way.len() - 1];
            if name == b".." {
                way.truncate((way.len() - 1).max(1));
                continue;
            }
            if name.len() > NAME_LEN_MAX || name.contains(&0) {
                return Err(not_there(path));
            }
            if self.child(here, &name).is_none() {
                self.add(here, &name, DIRECTORY, Kind::Directory(BTreeMap::new()))?;
            }
            let id = self.child(here, &name).ok_or_else(|| not_there(path))?;
            match &self.nodes[id.0].kind {
                Kind::Symlink(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(not_there(path));
                    }
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    rest.extend(parts_of(target).map(<[u8]>::to_vec));
                }
                Kind::Directory(_) if way.len() < DEPTH_MAX => {
                    self.mark(here, &name);
                    way.push(id);
                }
                _ => return Err(not_there(path)),
            }
        }
        Ok(way[way.len() - 1])
    }

    /// The nodes from the root to what `names` lead to. The last name's link is followed if `follow`;
    /// what this layer has hidden is seen if `hidden`.
    fn walk(&self, names: &[&[u8]], follow: bool, hidden: bool) -> Result<Vec<NodeId>, Astray> {
        let mut rest: Vec<&[u8]> = names.iter().rev().copied().collect();
        let mut way = vec![ROOT];
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name == b".." {
                way.truncate((way.len() - 1).max(1));
                continue;
            }
            let here = way[way.len() - 1];
            let id = match self.child(here, name) {
                None if hidden => self.hidden.get(&(here, name.to_vec())).copied(),
                found => found,
            };
            let id = id.ok_or(Astray)?;
            match &self.nodes[id.0].kind {
                Kind::Symlink(target) if follow || !rest.is_empty() => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(Astray);
                    }
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    rest.extend(parts_of(target));
                }
                _ => way.push(id),
            }
        }
        Ok(way)
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.nodes[parent.0].kind {
            Kind::Directory(children) => children.get(name).map(|there| there.node),
            _ => None,
        }
    }

    /// This layer has a name that is there.
    fn mark(&mut self, parent: NodeId, name: &[u8]) {
        let layer = self.layer;
        if let Some(there) = self.children(parent).get_mut(name) {
            there.layer = layer;
        }
    }

    fn insert(&mut self, parent: NodeId, name: &[u8], node: NodeId) {
        let layer = self.layer;
        let name = name.to_vec();
        self.children(parent).insert(name, Name { node, layer });
    }

    fn children(&mut self, parent: NodeId) -> &mut BTreeMap<Vec<u8>, Name> {
        match &mut self.nodes[parent.0].kind {
            Kind::Directory(children) => children,
            _ => unreachable!("callers have looked"),
        }
    }

    fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        attributes: Attributes,
        kind: Kind,
    ) -> Result<(), Error> {
        self.count_name()?;
        let id = NodeId(self.nodes.len());
        self.nodes.push(Node {
            attributes,
            kind,
            names: 1,
            xattrs: Vec::new(),
        });
        self.insert(parent, name, id);
        Ok(())
    }

    fn count_name(&mut self) -> Result<(), Error> {
        self.names += 1;
        if self.names > NAMES_MAX {
            return Err(Error::TooMany);
        }
        Ok(())
    }

    /// Takes a name away, and what has no other name with it.
    fn remove_child(&mut self, parent: NodeId, name: &[u8], spool: &mut dyn Spool) {
        if let Some(there) = self.children(parent).remove(name) {
            self.release(there.node, spool);
        }
    }

    /// One name fewer leads to a node.
    fn release(&mut self, id: NodeId, spool: &mut dyn Spool) {
        let mut gone = vec![id];
        while let Some(id) = gone.pop() {
            let node = &mut self.nodes[id.0];
            node.names -= 1;
            if node.names > 0 {
                continue;
            }
            match std::mem::replace(&mut node.kind, Kind::Fifo) {
                Kind::Directory(children) => {
                    gone.extend(children.into_values().map(|there| there.node));
                }
                Kind::File(blob) => spool.forget(blob),
                _ => {}
            }
        }
    }
}

/// The names of a symbolic link's target, the last one first.
fn parts_of(target: &[u8]) -> impl Iterator<Item = &[u8]> {
    let parts = target.split(|&byte| byte == b'/').rev();
    parts.filter(|part| !part.is_empty() && *part != b".")
}

/// A path's names. Leading, doubled and trailing slashes and `.` count for nothing; `..` is refused,
/// as archives have no use for it.
fn split(path: &[u8]) -> Result<Vec<&[u8]>, Error> {
    let names: Vec<&[u8]> = path
        .split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .collect();
    let wrong = |name: &&[u8]| *name == b".." || name.len() > NAME_LEN_MAX || name.contains(&0);
    if path.len() > PATH_LEN_MAX || names.len() > DEPTH_MAX || names.iter().any(wrong) {
        return Err(bad(path));
    }
    Ok(names)
}

fn bad(path: &[u8]) -> Error {
    Error::Path(lossy(path))
}

fn not_there(path: &[u8]) -> Error {
    Error::NotThere(lossy(path))
}

/// The beginning of a path for people.
fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned()
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
