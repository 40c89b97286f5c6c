//! The base store: immutable base VMs, each in a directory named by its id, and tags that name
//! them for people.
//!
//! | path below the store | what it is |
//! | --- | --- |
//! | `ID/` | an image (`image.rs`), with `hashes` (a hash a page) and `manifest` beside it |
//! | `tags/TAG` | the id of the base VM the tag means |
//!
//! The id is the hash of the manifest, which has the hashes of all the files: a base VM is what
//! its id says, or `verify` finds out. Everything appears by a rename, whole.

use std::fs::File;
use std::io::{self, BufReader, BufWriter};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cloudlet_overlay::{
    BaseHashes, BaseId, Digest, Manifest, PAGE_BYTES, Space, SpaceFile, StoredFile,
};
use cloudlet_snapshot::{AtomicDir, AtomicError, AtomicFile, sweep_leftovers};

use crate::files;
use crate::image::{self, Image, file};
use crate::pages::ImagePages;
use crate::sparse::SparseFile;

const MANIFEST: &str = "manifest";
const HASHES: &str = "hashes";
const TAGS: &str = "tags";
const MANIFEST_LEN_MAX: u64 = 2 << 20;
const TAG_FILE_LEN_MAX: u64 = 128;
/// Longest tag.
const TAG_LEN_MAX: usize = 64;
/// Fewest digits that abbreviate an id.
const ABBREVIATION_LEN_MIN: usize = 6;

