//! OCI images: index, manifest, configuration and layers, each found by the hash that the one before it
//! gives, and believed only when it has that hash.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::archive;
use super::choose::{self, ARCHITECTURE, OS};
use super::hex;
use super::layout::Layout;
use super::spool::Spool;
use super::tree::Tree;
use super::unpack;

/// Longest of the JSON files.
const JSON_LEN_MAX: u64 = 4 << 20;
/// Most layers.
pub const LAYERS_MAX: usize = 512;
/// Deepest index in an index.
const INDEX_DEPTH_MAX: u32 = 4;
/// Bytes hashed at a time.
const CHUNK_LEN: usize = 256 << 10;

/// Why an image cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read the image's {name}")]
    Read {
        /// The file, as the image names it.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("the image's {what} is not as its format says")]
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
    #[error("there are {0} images without names to choose by, and one is needed")]
    Count(usize),
    /// There are several images, which have names.
    #[error("there are {count} images: choose one as SOURCE:NAME, of {names}")]
    Several {
        /// How many.
        count: usize,
        /// What they are called.
        names: String,
    },
    /// No image has the name.
    #[error("no image has that name; there is {names}")]
    Name {
        /// What there is.
        names: String,
    },
    /// There is no end of layers.
    #[error("the image has more than {LAYERS_MAX} layers")]
    Layers,
    /// There are not as many hashes as layers.
    #[error("the image's configuration has other layers than its manifest")]
    Hashes,
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
    /// A layer cannot be unpacked.
    #[error(transparent)]
    Unpack(#[from] unpack::Error),
}

/// What leads to a file: kind, hash and length.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    media_type: String,
    pub(super) digest: String,
    size: u64,
    pub(super) platform: Option<Platform>,
    pub(super) annotations: Option<BTreeMap<String, String>>,
}

/// A kind of machine.
#[derive(Debug, Clone, Deserialize)]
pub struct Platform {
    pub(super) architecture: String,
    pub(super) os: String,
    pub(super) variant: Option<String>,
}

/// An index: what images there are.
#[derive(Debug, Deserialize)]
pub struct Index {
    pub(super) manifests: Vec<Descriptor>,
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
    pub(super) config: Option<Config>,
    #[serde(default)]
    pub(super) rootfs: RootFs,
}

/// What an image's root file system is of.
#[derive(Debug, Default, Deserialize)]
pub struct RootFs {
    /// Hashes of the layers as archives that are not compressed.
    #[serde(default)]
    pub(super) diff_ids: Vec<String>,
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
    /// The hash of its manifest; where it has none, of its configuration.
    pub digest: String,
    /// How its process is started.
    pub config: Config,
}

/// Whether a layout is an OCI image and not a root file system.
#[must_use]
pub fn is_image(layout: &Layout<'_>) -> bool {
    layout.open("oci-layout").is_ok() && layout.open("index.json").is_ok()
}

/// Reads an image, its layers in order, into `tree`: the one of that name if there are several. A layer
/// may have `len_max` bytes when it is unpacked.
///
/// # Errors
/// As [`Error`] says. The tree may have a part of it then.
pub fn read(
    layout: &Layout<'_>,
    name: Option<&str>,
    tree: &mut Tree,
    spool: &mut dyn Spool,
    len_max: u64,
) -> Result<Image, Error> {
    let index: Index = parse(&whole(layout, "index.json", "index")?, "index")?;
    let chosen = choose(layout, &index, name)?;
    let manifest: Manifest = load(layout, &chosen, "manifest")?;
    if manifest.layers.len() > LAYERS_MAX {
        return Err(Error::Layers);
    }
    let about: Configuration = load(layout, &manifest.config, "configuration")?;
    about.check()?;
    for (at, layer) in manifest.layers.iter().enumerate() {
        if !layer.media_type.contains(".tar") || layer.media_type.contains("encrypted") {
            return Err(Error::LayerType(layer.media_type.clone()));
        }
        let file = verified(layout, layer)?;
        add_layer(file, at, &layer.digest, tree, spool, len_max)?;
    }
    Ok(Image {
        digest: chosen.digest,
        config: about.config.unwrap_or_default(),
    })
}

impl Configuration {
    /// Whether it is for this kind of machine.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self) -> Result<(), Error> {
        if self.os != OS || self.architecture != ARCHITECTURE {
            return Err(Error::Platform);
        }
        Ok(())
    }
}

/// Puts a layer, the next after `at` others, into the tree.
///
/// # Errors
/// It cannot be read.
pub fn add_layer(
    file: File,
    at: usize,
    digest: &str,
    tree: &mut Tree,
    spool: &mut dyn Spool,
    len_max: u64,
) -> Result<(), Error> {
    archive::read(file, tree, spool, archive::Kind::Layer, len_max).map_err(|source| Error::Layer {
        number: at + 1,
        digest: digest.to_owned(),
        source,
    })
}

