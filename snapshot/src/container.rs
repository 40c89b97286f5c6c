//! Named, versioned sections in one buffer, each with its hash.
//!
//! Layout, all integers little-endian:
//!
//! ```text
//! offset  bytes  field
//!      0      8  magic "CLDSNAP\n"
//!      8      4  format version
//!     12      4  number of sections, n
//!     16      8  length of the whole container
//!     24      8  zero
//!     32     32  BLAKE3 of the directory
//!     64  104*n  directory, one entry a section:
//!                  0  48  name, ASCII, padded with zeros
//!                 48   4  version of the section's content
//!                 52   4  zero
//!                 56   8  offset of the content
//!                 64   8  length of the content
//!                 72  32  BLAKE3 of the content
//!    ...    ...  contents, one after the other in the order of the directory, without gaps
//! ```
//!
//! There is exactly one encoding of a list of sections, so every byte of a container is checked
//! by [`Reader::parse`].

use std::ops::RangeInclusive;

use thiserror::Error;

/// First eight bytes of a container.
pub const MAGIC: [u8; 8] = *b"CLDSNAP\n";
/// Version of the layout that this code writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Largest number of sections. A machine has some tens (vCPUs, devices, clocks).
pub const SECTIONS_MAX: usize = 1024;
/// Longest name of a section in bytes.
pub const NAME_BYTES_MAX: usize = 48;
/// Longest container in bytes. Machine state without memory is well under one MiB; the limit is
/// that of the state segment of an overlay, which carries a container.
pub const CONTAINER_BYTES_MAX: usize = 64 << 20;

const PREFIX_BYTES: usize = 64;
const ENTRY_BYTES: usize = 104;

/// Why a container could not be written or read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ContainerError {
    /// The name is empty, too long, or has other characters than `a-z 0-9 - _ . /`.
    #[error("{name:?} is not a section name (1 to {NAME_BYTES_MAX} of a-z 0-9 - _ . /)")]
    Name {
        /// The name as it was given or found.
        name: String,
    },
    /// Two sections have one name.
    #[error("section {name} is there twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// More sections than [`SECTIONS_MAX`].
    #[error("{count} sections, the limit is {SECTIONS_MAX}")]
    TooManySections {
        /// How many there are.
        count: usize,
    },
    /// The container is longer than [`CONTAINER_BYTES_MAX`].
    #[error("{bytes} bytes of machine state, the limit is {CONTAINER_BYTES_MAX}")]
    TooLong {
        /// Length in bytes.
        bytes: usize,
    },
    /// The bytes do not begin with [`MAGIC`].
    #[error("not a machine state container (wrong magic)")]
    Magic,
    /// The layout has a version that this code does not know.
    #[error("container format version {found}, this program reads version {FORMAT_VERSION}")]
    Format {
        /// The version found.
        found: u32,
    },
    /// The bytes end before the header says, or go on after it.
    #[error("container is {found} bytes long, its header says {expected}")]
    Length {
        /// Length that is there.
        found: usize,
        /// Length by the header; the smallest possible one where the header itself is cut.
        expected: u64,
    },
    /// The directory does not have the hash that the header gives.
    #[error("the directory of the container is damaged (wrong hash)")]
    DirectoryHash,
    /// A field that must be zero is not, or a section is not where it has to be.
    #[error("entry {index} of the directory is malformed: {what}")]
    Entry {
        /// Number of the entry, from 0.
        index: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The content of a section does not have the hash that the directory gives.
    #[error("section {name} is damaged (wrong hash)")]
    SectionHash {
        /// Name of the section.
        name: String,
    },
    /// A section that is needed is not there, or was taken before.
    #[error("section {name} is missing")]
    Missing {
        /// Name of the section.
        name: String,
    },
    /// A section has a version that its reader does not know.
    #[error("section {name} has version {found}, this program reads {oldest} to {newest}")]
    SectionVersion {
        /// Name of the section.
        name: String,
        /// The version found.
        found: u32,
        /// Oldest version that can be read.
        oldest: u32,
        /// Newest version that can be read.
        newest: u32,
    },
    /// Sections that nobody took: state that would have been lost.
    #[error("sections that nothing here restores: {}", names.join(", "))]
    Unconsumed {
        /// Their names, in the order of the container.
        names: Vec<String>,
    },
}

fn check_name(name: &str) -> Result<(), ContainerError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_./".contains(&b);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(allowed) {
        return Err(ContainerError::Name {
            name: name.to_owned(),
        });
    }
    Ok(())
}

