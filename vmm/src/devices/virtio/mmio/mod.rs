//! Virtio over MMIO, version 2 registers (virtio 1.2 section 4.2.2).
//!
//! - `device.rs`: the registers, the status state machine, activation and reset
//! - `event_handler.rs`: the control thread's side: kicks, backend descriptors, pausing
//! - `persist.rs`: saving a device and restoring it

mod device;
mod event_handler;
mod persist;

#[cfg(test)]
mod tests;

pub use self::device::{MmioTransport, WINDOW_BYTES};
pub use self::persist::{MmioState, STATE_VERSION};
