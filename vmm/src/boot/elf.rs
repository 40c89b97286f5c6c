//! ELF kernels: the headers, checked before anything is believed, and loading.
//!
//! Read are the file header, the program headers and the notes of a 64-bit little-endian x86
//! executable (ELF-64 object file format 1.5; System V ABI, AMD64 supplement). Of the notes, two
//! matter: `XEN_ELFNOTE_PHYS32_ENTRY` (linux `include/xen/interface/elfnote.h`), whose
//! descriptor is the 32-bit physical address of the PVH entry; and any by the name of "Linux",
//! which every Linux since 4.18 has (`include/linux/elfnote-lto.h`, `include/linux/build-salt.h`).

use std::io;

use vm_memory::{GuestAddress, GuestMemoryError};

use super::image::{Image, LoadError};
use super::layout::{CMDLINE, CMDLINE_BYTES, HIGH_RAM_START, LOW_RAM_END};
use crate::memory::GuestRam;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// Most program headers of a kernel that is believed; Linux has five.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// Most bytes of a note segment that are read.
const NOTE_BYTES_MAX: u64 = 64 << 10;

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
const NOTE_HEADER_BYTES: usize = 12;
const NOTE_PHYS32_ENTRY: u32 = 18;

/// What is wrong with a kernel.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The file ends early or cannot be read.
    #[error("cannot read {what} at offset {offset}")]
    Read {
        /// Which part.
        what: &'static str,
        /// Where in the file.
        offset: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("it is no 64-bit x86 ELF executable: {0}")]
    Kind(&'static str),
    /// The program headers are not of the right size or too many.
    #[error(
        "it has {count} program headers of {bytes} bytes; at most {PROGRAM_HEADERS_MAX} of \
         {PROGRAM_HEADER_BYTES} are taken"
    )]
    ProgramHeaders {
        /// How many.
        count: u16,
        /// Of which size.
        bytes: u16,
    },
    /// There is nothing to load.
    #[error("it has nothing to load")]
    Empty,
    /// A segment is inconsistent in itself.
    #[error("its segment {0} has sizes or offsets that cannot be")]
    Segment(u16),
    /// A segment would lie where it cannot.
    #[error(
        "its segment from {start:#x} to {end:#x} lies outside low RAM or over the boot structures"
    )]
    Place {
        /// First address.
        start: u64,
        /// First address behind it.
        end: u64,
    },
    /// The entry point is in no segment.
    #[error("its entry point {0:#x} is in none of its segments")]
    EntryPoint(u64),
    /// Guest memory refused a segment.
    #[error("guest memory has no room for its segment at {at:#x}")]
    Guest {
        /// Where.
        at: u64,
        /// What vm-memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// A part of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    file_offset: u64,
    file_bytes: u64,
    at: u64,
    end: u64,
}

/// A kernel whose headers have been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Elf {
    entry: u64,
    notes: Notes,
    segments: Vec<Segment>,
}

/// What the notes say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Notes {
    pvh_entry: Option<u32>,
    linux: bool,
}

impl Elf {
    /// Read and check the headers.
    pub(super) fn parse(image: &Image<'_>) -> Result<Elf, ElfError> {
        let mut header = [0; HEADER_BYTES];
        read(image, &mut header, 0, "the ELF header")?;
        let (table, count) = check_header(&header)?;
        let mut elf = Elf {
            entry: u64_at(&header, 24),
            notes: Notes::default(),
            segments: Vec::new(),
        };
        for index in 0..count {
            // At most 64 headers of 56 bytes, so only the addition can overflow.
            let skip = u64::from(index) * 56;
            let offset = table.checked_add(skip).ok_or(ElfError::Segment(index))?;
            let mut bytes = [0; PROGRAM_HEADER_BYTES];
            read(image, &mut bytes, offset, "a program header")?;
            match u32_at(&bytes, 0) {
                SEGMENT_LOAD => elf.segments.extend(load_segment(&bytes, index)?),
                SEGMENT_NOTE => read_notes(image, &bytes, &mut elf.notes)?,
                _ => {}
            }
        }
        if elf.segments.is_empty() {
            return Err(ElfError::Empty);
        }
        Ok(elf)
    }

    /// Copy the segments into guest memory, of which `[0, low_end)` is RAM. What a segment has in
    /// memory beyond the file is left as it is: fresh guest memory is zero.
    pub(super) fn load(
        &self,
        image: &Image<'_>,
        guest: &GuestRam,
        low_end: u64,
    ) -> Result<(), ElfError> {
        for segment in &self.segments {
            let (start, end) = (segment.at, segment.end);
            let conventional = start >= CMDLINE + CMDLINE_BYTES && end <= LOW_RAM_END;
            if end > low_end || !(start >= HIGH_RAM_START || conventional) {
                return Err(ElfError::Place { start, end });
            }
            image
                .load(
                    segment.file_offset,
                    segment.file_bytes,
                    guest,
                    GuestAddress(start),
                )
                .map_err(|error| match error {
                    LoadError::Read(source) => ElfError::Read {
                        what: "a segment",
                        offset: segment.file_offset,
                        source,
                    },
                    LoadError::Guest(source) => ElfError::Guest { at: start, source },
                })?;
        }
        Ok(())
    }