/// Collects sections and lays them out.
#[derive(Debug, Default)]
pub struct Writer {
    sections: Vec<(String, u32, Vec<u8>)>,
    bytes: usize,
}

impl Writer {
    /// An empty container.
    #[must_use]
    pub fn new() -> Self {
        Self {
            sections: Vec::new(),
            bytes: PREFIX_BYTES,
        }
    }

    /// Adds a section. `version` is that of the content's own encoding.
    ///
    /// # Errors
    /// A bad or repeated name, or a container over its limits; nothing is added then.
    pub fn section(
        &mut self,
        name: &str,
        version: u32,
        content: impl Into<Vec<u8>>,
    ) -> Result<&mut Self, ContainerError> {
        check_name(name)?;
        if self.sections.iter().any(|(other, ..)| other == name) {
            return Err(ContainerError::Duplicate {
                name: name.to_owned(),
            });
        }
        if self.sections.len() == SECTIONS_MAX {
            return Err(ContainerError::TooManySections {
                count: SECTIONS_MAX + 1,
            });
        }
        let content = content.into();
        let bytes = self
            .bytes
            .saturating_add(ENTRY_BYTES)
            .saturating_add(content.len());
        if bytes > CONTAINER_BYTES_MAX {
            return Err(ContainerError::TooLong { bytes });
        }
        self.bytes = bytes;
        self.sections.push((name.to_owned(), version, content));
        Ok(self)
    }

    /// Lays the container out.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let directory_bytes = self.sections.len() * ENTRY_BYTES;
        let mut directory = Vec::with_capacity(directory_bytes);
        let mut offset = PREFIX_BYTES + directory_bytes;
        for (name, version, content) in &self.sections {
            let mut padded = [0; NAME_BYTES_MAX];
            padded[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend_from_slice(&padded);
            directory.extend_from_slice(&version.to_le_bytes());
            directory.extend_from_slice(&[0; 4]);
            directory.extend_from_slice(&(offset as u64).to_le_bytes());
            directory.extend_from_slice(&(content.len() as u64).to_le_bytes());
            directory.extend_from_slice(blake3::hash(content).as_bytes());
            offset += content.len();
        }
        // `section` keeps the count at SECTIONS_MAX or below.
        let count = u32::try_from(self.sections.len()).unwrap_or(u32::MAX);
        let mut out = Vec::with_capacity(self.bytes);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&(self.bytes as u64).to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(blake3::hash(&directory).as_bytes());
        out.extend_from_slice(&directory);
        for (_, _, content) in &self.sections {
            out.extend_from_slice(content);
        }
        out
    }
}

struct Section<'a> {
    name: &'a str,
    version: u32,
    content: &'a [u8],
    taken: bool,
}

/// A container whose every byte has been checked; sections are taken from it one by one, and
/// [`Reader::finish`] tells whether all of them were.
#[must_use = "call finish() to know that no section was left over"]
pub struct Reader<'a> {
    sections: Vec<Section<'a>>,
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.sections.iter().map(|s| (s.name, s.version)))
            .finish()
    }
}

