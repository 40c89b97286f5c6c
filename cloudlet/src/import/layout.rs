//! Where the files of a container image are: below a directory, or in an archive that was read as if it
//! were a root file system. Names come from the image and lead nowhere else.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::spool::FileSpool;
use super::tree::{Kind, ROOT, Tree};

/// An image's files.
#[derive(Debug, Clone, Copy)]
pub enum Layout<'a> {
    /// Below a directory.
    Directory(&'a Path),
    /// In an archive: its names and their contents.
    Archive {
        /// The names.
        tree: &'a Tree,
        /// The contents.
        spool: &'a FileSpool,
        /// The directory in the archive that is the image's, or nothing.
        base: &'a [u8],
    },
}

impl Layout<'_> {
    /// Opens the file of a name.
    ///
    /// # Errors
    /// It leads out of the image, is no file, or cannot be opened.
    pub fn open(&self, name: &str) -> io::Result<File> {
        match self {
            Self::Directory(dir) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let place = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let place = rustix::fs::openat(CWD, *dir, place, Mode::empty())?;
                let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                let file = rustix::fs::openat2(place, name, flags, Mode::empty(), beneath)?;
                let file = File::from(file);
                if !file.metadata()?.is_file() {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                Ok(file)
            }
            Self::Archive { tree, spool, base } => {
                let id = tree.find(&[base, &b"/"[..], name.as_bytes()].concat());
                match id.map(|id| &tree.node(id).kind) {
                    Some(Kind::File(blob)) => File::open(spool.path(*blob)),
                    _ => Err(io::ErrorKind::NotFound.into()),
                }
            }
        }
    }
}

/// The one directory that is all that an archive has, as when an image's directory was packed.
#[must_use]
pub fn only_directory(tree: &Tree) -> Option<&[u8]> {
    let mut names = tree.names(ROOT);
    let (name, id) = names.next()?;
    let is_directory = matches!(tree.node(id).kind, Kind::Directory(_));
    (is_directory && names.next().is_none()).then_some(name)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn names_lead_to_files_of_the_image_alone() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::create_dir_all(image.join("sub")).unwrap();
        fs::write(dir.path().join("outside"), "x").unwrap();
        fs::write(image.join("sub/inside"), "x").unwrap();
        symlink("sub/inside", image.join("link")).unwrap();
        symlink("../outside", image.join("out")).unwrap();
        rustix::fs::mkfifoat(CWD, image.join("pipe"), Mode::RWXU).unwrap();
        let layout = Layout::Directory(&image);
        layout.open("sub/../link").unwrap();
        for bad in [
            "../outside",
            "out",
            "/etc/passwd",
            "sub",
            "pipe",
            "",
            "missing",
        ] {
            assert!(layout.open(bad).is_err(), "{bad}");
        }
    }
}
