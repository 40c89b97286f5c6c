//! Virtio network device (virtio 1.2 section 5.1): one receive and one transmit queue over a [`Backend`].
//!
//! | file | what |
//! | --- | --- |
//! | `device.rs` | frames from the guest, the link, what is waited for |
//! | `receive.rs` | frames to the guest: gathering its buffers, merging them |
//! | `backend.rs` | what is behind the device |
//! | `tap.rs` | a TAP interface, with offloads |
//! | `stream.rs` | a stream socket with a length before each frame, as passt and QEMU speak |
//! | `frames.rs` | one frame, one vectored call, straight into or out of guest memory |
//! | `mac.rs` | MAC addresses |
//! | `event_handler.rs`, `persist.rs` | the device as its transport sees it, and what a save keeps |
//!
//! The device has an epoll of its own over the backend and the timers of its limits, and the event
//! loop watches that epoll. The backend is watched once at a time (EPOLLONESHOT), and only for what
//! the device can do something about: while the guest gives no buffers or a limit is reached, frames
//! wait in the backend and cost nothing. A frame is never cut: one that has no room in the guest's
//! buffers waits for more of them.
//!
//! The header before each frame (checksum and segmentation offload) is the guest's word. A TAP's
//! kernel checks every field of it against the frame and refuses what does not hold, which is a
//! dropped frame; a stream has no offloads, and the header goes nowhere. Nothing here acts on it.

mod backend;
mod device;
mod event_handler;
mod frames;
mod mac;
mod persist;
mod receive;
mod stream;
mod tap;

#[cfg(test)]
mod tests;

pub use self::backend::{Backend, Received, Sent};
pub use self::device::{FRAME_BYTES_MAX, HEADER_BYTES, Net, NetBackend, NetStats};
pub use self::mac::{MacAddr, MacError};
pub use self::persist::NetState;
pub use self::stream::{FrameReader, FramingError, StreamBackend};
pub use self::tap::{Tap, TapError};