impl<'a> Reader<'a> {
    /// Checks layout, limits and all hashes.
    ///
    /// # Errors
    /// Says what is wrong where; nothing of a bad container can be read.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ContainerError> {
        if bytes.len() > CONTAINER_BYTES_MAX {
            return Err(ContainerError::TooLong { bytes: bytes.len() });
        }
        let too_short = |expected| ContainerError::Length {
            found: bytes.len(),
            expected,
        };
        if !bytes.starts_with(&MAGIC) {
            return Err(ContainerError::Magic);
        }
        let prefix: &[u8; PREFIX_BYTES] =
            bytes.first_chunk().ok_or(too_short(PREFIX_BYTES as u64))?;
        let format = u32_at(prefix, 8);
        if format != FORMAT_VERSION {
            return Err(ContainerError::Format { found: format });
        }
        let count = usize::try_from(u32_at(prefix, 12)).unwrap_or(usize::MAX);
        if count > SECTIONS_MAX {
            return Err(ContainerError::TooManySections { count });
        }
        let length = u64_at(prefix, 16);
        if length != bytes.len() as u64 {
            return Err(too_short(length));
        }
        let contents_at = PREFIX_BYTES + count * ENTRY_BYTES;
        let directory = bytes
            .get(PREFIX_BYTES..contents_at)
            .ok_or(too_short(contents_at as u64))?;
        if prefix[24..32] != [0; 8] || *blake3::hash(directory).as_bytes() != prefix[32..64] {
            return Err(ContainerError::DirectoryHash);
        }
        let mut reader = Self {
            sections: Vec::with_capacity(count),
        };
        let mut offset = contents_at;
        for (index, entry) in directory.chunks_exact(ENTRY_BYTES).enumerate() {
            let section = parse_entry(bytes, index, entry, offset)?;
            if reader
                .sections
                .iter()
                .any(|other| other.name == section.name)
            {
                return Err(ContainerError::Duplicate {
                    name: section.name.to_owned(),
                });
            }
            offset += section.content.len();
            reader.sections.push(section);
        }
        if offset != bytes.len() {
            return Err(too_short(offset as u64));
        }
        Ok(reader)
    }

    /// Names of the sections that have not been taken yet, in the order of the container.
    pub fn names(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.sections.iter().filter(|s| !s.taken).map(|s| s.name)
    }

    /// Takes a section: its version and its content.
    ///
    /// # Errors
    /// There is no such section, or it was taken before.
    pub fn take(&mut self, name: &str) -> Result<(u32, &'a [u8]), ContainerError> {
        self.take_optional(name)
            .ok_or_else(|| ContainerError::Missing {
                name: name.to_owned(),
            })
    }

    /// Takes a section if it is there.
    pub fn take_optional(&mut self, name: &str) -> Option<(u32, &'a [u8])> {
        let section = self
            .sections
            .iter_mut()
            .find(|s| s.name == name && !s.taken)?;
        section.taken = true;
        Some((section.version, section.content))
    }

    /// Takes a section whose version must be among those that the caller can read.
    ///
    /// # Errors
    /// There is no such section, or it has another version.
    pub fn take_version(
        &mut self,
        name: &str,
        versions: RangeInclusive<u32>,
    ) -> Result<(u32, &'a [u8]), ContainerError> {
        let (found, content) = self.take(name)?;
        if !versions.contains(&found) {
            let (oldest, newest) = versions.into_inner();
            let name = name.to_owned();
            return Err(ContainerError::SectionVersion {
                name,
                found,
                oldest,
                newest,
            });
        }
        Ok((found, content))
    }

    /// Ends reading.
    ///
    /// # Errors
    /// [`ContainerError::Unconsumed`] with the names of the sections that nobody took.
    pub fn finish(self) -> Result<(), ContainerError> {
        let names: Vec<String> = self.names().map(str::to_owned).collect();
        if names.is_empty() {
            Ok(())
        } else {
            Err(ContainerError::Unconsumed { names })
        }
    }
}

/// Reads one entry of the directory; its content has to begin at `offset`.
fn parse_entry<'a>(
    bytes: &'a [u8],
    index: usize,
    entry: &'a [u8],
    offset: usize,
) -> Result<Section<'a>, ContainerError> {
    let bad = |what| ContainerError::Entry { index, what };
    let padded = &entry[..NAME_BYTES_MAX];
    let name_bytes = padded
        .iter()
        .position(|&b| b == 0)
        .unwrap_or(NAME_BYTES_MAX);
    let (name, padding) = padded.split_at(name_bytes);
    let name = std::str::from_utf8(name).map_err(|_| bad("the name is not ASCII"))?;
    check_name(name)?;
    if padding.iter().any(|&b| b != 0) {
        return Err(bad("the name is followed by something"));
    }
    if entry[52..56] != [0; 4] {
        return Err(bad("a field that must be zero is not"));
    }
    if u64_at(entry, 56) != offset as u64 {
        return Err(bad("the content is not where the one before it ends"));
    }
    let content = usize::try_from(u64_at(entry, 64))
        .ok()
        .and_then(|length| offset.checked_add(length))
        .and_then(|end| bytes.get(offset..end))
        .ok_or(bad("the content goes past the end of the container"))?;
    if *blake3::hash(content).as_bytes() != entry[72..ENTRY_BYTES] {
        return Err(ContainerError::SectionHash {
            name: name.to_owned(),
        });
    }
    Ok(Section {
        name,
        version: u32_at(entry, NAME_BYTES_MAX),
        content,
        taken: false,
    })
}

/// Little-endian u32 at `at`; the caller has checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

/// Little-endian u64 at `at`; the caller has checked the length.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
