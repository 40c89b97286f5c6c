//! Which ranges of guest physical memory a kernel may use, as the PVH memory map and the e820
//! table of the zero page tell it. Both use the types of ACPI's address range descriptors.

use super::acpi::Hardware;
use super::layout::{HIGH_RAM_START, LOW_RAM_END};
use crate::memory::{PAGE_BYTES, RamLayout};

/// Usable RAM, `E820_TYPE_RAM` and `XEN_HVM_MEMMAP_TYPE_RAM`.
const TYPE_RAM: u32 = 1;
/// Not to be used.
const TYPE_RESERVED: u32 = 2;

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) bytes: u64,
    pub(super) kind: u32,
}

/// All ranges in order of address: at most five. The ACPI tables lie in the first reserved one.
pub(super) fn memory_map(ram: &RamLayout, acpi: Option<&Hardware>) -> Vec<Range> {
    let mut map = vec![
        Range {
            start: 0,
            bytes: LOW_RAM_END,
            kind: TYPE_RAM,
        },
        Range {
            start: LOW_RAM_END,
            bytes: HIGH_RAM_START - LOW_RAM_END,
            kind: TYPE_RESERVED,
        },
    ];
    for region in ram.regions() {
        let start = region.gpa.0.max(HIGH_RAM_START);
        let bytes = (region.gpa.0 + region.len).saturating_sub(start);
        if bytes > 0 {
            map.push(Range {
                start,
                bytes,
                kind: TYPE_RAM,
            });
        }
    }
    if let Some(hardware) = acpi {
        map.push(Range {
            start: hardware.generation_at,
            bytes: PAGE_BYTES,
            kind: TYPE_RESERVED,
        });
        map.sort_by_key(|range| range.start);
    }
    map
}
