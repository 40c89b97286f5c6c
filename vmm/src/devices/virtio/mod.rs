//! Virtio 1.2 devices: what a device is to its transport, and the constants all of them share.
//!
//! The transport ([`mmio`]) owns registers, queues, the interrupt and the event loop's side of a
//! device; a [`VirtioDevice`] only turns descriptor chains into work. All work of a device runs on
//! the control thread, request by request and synchronously; activation and reset run on the vCPU
//! whose register write asks for them. One lock a device covers both.

pub mod balloon;
pub mod block;
pub mod buffers;
mod gate;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;

#[cfg(any(test, feature = "fuzzing"))]
pub mod testing;

use std::io;
use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::queue::{QueueError, VirtQueue};

pub use self::gate::Gate;
pub use crate::memory::GuestRam;

/// Device types, virtio 1.2 section 5.
pub mod device_type {
    /// Network device, section 5.1.
    pub const NET: u32 = 1;
    /// Block device, section 5.2.
    pub const BLOCK: u32 = 2;
    /// Entropy device, section 5.4.
    pub const RNG: u32 = 4;
    /// Memory balloon, section 5.5.
    pub const BALLOON: u32 = 5;
    /// Socket device, section 5.10.
    pub const VSOCK: u32 = 19;

    /// Its name in words.
    #[must_use]
    pub fn name(id: u32) -> &'static str {
        match id {
            NET => "network card",
            BLOCK => "disk",
            RNG => "entropy device",
            BALLOON => "memory balloon",
            VSOCK => "vsock",
            _ => "virtio device",
        }
    }
}

/// Chains a device takes from one queue before the event loop gets its turn again. A guest that
/// keeps adding to a ring can keep its device busy, not the control thread.
pub const CHAINS_A_TURN_MAX: u32 = 1024;

/// Why a device stopped and now asks its driver for a reset.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The driver broke the rules of the ring.
    #[error("queue {queue} holds something that is no request")]
    Queue {
        /// Index of the queue.
        queue: usize,
        /// What is wrong with it.
        #[source]
        source: QueueError,
    },
    /// The driver set a queue up where no RAM is.
    #[error("queue {0} was set up with addresses or a size that do not hold")]
    QueueSetup(u32),
    /// The driver wrote a device status that does not follow from the one before.
    #[error("device status {from:#x} cannot become {to:#x}")]
    Status {
        /// Status before the write.
        from: u32,
        /// What was written.
        to: u32,
    },
    /// The host refused something the device cannot do without.
    #[error("{what} failed on the host")]
    Host {
        /// Which operation.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// A descriptor could not be watched by the event loop.
    #[error("the event loop refused a descriptor")]
    Watch(#[source] event_manager::Error),
}

impl DeviceError {
    /// For `map_err` on the operations of queue `queue`.
    pub fn queue(queue: usize) -> impl FnOnce(QueueError) -> Self {
        move |source| Self::Queue { queue, source }
    }

    /// For `map_err` on a system call.
    pub fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Why a saved device was refused.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The state belongs to another kind of device.
    #[error("the saved device is not a {0}")]
    OtherDevice(&'static str),
    /// A field that no save could have produced.
    #[error("the saved device's {0} is out of range")]
    Field(&'static str),
    /// The host lacks a feature the guest's driver has accepted.
    #[error("the guest uses virtio features {0:#x} that this device does not offer")]
    Features(u64),
    /// A queue that does not lie in this VM's RAM.
    #[error("saved queue {0} does not lie in RAM")]
    Queue(usize),
    /// The host's file or socket does not fit the saved device.
    #[error("the saved device had {what} {saved}, the one given has {given}")]
    Resource {
        /// Which property.
        what: &'static str,
        /// Its value when the device was saved.
        saved: u64,
        /// Its value now.
        given: u64,
    },
    /// The device could not be set going.
    #[error("the device could not be activated")]
    Activate(#[source] DeviceError),
}

/// What a device keeps across a save: nothing of the host, all of what the driver has agreed with
/// it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// An entropy device.
    Rng(rng::RngState),
    /// A block device.
    Block(block::BlockState),
    /// A socket device.
    Vsock(vsock::VsockState),
    /// A memory balloon.
    Balloon(balloon::BalloonState),
    /// A network device.
    Net(net::NetState),
}

/// What a device works on while it handles an event.
pub struct DeviceIo<'a> {
    /// Guest RAM.
    pub guest: &'a GuestRam,
    /// The device's queues, by index. One that the driver did not set up gives no chains.
    pub queues: &'a mut [VirtQueue],
    /// Queues (bit by index) that have more to do than one turn should take: the transport comes
    /// back to them on the event loop's next turn.
    pub again: u32,
    /// Set by a device that has changed its configuration space: the driver is told.
    pub config_changed: bool,
}

impl DeviceIo<'_> {
    /// Asks the driver to notify of new buffers in `queue`. True if some are there already.
    ///
    /// # Errors
    /// When the ring cannot be accessed.
    pub fn enable_kicks(&mut self, queue: usize) -> Result<bool, DeviceError> {
        match self.queues.get_mut(queue) {
            Some(ring) => ring
                .enable_kicks(self.guest)
                .map_err(DeviceError::queue(queue)),
            None => Ok(false),
        }
    }

    /// Asks for another event on `queue` in the event loop's next turn.
    pub fn come_back(&mut self, queue: usize) {
        self.again |= 1_u32
            .checked_shl(u32::try_from(queue).unwrap_or(u32::MAX))
            .unwrap_or(0);
    }
}

/// A device behind a transport.
///
/// Interrupts are no concern of it: the transport raises one for each queue that got used buffers.
/// An error from any method marks the device as needing a reset and stops it until the driver does.
pub trait VirtioDevice: Send {
    /// Device type, one of [`device_type`].
    fn id(&self) -> u32;

    /// Feature bits of the device type. The transport adds those of the ring.
    fn features(&self) -> u64;

    /// Largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Configuration space, little-endian. Its length is constant for the device's life; a change of
    /// its contents is announced by [`DeviceIo::config_changed`].
    fn config(&self) -> &[u8];

    /// The driver writes `bytes` to configuration space from `at` on. A field that is not the driver's
    /// stays as it is, and most devices have no other.
    fn write_config(&mut self, _at: usize, _bytes: &[u8]) {}

    /// Descriptors that become readable when the host has something for the device; constant for
    /// the device's life. They are watched, level-triggered, while the device is active.
    fn backend_fds(&self) -> Vec<RawFd>;

    /// The driver has set `DRIVER_OK` after accepting `features`.
    ///
    /// # Errors
    /// When the host refuses what the device needs.
    fn activate(&mut self, features: u64) -> Result<(), DeviceError>;

    /// The driver resets the device: back to the state after construction.
    fn reset(&mut self);

    /// The driver may have added buffers to queue `queue`.
    ///
    /// # Errors
    /// When the driver broke the ring's rules or the host refuses what the device needs.
    fn queue_event(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError>;

    /// The descriptor at `index` of [`VirtioDevice::backend_fds`] is readable.
    ///
    /// # Errors
    /// As [`VirtioDevice::queue_event`].
    fn backend_event(&mut self, index: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError>;

    /// What must be kept across a save.
    fn save(&self) -> DeviceState;

    /// Takes over a saved state; called once, on a new device, before [`VirtioDevice::activate`].
    ///
    /// # Errors
    /// When the state is another device's or does not fit the host's resources.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;
}
