//! What is imported: a directory, an archive in a file or on standard input, or a container image in
//! either, and which of several images.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::layout::{self, Layout};
use super::oci::{self, Image};
use super::spool::{FileSpool, Spool};
use super::tree::{self, Tree};
use super::{Error, archive, dir, docker, entry, io_error};
use crate::files;

/// Where an OCI image's process is put, for `resources/linux/init`.
const ENTRY_POINT: &str = "/etc/cloudlet/entry";

/// What is imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The path; none is standard input.
    path: Option<PathBuf>,
    /// Which of several images.
    name: Option<String>,
}

/// A root file system that was read.
#[derive(Debug)]
pub struct Root {
    /// Its names.
    pub tree: Tree,
    /// Where its contents are.
    pub contents: PathBuf,
    /// What it was.
    pub name: String,
}

impl Source {
    /// Takes a path apart: `-` is standard input, and what is there with its whole name is that; else
    /// what follows a colon is the name of an image.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        let whole = Self {
            path: (bytes != b"-").then(|| path.to_owned()),
            name: None,
        };
        if whole.path.is_none() || path.symlink_metadata().is_ok() {
            return whole;
        }
        let colons = bytes.iter().enumerate().filter(|(_, byte)| **byte == b':');
        let mut splits = colons.filter_map(|(at, _)| {
            let (before, name) = (OsStr::from_bytes(&bytes[..at]), &bytes[at + 1..]);
            let is_there = before == "-" || Path::new(before).symlink_metadata().is_ok();
            is_there.then_some(Self {
                path: (before != "-").then(|| before.into()),
                name: Some(std::str::from_utf8(name).ok()?.to_owned()),
            })
        });
        splits.next().unwrap_or(whole)
    }

    /// Reads what it is, with contents in new directories in `work`. Of archives at most what can make a
    /// root file system of `root_len` bytes is read.
    ///
    /// # Errors
    /// It cannot be read, or is nothing that can be imported.
    pub fn read(&self, work: &Path, root_len: u64) -> Result<Root, Error> {
        let name = self.name.as_deref();
        let reader = Reader {
            work,
            len_max: archive::len_max(root_len),
        };
        let Some(path) = &self.path else {
            if io::stdin().is_terminal() {
                return Err(Error::Terminal);
            }
            return reader.archive(io::stdin().lock(), name);
        };
        let metadata = std::fs::metadata(path).map_err(io_error("find", path))?;
        if !metadata.is_dir() {
            return reader.archive(files::open(path)?, name);
        }
        let layout = Layout::Directory(path);
        if let Some(root) = reader.image(&layout, name)? {
            return Ok(root);
        }
        if name.is_some() {
            return Err(Error::NoImages);
        }
        let (mut tree, mut spool) = (Tree::new(), reader.spool("contents")?);
        dir::read(path, &mut tree, &mut spool)?;
        Ok(Root::new(tree, &spool, "a directory"))
    }
}

impl Root {
    fn new(tree: Tree, spool: &FileSpool, name: impl Into<String>) -> Self {
        Self {
            tree,
            contents: spool.dir().to_owned(),
            name: name.into(),
        }
    }
}

struct Reader<'a> {
    work: &'a Path,
    len_max: u64,
}

impl Reader<'_> {
    /// A spool in a new directory.
    fn spool(&self, name: &str) -> Result<FileSpool, Error> {
        let dir = self.work.join(name);
        std::fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        Ok(FileSpool::new(&dir, self.len_max))
    }

    /// Reads an archive as if it were a root file system. Only then it shows whether it is an image,
    /// whose files may come in any order.
    fn archive(&self, source: impl Read, name: Option<&str>) -> Result<Root, Error> {
        let (mut tree, mut spool) = (Tree::new(), self.spool("archive")?);
        let kind = archive::Kind::Whole;
        archive::read(source, &mut tree, &mut spool, kind, self.len_max)?;
        let inner = layout::only_directory(&tree).map(<[u8]>::to_vec);
        for base in [Some(Vec::new()), inner].into_iter().flatten() {
            let layout = Layout::Archive {
                tree: &tree,
                spool: &spool,
                base: &base,
            };
            if let Some(root) = self.image(&layout, name)? {
                let dir = spool.dir();
                std::fs::remove_dir_all(dir).map_err(io_error("remove", dir))?;
                return Ok(root);
            }
        }
        if name.is_some() {
            return Err(Error::NoImages);
        }
        Ok(Root::new(tree, &spool, "a tar archive"))
    }

    /// Reads an image, if it is one.
    fn image(&self, layout: &Layout<'_>, name: Option<&str>) -> Result<Option<Root>, Error> {
        let is_oci = oci::is_image(layout);
        let docker = if is_oci { None } else { docker::images(layout) };
        if !is_oci && docker.is_none() {
            return Ok(None);
        }
        let (mut tree, mut spool) = (Tree::new(), self.spool("contents")?);
        let (image, form) = match docker {
            None => {
                let image = oci::read(layout, name, &mut tree, &mut spool, self.len_max)?;
                (image, "oci")
            }
            Some(images) => {
                let len_max = self.len_max;
                let image = docker::read(layout, &images, name, &mut tree, &mut spool, len_max)?;
                (image, "docker")
            }
        };
        add_process(&image, &mut tree, &mut spool)?;
        let name = format!("{form} {}", image.digest);
        Ok(Some(Root::new(tree, &spool, name)))
    }
}

/// Puts an image's process into its root, in the file that the guest's agent starts it from.
fn add_process(image: &Image, tree: &mut Tree, spool: &mut FileSpool) -> Result<(), Error> {
    let Some(file) = entry::file(&image.config, tree, spool)? else {
        return Ok(());
    };
    let blob = spool
        .store(&mut file.as_slice(), file.len() as u64)
        .map_err(tree::Error::from)?;
    let attributes = tree::Attributes {
        mode: 0o600,
        ..tree::Attributes::default()
    };
    let kind = tree::Kind::File(blob);
    Ok(tree.put(ENTRY_POINT.as_bytes(), attributes, kind, spool)?)
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
