//! The PVH boot protocol: xen `public/arch-x86/hvm/start_info.h` and the "x86/HVM direct boot ABI"
//! document. The kernel is entered in 32-bit protected mode with paging off, EBX pointing to the
//! start info.

use kvm_bindings::kvm_regs;

use super::layout::{CMDLINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use super::memory_map::Range;
use super::{BootError, Placed, write};
use crate::memory::GuestRam;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const VERSION: u32 = 1;

/// Write `struct hvm_start_info` and what it points to.
pub(super) fn write_start_info(
    guest: &GuestRam,
    map: &[Range],
    initrd: Option<Placed>,
    rsdp: Option<u64>,
) -> Result<(), BootError> {
    let mut info = Vec::with_capacity(56);
    // magic, version, flags, nr_modules
    put_u32(&mut info, &[MAGIC, VERSION, 0, u32::from(initrd.is_some())]);
    // modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr
    let modules = if initrd.is_some() { PVH_MODULES } else { 0 };
    put_u64(
        &mut info,
        &[modules, CMDLINE, rsdp.unwrap_or(0), PVH_MEMORY_MAP],
    );
    // memmap_entries, reserved; the map has at most five entries
    put_u32(&mut info, &[u32::try_from(map.len()).unwrap_or(0), 0]);
    write(guest, &info, PVH_START_INFO, "the PVH start info")?;

    if let Some(initrd) = initrd {
        // struct hvm_modlist_entry: paddr, size, cmdline_paddr, reserved
        let mut module = Vec::new();
        put_u64(&mut module, &[initrd.at, initrd.bytes, 0, 0]);
        write(guest, &module, PVH_MODULES, "the PVH module list")?;
    }

    let mut table = Vec::new();
    for range in map {
        // struct hvm_memmap_table_entry: addr, size, type, reserved
        put_u64(&mut table, &[range.start, range.bytes]);
        put_u32(&mut table, &[range.kind, 0]);
    }
    write(guest, &table, PVH_MEMORY_MAP, "the PVH memory map")
}

fn put_u32(to: &mut Vec<u8>, words: &[u32]) {
    to.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn put_u64(to: &mut Vec<u8>, words: &[u64]) {
    to.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// General registers at the entry.
pub(super) fn regs(entry: u32) -> kvm_regs {
    kvm_regs {
        rip: entry.into(),
        rbx: PVH_START_INFO,
        // Bit 1 of RFLAGS is always set; interrupts are off.
        rflags: 2,
        ..Default::default()
    }
}