/// The one image of that name and for this kind of machine, through indices in indices.
fn choose(layout: &Layout<'_>, index: &Index, name: Option<&str>) -> Result<Descriptor, Error> {
    let level = choose::level_of_host();
    let mut chosen = choose::pick(&index.manifests, name, level)?.clone();
    for _ in 0..INDEX_DEPTH_MAX {
        if !is_index(&chosen.media_type) {
            return Ok(chosen);
        }
        let inner: Index = load(layout, &chosen, "index")?;
        chosen = choose::pick(&inner.manifests, None, level)?.clone();
    }
    Err(Error::Count(0))
}

fn is_index(media_type: &str) -> bool {
    media_type == "application/vnd.oci.image.index.v1+json"
        || media_type == "application/vnd.docker.distribution.manifest.list.v2+json"
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
    layout: &Layout<'_>,
    descriptor: &Descriptor,
    what: &'static str,
) -> Result<T, Error> {
    if descriptor.size > JSON_LEN_MAX {
        return Err(Error::TooLong { what });
    }
    let bytes = whole(layout, &name_of(&descriptor.digest)?, what)?;
    let right = bytes.len() as u64 == descriptor.size
        && is_hash(&descriptor.digest, &Sha256::digest(&bytes));
    if !right {
        return Err(wrong(&descriptor.digest));
    }
    parse(&bytes, what)
}

/// Opens a file that has the right hash: all of it is read before any of it is used.
fn verified(layout: &Layout<'_>, descriptor: &Descriptor) -> Result<File, Error> {
    let name = name_of(&descriptor.digest)?;
    let mut file = open(layout, &name)?;
    // A byte more than there should be is enough to see that there is one.
    let limit = descriptor.size.saturating_add(1);
    let (len, hash) = hash(&mut file, limit).map_err(read_error(&name))?;
    if len != descriptor.size || !is_hash(&descriptor.digest, &hash) {
        return Err(wrong(&descriptor.digest));
    }
    file.rewind().map_err(read_error(&name))?;
    Ok(file)
}

/// Length and hash of what `source` gives, of at most `len_max` bytes.
///
/// # Errors
/// It cannot be read.
pub fn hash(source: &mut dyn Read, len_max: u64) -> io::Result<(u64, [u8; 32])> {
    let mut hash = Sha256::new();
    let mut source = source.take(len_max);
    let mut len = 0;
    let mut chunk = vec![0; CHUNK_LEN];
    loop {
        let count = source.read(&mut chunk)?;
        if count == 0 {
            return Ok((len, hash.finalize().into()));
        }
        hash.update(&chunk[..count]);
        len += count as u64;
    }
}

/// Contents that are not what a hash says.
#[must_use]
pub fn wrong(digest: &str) -> Error {
    Error::Contents {
        digest: digest.to_owned(),
    }
}

/// Whether a hash as images write it is this one.
#[must_use]
pub fn is_hash(digest: &str, bytes: &[u8]) -> bool {
    digest.strip_prefix("sha256:") == Some(&hex(bytes))
}

/// Where contents lie: the hash is held against its form before it becomes a name.
///
/// # Errors
/// It is no hash.
pub fn name_of(digest: &str) -> Result<String, Error> {
    let digits = digest.strip_prefix("sha256:");
    match digits.filter(|digits| is_digits(digits)) {
        Some(digits) => Ok(format!("blobs/sha256/{digits}")),
        None => Err(Error::Digest(digest.chars().take(100).collect())),
    }
}

/// Whether a text is a SHA-256 as images write it.
#[must_use]
pub fn is_digits(text: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == 64 && text.bytes().all(is_digit)
}

/// Opens a file of an image.
///
/// # Errors
/// It is not there, or no file.
pub fn open(layout: &Layout<'_>, name: &str) -> Result<File, Error> {
    layout.open(name).map_err(read_error(name))
}

/// What could not be read.
pub fn read_error(name: &str) -> impl Fn(io::Error) -> Error {
    let name: String = name.chars().take(200).collect();
    move |source| Error::Read {
        name: name.clone(),
        source,
    }
}

/// All of one of the JSON files.
///
/// # Errors
/// It is longer than any is, or cannot be read.
pub fn whole(layout: &Layout<'_>, name: &str, what: &'static str) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let file = open(layout, name)?;
    let read = file.take(JSON_LEN_MAX + 1).read_to_end(&mut bytes);
    read.map_err(read_error(name))?;
    if bytes.len() as u64 > JSON_LEN_MAX {
        return Err(Error::TooLong { what });
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "oci_tests.rs"]
mod tests;
