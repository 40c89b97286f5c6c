//! Getting a kernel to its first instruction: loading it, describing the machine to it, and the
//! registers that its boot protocol asks for.
//!
//! | file | what |
//! | --- | --- |
//! | `image.rs` | where a kernel or initrd comes from: bytes or a file |
//! | `elf.rs` | ELF headers, checked, and loading into guest memory |
//! | `layout.rs` | guest addresses of everything that the VMM writes |
//! | `memory_map.rs` | which ranges are RAM, as both protocols tell it |
//! | `pvh.rs` | the PVH protocol: start info, 32-bit entry |
//! | `linux64.rs` | the 64-bit Linux protocol: zero page, page tables, 64-bit entry |
//! | `entry.rs` | segments and control registers of both entries |
//!
//! A bzImage is a further kind of kernel beside `elf.rs`; ACPI tables are a further structure that
//! [`load`] writes and that both protocols have a field for (`rsdp_paddr`, `acpi_rsdp_addr`).

mod elf;
mod entry;
mod image;
pub mod layout;
mod linux64;
mod memory_map;
mod pvh;

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::config::BootProtocol;
use crate::memory::{GuestRam, RamLayout};

pub use elf::ElfError;
pub use image::Image;
use layout::{CMDLINE, CMDLINE_BYTES, HIGH_RAM_START};

/// Why a kernel cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is no ELF that can be loaded.
    #[error("the kernel cannot be loaded")]
    Elf(#[from] ElfError),
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
        "the command line has {0} bytes with what is appended for the devices; it must stay below \
         {CMDLINE_BYTES}"
    )]
    Cmdline(usize),
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

/// Load a kernel with everything that its protocol wants in guest memory.
///
/// # Errors
/// The kernel, the initrd or the command line is not usable; nothing of the VM has run.
pub fn load(
    guest: &GuestRam,
    ram: &RamLayout,
    kernel: &Image<'_>,
    initrd: Option<&Image<'_>>,
    cmdline: &str,
    wanted: BootProtocol,
) -> Result<Entry, BootError> {
    let low_end = ram.regions().first().map_or(0, |region| region.len);
    let elf = elf::Elf::parse(kernel)?;
    let pvh_entry = match wanted {
        BootProtocol::Auto => elf.pvh_entry()?,
        BootProtocol::Pvh => Some(elf.pvh_entry()?.ok_or(BootError::NoPvhNote)?),
        BootProtocol::Linux64 => None,
    };
    elf.load(kernel, guest, low_end)?;
    let initrd = initrd
        .map(|image| place_initrd(guest, image, elf.end(), low_end))
        .transpose()?;
    write_cmdline(guest, cmdline)?;
    let map = memory_map::memory_map(ram);
    if let Some(pvh_entry) = pvh_entry {
        pvh::write_start_info(guest, &map, initrd)?;
        let mode = entry::Mode::Protected32;
        entry::write_gdt(guest, mode)?;
        return Ok(Entry {
            protocol: BootProtocol::Pvh,
            regs: pvh::regs(pvh_entry),
            mode,
        });
    }
    let regs = linux64::regs(elf.entry()?);
    linux64::write_boot_params(guest, &map, initrd, cmdline.len())?;
    linux64::write_page_tables(guest)?;
    let mode = entry::Mode::Long64;
    entry::write_gdt(guest, mode)?;
    Ok(Entry {
        protocol: BootProtocol::Linux64,
        regs,
        mode,
    })
}

/// Put the initrd as high in low memory as it fits, on a page boundary.
fn place_initrd(
    guest: &GuestRam,
    image: &Image<'_>,
    kernel_end: u64,
    low_end: u64,
) -> Result<Placed, BootError> {
    let bytes = image.bytes().map_err(BootError::Initrd)?;
    let no_space = || BootError::InitrdSpace { bytes, kernel_end };
    let at = low_end.checked_sub(bytes).ok_or_else(no_space)? & !0xfff;
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
    Err(BootError::Cmdline(cmdline.len()))
}

/// Write a boot structure.
fn write(guest: &GuestRam, bytes: &[u8], at: u64, what: &'static str) -> Result<(), BootError> {
    guest
        .write_slice(bytes, GuestAddress(at))
        .map_err(|source| BootError::Write { what, at, source })
}

#[cfg(test)]
mod tests;
