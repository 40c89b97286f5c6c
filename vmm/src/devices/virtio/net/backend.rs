//! What is behind a network device: something that frames come from and go to.

use std::io;
use std::os::fd::RawFd;

use crate::devices::virtio::GuestRam;
use crate::devices::virtio::buffers::Buffers;

/// What came of asking for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A frame of `len` bytes with its header, `direct` of them in the guest's buffers and the rest
    /// in host memory.
    Frame {
        /// Header and frame.
        len: usize,
        /// How much of that the guest's buffers had room for.
        direct: usize,
    },
    /// There is none.
    Nothing,
    /// There never will be one again.
    Gone,
}

/// What came of sending a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Done,
    /// It must wait until the descriptor is writable.
    Busy,
    /// The backend does not take this frame.
    Refused,
    /// It takes none any more.
    Gone,
}

/// The host's side of a network device. Frames have the header of virtio 1.2 section 5.1.6 before
/// them, [`super::HEADER_BYTES`] long, whose number of buffers the device fills in.
pub trait Backend: Send {
    /// What to call it in a status report.
    fn name(&self) -> String;

    /// The descriptor that becomes readable and writable, constant for the backend's life.
    fn fd(&self) -> RawFd;

    /// Feature bits of the offloads that it can do, of those that [`super::Net`] knows.
    fn offloads(&self) -> u64;

    /// The driver accepted `features`: frames come and go accordingly from now on, and those that
    /// were made before are gone.
    ///
    /// # Errors
    /// When the host refuses; the backend is of no use then.
    fn set_up(&mut self, features: u64) -> io::Result<()>;

    /// Takes the next frame into `buffers`, and what they have no room for into `overflow`, which
    /// has room for a whole frame.
    fn receive(&mut self, guest: &GuestRam, buffers: &Buffers, overflow: &mut [u8]) -> Received;

    /// Sends the frame in `buffers`, which is longer than its header and no longer than a frame may
    /// be.
    fn send(&mut self, guest: &GuestRam, buffers: &Buffers) -> Sent;

    /// The descriptor is writable: goes on with what was sent in part.
    fn flush(&mut self) -> Sent;
}
