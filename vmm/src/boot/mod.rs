//! Getting a kernel to its first instruction: loading it, describing the machine to it, and the
//! registers that its boot protocol asks for.
//!
//! | file | what |
//! | --- | --- |
//! | `image.rs` | where a kernel or initrd comes from: bytes or a file |
//! | `elf.rs` | ELF headers, checked, and loading into guest memory |
//! | `bzimage.rs` | the same of bzImages, as distributions ship them |
//! | `acpi.rs` | the ACPI tables |
//! | `layout.rs` | guest addresses of everything that the VMM writes |
//! | `memory_map.rs` | which ranges are RAM, as both protocols tell it |
//! | `pvh.rs` | the PVH protocol: start info, 32-bit entry |
//! | `linux64.rs` | the 64-bit Linux protocol: zero page, page tables, 64-bit entry |
//! | `entry.rs` | segments and control registers of both entries |

pub mod acpi;
mod bzimage;
mod elf;
mod entry;
mod image;
pub mod layout;
mod linux64;
mod memory_map;
mod pvh;

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::config::BootProtocol;
use crate::memory::{GuestRam, RamLayout};

pub use bzimage::BzImageError;
pub use elf::ElfError;
pub use image::Image;

use bzimage::BzImage;
use elf::Elf;
use layout::{CMDLINE, CMDLINE_BYTES, HIGH_RAM_START};

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is no ELF that can be loaded.
    #[error("the kernel cannot be loaded")]
    Elf(#[from] ElfError),
    /// The kernel is a bzImage that cannot be loaded.
    #[error("the kernel cannot be loaded")]
    BzImage(#[from] BzImageError),
    /// PVH was asked for and the kernel has no note for it.
    #[error("the kernel has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhNote,
    /// The initrd does not fit between the kernel and the end of low memory.
    #[error(
        "an initrd of {bytes} bytes does not fit behind the kernel, which ends at {kernel_end:#x}"
    )]
    InitrdSpace {
        /// Its size.
        bytes: u64,
        /// First address behind the kernel.
        kernel_end: u64,
    },
    /// The initrd cannot be read.
    #[error("the initrd cannot be read")]
    Initrd(#[source] std::io::Error),
    /// The command line is longer than its place.
    #[error(
        "the command line has {bytes} bytes with what is appended for the devices; it must stay \
         below {limit}"
    )]
    Cmdline {
        /// Its length.
        bytes: usize,
        /// What the VMM or the kernel has room for.
        limit: u64,
    },
    /// The ACPI tables do not fit in their place.
    #[error("the ACPI tables take {0} bytes, more than there is room for")]
    AcpiSpace(u64),
    /// A boot structure does not fit into guest memory.
    #[error("guest memory has no room for {what} at {at:#x}")]
    Write {
        /// Which structure.
        what: &'static str,
        /// Where.
        at: u64,
        /// What vm-memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// Registers of the first vCPU before its first instruction.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The protocol that was chosen.
    pub protocol: BootProtocol,
    /// General registers.
    pub regs: kvm_regs,
    mode: entry::Mode,
}

impl Entry {
    /// Change the segments and control registers that KVM has after a reset to what the protocol
    /// asks for.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        entry::apply(self.mode, sregs);
    }
}

/// Where an initrd lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    at: u64,
    bytes: u64,
}

/// A kernel whose headers have been checked.
pub struct Kernel<'a> {
    image: &'a Image<'a>,
    kind: Kind,
}

enum Kind {
    Elf(Elf),
    BzImage(BzImage),
}

impl<'a> Kernel<'a> {
    /// Read and check the headers of an ELF file or a bzImage.
    ///
    /// # Errors
    /// It is neither, or no kernel of ours.
    pub fn open(image: &'a Image<'a>) -> Result<Kernel<'a>, BootError> {
        let kind = if BzImage::is_one(image) {
            Kind::BzImage(BzImage::parse(image)?)
        } else {
            Kind::Elf(Elf::parse(image)?)
        };
        Ok(Kernel { image, kind })
    }

    /// Whether it is Linux, as far as it tells.
    #[must_use]
    pub fn is_linux(&self) -> bool {
        match &self.kind {
            Kind::Elf(elf) => elf.is_linux(),
            Kind::BzImage(_) => true,
        }
    }

    /// Copy it to guest memory, of which `[0, low_end)` is RAM.
    fn load(
        &self,
        guest: &GuestRam,
        low_end: u64,
        cmdline: &str,
        wanted: BootProtocol,
    ) -> Result<Loaded, BootError> {
        let cmdline_bytes = cmdline.len();
        match &self.kind {
            Kind::Elf(elf) => {
                let pvh_entry = match wanted {
                    BootProtocol::Auto => elf.pvh_entry()?,
                    BootProtocol::Pvh => Some(elf.pvh_entry()?.ok_or(BootError::NoPvhNote)?),
                    BootProtocol::Linux64 => None,
                };
                elf.load(self.image, guest, low_end)?;
                let start = match pvh_entry {
                    Some(entry) => Start::Pvh(entry),
                    None => {
                        let header = linux64::elf_header(cmdline_bytes);
                        Start::Linux64(elf.entry()?, Box::new(header))
                    }
                };
                Ok(Loaded {
                    start,
                    end: elf.end(),
                    initrd_end_max: low_end,
                })
            }
            Kind::BzImage(kernel) => {
                if wanted == BootProtocol::Pvh {
                    return Err(BootError::NoPvhNote);
                }
                let limit = u64::from(kernel.header.cmdline_size);
                if u64::try_from(cmdline_bytes).map_or(true, |bytes| bytes > limit) {
                    return Err(BootError::Cmdline {
                        bytes: cmdline_bytes,
                        limit: limit + 1,
                    });
                }
                let at = kernel.place(low_end)?;
                kernel.load(self.image, guest, at)?;
                let start = Start::Linux64(BzImage::entry(at), Box::new(kernel.header));
                Ok(Loaded {
                    start,
                    end: kernel.end(at),
                    initrd_end_max: low_end.min(kernel.initrd_end_max()),
                })
            }
        }
    }
}

