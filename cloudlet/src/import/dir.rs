//! A root file system that is a directory of the host. Symbolic links are taken as they are and
//! never followed; owners are the host's.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use cloudlet_agent::sparse;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::spool::{Blob, STRETCHES_MAX, Spool};
use super::tree::{Attributes, Kind, Tree};
use super::xattrs::Xattr;
use super::{Error, io_error};

/// Longest list of names, and longest value, of extended attributes (linux/limits.h).
const XATTRS_LEN_MAX: usize = 64 << 10;

/// Reads the directory at `path` into `tree`. Sockets are left out: nobody would listen on them.
///
/// # Errors
/// Something cannot be read, or is what no root file system has.
pub fn read(path: &Path, tree: &mut Tree, spool: &mut dyn Spool) -> Result<(), Error> {
    let metadata = std::fs::symlink_metadata(path).map_err(io_error("look at", path))?;
    tree.put_directory(b"/", attributes(&metadata), spool)?;
    tree.set_xattrs(b"/", xattrs(path)?)?;
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
            self.tree.set_xattrs(inner, xattrs(path)?)?;
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
        self.tree.put(inner, attributes, node, self.spool)?;
        Ok(self.tree.set_xattrs(inner, xattrs(path)?)?)
    }

    /// Whoever can write to the directory may swap a name between look and open: what is opened is
    /// no symbolic link, and the file that was looked at.
    fn contents(&mut self, path: &Path, metadata: &Metadata) -> Result<Kind, Error> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = File::options()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
            .map_err(io_error("open", path))?;
        let opened = file.metadata().map_err(io_error("look at", path))?;
        if (opened.dev(), opened.ino()) != (metadata.dev(), metadata.ino()) {
            let source = std::io::Error::other("it changed meanwhile");
            return Err(io_error("read", path)(source));
        }
        let blob = keep(&file, opened.len(), self.spool);
        Ok(Kind::File(blob.map_err(io_error("read", path))?))
    }
}

/// Keeps a file's contents, of which holes are not read. Where there is no end of stretches, the last
/// goes on to the end.
fn keep(file: &File, len: u64, spool: &mut dyn Spool) -> io::Result<Blob> {
    let mut stretches = Vec::new();
    for stretch in sparse::data(file, len) {
        let mut stretch = stretch?;
        let is_last = stretches.len() + 1 == STRETCHES_MAX;
        if is_last {
            stretch.end = len;
        }
        stretches.push(stretch);
        if is_last {
            break;
        }
    }
    let mut source = Stretches {
        file,
        left: stretches.clone().into_iter(),
        now: 0..0,
    };
    spool.store_sparse(&mut source, len, &stretches)
}

/// What a file has in some stretches, one after the other.
struct Stretches<'a> {
    file: &'a File,
    left: std::vec::IntoIter<Range<u64>>,
    now: Range<u64>,
}

impl Read for Stretches<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.left.next() {
                Some(next) => self.now = next,
                None => return Ok(0),
            }
        }
        let left = usize::try_from(self.now.end - self.now.start).unwrap_or(usize::MAX);
        let len = left.min(buffer.len());
        let count = self.file.read_at(&mut buffer[..len], self.now.start)?;
        self.now.start += count as u64;
        Ok(count)
    }
}

/// A file's extended attributes, of a link those of itself. A file system may have none.
fn xattrs(path: &Path) -> Result<Vec<Xattr>, Error> {
    let failed = |error: Errno| io_error("read the extended attributes of", path)(error.into());
    let mut names = vec![0; XATTRS_LEN_MAX];
    let len = match rustix::fs::llistxattr(path, &mut names) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => 0,
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for name in names[..len].split_inclusive(|&byte| byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(|_| failed(Errno::INVAL))?;
        let mut value = vec![0; XATTRS_LEN_MAX];
        match rustix::fs::lgetxattr(path, name, &mut value) {
            Ok(len) => value.truncate(len),
            // It is gone again.
            Err(Errno::NODATA) => continue,
            Err(error) => return Err(failed(error)),
        }
        found.push((name.to_bytes().to_vec(), value));
    }
    Ok(found)
}

fn attributes(metadata: &Metadata) -> Attributes {
    Attributes {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: metadata.mtime(),
        nanos: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::spool::FileSpool;
    use super::*;

    #[test]
    fn holes_of_files_are_neither_read_nor_counted() {
        let dir = tempfile::tempdir().unwrap();
        let (from, contents) = (dir.path().join("from"), dir.path().join("contents"));
        std::fs::create_dir(&from).unwrap();
        std::fs::create_dir(&contents).unwrap();
        let file = File::create_new(from.join("lastlog")).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(b"somebody", 100 << 30).unwrap();
        file.set_len(200 << 30).unwrap();
        let mut spool = FileSpool::new(&contents, 1 << 20);
        let mut tree = Tree::new();
        read(&from, &mut tree, &mut spool).unwrap();
        let Kind::File(blob) = tree.node(tree.find(b"lastlog").unwrap()).kind else {
            panic!("it is a file");
        };
        assert_eq!(blob.len, 200 << 30);
        let kept = File::open(spool.path(blob)).unwrap();
        assert_eq!(kept.metadata().unwrap().len(), 200 << 30);
        assert!(kept.metadata().unwrap().blocks() <= 32);
        let mut bytes = [0; 8];
        kept.read_exact_at(&mut bytes, 100 << 30).unwrap();
        assert_eq!(&bytes, b"somebody");
        kept.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"first\0\0\0");
    }

    #[test]
    fn extended_attributes_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"").unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        let set = |name, value| rustix::fs::setxattr(&path, name, value, flags);
        // Not every file system has these, and not everybody may set the other.
        let is_noted = set("user.note", b"yes").is_ok();
        let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let is_capable = set("security.capability", capability).is_ok();
        let (mut tree, mut spool) = (Tree::new(), FileSpool::new(dir.path(), 0));
        read(dir.path(), &mut tree, &mut spool).unwrap();
        let mut expected = Vec::new();
        if is_capable {
            expected.push((b"security.capability".to_vec(), capability.to_vec()));
        }
        if is_noted {
            expected.push((b"user.note".to_vec(), b"yes".to_vec()));
        }
        assert_eq!(tree.node(tree.find(b"file").unwrap()).xattrs, expected);
    }

    #[test]
    fn times_before_1970_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create_new(dir.path().join("early")).unwrap();
        let time = std::time::UNIX_EPOCH - std::time::Duration::from_millis(315_619_200_250);
        file.set_modified(time).unwrap();
        let (mut tree, mut spool) = (Tree::new(), FileSpool::new(dir.path(), 0));
        read(dir.path(), &mut tree, &mut spool).unwrap();
        let attributes = tree.node(tree.find(b"early").unwrap()).attributes;
        assert_eq!(attributes.mtime, -315_619_201);
        assert_eq!(attributes.nanos, 750_000_000);
    }
}
