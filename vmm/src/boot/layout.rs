//! Guest physical addresses of what the VMM writes before the first instruction. The boot
//! structures lie in the first 640 KiB, which every protocol leaves to the loader, and may be
//! overwritten by the guest once it has read them. The ACPI tables lie where a PC's firmware is, in
//! memory that the map says is reserved.

/// The global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH: the list of modules (the initrd).
pub const PVH_MODULES: u64 = 0x6040;
/// PVH: the memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// Linux: the zero page, `struct boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Linux: first stack, growing down from here over the page behind the zero page.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Linux: the top page table.
pub const PML4: u64 = 0x9000;
/// Linux: the second-level page table.
pub const PDPT: u64 = 0xa000;
/// Linux: four page directories, one for each GiB.
pub const PAGE_DIRECTORIES: u64 = 0xb000;
/// The command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes set aside for the command line with its terminating zero.
pub const CMDLINE_BYTES: u64 = 0x1000;
/// End of conventional memory: the extended BIOS data area begins here on a PC.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The first MiB's firmware and video area ends here, and RAM goes on.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// ACPI: the root pointer. The 128 KiB from here to 1 MiB are where a kernel looks for it that is
/// not told.
pub const RSDP: u64 = 0xe_0000;
/// ACPI: the tables, one behind the other.
pub const ACPI_TABLES: u64 = 0xe_0040;
/// Where a processor begins after a reset, F000:FFF0, the firmware's entry on a PC.
pub const RESET_VECTOR: u64 = 0xf_fff0;