/// How a loaded kernel is entered.
enum Start {
    /// At a 32-bit address.
    Pvh(u32),
    /// At a 64-bit address, with its setup header in the zero page.
    Linux64(u64, Box<setup_header>),
}

/// A kernel in guest memory.
struct Loaded {
    start: Start,
    /// First address behind it and what it needs at once.
    end: u64,
    /// First address that an initrd may not reach.
    initrd_end_max: u64,
}

/// What a kernel is given.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a> {
    /// The initial RAM disk.
    pub initrd: Option<&'a Image<'a>>,
    /// The command line.
    pub cmdline: &'a str,
    /// How to enter it.
    pub protocol: BootProtocol,
    /// The machine that its ACPI tables describe; without, it gets none.
    pub acpi: Option<&'a acpi::Hardware>,
}

/// Load a kernel with everything that its protocol wants in guest memory.
///
/// # Errors
/// The kernel, the initrd or the command line is not usable; nothing of the VM has run.
pub fn load(
    guest: &GuestRam,
    ram: &RamLayout,
    kernel: &Kernel<'_>,
    given: Given<'_>,
) -> Result<Entry, BootError> {
    let low_end = ram.regions().first().map_or(0, |region| region.len);
    let loaded = kernel.load(guest, low_end, given.cmdline, given.protocol)?;
    let initrd = given
        .initrd
        .map(|image| place_initrd(guest, image, loaded.end, loaded.initrd_end_max))
        .transpose()?;
    write_cmdline(guest, given.cmdline)?;
    let rsdp = given
        .acpi
        .map(|hardware| acpi::write_tables(guest, hardware))
        .transpose()?;
    let map = memory_map::memory_map(ram, given.acpi);
    match loaded.start {
        Start::Pvh(entry) => {
            pvh::write_start_info(guest, &map, initrd, rsdp)?;
            let mode = entry::Mode::Protected32;
            entry::write_gdt(guest, mode)?;
            Ok(Entry {
                protocol: BootProtocol::Pvh,
                regs: pvh::regs(entry),
                mode,
            })
        }
        Start::Linux64(entry, header) => {
            linux64::write_boot_params(guest, *header, &map, initrd, rsdp)?;
            linux64::write_page_tables(guest)?;
            let mode = entry::Mode::Long64;
            entry::write_gdt(guest, mode)?;
            Ok(Entry {
                protocol: BootProtocol::Linux64,
                regs: linux64::regs(entry),
                mode,
            })
        }
    }
}

/// Put the initrd as high below `end_max` as it fits, on a page boundary.
fn place_initrd(
    guest: &GuestRam,
    image: &Image<'_>,
    kernel_end: u64,
    end_max: u64,
) -> Result<Placed, BootError> {
    let bytes = image.bytes().map_err(BootError::Initrd)?;
    let no_space = || BootError::InitrdSpace { bytes, kernel_end };
    let at = end_max.checked_sub(bytes).ok_or_else(no_space)? & !0xfff;
    if at < kernel_end.max(HIGH_RAM_START) {
        return Err(no_space());
    }
    image
        .load(0, bytes, guest, GuestAddress(at))
        .map_err(|error| match error {
            image::LoadError::Read(source) => BootError::Initrd(source),
            image::LoadError::Guest(source) => BootError::Write {
                what: "the initrd",
                at,
                source,
            },
        })?;
    Ok(Placed { at, bytes })
}

fn write_cmdline(guest: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    if u64::try_from(bytes.len()).is_ok_and(|len| len <= CMDLINE_BYTES) {
        return write(guest, &bytes, CMDLINE, "the command line");
    }
    Err(BootError::Cmdline {
        bytes: cmdline.len(),
        limit: CMDLINE_BYTES,
    })
}

/// Write a boot structure.
fn write(guest: &GuestRam, bytes: &[u8], at: u64, what: &'static str) -> Result<(), BootError> {
    guest
        .write_slice(bytes, GuestAddress(at))
        .map_err(|source| BootError::Write { what, at, source })
}

#[cfg(test)]
mod tests;
