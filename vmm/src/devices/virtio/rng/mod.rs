//! Virtio entropy device (virtio 1.2 section 5.4): random bytes from the host's getrandom.
//!
//! It keeps nothing, so a clone of a VM reads other bytes than its twin.

mod device;
mod event_handler;
mod persist;

#[cfg(test)]
mod tests;

pub use self::device::Rng;
pub use self::persist::RngState;
