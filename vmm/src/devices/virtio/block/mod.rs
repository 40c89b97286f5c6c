//! Virtio block device (virtio 1.2 section 5.2) over a [`crate::devices::disk::Disk`].
//!
//! - `request.rs`: what a chain asks for, checked before anything is done
//! - `device.rs`: doing it, one request after the other, on the control thread
//! - `event_handler.rs`, `persist.rs`: the device as its transport sees it, and what a save keeps
//!
//! A request moves its bytes between the files and the guest's buffers with vectored calls. One
//! that needs a block which has yet to arrive stays in the ring, together with those behind it,
//! until the disk says that the block is there; the blocks that those behind it need are demanded
//! at once. A limit of bytes or requests a second holds requests back the same way.

mod device;
mod event_handler;
mod persist;
mod request;

#[cfg(test)]
mod tests;

pub use self::device::{Block, ID_BYTES};
pub use self::persist::BlockState;