/// What is wrong with the store or a base VM in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tag that would be taken for an id.
    #[error("{tag:?} cannot be a tag: it is what the id of a base VM looks like")]
    TagLikeId {
        /// The tag as given.
        tag: String,
    },
    /// A tag that cannot be a file name.
    #[error("{tag:?} is no tag: use 1 to {TAG_LEN_MAX} letters, digits, '-', '_', '.', ':'")]
    BadTag {
        /// The tag as given.
        tag: String,
    },
    /// Nothing of that name.
    #[error("no base VM {name}: `cloudlet base ls` lists them")]
    Unknown {
        /// Tag or id as given.
        name: String,
    },
    /// An abbreviation that more than one id begins with.
    #[error("{name} may be several base VMs: give more digits")]
    Ambiguous {
        /// The abbreviation.
        name: String,
    },
    /// The store's files cannot be used.
    #[error("cannot use {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// One of the store's files is not there, or is none.
    #[error(transparent)]
    File(#[from] files::Error),
    /// A file or directory could not be published.
    #[error(transparent)]
    Atomic(#[from] AtomicError),
    /// The image in a base VM is unusable.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The manifest is not one, or cannot be made.
    #[error("the manifest of {path} is unusable")]
    Manifest {
        /// The base VM's directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: cloudlet_overlay::manifest::ManifestError,
    },
    /// The page hashes cannot be made or read.
    #[error("the page hashes of {path} are unusable")]
    Hashes {
        /// The base VM's directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: cloudlet_overlay::base_hashes::HashesError,
    },
    /// A file is not what the manifest says.
    #[error("{path} is damaged: its content is not what the base VM's id stands for")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// A base VM in the store.
#[derive(Debug, Clone)]
pub struct Base {
    /// Its name.
    pub id: BaseId,
    /// Its directory, which is an image.
    pub dir: PathBuf,
    /// The tags that mean it.
    pub tags: Vec<String>,
}

impl Base {
    /// Its files, with their lengths checked.
    pub fn image(&self) -> Result<Image, Error> {
        Ok(Image::open(&self.dir)?)
    }

    /// Its manifest, checked against its id.
    pub fn manifest(&self) -> Result<Manifest, Error> {
        let path = self.dir.join(MANIFEST);
        let bytes = files::read_inside(&self.dir, MANIFEST, MANIFEST_LEN_MAX)?;
        if BaseId(Digest::of(&bytes)) != self.id {
            return Err(Error::Damaged { path });
        }
        let failed = |source| Error::Manifest {
            path: self.dir.clone(),
            source,
        };
        Manifest::parse(&bytes).map_err(failed)
    }

    /// The hashes of its pages.
    pub fn hashes(&self) -> Result<BaseHashes, Error> {
        let file = files::open_inside(&self.dir, HASHES)?;
        BaseHashes::read(&mut BufReader::new(file)).map_err(|source| Error::Hashes {
            path: self.dir.clone(),
            source,
        })
    }

    /// Bytes it takes on disk.
    pub fn disk_usage(&self) -> Result<u64, Error> {
        use std::os::unix::fs::MetadataExt;
        let mut bytes = 0;
        for entry in std::fs::read_dir(&self.dir).map_err(io_error(&self.dir))? {
            let meta = entry
                .and_then(|entry| entry.metadata())
                .map_err(io_error(&self.dir))?;
            // st_blocks counts 512-byte units whatever the file system's block size: stat(2).
            bytes += meta.blocks() * 512;
        }
        Ok(bytes)
    }

    /// Reads every byte and compares it with the manifest.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, Error> {
        let manifest = self.manifest()?;
        let mut expected: Vec<(String, u64, Digest)> = vec![
            (
                file::STATE.into(),
                manifest.state.bytes,
                manifest.state.hash,
            ),
            (HASHES.into(), manifest.hashes.bytes, manifest.hashes.hash),
        ];
        for space in &manifest.spaces {
            expected.push((space_file(space.space), space.pages * PAGE_LEN, space.hash));
        }
        let total = expected.iter().map(|(_, bytes, _)| bytes).sum();
        let mut done = 0;
        for (name, bytes, hash) in expected {
            if hash_file(&self.dir, &name)? != (hash, bytes) {
                let path = self.dir.join(name);
                return Err(Error::Damaged { path });
            }
            done += bytes;
            progress(done, total);
        }
        let described = serde_json::to_vec(&self.image()?.description);
        if described.ok().as_deref() != Some(&manifest.meta) {
            return Err(Error::Damaged {
                path: self.dir.join(file::DESCRIPTION),
            });
        }
        Ok(total)
    }
}

const PAGE_LEN: u64 = PAGE_BYTES as u64;

fn space_file(space: Space) -> String {
    match space {
        Space::Memory => file::MEMORY.into(),
        Space::Disk(index) => file::disk(usize::from(index)),
    }
}

fn hash_file(dir: &Path, name: &str) -> Result<(Digest, u64), Error> {
    let file = SparseFile::new(files::open_inside(dir, name)?);
    file.and_then(|file| Digest::of_reader(&mut file.reader()))
        .map_err(io_error(&dir.join(name)))
}

/// A tag that may become a file.
fn check_tag(tag: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    let good = (1..=TAG_LEN_MAX).contains(&tag.len())
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric())
        && tag.chars().all(allowed);
    if !good {
        return Err(Error::BadTag {
            tag: tag.to_owned(),
        });
    }
    // Whoever names a base VM by its id never gets one that somebody gave that name.
    if tag.parse::<BaseId>().is_ok() {
        return Err(Error::TagLikeId {
            tag: tag.to_owned(),
        });
    }
    Ok(())
}

