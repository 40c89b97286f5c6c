//! Guest memory: where it lies, what each page is backed by, and who fills it.
//!
//! | file | what |
//! | --- | --- |
//! | `layout.rs` | page numbers, runs, page sets, and where RAM sits in the guest's address space |
//! | `pieces.rs` | the plan of mappings: which stretch is backed by what; no system calls |
//! | `ram.rs` | the mappings themselves and everything that owns or asks about them |
//! | `uffd.rs` | the userfaultfd interface |
//! | `placer.rs` | the one gate through which contents enter missing pages |
//! | `filling.rs` | what is missing, and the calls that fill it |
//! | `pager.rs` | the thread that answers faults |
//! | `poll.rs` | waiting for file descriptors |
//! | `discard.rs` | giving pages back to the host |
//! | `dirty.rs` | which pages were written, by vCPUs and devices alike |
//! | `pagemap.rs` | which pages are the VM's own |
//! | `image.rs` | writing RAM to a memory image |

mod dirty;
mod discard;
mod filling;
mod image;
mod layout;
mod pagemap;
mod pager;
mod pieces;
mod placer;
mod poll;
mod ram;
mod uffd;

#[cfg(test)]
mod discard_tests;
#[cfg(test)]
mod pager_tests;

pub use dirty::{DirtyError, DirtyLog};
pub use discard::{Afterwards, DiscardError, Discarder, pages_of_frames, whole_pages};
pub use image::ImageError;
pub use layout::{
    HOLE_END, HOLE_START, LayoutError, PAGE, PAGE_BYTES, PageRun, PageSet, RAM_BYTES_MAX,
    RamLayout, RamPage, RamRegion, Runs,
};
pub use pagemap::PagemapError;
pub use pager::{PageSource, Pager, PagerError, PagerHooks, PagerStats, SourceError};
pub use pieces::{PIECES_MAX, PlanError};
pub use placer::{PlaceError, Placed, Placer, PlacerBuildError, PlacerStats};
pub use ram::{GuestRam, OwnPagesError, Ram, RamError, Slot};
pub use uffd::UffdError;
