//! A root file system that is a directory of the host. Symbolic links are taken as they are and
//! never followed; owners are the host's.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use super::spool::Spool;
use super::tree::{Attributes, Kind, Tree};
use super::{Error, io_error};

/// Reads the directory at `path` into `tree`. Sockets are left out: nobody would listen on them.
///
/// # Errors
/// Something cannot be read, or is what no root file system has.
pub fn read(path: &Path, tree: &mut Tree, spool: &mut dyn Spool) -> Result<(), Error> {
    let metadata = std::fs::symlink_metadata(path).map_err(io_error("look at", path))?;
    tree.put_directory(b"/", attributes(&metadata), spool)?;
    let mut reader = Reader {
        tree,
        spool,
        linked: HashMap::new(),
    };
    reader.inside(path, b"")
}

struct Reader<'a> {
    tree: &'a mut Tree,
    spool: &'a mut dyn Spool,
    /// The first name of each file with several.
    linked: HashMap<(u64, u64), Vec<u8>>,
}

impl Reader<'_> {
    /// Depth is limited by what the tree takes.
    fn inside(&mut self, dir: &Path, name: &[u8]) -> Result<(), Error> {
        for entry in std::fs::read_dir(dir).map_err(io_error("list", dir))? {
            let entry = entry.map_err(io_error("list", dir))?;
            let path = entry.path();
            let inner = [name, b"/", entry.file_name().as_bytes()].concat();
            let metadata = entry.metadata().map_err(io_error("look at", &path))?;
            self.one(&path, &inner, &metadata)?;
        }
        Ok(())
    }

    fn one(&mut self, path: &Path, inner: &[u8], metadata: &Metadata) -> Result<(), Error> {
        let attributes = attributes(metadata);
        let kind = metadata.file_type();
        if kind.is_dir() {
            self.tree.put_directory(inner, attributes, self.spool)?;
            return self.inside(path, inner);
        }
        let key = (metadata.dev(), metadata.ino());
        if metadata.nlink() > 1 {
            if let Some(first) = self.linked.get(&key) {
                return Ok(self.tree.link(inner, first, self.spool)?);
            }
            self.linked.insert(key, inner.to_vec());
        }
        let device = || {
            let number = metadata.rdev();
            (rustix::fs::major(number), rustix::fs::minor(number))
        };
        let node = if kind.is_file() {
            self.contents(path, metadata)?
        } else if kind.is_symlink() {
            let target = std::fs::read_link(path).map_err(io_error("read", path))?;
            Kind::Symlink(target.as_os_str().as_bytes().to_vec())
        } else if kind.is_char_device() {
            Kind::Character(device().0, device().1)
        } else if kind.is_block_device() {
            Kind::Block(device().0, device().1)
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            return Ok(());
        };
        Ok(self.tree.put(inner, attributes, node, self.spool)?)
    }

    /// Whoever can write to the directory may swap a name between look and open: what is opened is
    /// no symbolic link, and the file that was looked at.
    fn contents(&mut self, path: &Path, metadata: &Metadata) -> Result<Kind, Error> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut file = File::options()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(io_error("open", path))?;
        let opened = file.metadata().map_err(io_error("look at", path))?;
        if (opened.dev(), opened.ino()) != (metadata.dev(), metadata.ino()) {
            let source = std::io::Error::other("it changed meanwhile");
            return Err(io_error("read", path)(source));
        }
        let blob = self.spool.store(&mut file, opened.len());
        Ok(Kind::File(blob.map_err(io_error("read", path))?))
    }
}

fn attributes(metadata: &Metadata) -> Attributes {
    Attributes {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: u32::try_from(metadata.mtime()).unwrap_or(0),
    }
}
