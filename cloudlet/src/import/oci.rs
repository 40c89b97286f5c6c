//! OCI images as directories: index, manifest, configuration and layers, each found by the hash that
//! the one before it gives, and believed only when it has that hash.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::archive;
use super::hex;
use super::spool::FileSpool;
use super::tree::Tree;
use crate::files;

/// Longest of the JSON files.
const JSON_LEN_MAX: u64 = 4 << 20;
/// Most layers.
const LAYERS_MAX: usize = 512;
/// Deepest index in an index.
const INDEX_DEPTH_MAX: u32 = 4;
/// What the kernels here run.
const OS: &str = "linux";
const ARCHITECTURE: &str = "amd64";
/// Bytes hashed at a time.
const CHUNK_LEN: usize = 256 << 10;

/// Why a directory is no OCI image that can be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing, or is none.
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
    /// A file is not the JSON that it should be.
    #[error("the image's {what} is not as the OCI image format says")]
    Syntax {
        /// Which.
        what: &'static str,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A file is longer than any is.
    #[error("the image's {what} is longer than {JSON_LEN_MAX} bytes")]
    TooLong {
        /// Which.
        what: &'static str,
    },
    /// A hash is of a kind that is not known here, or no hash.
    #[error("{0:?} is no SHA-256")]
    Digest(String),
    /// Contents are not what their hash says.
    #[error("{digest} has other contents than its hash or its length says")]
    Contents {
        /// The hash.
        digest: String,
    },
    /// There is nothing for this kind of machine.
    #[error("the image has nothing for {OS} on {ARCHITECTURE}")]
    Platform,
    /// There are several images, or none.
    #[error("the directory has {0} images, and one is needed")]
    Count(usize),
    /// There is no end of layers.
    #[error("the image has more than {LAYERS_MAX} layers")]
    Layers,
    /// A layer is of a kind that is not known here.
    #[error("{0:?} is a kind of layer that is not known here")]
    LayerType(String),
    /// A layer cannot be read.
    #[error("layer {number} ({digest})")]
    Layer {
        /// Which, from 1.
        number: usize,
        /// Its hash.
        digest: String,
        /// The cause.
        #[source]
        source: archive::Error,
    },
}

/// What leads to a file: kind, hash and length.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// An index: what images there are.
#[derive(Debug, Deserialize)]
pub struct Index {
    manifests: Vec<Descriptor>,
}

/// A manifest: what an image is made of.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// An image's configuration.
#[derive(Debug, Deserialize)]
pub struct Configuration {
    architecture: String,
    os: String,
    config: Option<Config>,
}

/// How an image's process is started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Config {
    /// `NAME=VALUE` words.
    pub env: Option<Vec<String>>,
    /// Program and arguments.
    pub entrypoint: Option<Vec<String>>,
    /// More arguments, or program and arguments if there is no entry point.
    pub cmd: Option<Vec<String>>,
    /// Where it is started.
    pub working_dir: Option<String>,
    /// As whom: `USER[:GROUP]`, names or numbers.
    pub user: Option<String>,
}

/// An image that was read.
#[derive(Debug)]
pub struct Image {
    /// Its manifest's hash.
    pub digest: String,
    /// How its process is started.
    pub config: Config,
}

/// Whether a directory is an OCI image and not a root file system.
#[must_use]
pub fn is_layout(dir: &Path) -> bool {
    dir.join("oci-layout").is_file() && dir.join("index.json").is_file()
}

/// Reads the image in `dir`, its layers in order, into `tree`.
///
/// # Errors
/// As [`Error`] says. The tree may have a part of it then.
pub fn read(dir: &Path, tree: &mut Tree, spool: &mut FileSpool) -> Result<Image, Error> {
    let path = dir.join("index.json");
    let file = open(&path)?;
    let index: Index = parse(&limited(file, &path, "index")?, "index")?;
    let chosen = choose(dir, &index)?;
    let manifest: Manifest = load(dir, &chosen, "manifest")?;
    if manifest.layers.len() > LAYERS_MAX {
        return Err(Error::Layers);
    }
    let about: Configuration = load(dir, &manifest.config, "configuration")?;
    if about.os != OS || about.architecture != ARCHITECTURE {
        return Err(Error::Platform);
    }
    for (at, layer) in manifest.layers.iter().enumerate() {
        if !layer.media_type.contains(".tar") || layer.media_type.contains("encrypted") {
            return Err(Error::LayerType(layer.media_type.clone()));
        }
        let file = verified(dir, layer)?;
        let len_max = archive::len_max(spool.len_max());
        archive::read(file, tree, spool, archive::Kind::Layer, len_max).map_err(|source| {
            Error::Layer {
                number: at + 1,
                digest: layer.digest.clone(),
                source,
            }
        })?;
    }
    Ok(Image {
        digest: chosen.digest,
        config: about.config.unwrap_or_default(),
    })
}