/// The store.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The store in `dir`, which exists.
    #[must_use]
    pub fn open(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// A place in the store for an image that is to be published, gone when dropped.
    pub fn incoming(&self) -> Result<AtomicDir, Error> {
        sweep_leftovers(&self.dir)?;
        let name = format!("incoming-{}", std::process::id());
        Ok(AtomicDir::create(self.dir.join(name))?)
    }

    /// Publishes the image in `image_dir`, a directory of an [`Store::incoming`], under `tag`.
    pub fn publish(
        &self,
        image_dir: &Path,
        tag: &str,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Base, Error> {
        check_tag(tag)?;
        let id = write_manifest(image_dir, progress)?;
        let dir = self.dir.join(id.to_string());
        if dir.join(MANIFEST).exists() {
            // The same base VM is there already: the new copy goes with its incoming directory.
        } else {
            std::fs::rename(image_dir, &dir).map_err(io_error(&dir))?;
            sync_dir(&self.dir)?;
        }
        self.set_tag(tag, id)?;
        self.find(tag)
    }

    fn set_tag(&self, tag: &str, id: BaseId) -> Result<(), Error> {
        check_tag(tag)?;
        let tags = self.dir.join(TAGS);
        std::fs::create_dir_all(&tags).map_err(io_error(&tags))?;
        sync_dir(&self.dir)?;
        let file = AtomicFile::create(tags.join(tag))?;
        io::Write::write_all(&mut file.file(), id.to_string().as_bytes())
            .map_err(io_error(&tags))?;
        Ok(file.commit()?)
    }

    /// All base VMs, by id.
    pub fn list(&self) -> Result<Vec<Base>, Error> {
        let tags = self.tags()?;
        let mut bases = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(io_error(&self.dir))? {
            let entry = entry.map_err(io_error(&self.dir))?;
            let Some(Ok(id)) = entry.file_name().to_str().map(str::parse::<BaseId>) else {
                continue;
            };
            let of_this = |(tag, tagged): &(String, BaseId)| (*tagged == id).then(|| tag.clone());
            bases.push(Base {
                id,
                dir: entry.path(),
                tags: tags.iter().filter_map(of_this).collect(),
            });
        }
        bases.sort_by_key(|base| base.id.to_string());
        Ok(bases)
    }

    fn tags(&self) -> Result<Vec<(String, BaseId)>, Error> {
        let dir = self.dir.join(TAGS);
        let entries = match std::fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error(&dir))?,
        };
        let mut tags = Vec::new();
        for entry in entries {
            let name = entry.map_err(io_error(&dir))?.file_name();
            let Some(tag) = name.to_str().filter(|tag| check_tag(tag).is_ok()) else {
                continue;
            };
            let text = files::read(&dir.join(tag), TAG_FILE_LEN_MAX)?;
            if let Some(id) = std::str::from_utf8(&text)
                .ok()
                .and_then(|text| text.parse().ok())
            {
                tags.push((tag.to_owned(), id));
            }
        }
        tags.sort();
        Ok(tags)
    }

    /// The base VM that `name` means: an id, a tag, or the beginning of an id.
    pub fn find(&self, name: &str) -> Result<Base, Error> {
        if let Ok(id) = name.parse() {
            return self.with_id(id);
        }
        let bases = self.list()?;
        if let Some(base) = bases
            .iter()
            .find(|base| base.tags.iter().any(|tag| tag == name))
        {
            return Ok(base.clone());
        }
        let is_abbreviation = name.len() >= ABBREVIATION_LEN_MIN;
        let mut matching = bases
            .into_iter()
            .filter(|base| is_abbreviation && base.id.to_string().starts_with(name));
        match (matching.next(), matching.next()) {
            (Some(base), None) => Ok(base),
            (Some(_), Some(_)) => Err(Error::Ambiguous {
                name: name.to_owned(),
            }),
            (None, _) => Err(Error::Unknown {
                name: name.to_owned(),
            }),
        }
    }

    /// The base VM with this id, to be built upon: its manifest is the one that the id stands for.
    pub fn get(&self, id: BaseId) -> Result<Base, Error> {
        let base = self.with_id(id)?;
        base.manifest()?;
        Ok(base)
    }

    fn with_id(&self, id: BaseId) -> Result<Base, Error> {
        let base = self.list()?.into_iter().find(|base| base.id == id);
        base.ok_or_else(|| Error::Unknown {
            name: id.to_string(),
        })
    }

    /// Forgets `name` if it is a tag; the base VM itself stays.
    pub fn untag(&self, name: &str) -> Result<(), Error> {
        check_tag(name)?;
        let path = self.dir.join(TAGS).join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Unknown {
                name: name.to_owned(),
            }),
            removed => removed.map_err(io_error(&path)),
        }
    }

    /// Removes a base VM and its tags. VMs that run on it keep the pages they have mapped; whoever calls
    /// this has asked whether there are any ([`crate::hold`]).
    pub fn remove(&self, base: &Base) -> Result<(), Error> {
        for tag in &base.tags {
            self.untag(tag)?;
        }
        // Renamed first: a base VM is there whole or not at all.
        let doomed = self.incoming()?;
        let target = doomed.path().join("removed");
        std::fs::rename(&base.dir, target).map_err(io_error(&base.dir))?;
        sync_dir(&self.dir)
    }
}

