//! Images as `docker save` and `podman save` write them: `manifest.json` names the configuration, whose
//! file is named by its hash, and the layers, whose hashes the configuration has.

use std::fs::File;
use std::io::{self, Seek};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::choose::{is_name, names_of};
use super::layout::Layout;
use super::oci::{self, Configuration, Error, Image, LAYERS_MAX, is_digits, is_hash, open, wrong};
use super::spool::Spool;
use super::tree::Tree;
use super::unpack::unpack;

/// The file that says what images there are.
const MANIFEST: &str = "manifest.json";
/// What the file of a configuration is called before or behind its hash.
const PLACES: [(&str, &str); 2] = [("blobs/sha256/", ""), ("", ".json")];

/// One of the images.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Entry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// What images there are, if a layout is of this form. A root file system may have a file of that name
/// too.
#[must_use]
pub fn images(layout: &Layout<'_>) -> Option<Vec<Entry>> {
    let bytes = oci::whole(layout, MANIFEST, "manifest").ok()?;
    let entries: Vec<Entry> = oci::parse(&bytes, "manifest").ok()?;
    (!entries.is_empty()).then_some(entries)
}

/// Reads the one of `images` that has the name, as [`oci::read`] does.
///
/// # Errors
/// As [`Error`] says. The tree may have a part of it then.
pub fn read(
    layout: &Layout<'_>,
    images: &[Entry],
    name: Option<&str>,
    tree: &mut Tree,
    spool: &mut dyn Spool,
    len_max: u64,
) -> Result<Image, Error> {
    let chosen = choose(images, name)?;
    if chosen.layers.len() > LAYERS_MAX {
        return Err(Error::Layers);
    }
    let digest = digest_of(&chosen.config)?;
    let bytes = oci::whole(layout, &chosen.config, "configuration")?;
    if !is_hash(&digest, &Sha256::digest(&bytes)) {
        return Err(wrong(&digest));
    }
    let about: Configuration = oci::parse(&bytes, "configuration")?;
    about.check()?;
    let hashes = &about.rootfs.diff_ids;
    if hashes.len() != chosen.layers.len() {
        return Err(Error::Hashes);
    }
    for (at, (layer, hash)) in chosen.layers.iter().zip(hashes).enumerate() {
        let file = verified(layout, layer, hash, len_max)?;
        oci::add_layer(file, at, hash, tree, spool, len_max)?;
    }
    Ok(Image {
        digest,
        config: about.config.unwrap_or_default(),
    })
}

/// The one image of that name; several names of one image are one.
pub fn choose<'a>(images: &'a [Entry], name: Option<&str>) -> Result<&'a Entry, Error> {
    let tags = |image: &'a Entry| image.repo_tags.iter().flatten().map(String::as_str);
    let has_name = |image: &&Entry| match name {
        Some(name) => image
            .repo_tags
            .iter()
            .flatten()
            .any(|tag| is_name(tag, name)),
        None => true,
    };
    let mut fitting = images.iter().filter(has_name);
    let Some(first) = fitting.next() else {
        let names = names_of(images.iter().flat_map(tags));
        return Err(Error::Name { names });
    };
    let count = fitting.filter(|image| image.config != first.config).count();
    match (count, names_of(images.iter().flat_map(tags))) {
        (0, _) => Ok(first),
        (more, names) if names.is_empty() => Err(Error::Count(more + 1)),
        (more, names) => Err(Error::Several {
            count: more + 1,
            names,
        }),
    }
}

/// The hash that the name of a configuration's file is made of.
pub fn digest_of(name: &str) -> Result<String, Error> {
    let digits = PLACES.iter().find_map(|(before, behind)| {
        let digits = name.strip_prefix(before)?.strip_suffix(behind)?;
        is_digits(digits).then_some(digits)
    });
    match digits {
        Some(digits) => Ok(format!("sha256:{digits}")),
        None => Err(Error::Digest(name.chars().take(100).collect())),
    }
}

/// Opens a layer whose archive has the right hash: all of it is read before any of it is used.
fn verified(layout: &Layout<'_>, name: &str, digest: &str, len_max: u64) -> Result<File, Error> {
    let mut file = open(layout, name)?;
    let mut unpacked = unpack(&file)?;
    let (len, hash) = oci::hash(&mut unpacked, len_max).map_err(oci::read_error(name))?;
    drop(unpacked);
    if len == len_max {
        let source = io::Error::other("a layer is longer than what fits (--size)");
        return Err(oci::read_error(name)(source));
    }
    if !is_hash(digest, &hash) {
        return Err(wrong(digest));
    }
    file.rewind().map_err(oci::read_error(name))?;
    Ok(file)
}

#[cfg(test)]
#[path = "docker_tests.rs"]
mod tests;
