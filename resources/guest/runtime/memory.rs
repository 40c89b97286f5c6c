//! Who gets which RAM: the runtime what is below 16 MiB, applications the rest. What lies above
//! 4 GiB is mapped here; boot.s maps only what lies below.

use alloc::alloc::{Layout, alloc_zeroed};

use shared::abi::{APP_BASE, Region};

use crate::app::Space;
use crate::bootinfo::Range;

const IMAGE_END: u64 = 0x20_0000;
const FOUR_GIB: u64 = 1 << 32;
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable, user, accessed, dirty, 2 MiB.
const LARGE: u64 = 0xe7;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// What one page directory pointer table maps.
const TOP: u64 = 512 << 30;

unsafe extern "C" {
    static mut pdpt: [u64; 512];
}

/// How memory is divided.
pub struct Plan {
    /// The runtime's heap.
    pub heap: Region,
    /// The applications' memory.
    pub space: Space,
    /// Bytes of RAM in the memory map.
    pub total: u64,
}

fn address(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Divides the RAM of the memory map; none if there is none where the runtime needs it.
pub fn plan(ranges: &[Range]) -> Option<Plan> {
    let low = ranges
        .iter()
        .find(|r| r.start <= IMAGE_END && r.end > IMAGE_END)?;
    let high = ranges
        .iter()
        .filter(|r| r.start >= FOUR_GIB)
        .max_by_key(|r| r.end - r.start);
    let high = match high {
        Some(r) => {
            let start = r.start.next_multiple_of(LARGE_PAGE);
            let end = (r.end & !(LARGE_PAGE - 1)).min(TOP).max(start);
            Region {
                start: address(start),
                end: address(end),
            }
        }
        None => Region { start: 0, end: 0 },
    };
    let low_end = address(low.end.min(FOUR_GIB));
    let heap = Region {
        start: address(IMAGE_END),
        end: low_end.min(APP_BASE),
    };
    let total = ranges.iter().map(|r| r.end - r.start).sum();
    Some(Plan {
        heap,
        space: Space { low_end, high },
        total,
    })
}

/// Maps what lies above 4 GiB, one to one. Needs the heap.
pub fn map_high(high: Region) {
    let (start, end) = (high.start as u64, high.end as u64);
    let mut gib = start >> 30;
    while gib << 30 < end {
        let layout = Layout::from_size_align(4096, 4096).expect("a page");
        // SAFETY: the layout is not empty. Never freed: it is in use for ever.
        let table = unsafe { alloc_zeroed(layout) }.cast::<u64>();
        assert!(!table.is_null(), "no memory for page tables");
        for slot in 0..512 {
            let page = (gib << 30) + slot * LARGE_PAGE;
            if page >= start && page < end {
                // SAFETY: the slot is inside the table.
                unsafe { table.add(slot as usize).write(page | LARGE) };
            }
        }
        // SAFETY: an entry of the top table that was absent becomes present; nothing was cached for
        // it. The table is user-accessible memory like all else.
        unsafe {
            (&raw mut pdpt)
                .cast::<u64>()
                .add(gib as usize)
                .write_volatile(table as u64 | TABLE)
        };
        gib += 1;
    }
}
