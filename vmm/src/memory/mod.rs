//! Guest memory: where it lies, what each page is backed by, and who fills it.
//!
//! | file | what |
//! | --- | --- |
//! | `layout.rs` | page numbers, runs, page sets, and where RAM sits in the guest's address space |
//! | `ram.rs` | the mappings themselves and everything that owns or asks about them |

mod layout;
mod ram;

pub use layout::{
    HOLE_END, HOLE_START, LayoutError, PAGE, PAGE_BYTES, PageRun, PageSet, RAM_BYTES_MAX,
    RamLayout, RamPage, RamRegion, Runs,
};
pub use ram::{GuestRam, Ram, RamError, Slot};