/// The one image for this kind of machine, through indices in indices.
fn choose(dir: &Path, index: &Index) -> Result<Descriptor, Error> {
    let mut chosen = pick(index)?;
    for _ in 0..INDEX_DEPTH_MAX {
        if !is_index(&chosen.media_type) {
            return Ok(chosen);
        }
        let inner: Index = load(dir, &chosen, "index")?;
        chosen = pick(&inner)?;
    }
    Err(Error::Count(0))
}

fn is_index(media_type: &str) -> bool {
    media_type == "application/vnd.oci.image.index.v1+json"
        || media_type == "application/vnd.docker.distribution.manifest.list.v2+json"
}

/// The one entry that fits: those for other machines do not count.
pub fn pick(index: &Index) -> Result<Descriptor, Error> {
    let fits = |entry: &&Descriptor| {
        entry
            .platform
            .as_ref()
            .is_none_or(|platform| platform.os == OS && platform.architecture == ARCHITECTURE)
    };
    let mut fitting = index.manifests.iter().filter(fits);
    match (fitting.next(), fitting.count()) {
        (Some(one), 0) => Ok(one.clone()),
        (None, _) if !index.manifests.is_empty() => Err(Error::Platform),
        (one, more) => Err(Error::Count(usize::from(one.is_some()) + more)),
    }
}

/// Parses one of the JSON files.
///
/// # Errors
/// It is not what it should be.
pub fn parse<T: DeserializeOwned>(bytes: &[u8], what: &'static str) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|source| Error::Syntax { what, source })
}

/// Reads a JSON file that has the right hash.
fn load<T: DeserializeOwned>(
    dir: &Path,
    descriptor: &Descriptor,
    what: &'static str,
) -> Result<T, Error> {
    if descriptor.size > JSON_LEN_MAX {
        return Err(Error::TooLong { what });
    }
    let path = path_of(dir, &descriptor.digest)?;
    let bytes = limited(open(&path)?, &path, what)?;
    let right = bytes.len() as u64 == descriptor.size
        && is_hash(&descriptor.digest, &Sha256::digest(&bytes));
    if !right {
        return Err(wrong(descriptor));
    }
    parse(&bytes, what)
}

/// Opens a file that has the right hash: all of it is read before any of it is used.
fn verified(dir: &Path, descriptor: &Descriptor) -> Result<File, Error> {
    let path = path_of(dir, &descriptor.digest)?;
    let read_error = |source| Error::Read {
        path: path.clone(),
        source,
    };
    let mut file = open(&path)?;
    let mut hash = Sha256::new();
    let mut left = descriptor.size;
    let mut chunk = vec![0; CHUNK_LEN];
    loop {
        let count = file.read(&mut chunk).map_err(read_error)?;
        if count == 0 {
            break;
        }
        hash.update(&chunk[..count]);
        left = left
            .checked_sub(count as u64)
            .ok_or_else(|| wrong(descriptor))?;
    }
    if left != 0 || !is_hash(&descriptor.digest, &hash.finalize()) {
        return Err(wrong(descriptor));
    }
    file.rewind().map_err(read_error)?;
    Ok(file)
}

fn wrong(descriptor: &Descriptor) -> Error {
    Error::Contents {
        digest: descriptor.digest.clone(),
    }
}

fn is_hash(digest: &str, bytes: &[u8]) -> bool {
    digest.strip_prefix("sha256:") == Some(&hex(bytes))
}

/// Where contents lie: the hash is held against its form before it becomes a name.
pub fn path_of(dir: &Path, digest: &str) -> Result<PathBuf, Error> {
    let digits = digest.strip_prefix("sha256:").filter(|digits| {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        digits.len() == 64 && digits.bytes().all(is_digit)
    });
    match digits {
        Some(digits) => Ok(dir.join("blobs/sha256").join(digits)),
        None => Err(Error::Digest(digest.chars().take(100).collect())),
    }
}

fn open(path: &Path) -> Result<File, Error> {
    Ok(files::open(path)?)
}

fn limited(file: File, path: &Path, what: &'static str) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    file.take(JSON_LEN_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
    if bytes.len() as u64 > JSON_LEN_MAX {
        return Err(Error::TooLong { what });
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "oci_tests.rs"]
mod tests;
