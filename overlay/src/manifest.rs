//! The manifest of a base: what belongs to it and which hashes that has. Its own hash is the
//! base's name, so a name pins every byte of the base.
//!
//! As bytes, little-endian, which is what is hashed (a store may keep it in another encoding):
//!
//! ```text
//! magic u8*8, version u32, number of spaces u32
//! spaces      48 bytes each: code u8, 7 zero, pages u64, BLAKE3 of the image
//! state       40 bytes: length u64, BLAKE3
//! hashes      40 bytes: length u64, BLAKE3; the file of page hashes
//! meta        length u32, bytes
//! ```

use thiserror::Error;

use crate::bytes::{array_at, to_u64, u32_at, u64_at};
use crate::digest::{BaseId, Digest};
use crate::format::META_BYTES_MAX;
use crate::page::{DISKS_MAX, SPACE_PAGES_MAX, Space};

const MAGIC: [u8; 8] = *b"CLDBASE\n";
const FORMAT_VERSION: u32 = 1;
const HEAD_BYTES: usize = 16;
const SPACE_BYTES: usize = 48;
const FILE_BYTES: usize = 40;

/// Why a manifest cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ManifestError {
    /// Not a manifest, or of another version.
    #[error("not a base manifest of version {FORMAT_VERSION}")]
    Magic,
    /// The bytes end too early or go on after the end.
    #[error("the manifest has {found} bytes and should have {expected}")]
    Length {
        /// Length by what is in it.
        expected: u64,
        /// Length that is there.
        found: u64,
    },
    /// A space is unknown, too large, out of order, or there twice.
    #[error("entry {entry} of the spaces of the manifest is malformed")]
    Space {
        /// Number of the entry.
        entry: usize,
    },
    /// The meta is too long.
    #[error("the manifest's meta has {bytes} bytes, the limit is {META_BYTES_MAX}")]
    Meta {
        /// Its length.
        bytes: usize,
    },
}

/// The image of a space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceFile {
    /// Which space.
    pub space: Space,
    /// Its length in pages.
    pub pages: u64,
    /// BLAKE3 of the image.
    pub hash: Digest,
}

/// A file that belongs to the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredFile {
    /// Its length in bytes.
    pub bytes: u64,
    /// BLAKE3 of its content.
    pub hash: Digest,
}

/// What a base is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The images, in the order of their spaces.
    pub spaces: Vec<SpaceFile>,
    /// The machine state.
    pub state: StoredFile,
    /// The file of page hashes ([`crate::BaseHashes`]).
    pub hashes: StoredFile,
    /// What else identifies the base; opaque here, at most [`META_BYTES_MAX`] bytes.
    pub meta: Vec<u8>,
}

impl Manifest {
    /// Checks the rules that [`Manifest::parse`] checks.
    ///
    /// # Errors
    /// A space is unknown, too large, out of order or there twice, or the meta is too long.
    pub fn check(&self) -> Result<(), ManifestError> {
        for (entry, file) in self.spaces.iter().enumerate() {
            let in_order = entry == 0 || self.spaces[entry - 1].space < file.space;
            if !in_order || file.space.code().is_none() || file.pages > SPACE_PAGES_MAX {
                return Err(ManifestError::Space { entry });
            }
        }
        let bytes = self.meta.len();
        if bytes > META_BYTES_MAX {
            Err(ManifestError::Meta { bytes })
        } else {
            Ok(())
        }
    }

