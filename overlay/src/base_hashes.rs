//! Hashes of all pages of a base, by which the encoder finds content that has moved.
//!
//! A page's hash is the first 16 bytes of its BLAKE3: enough to find a page by, and whoever finds
//! one compares the bytes. In a file, little-endian:
//!
//! ```text
//! magic u8*8, version u32, number of spaces u32
//! spaces      16 bytes each: code u8, 7 zero, pages u64
//! hashes      16 bytes a page, space after space
//! BLAKE3 of all of that
//! ```

use std::io::{self, Read, Write};
use std::sync::OnceLock;

use thiserror::Error;

use crate::bytes::{array_at, to_u64, to_usize, u32_at, u64_at};
use crate::digest::Digest;
use crate::page::{DISKS_MAX, PAGE_BYTES, PageAt, PageReader, SPACE_PAGES_MAX, Space, is_zero};
use crate::parallel;

const MAGIC: [u8; 8] = *b"CLDHASH\n";
const FORMAT_VERSION: u32 = 1;
const ENTRY_BYTES: usize = 16;
/// Bytes of a page's hash.
const HASH_BYTES: usize = 16;
/// Pages hashed in one job, and hashes read at once.
const JOB_PAGES: usize = 256;

/// Hash of a page: the first 16 bytes of its BLAKE3.
pub type PageHash = [u8; HASH_BYTES];

/// Why the hashes of a base could not be made or read.
#[derive(Debug, Error)]
pub enum HashesError {
    /// A space is listed twice, or has a number or size over the limits.
    #[error("{space} is listed twice or too large ({pages} pages)")]
    Space {
        /// The space.
        space: Space,
        /// Its pages.
        pages: u64,
    },
    /// Pages of the base could not be read.
    #[error("cannot read {pages} pages from {first} in the base")]
    ReadBase {
        /// First page.
        first: PageAt,
        /// Number of pages.
        pages: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file of hashes could not be read, or is too short.
    #[error("cannot read the page hashes")]
    Read(#[source] io::Error),
    /// Not a file of hashes, or of another version.
    #[error("not a file of page hashes of version {FORMAT_VERSION}")]
    Magic,
    /// The list of spaces in the file makes no sense.
    #[error("entry {entry} of the spaces in the page hashes is malformed")]
    Entry {
        /// Number of the entry.
        entry: u32,
    },
    /// The file is damaged, or goes on after its end.
    #[error("the page hashes are damaged (wrong hash)")]
    Damaged,
}

/// Hashes of the pages of one space.
#[derive(Debug)]
struct SpaceHashes {
    space: Space,
    hashes: Vec<PageHash>,
    /// First half of the hash and page number, sorted, of all pages that are not zero; of pages
    /// with the same hash only the first. Made when it is first needed.
    sorted: OnceLock<Vec<(u64, u32)>>,
}

/// Hashes of all pages of a base.
#[derive(Debug)]
pub struct BaseHashes {
    spaces: Vec<SpaceHashes>,
}

fn zero_hash() -> &'static PageHash {
    static ZERO: OnceLock<PageHash> = OnceLock::new();
    ZERO.get_or_init(|| hash_bytes(&[0; PAGE_BYTES]))
}

fn hash_bytes(page: &[u8; PAGE_BYTES]) -> PageHash {
    array_at(blake3::hash(page).as_bytes(), 0)
}

/// Hash of a page.
#[must_use]
pub fn page_hash(page: &[u8; PAGE_BYTES]) -> PageHash {
    if is_zero(page) {
        *zero_hash()
    } else {
        hash_bytes(page)
    }
}

impl BaseHashes {
    /// Hashes all pages of `spaces`, each given with its number of pages, on `threads` threads
    /// (0 for one a core).
    ///
    /// # Errors
    /// A space is listed twice or too large, or a page cannot be read.
    pub fn build(
        spaces: &[(Space, u64)],
        pages: &dyn PageReader,
        threads: usize,
    ) -> Result<Self, HashesError> {
        let mut out: Vec<SpaceHashes> = Vec::with_capacity(spaces.len());
        for &(space, count) in spaces {
            let twice = out.iter().any(|other| other.space == space);
            let Some(count) = page_count(space, count).filter(|_| !twice) else {
                return Err(HashesError::Space {
                    space,
                    pages: count,
                });
            };
            let mut hashes = Vec::with_capacity(count);
            parallel::ordered(
                parallel::threads(threads),
                count.div_ceil(JOB_PAGES),
                || vec![0; JOB_PAGES * PAGE_BYTES],
                |buffer, job| {
                    let from = job * JOB_PAGES;
                    let many = JOB_PAGES.min(count - from);
                    let first = PageAt {
                        space,
                        page: to_u64(from),
                    };
                    let buffer = &mut buffer[..many * PAGE_BYTES];
                    pages.read_run(first, buffer).map_err(|source| {
                        let pages = to_u64(many);
                        HashesError::ReadBase {
                            first,
                            pages,
                            source,
                        }
                    })?;
                    Ok(buffer
                        .as_chunks()
                        .0
                        .iter()
                        .map(page_hash)
                        .collect::<Vec<_>>())
                },
                |_, some| {
                    hashes.extend_from_slice(&some);
                    Ok(())
                },
            )?;
            out.push(SpaceHashes {
                space,
                hashes,
                sorted: OnceLock::new(),
            });
        }
        out.sort_unstable_by_key(|hashes| hashes.space);
        Ok(Self { spaces: out })
    }

