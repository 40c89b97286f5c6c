//! The 64-bit Linux boot protocol (linux `Documentation/arch/x86/boot.rst`, "64-bit Boot
//! Protocol"): long mode, the kernel and the loader's structures mapped one to one, RSI pointing
//! to the zero page.

use kvm_bindings::kvm_regs;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::layout::{BOOT_STACK, CMDLINE, PAGE_DIRECTORIES, PDPT, PML4, ZERO_PAGE};
use super::memory_map::Range;
use super::{BootError, Placed, write};
use crate::memory::GuestRam;

/// `boot_flag` of every kernel.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS", the magic of the setup header.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol 2.15, the last one.
const PROTOCOL_VERSION: u16 = 0x020f;
/// A loader without an assigned number.
const LOADER_TYPE: u8 = 0xff;
/// Default alignment of a relocatable kernel.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;
/// GiB that are mapped, each by a page directory of its own.
const MAPPED_GIB: u64 = 4;
const ENTRIES: u64 = 512;

/// The setup header of a kernel that has none, being an ELF file.
pub(super) fn elf_header(cmdline_bytes: usize) -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_VERSION,
        kernel_alignment: KERNEL_ALIGNMENT,
        // The command line is shorter than 4 KiB.
        cmdline_size: u32::try_from(cmdline_bytes).unwrap_or(0),
        ..setup_header::default()
    }
}

/// Write `struct boot_params` with a kernel's setup header in it.
pub(super) fn write_boot_params(
    guest: &GuestRam,
    header: setup_header,
    map: &[Range],
    initrd: Option<Placed>,
    rsdp: Option<u64>,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp.unwrap_or(0),
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_TYPE;
    // The command line lies below 1 MiB, the initrd below 3 GiB.
    params.hdr.cmd_line_ptr = low_u32(CMDLINE);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low_u32(initrd.at);
        params.hdr.ramdisk_size = low_u32(initrd.bytes);
    }
    let mut table = params.e820_table;
    for (slot, range) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.bytes,
            r#type: range.kind,
        };
        params.e820_entries += 1;
    }
    params.e820_table = table;
    write(guest, params.as_slice(), ZERO_PAGE, "the zero page")
}

/// Addresses and sizes below the hole fit into 32 bits.
fn low_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Map the first 4 GiB one to one by 2 MiB pages.
pub(super) fn write_page_tables(guest: &GuestRam) -> Result<(), BootError> {
    let link = PAGE_PRESENT | PAGE_WRITABLE;
    write(
        guest,
        &(PDPT | link).to_le_bytes(),
        PML4,
        "the top page table",
    )?;
    let directories: Vec<u8> = (0..MAPPED_GIB)
        .flat_map(|gib| ((PAGE_DIRECTORIES + gib * 4096) | link).to_le_bytes())
        .collect();
    write(guest, &directories, PDPT, "the second page table")?;
    let pages: Vec<u8> = (0..MAPPED_GIB * ENTRIES)
        .flat_map(|page| ((page << 21) | link | PAGE_LARGE).to_le_bytes())
        .collect();
    write(guest, &pages, PAGE_DIRECTORIES, "the page directories")
}

/// General registers at the entry.
pub(super) fn regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        // Bit 1 of RFLAGS is always set; interrupts are off.
        rflags: 2,
        ..Default::default()
    }
}
