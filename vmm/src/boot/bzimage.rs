//! bzImage kernels, as distributions ship them: the setup header, checked before anything is
//! believed, and loading for the 64-bit entry (linux `Documentation/arch/x86/boot.rst`).
//!
//! The file is a boot sector, the real-mode setup code with the header in it, and the kernel
//! proper, which unpacks itself. Only the last is loaded. It is entered 512 bytes from its start
//! and uses `init_size` bytes from there on before it reads the memory map.

use std::io;

use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryError};

use super::image::{Image, LoadError};
use super::layout::HIGH_RAM_START;
use crate::memory::GuestRam;

/// Where the header begins in the file and in the zero page.
const HEADER_AT: usize = 0x1f1;
/// Where the jump instruction is whose second byte says how long the header is.
const JUMP_AT: usize = 0x200;
/// The header ends at the latest where the zero page goes on with other fields.
const HEADER_END_MAX: usize = 0x290;
/// Bytes of the header that we have names for.
const HEADER_BYTES: usize = size_of::<setup_header>();
const SECTOR_BYTES: u64 = 512;
/// What `setup_sects` of 0 means.
const SETUP_SECTORS_DEFAULT: u8 = 4;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const MAGIC: u32 = 0x5372_6448;
/// Protocol 2.12, the first one whose header says whether there is a 64-bit entry.
const VERSION_MIN: u16 = 0x020c;
/// `LOADED_HIGH`: the kernel proper lies at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// The 64-bit entry, from the start of the kernel proper.
const ENTRY_64: u64 = 0x200;
/// Units of `syssize`.
const PARAGRAPH_BYTES: u64 = 16;

/// What is wrong with a bzImage.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
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
    /// The kernel is older than the 64-bit entry.
    #[error(
        "it speaks boot protocol {}.{}; 2.12 is the first that is taken", version >> 8, version & 0xff
    )]
    Old {
        /// Its protocol.
        version: u16,
    },
    /// There is no 64-bit entry.
    #[error("it is no 64-bit kernel")]
    Not64,
    /// Fields of the header that contradict each other.
    #[error("its header has {0}")]
    Header(&'static str),
    /// There is not enough memory at a place where it could run.
    #[error("it needs {needed} bytes from {at:#x} on, and RAM ends at {low_end:#x}")]
    Memory {
        /// Bytes that it uses.
        needed: u64,
        /// Its preferred address.
        at: u64,
        /// Where low RAM ends.
        low_end: u64,
    },
    /// Guest memory refused the kernel.
    #[error("guest memory has no room for it at {at:#x}")]
    Guest {
        /// Where.
        at: u64,
        /// What vm-memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// A kernel whose header has been checked.
#[derive(Debug, Clone)]
pub(super) struct BzImage {
    /// The header as the zero page shall have it, before the loader's own fields.
    pub(super) header: setup_header,
    /// The kernel proper in the file.
    offset: u64,
    bytes: u64,
}

impl BzImage {
    /// Whether the file is a bzImage at all.
    pub(super) fn is_one(image: &Image<'_>) -> bool {
        let mut start = [0; 0x206];
        image.read_at(&mut start, 0).is_ok()
            && start[0x1fe..0x200] == BOOT_FLAG.to_le_bytes()
            && start[0x202..0x206] == MAGIC.to_le_bytes()
    }

    /// Read and check the header.
    pub(super) fn parse(image: &Image<'_>) -> Result<BzImage, BzImageError> {
        let read = |what, offset| {
            move |source| BzImageError::Read {
                what,
                offset,
                source,
            }
        };
        let mut start = [0; HEADER_END_MAX];
        image
            .read_at(&mut start, 0)
            .map_err(read("the setup header", 0))?;
        let header = header_of(&start);
        let setup_sectors = match header.setup_sects {
            0 => SETUP_SECTORS_DEFAULT,
            sectors => sectors,
        };
        check(&header)?;
        let offset = (u64::from(setup_sectors) + 1) * SECTOR_BYTES;
        let file_bytes = image.bytes().map_err(read("its length", 0))?;
        // `syssize` counts what is left out of the file's end (a signature may follow) and is
        // rounded up.
        let claimed = u64::from(header.syssize) * PARAGRAPH_BYTES;
        let there = file_bytes.saturating_sub(offset);
        if claimed.saturating_sub(there) >= PARAGRAPH_BYTES {
            let source = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(read("the kernel proper", offset)(source));
        }
        let bytes = claimed.min(there);
        if bytes <= ENTRY_64 {
            return Err(BzImageError::Header("no room for a 64-bit entry"));
        }
        if u64::from(header.init_size) < bytes {
            return Err(BzImageError::Header(
                "an init_size that is less than the kernel's length",
            ));
        }
        Ok(BzImage {
            header,
            offset,
            bytes,
        })
    }

    /// Where in `[0, low_end)` the kernel goes: to the address it prefers, else as low as it may.
    pub(super) fn place(&self, low_end: u64) -> Result<u64, BzImageError> {
        let preferred = self.header.pref_address;
        let needed = u64::from(self.header.init_size);
        let fits = |at: &u64| {
            *at >= HIGH_RAM_START && at.checked_add(needed).is_some_and(|end| end <= low_end)
        };
        let lowest = HIGH_RAM_START.next_multiple_of(u64::from(self.header.kernel_alignment));
        Some(preferred)
            .filter(fits)
            .or_else(|| Some(lowest).filter(|at| self.header.relocatable_kernel != 0 && fits(at)))
            .ok_or(BzImageError::Memory {
                needed,
                at: preferred,
                low_end,
            })
    }

    /// Copy the kernel proper to `at`, which [`BzImage::place`] has found.
    pub(super) fn load(
        &self,
        image: &Image<'_>,
        guest: &GuestRam,
        at: u64,
    ) -> Result<(), BzImageError> {
        image
            .load(self.offset, self.bytes, guest, GuestAddress(at))
            .map_err(|error| match error {
                LoadError::Read(source) => BzImageError::Read {
                    what: "the kernel proper",
                    offset: self.offset,
                    source,
                },
                LoadError::Guest(source) => BzImageError::Guest { at, source },
            })
    }

    /// The 64-bit entry of a kernel at `at`.
    pub(super) fn entry(at: u64) -> u64 {
        at + ENTRY_64
    }

    /// First address behind what a kernel at `at` uses.
    pub(super) fn end(&self, at: u64) -> u64 {
        at + u64::from(self.header.init_size)
    }

    /// First address that an initrd may not reach.
    pub(super) fn initrd_end_max(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }
}

/// The header as far as the kernel has it; fields that its protocol does not have are zero.
fn header_of(start: &[u8; HEADER_END_MAX]) -> setup_header {
    let end =
        (JUMP_AT + 2 + usize::from(start[JUMP_AT + 1])).clamp(HEADER_AT, HEADER_AT + HEADER_BYTES);
    let mut header = setup_header::default();
    header.as_mut_slice()[..end - HEADER_AT].copy_from_slice(&start[HEADER_AT..end]);
    header
}

/// What a kernel must say of itself to be taken.
fn check(header: &setup_header) -> Result<(), BzImageError> {
    let (version, xloadflags, alignment) =
        (header.version, header.xloadflags, header.kernel_alignment);
    if version < VERSION_MIN {
        return Err(BzImageError::Old { version });
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BzImageError::Not64);
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BzImageError::Header("no LOADED_HIGH flag"));
    }
    if !alignment.is_power_of_two() {
        return Err(BzImageError::Header("an alignment that is no power of two"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "bzimage_tests.rs"]
mod tests;