    /// Hash of one page, if the base has it.
    #[must_use]
    pub fn get(&self, at: PageAt) -> Option<&PageHash> {
        let hashes = &self
            .spaces
            .iter()
            .find(|hashes| hashes.space == at.space)?
            .hashes;
        hashes.get(usize::try_from(at.page).ok()?)
    }

    /// The first page of `space` in the base that has the hash of `page`. Zero pages are not
    /// looked for. The first call for a space sorts its hashes.
    #[must_use]
    pub fn find(&self, space: Space, page: &[u8; PAGE_BYTES]) -> Option<u32> {
        self.find_hash(space, &Digest::of(page))
    }

    /// As [`BaseHashes::find`], by the hash of a page.
    #[must_use]
    pub fn find_hash(&self, space: Space, hash: &Digest) -> Option<u32> {
        let space = self.spaces.iter().find(|hashes| hashes.space == space)?;
        space.find(&array_at(&hash.0, 0))
    }

    /// Writes the hashes.
    ///
    /// # Errors
    /// The writer's.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut put = |bytes: &[u8]| {
            hasher.update(bytes);
            out.write_all(bytes)
        };
        put(&MAGIC)?;
        put(&FORMAT_VERSION.to_le_bytes())?;
        let count = u32::try_from(self.spaces.len()).unwrap_or(u32::MAX);
        put(&count.to_le_bytes())?;
        for space in &self.spaces {
            let mut entry = [0; ENTRY_BYTES];
            entry[0] = space.space.code().unwrap_or(u8::MAX);
            entry[8..].copy_from_slice(&to_u64(space.hashes.len()).to_le_bytes());
            put(&entry)?;
        }
        for space in &self.spaces {
            for some in space.hashes.chunks(JOB_PAGES) {
                put(some.as_flattened())?;
            }
        }
        let hash = hasher.finalize();
        out.write_all(hash.as_bytes())
    }

    /// Reads what [`BaseHashes::write`] has written, to the end of the input.
    ///
    /// # Errors
    /// Reading fails, or the input is not an undamaged file of hashes.
    pub fn read(input: &mut dyn Read) -> Result<Self, HashesError> {
        let mut hasher = blake3::Hasher::new();
        let mut get = |into: &mut [u8]| -> Result<(), HashesError> {
            input.read_exact(into).map_err(HashesError::Read)?;
            hasher.update(into);
            Ok(())
        };
        let mut head = [0; 16];
        get(&mut head)?;
        if !head.starts_with(&MAGIC) || u32_at(&head, 8) != FORMAT_VERSION {
            return Err(HashesError::Magic);
        }
        let entries = u32_at(&head, 12);
        if entries > u32::from(DISKS_MAX) + 1 {
            return Err(HashesError::Entry {
                entry: u32::from(DISKS_MAX) + 1,
            });
        }
        let mut sizes: Vec<(Space, usize)> = Vec::new();
        for entry in 0..entries {
            let mut bytes = [0; ENTRY_BYTES];
            get(&mut bytes)?;
            let size = Space::from_code(bytes[0])
                .filter(|_| bytes[1..8] == [0; 7])
                .filter(|space| sizes.last().is_none_or(|(last, _)| last < space))
                .and_then(|space| Some((space, page_count(space, u64_at(&bytes, 8))?)))
                .ok_or(HashesError::Entry { entry })?;
            sizes.push(size);
        }
        let mut spaces = Vec::with_capacity(sizes.len());
        for (space, count) in sizes {
            // Grows with what is really there, whatever the head says.
            let mut hashes = Vec::new();
            let mut buffer = [[0; HASH_BYTES]; JOB_PAGES];
            while hashes.len() < count {
                let some = &mut buffer[..JOB_PAGES.min(count - hashes.len())];
                get(some.as_flattened_mut())?;
                hashes.extend_from_slice(some);
            }
            spaces.push(SpaceHashes {
                space,
                hashes,
                sorted: OnceLock::new(),
            });
        }
        let hash = hasher.finalize();
        let mut end = [0; 32];
        input.read_exact(&mut end).map_err(HashesError::Read)?;
        let more = input.read(&mut [0]).map_err(HashesError::Read)?;
        if end != *hash.as_bytes() || more != 0 {
            return Err(HashesError::Damaged);
        }
        Ok(Self { spaces })
    }
}

/// Number of pages of a space, if space and number are inside the limits.
fn page_count(space: Space, pages: u64) -> Option<usize> {
    space.code()?;
    usize::try_from(pages)
        .ok()
        .filter(|_| pages <= SPACE_PAGES_MAX)
}

impl SpaceHashes {
    fn find(&self, hash: &PageHash) -> Option<u32> {
        let sorted = self.sorted.get_or_init(|| self.sort());
        let key = u64_at(hash, 0);
        let start = sorted.partition_point(|(other, _)| *other < key);
        sorted[start..]
            .iter()
            .take_while(|(other, _)| *other == key)
            .map(|(_, page)| *page)
            .find(|page| self.hashes[to_usize(*page)] == *hash)
    }

    fn sort(&self) -> Vec<(u64, u32)> {
        let mut sorted: Vec<(u64, u32)> = (0..)
            .zip(&self.hashes)
            .filter(|(_, hash)| *hash != zero_hash())
            .map(|(page, hash)| (u64_at(hash, 0), page))
            .collect();
        sorted.sort_unstable();
        sorted
            .dedup_by(|next, kept| self.hashes[to_usize(next.1)] == self.hashes[to_usize(kept.1)]);
        sorted
    }
}

#[cfg(test)]
#[path = "base_hashes_tests.rs"]
mod tests;