/// Hashes everything in `image_dir` and writes `hashes` and `manifest` beside it.
fn write_manifest(image_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<BaseId, Error> {
    let image = Image::open(image_dir)?;
    progress("hashing pages");
    let spaces = image.spaces();
    let pages = ImagePages::open(&image)?;
    let hashes_failed = |source| Error::Hashes {
        path: image_dir.to_owned(),
        source,
    };
    let hashes = BaseHashes::build(&spaces, &pages, 0).map_err(hashes_failed)?;
    let hashes_path = image_dir.join(HASHES);
    let mut out = BufWriter::new(File::create(&hashes_path).map_err(io_error(&hashes_path))?);
    hashes.write(&mut out).map_err(io_error(&hashes_path))?;
    let written = out.into_inner().map_err(|error| error.into_error());
    written
        .and_then(|file| file.sync_all())
        .map_err(io_error(&hashes_path))?;

    progress("hashing files");
    let stored =
        |name: &str| hash_file(image_dir, name).map(|(hash, bytes)| StoredFile { bytes, hash });
    let manifest = Manifest {
        spaces: spaces
            .iter()
            .map(|&(space, pages)| {
                let (hash, _) = hash_file(image_dir, &space_file(space))?;
                Ok(SpaceFile { space, pages, hash })
            })
            .collect::<Result<_, Error>>()?,
        state: stored(file::STATE)?,
        hashes: stored(HASHES)?,
        meta: serde_json::to_vec(&image.description).unwrap_or_default(),
    };
    let failed = |source| Error::Manifest {
        path: image_dir.to_owned(),
        source,
    };
    let bytes = manifest.to_bytes().map_err(failed)?;
    let path = image_dir.join(MANIFEST);
    let file = AtomicFile::create(&path)?;
    io::Write::write_all(&mut file.file(), &bytes).map_err(io_error(&path))?;
    file.commit()?;
    make_read_only(image_dir)?;
    Ok(BaseId(Digest::of(&bytes)))
}

/// A base VM's files are for reading, by accident too.
fn make_read_only(dir: &Path) -> Result<(), Error> {
    for entry in std::fs::read_dir(dir).map_err(io_error(dir))? {
        let path = entry.map_err(io_error(dir))?.path();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400))
            .map_err(io_error(&path))?;
    }
    Ok(())
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store with a base VM that is nothing but a manifest, under its true id or another.
    fn store_with(id: Option<&str>) -> (tempfile::TempDir, Store, BaseId) {
        let dir = tempfile::tempdir().unwrap();
        let manifest = Manifest {
            spaces: Vec::new(),
            state: StoredFile {
                bytes: 0,
                hash: Digest::of(b""),
            },
            hashes: StoredFile {
                bytes: 0,
                hash: Digest::of(b""),
            },
            meta: Vec::new(),
        };
        let bytes = manifest.to_bytes().unwrap();
        let id = id.map_or(BaseId(Digest::of(&bytes)), |id| id.parse().unwrap());
        std::fs::create_dir(dir.path().join(id.to_string())).unwrap();
        std::fs::write(dir.path().join(id.to_string()).join(MANIFEST), bytes).unwrap();
        let store = Store::open(dir.path().to_owned());
        (dir, store, id)
    }

    #[test]
    fn a_tag_never_passes_for_an_id() {
        let (dir, store, id) = store_with(None);
        let other = "ab".repeat(32);
        assert!(matches!(
            store.set_tag(&other, id),
            Err(Error::TagLikeId { .. })
        ));
        // One that an older version wrote, or somebody put there.
        std::fs::create_dir_all(dir.path().join(TAGS)).unwrap();
        std::fs::write(dir.path().join(TAGS).join(&other), id.to_string()).unwrap();
        assert!(matches!(store.find(&other), Err(Error::Unknown { .. })));
        store.set_tag("abcdef", id).unwrap();
        assert_eq!(store.find("abcdef").unwrap().id, id);
        assert_eq!(store.find(&id.to_string()).unwrap().id, id);
    }

    #[test]
    fn a_base_vm_under_anothers_id_is_not_taken() {
        let wrong = "cd".repeat(32);
        let (_dir, store, id) = store_with(Some(&wrong));
        assert!(matches!(store.get(id), Err(Error::Damaged { .. })));
        // It can be named, to be removed.
        assert_eq!(store.find(&wrong).unwrap().id, id);
    }
}
