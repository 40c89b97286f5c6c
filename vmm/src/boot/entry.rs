//! Segments and control registers at the entry of each protocol, and the descriptor table that
//! they refer to.

use kvm_bindings::{kvm_segment, kvm_sregs};

use super::layout::{GDT, PML4};
use super::{BootError, write};
use crate::memory::GuestRam;

/// The two states in which kernels are entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Protected mode, 32 bits, paging off.
    Protected32,
    /// Long mode, paging on.
    Long64,
}

// Code at selector 0x10 and data at 0x18, as Linux' 64-bit protocol asks; the task state behind.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Two null descriptors, code, data, task state, and the task state's upper half of long mode.
const GDT_ENTRIES: u16 = 6;

// Segment types (SDM volume 3A, 3.4.5.1 and 3.5): code, execute and read, accessed; data, read
// and write, accessed; busy task state.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TASK: u8 = 0xb;
/// Limit of the smallest task state segment.
const TASK_LIMIT: u32 = 0x67;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Code, data and task state of a mode: flat, ring 0.
fn segments(mode: Mode) -> [kvm_segment; 3] {
    let long = mode == Mode::Long64;
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    [
        kvm_segment {
            selector: CODE_SELECTOR,
            type_: TYPE_CODE,
            l: u8::from(long),
            db: u8::from(!long),
            ..flat
        },
        kvm_segment {
            selector: DATA_SELECTOR,
            type_: TYPE_DATA,
            db: 1,
            ..flat
        },
        kvm_segment {
            selector: TASK_SELECTOR,
            type_: TYPE_TASK,
            limit: TASK_LIMIT,
            present: 1,
            ..Default::default()
        },
    ]
}

/// A descriptor as it lies in the table (SDM volume 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | (u64::from(segment.s) << 4)
        | (u64::from(segment.dpl) << 5)
        | (u64::from(segment.present) << 7);
    let flags =
        (u64::from(segment.l) << 1) | (u64::from(segment.db) << 2) | (u64::from(segment.g) << 3);
    (limit & 0xffff)
        | ((segment.base & 0xff_ffff) << 16)
        | (access << 40)
        | (((limit >> 16) & 0xf) << 48)
        | (flags << 52)
        | (((segment.base >> 24) & 0xff) << 56)
}

/// Write the mode's table, so that the guest may reload its segments from it.
pub(super) fn write_gdt(guest: &GuestRam, mode: Mode) -> Result<(), BootError> {
    let [code, data, task] = segments(mode).map(|segment| descriptor(&segment));
    let bytes: Vec<u8> = [0, 0, code, data, task, 0]
        .iter()
        .flat_map(|entry: &u64| entry.to_le_bytes())
        .collect();
    write(guest, &bytes, GDT, "the descriptor table")
}

/// Put a vCPU that comes from reset into the mode.
pub(super) fn apply(mode: Mode, sregs: &mut kvm_sregs) {
    let [code, data, task] = segments(mode);
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = task;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = GDT_ENTRIES * 8 - 1;
    // No interrupt table: interrupts are off, and a fault before the guest has its own is a
    // triple fault, which is reported as such.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if mode == Mode::Long64 {
        sregs.cr3 = PML4;
        sregs.cr0 |= CR0_PG;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
}
