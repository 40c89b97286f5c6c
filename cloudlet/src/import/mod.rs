//! Making a bootable image of a root file system that is a directory, a tar archive, or a container
//! image in either.
//!
//! Nothing of what is imported becomes a path of the host. [`tree`] holds names and attributes in
//! memory, where layers are merged; contents lie in numbered files of a private directory
//! ([`spool`]); [`ext4`] writes both as a file system. So owners and device nodes need no privilege, and
//! symbolic links and `..` have nothing to lead out of.
//!
//! | module | what |
//! | --- | --- |
//! | [`source`] | which of these it is |
//! | [`dir`] | directories |
//! | [`archive`], [`entries`], [`sparse`] | tar archives; [`unpack`] and [`sniff`] find them in what is compressed, and name what is none |
//! | [`oci`], [`docker`], [`choose`] | container images, whose files are where [`layout`] finds them |
//! | [`xattrs`] | which extended attributes are kept |
//! | [`entry`] | an OCI image's process, in the file that the guest's agent starts it from |
//! | [`boot`] | kernel and initial RAM disk |

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use cloudlet_agent::sparse as holes;
use sha2::{Digest as _, Sha256};

use crate::boot_image::{self, Digest, Files, Manifest};
use crate::files;

pub mod archive;
pub mod boot;
pub mod choose;
pub mod dir;
pub mod docker;
pub mod entries;
pub mod entry;
pub mod ext4;
pub mod layout;
pub mod oci;
pub mod sniff;
pub mod source;
pub mod sparse;
pub mod spool;
pub mod tree;
pub mod unpack;
pub mod xattrs;

use source::Source;
use xattrs::LeftOut;

/// Size of a root file system for which none is given: this, or twice what it takes if that is more.
pub const ROOT_LEN: u64 = 2 << 30;
/// Most bytes of contents where no size is given.
const CONTENTS_LEN_MAX: u64 = 16 << 30;

/// Bytes hashed at a time.
const HASH_CHUNK_LEN: usize = 256 << 10;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source cannot be read, or the image cannot be written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The source is neither a directory nor a file.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The source has what no root file system has.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// An archive is damaged or of a kind that is not known here.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// An OCI image is not what it should be.
    #[error(transparent)]
    Oci(#[from] oci::Error),
    /// Nobody types an archive.
    #[error("standard input is a terminal: an archive is to come from there, through a pipe")]
    Terminal,
    /// A name that chooses, where there is nothing to choose from.
    #[error("there are no images in it to choose by name")]
    NoImages,
    /// An OCI image's process cannot be run.
    #[error(transparent)]
    Entry(#[from] entry::Error),
    /// There is no kernel to boot it with.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The file system could not be made.
    #[error(transparent)]
    Ext4(#[from] ext4::Error),
}

/// What to import, and what to make of it.
#[derive(Debug)]
pub struct Options<'a> {
    /// What is imported.
    pub source: &'a Source,
    /// Where kernel and initial RAM disk come from.
    pub boot: boot::Choice<'a>,
    /// Size of the root file system in bytes; none is as [`ROOT_LEN`] says.
    pub root_len: Option<u64>,
    /// A private empty directory on the image's file system.
    pub work: &'a Path,
}

/// Hears of steps, and how far the last of them is.
pub trait Progress {
    /// A step begins.
    fn step(&mut self, step: &str);
    /// So many bytes of so many of the root file system are written.
    fn written(&mut self, done: u64, total: u64);
}

/// What was made.
#[derive(Debug)]
pub struct Made {
    /// The image.
    pub manifest: Manifest,
    /// What was left out of what the source has.
    pub left_out: LeftOut,
}

/// Makes the image's files in `options.work` joined with `image`, and says what was made.
///
/// # Errors
/// As [`Error`] says; `options.work` may have leftovers then.
pub fn import(options: &Options<'_>, progress: &mut dyn Progress) -> Result<Made, Error> {
    let image = options.work.join("image");
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.mode(0o700).create(&image);
    made.map_err(io_error("make", &image))?;
    progress.step("reading the root file system");
    let limit = options.root_len.unwrap_or(CONTENTS_LEN_MAX);
    let read = options.source.read(options.work, limit)?;
    let (tree, contents) = (&read.tree, &read.contents);
    progress.step("adding kernel and initial RAM disk");
    let cmdline = boot::place(&options.boot, tree, contents, &image)?;
    progress.step("writing the root file system");
    let root = image.join(boot_image::ROOT);
    let file = File::create_new(&root).map_err(io_error("make", &root))?;
    let plan = ext4::plan(tree, contents)?;
    let root_len = options.root_len.unwrap_or_else(|| {
        let roomy = plan.smallest().saturating_mul(2).next_multiple_of(1 << 20);
        roomy.max(ROOT_LEN)
    });
    plan.write(&file, root_len, &mut |done, total| {
        progress.written(done, total);
    })?;
    let manifest = Manifest {
        format: boot_image::FORMAT,
        source: read.name,
        cmdline,
        files: Files {
            kernel: digest(&image.join(boot_image::KERNEL))?,
            initrd: digest(&image.join(boot_image::INITRD))?,
            root: digest(&root)?,
        },
        packages: Vec::new(),
    };
    let path = image.join(boot_image::MANIFEST);
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain JSON");
    std::fs::write(&path, text).map_err(io_error("write", &path))?;
    Ok(Made {
        manifest,
        left_out: tree.left_out().clone(),
    })
}

/// Length and hash of a finished file, whose holes are not read.
fn digest(path: &Path) -> Result<Digest, Error> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let mut hash = Sha256::new();
    hash_into(&mut hash, &file).map_err(io_error("read", path))?;
    Ok(Digest {
        bytes: file.metadata().map_err(io_error("look at", path))?.len(),
        sha256: hex(&hash.finalize()),
    })
}

fn hash_into(hash: &mut Sha256, file: &File) -> io::Result<()> {
    let len = file.metadata()?.len();
    let zeros = vec![0; HASH_CHUNK_LEN];
    let mut chunk = zeros.clone();
    let mut at = 0;
    let stretches = holes::data(file, len).chain(std::iter::once(Ok(len..len)));
    for stretch in stretches {
        let stretch = stretch?;
        while at < stretch.start {
            let count = (stretch.start - at).min(HASH_CHUNK_LEN as u64);
            // At most a chunk.
            hash.update(&zeros[..usize::try_from(count).unwrap_or(0)]);
            at += count;
        }
        while at < stretch.end {
            let count = (stretch.end - at).min(HASH_CHUNK_LEN as u64);
            let part = &mut chunk[..usize::try_from(count).unwrap_or(0)];
            file.read_exact_at(part, at)?;
            hash.update(part);
            at += count;
        }
    }
    Ok(())
}

/// Bytes as lower-case digits.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}