    /// The ELF entry point as a physical address, which it is in kernels for this protocol.
    pub(super) fn entry(&self) -> Result<u64, ElfError> {
        self.inside(self.entry)
    }

    /// The PVH entry point, if there is a note.
    pub(super) fn pvh_entry(&self) -> Result<Option<u32>, ElfError> {
        self.notes
            .pvh_entry
            .map(|entry| self.inside(entry.into()).map(|_| entry))
            .transpose()
    }

    /// Whether it is Linux.
    pub(super) fn is_linux(&self) -> bool {
        self.notes.linux
    }

    fn inside(&self, entry: u64) -> Result<u64, ElfError> {
        if self
            .segments
            .iter()
            .any(|segment| (segment.at..segment.end).contains(&entry))
        {
            return Ok(entry);
        }
        Err(ElfError::EntryPoint(entry))
    }

    /// First address behind the kernel.
    pub(super) fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.end)
            .max()
            .unwrap_or(0)
    }
}

/// Where the program headers are and how many.
fn check_header(header: &[u8; HEADER_BYTES]) -> Result<(u64, u16), ElfError> {
    if header[..4] != *b"\x7fELF" {
        return Err(ElfError::Kind("no ELF magic"));
    }
    if header[4] != CLASS_64 {
        return Err(ElfError::Kind("not 64-bit"));
    }
    if header[5] != LITTLE_ENDIAN {
        return Err(ElfError::Kind("not little-endian"));
    }
    if !matches!(u16_at(header, 16), TYPE_EXECUTABLE | TYPE_SHARED) {
        return Err(ElfError::Kind("not executable"));
    }
    if u16_at(header, 18) != MACHINE_X86_64 {
        return Err(ElfError::Kind("not for x86-64"));
    }
    let (bytes, count) = (u16_at(header, 54), u16_at(header, 56));
    if usize::from(bytes) != PROGRAM_HEADER_BYTES || count > PROGRAM_HEADERS_MAX {
        return Err(ElfError::ProgramHeaders { count, bytes });
    }
    Ok((u64_at(header, 32), count))
}

/// What a program header says of a part to load; `None` if the part is empty.
fn load_segment(
    header: &[u8; PROGRAM_HEADER_BYTES],
    index: u16,
) -> Result<Option<Segment>, ElfError> {
    let (file_offset, at) = (u64_at(header, 8), u64_at(header, 24));
    let (file_bytes, memory_bytes) = (u64_at(header, 32), u64_at(header, 40));
    let end = at
        .checked_add(memory_bytes)
        .ok_or(ElfError::Segment(index))?;
    if file_bytes > memory_bytes || file_offset.checked_add(file_bytes).is_none() {
        return Err(ElfError::Segment(index));
    }
    Ok((memory_bytes > 0).then_some(Segment {
        file_offset,
        file_bytes,
        at,
        end,
    }))
}

/// Read a note segment. The first note of a kind counts.
fn read_notes(
    image: &Image<'_>,
    header: &[u8; PROGRAM_HEADER_BYTES],
    found: &mut Notes,
) -> Result<(), ElfError> {
    let (offset, bytes, alignment) = (u64_at(header, 8), u64_at(header, 32), u64_at(header, 48));
    let mut notes = vec![0; usize::try_from(bytes.min(NOTE_BYTES_MAX)).unwrap_or(0)];
    read(image, &mut notes, offset, "notes")?;
    // Notes are padded to 4 bytes, or to 8 in segments of that alignment (the GNU properties).
    let align = if alignment == 8 { 8 } else { 4 };
    let mut rest = notes.as_slice();
    while rest.len() >= NOTE_HEADER_BYTES {
        let size = |at| usize::try_from(u32_at(rest, at)).ok();
        let padded = |bytes: usize| bytes.checked_next_multiple_of(align);
        let fields = size(0).zip(size(4)).and_then(|(name, descriptor)| {
            let start = padded(name.checked_add(NOTE_HEADER_BYTES)?)?;
            Some((start, start.checked_add(descriptor)?, name))
        });
        let Some((start, end, name_bytes)) = fields else {
            break;
        };
        if end > rest.len() {
            break;
        }
        let name = &rest[NOTE_HEADER_BYTES..][..name_bytes];
        let is_entry = name == b"Xen\0" && u32_at(rest, 8) == NOTE_PHYS32_ENTRY;
        if is_entry && found.pvh_entry.is_none() && end - start >= 4 {
            found.pvh_entry = Some(u32_at(rest, start));
        }
        found.linux |= name == b"Linux\0";
        rest = padded(end).and_then(|next| rest.get(next..)).unwrap_or(&[]);
    }
    Ok(())
}

fn read(
    image: &Image<'_>,
    buffer: &mut [u8],
    offset: u64,
    what: &'static str,
) -> Result<(), ElfError> {
    image
        .read_at(buffer, offset)
        .map_err(|source| ElfError::Read {
            what,
            offset,
            source,
        })
}

// Little-endian fields; callers pass offsets inside buffers whose length they know.

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}