    /// The bytes that are hashed.
    ///
    /// # Errors
    /// As [`Manifest::check`]: what is returned can be parsed.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&count(self.spaces.len()));
        for file in &self.spaces {
            out.push(file.space.code().unwrap_or(u8::MAX));
            out.extend_from_slice(&[0; 7]);
            out.extend_from_slice(&file.pages.to_le_bytes());
            out.extend_from_slice(&file.hash.0);
        }
        for file in [&self.state, &self.hashes] {
            out.extend_from_slice(&file.bytes.to_le_bytes());
            out.extend_from_slice(&file.hash.0);
        }
        out.extend_from_slice(&count(self.meta.len()));
        out.extend_from_slice(&self.meta);
        Ok(out)
    }

    /// Name of the base: BLAKE3 of [`Manifest::to_bytes`].
    ///
    /// # Errors
    /// As [`Manifest::check`].
    pub fn id(&self) -> Result<BaseId, ManifestError> {
        Ok(BaseId(Digest::of(&self.to_bytes()?)))
    }

    /// Inverse of [`Manifest::to_bytes`].
    ///
    /// # Errors
    /// It is not a manifest, or breaks one of its rules.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let found = to_u64(bytes.len());
        let length = |expected: usize| ManifestError::Length {
            expected: to_u64(expected),
            found,
        };
        if bytes.len() < HEAD_BYTES {
            return Err(length(HEAD_BYTES));
        }
        if !bytes.starts_with(&MAGIC) || u32_at(bytes, 8) != FORMAT_VERSION {
            return Err(ManifestError::Magic);
        }
        let most = usize::from(DISKS_MAX) + 1;
        let count = usize::try_from(u32_at(bytes, 12)).unwrap_or(usize::MAX);
        if count > most {
            return Err(ManifestError::Space { entry: most });
        }
        let files_at = HEAD_BYTES + count * SPACE_BYTES;
        let meta_at = files_at + 2 * FILE_BYTES + 4;
        let Some(meta) = bytes.get(meta_at..) else {
            return Err(length(meta_at));
        };
        let meta_bytes = usize::try_from(u32_at(bytes, meta_at - 4)).unwrap_or(usize::MAX);
        if meta_bytes > META_BYTES_MAX {
            return Err(ManifestError::Meta { bytes: meta_bytes });
        }
        if meta.len() != meta_bytes {
            return Err(length(meta_at + meta_bytes));
        }
        let mut spaces = Vec::with_capacity(count);
        for (entry, raw) in bytes[HEAD_BYTES..files_at]
            .chunks_exact(SPACE_BYTES)
            .enumerate()
        {
            let space = Space::from_code(raw[0])
                .filter(|_| raw[1..8] == [0; 7])
                .ok_or(ManifestError::Space { entry })?;
            let hash = Digest(array_at(raw, 16));
            spaces.push(SpaceFile {
                space,
                pages: u64_at(raw, 8),
                hash,
            });
        }
        let file = |at| StoredFile {
            bytes: u64_at(bytes, at),
            hash: Digest(array_at(bytes, at + 8)),
        };
        let (state, hashes) = (file(files_at), file(files_at + FILE_BYTES));
        let manifest = Self {
            spaces,
            state,
            hashes,
            meta: meta.to_vec(),
        };
        manifest.check()?;
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Manifest {
        let file = |bytes| StoredFile {
            bytes,
            hash: Digest([3; 32]),
        };
        Manifest {
            spaces: vec![
                SpaceFile {
                    space: Space::Memory,
                    pages: 1000,
                    hash: Digest([1; 32]),
                },
                SpaceFile {
                    space: Space::Disk(4),
                    pages: 5,
                    hash: Digest([2; 32]),
                },
            ],
            state: file(77),
            hashes: file(88),
            meta: b"{}".to_vec(),
        }
    }

    #[test]
    fn bytes_go_both_ways_and_every_flip_makes_another_name_or_an_error() {
        let manifest = sample();
        let bytes = manifest.to_bytes().unwrap();
        assert_eq!(Manifest::parse(&bytes), Ok(manifest.clone()));
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x40;
            if let Ok(other) = Manifest::parse(&flipped) {
                assert_eq!(other.to_bytes().as_ref(), Ok(&flipped), "byte {at}");
                assert_ne!(other.id(), manifest.id(), "byte {at}");
            }
        }
        for length in 0..bytes.len() {
            assert!(Manifest::parse(&bytes[..length]).is_err());
        }
    }

    #[test]
    fn rules_are_checked() {
        let mut twice = sample();
        twice.spaces[1].space = Space::Memory;
        assert_eq!(twice.id(), Err(ManifestError::Space { entry: 1 }));
        let mut large = sample();
        large.spaces[0].pages = SPACE_PAGES_MAX + 1;
        assert_eq!(large.to_bytes(), Err(ManifestError::Space { entry: 0 }));
        let mut long = sample();
        long.meta = vec![0; META_BYTES_MAX + 1];
        assert_eq!(
            long.check(),
            Err(ManifestError::Meta {
                bytes: META_BYTES_MAX + 1
            })
        );
    }
}
