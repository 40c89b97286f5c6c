//! Virtio memory balloon (virtio 1.2 section 5.5): memory that the guest does without goes back to
//! the host, and out of snapshots and overlays.
//!
//! - `device.rs`: the queues: inflate, deflate, statistics, hints, reports
//! - `handle.rs`: what the host asks for and hears
//! - `statistics.rs`: what the guest says of its memory
//! - `event_handler.rs`, `persist.rs`: the device as its transport sees it, and what a save keeps
//!
//! There are three ways in which pages come, and each has its own rule of when their contents may go:
//!
//! - **Inflated** pages are the balloon's from the request on. They are discarded before the request
//!   is acknowledged; what they read as is of no concern, since the driver initialises a page that it
//!   takes out again. Which pages are in the balloon is not kept: a page that is touched is there.
//! - **Reported** pages are free and stand still until the report is acknowledged, and are discarded
//!   before that. Without PAGE_POISON they count as uninitialised afterwards, so the base's page will
//!   do. With it the driver has filled free pages with `poison_val` and expects to find that
//!   (`init_on_free` in Linux fills with 0, `page_poison` with 0xaa): with 0 only pages that read as
//!   zeros are discarded, with another value none.
//! - **Hinted** pages may be used again by the guest at any time, even before the device has seen the
//!   hint (Linux does so when memory is short). They may be discarded only if they were not written
//!   since the command was issued. So the device only collects them, and
//!   [`Machine::pause_without_free_pages`](crate::machine::Machine::pause_without_free_pages), which
//!   keeps a dirty log meanwhile, discards when the guest stands still. With PAGE_POISON, freeing a
//!   page writes to it, so that hints gain nothing and are not asked for.
//!
//! Page numbers and ranges are the guest's word: what is not RAM is ignored, partial pages stay, and
//! whatever else a guest gives away, or twice, is its own loss. The work of one turn is bounded.

mod device;
mod event_handler;
mod handle;
mod persist;
mod statistics;

#[cfg(test)]
mod tests;

pub use self::device::{Balloon, feature};
pub use self::handle::{BalloonHandle, BalloonStatus, Hints};
pub use self::persist::BalloonState;
pub use self::statistics::Statistics;
