//! A bootable image: a directory with a kernel, an initial RAM disk, an ext4 root and a manifest, as
//! `resources/linux/build-debian` makes it. The names of the files are fixed; the manifest says how
//! long they are and what is on the kernel's command line, and is held against limits.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files;

/// The kernel's file in an image.
pub const KERNEL: &str = "vmlinuz";
/// The initial RAM disk's.
pub const INITRD: &str = "initrd.img";
/// The root file system's.
pub const ROOT: &str = "root.ext4";
/// The manifest's.
pub const MANIFEST: &str = "manifest.json";
/// All of them.
pub const NAMES: [&str; 4] = [KERNEL, INITRD, ROOT, MANIFEST];

/// The only form of manifest there is.
pub(crate) const FORMAT: u32 = 1;
/// Longest manifest: a thousand packages have 40 KiB.
const MANIFEST_LEN_MAX: u64 = 4 << 20;
/// Longest command line; a kernel takes 2048 bytes, and the user may add some.
const CMDLINE_LEN_MAX: usize = 1024;
/// Where an ext4 file system has its magic number, and the number.
const EXT4_MAGIC_AT: u64 = 1024 + 0x38;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];

/// Why a directory is no bootable image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing, is none, or is longer than any of its kind.
    #[error(transparent)]
    File(#[from] files::Error),
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The manifest is not what it should be.
    #[error("{} is no manifest of a bootable image", path.display())]
    Syntax {
        /// The manifest.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is of another version.
    #[error("the image's form {0} is not known here, only {FORMAT}")]
    Format(u32),
    /// The kernel's command line has bytes that it cannot have, or too many.
    #[error("the image's command line is not of at most {CMDLINE_LEN_MAX} printable characters")]
    Cmdline,
    /// A file is not the one that the manifest was written for.
    #[error("{} has {actual} bytes and should have {expected}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        actual: u64,
        /// The manifest's word.
        expected: u64,
    },
    /// The root has no ext4 file system.
    #[error("{} has no ext4 file system", path.display())]
    NoFileSystem {
        /// The file.
        path: PathBuf,
    },
}

/// What the manifest has that matters for a boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// The manifest's form.
    pub format: u32,
    /// What the image was made from, in words.
    pub source: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// The files.
    pub files: Files,
    /// Names and versions of the packages, where the image is made of packages.
    #[serde(default)]
    pub packages: Vec<String>,
}

/// The files of an image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Files {
    /// The kernel.
    #[serde(rename = "vmlinuz")]
    pub kernel: Digest,
    /// The initial RAM disk.
    #[serde(rename = "initrd.img")]
    pub initrd: Digest,
    /// The root file system.
    #[serde(rename = "root.ext4")]
    pub root: Digest,
}

/// A file's length and hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256 in hexadecimal digits.
    pub sha256: String,
}

/// A bootable image that was found complete.
#[derive(Debug, Clone)]
pub struct BootImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The root file system, for the first disk.
    pub root: PathBuf,
    /// What the manifest says.
    pub manifest: Manifest,
}

impl BootImage {
    /// Opens the image in `dir`. Lengths are checked and contents are not.
    ///
    /// # Errors
    /// A file is missing or of another length, or the manifest is wrong.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let manifest = read_manifest(dir)?;
        let image = Self {
            kernel: dir.join(KERNEL),
            initrd: dir.join(INITRD),
            root: dir.join(ROOT),
            manifest,
        };
        let files = &image.manifest.files;
        check(dir, KERNEL, &files.kernel)?;
        check(dir, INITRD, &files.initrd)?;
        let root = check(dir, ROOT, &files.root)?;
        let mut magic = [0; 2];
        match root.read_exact_at(&mut magic, EXT4_MAGIC_AT) {
            Ok(()) if magic == EXT4_MAGIC => Ok(image),
            Ok(()) => Err(Error::NoFileSystem { path: image.root }),
            Err(source) => Err(Error::Read {
                path: image.root,
                source,
            }),
        }
    }
}

/// Reads the manifest in `dir` and checks what it says.
fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
    let text = files::read_inside(dir, MANIFEST, MANIFEST_LEN_MAX)?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|source| Error::Syntax {
        path: dir.join(MANIFEST),
        source,
    })?;
    if manifest.format != FORMAT {
        return Err(Error::Format(manifest.format));
    }
    let printable = manifest.cmdline.bytes().all(|b| (b' '..=b'~').contains(&b));
    if manifest.cmdline.len() > CMDLINE_LEN_MAX || !printable {
        return Err(Error::Cmdline);
    }
    Ok(manifest)
}

fn check(dir: &Path, name: &str, digest: &Digest) -> Result<File, Error> {
    let file = files::open_inside(dir, name)?;
    let length = file.metadata().map_err(|source| Error::Read {
        path: dir.join(name),
        source,
    })?;
    if length.len() != digest.bytes {
        return Err(Error::Length {
            path: dir.join(name),
            actual: length.len(),
            expected: digest.bytes,
        });
    }
    Ok(file)
}

#[cfg(test)]
#[path = "boot_image_tests.rs"]
mod tests;
