//! The gate for descriptor chains: nothing of a ring reaches a device without passing here.
//!
//! virtio-queue keeps the two rings; the walk over the descriptor table is this file's own, because
//! a device wants to be told of a bad chain, where an iterator would just end. A chain is accepted
//! when its indices lie in the table, it ends within as many descriptors as the queue has, what the
//! device may read comes before what it may write, no descriptor is indirect (the feature is not
//! offered), each buffer lies in one region of RAM, and all of them together stay below 4 GiB
//! (virtio 1.2 section 2.7). Buffers may overlap each other and the rings: that harms only the
//! guest, since every access is bounded by RAM.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueState as RingState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::GuestRam;
use super::buffers::{Buffers, Piece};

/// What a driver can do wrong with a ring.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The available index ran further ahead than the ring is long, or a ring access failed.
    #[error("the ring is not usable")]
    Ring(#[source] virtio_queue::Error),
    /// A head or a next index beyond the descriptor table.
    #[error("descriptor index {index} is outside the table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// More descriptors than the table has: the chain runs in a circle.
    #[error("the chain that starts at descriptor {0} never ends")]
    Loop(u16),
    /// An indirect descriptor, which was not offered.
    #[error("descriptor {0} is indirect")]
    Indirect(u16),
    /// A descriptor to read from after one to write to.
    #[error("descriptor {0} is readable but follows a writable one")]
    Order(u16),
    /// A buffer that is not in RAM, or not in one piece.
    #[error("the buffer of {len:#x} bytes at {address:#x} is not in RAM")]
    OutsideRam {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// More than 4 GiB in one chain.
    #[error("the chain's buffers add up to more than 4 GiB")]
    TooLong,
    /// A chain without the buffers that this queue is for.
    #[error("the chain lacks {0}")]
    Shape(&'static str),
}

/// A chain that passed the gate.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write.
    pub writable: Buffers,
}

/// A queue's registers and positions, as saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

/// A queue: registers while the driver sets it up, a ring once the device is active.
#[derive(Debug)]
pub struct VirtQueue {
    pub(super) size_max: u16,
    pub(super) size: u16,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    ring: Option<Queue>,
    /// Buffers were used since the driver was last considered for an interrupt.
    unsignalled: bool,
    /// Position in the used ring when the driver was last considered for an interrupt.
    considered: u16,
}

impl VirtQueue {
    /// A queue as after reset. `size_max` is a power of two, at most 32768.
    pub fn new(size_max: u16) -> Self {
        Self {
            size_max,
            size: size_max,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            ring: None,
            unsignalled: false,
            considered: 0,
        }
    }

    /// Whether the driver set this queue up and the device is active.
    pub fn is_active(&self) -> bool {
        self.ring.is_some()
    }

    /// Takes a size from the driver; false if it cannot be one.
    pub(super) fn set_size(&mut self, size: u32) -> bool {
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= self.size_max => {
                self.size = size;
                true
            }
            _ => false,
        }
    }

    /// Starts the ring where the registers say, if the driver declared it ready. False when the
    /// addresses are not aligned or not in RAM.
    pub(super) fn start(&mut self, guest: &GuestRam, event_idx: bool, at: (u16, u16)) -> bool {
        if !self.ready {
            return true;
        }
        let state = RingState {
            max_size: self.size_max,
            next_avail: at.0,
            next_used: at.1,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        match Queue::try_from(state) {
            // Ring address 0 stands for "not set up" in virtio-queue; no driver puts a ring there.
            Ok(ring) if self.available != 0 && ring.is_valid(guest) => {
                self.ring = Some(ring);
                self.considered = at.1;
                true
            }
            _ => false,
        }
    }

    /// What is saved of the queue.
    pub(super) fn save(&self) -> QueueState {
        QueueState {
            size: self.size,
            ready: self.ready,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            next_available: self.ring.as_ref().map_or(0, QueueT::next_avail),
            next_used: self.ring.as_ref().map_or(0, QueueT::next_used),
        }
    }

    /// Takes the next chain into `chain`, whose room is reused. False when there is none.
    ///
    /// # Errors
    /// When the ring or the chain is not what a driver may write. The chain counts as taken.
    pub fn pop(&mut self, guest: &GuestRam, chain: &mut Chain) -> Result<bool, QueueError> {
        let Some(ring) = self.ring.as_mut() else {
            return Ok(false);
        };
        let (table, size) = (ring.desc_table(), ring.size());
        let head = match ring.iter(guest).map_err(QueueError::Ring)?.next() {
            Some(found) => found.head_index(),
            None => return Ok(false),
        };
        chain.walk(guest, table, size, head)?;
        Ok(true)
    }

    /// Puts the chain that [`VirtQueue::pop`] gave last back, to be taken again later.
    pub fn put_back(&mut self) {
        if let Some(ring) = self.ring.as_mut() {
            ring.go_to_previous_position();
        }
    }

    /// Where the next chain is taken from, for [`VirtQueue::rewind`].
    pub fn position(&self) -> u16 {
        self.ring.as_ref().map_or(0, QueueT::next_avail)
    }

    /// Goes to `position`: puts all chains back that were taken since, none of which was given back.
    pub fn rewind(&mut self, position: u16) {
        if let Some(ring) = self.ring.as_mut() {
            ring.set_next_avail(position);
        }
    }

    /// Gives `chain` back to the driver, with `written` bytes written to its writable buffers.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn push_used(
        &mut self,
        guest: &GuestRam,
        chain: &Chain,
        written: usize,
    ) -> Result<(), QueueError> {
        let Some(ring) = self.ring.as_mut() else {
            return Ok(());
        };
        self.unsignalled = true;
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        ring.add_used(guest, chain.head, written)
            .map_err(QueueError::Ring)
    }

    /// Gives chains back that belong together, each by its head and the bytes written to it: the
    /// driver sees all of them or none, as it must with the buffers of one merged frame (section
    /// 5.1.6.4).
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn push_used_together(
        &mut self,
        guest: &GuestRam,
        chains: &[(u16, usize)],
    ) -> Result<(), QueueError> {
        let Some(ring) = self.ring.as_mut() else {
            return Ok(());
        };
        let broken = |error| QueueError::Ring(virtio_queue::Error::GuestMemory(error));
        let (used, size) = (ring.used_ring(), ring.size());
        let mut next = ring.next_used();
        for (head, written) in chains {
            let written = u32::try_from(*written).unwrap_or(u32::MAX);
            let slot = used + 4 + 8 * u64::from(next % size);
            let element = [u32::from(*head).to_le_bytes(), written.to_le_bytes()];
            guest
                .write_slice(element.as_flattened(), GuestAddress(slot))
                .map_err(broken)?;
            next = next.wrapping_add(1);
        }
        ring.set_next_used(next);
        self.unsignalled = true;
        guest
            .store(next.to_le(), GuestAddress(used + 2), Ordering::Release)
            .map_err(broken)
    }

    /// Asks the driver to notify of new buffers. True if some are there already.
    ///
    /// # Errors
    /// When the ring cannot be accessed.
    pub fn enable_kicks(&mut self, guest: &GuestRam) -> Result<bool, QueueError> {
        self.ring.as_mut().map_or(Ok(false), |ring| {
            ring.enable_notification(guest).map_err(QueueError::Ring)
        })
    }

    /// How many chains the driver has made available so far, a count that wraps.
    ///
    /// # Errors
    /// When the ring cannot be accessed.
    pub fn available(&self, guest: &GuestRam) -> Result<u16, QueueError> {
        self.ring.as_ref().map_or(Ok(0), |ring| {
            let index = ring.avail_idx(guest, Ordering::Acquire);
            index.map(|index| index.0).map_err(QueueError::Ring)
        })
    }

    /// Asks the driver to notify once it has made more than `available` chains available, however
    /// many of those are still to be taken. True if it has already.
    ///
    /// # Errors
    /// When the ring cannot be accessed.
    pub fn enable_kicks_beyond(
        &mut self,
        guest: &GuestRam,
        available: u16,
    ) -> Result<bool, QueueError> {
        let taken = self.position();
        self.rewind(available);
        let more = self.enable_kicks(guest);
        self.rewind(taken);
        more
    }

    /// Tells the driver that notifications are not needed for now.
    ///
    /// # Errors
    /// When the ring cannot be accessed.
    pub fn disable_kicks(&mut self, guest: &GuestRam) -> Result<(), QueueError> {
        self.ring.as_mut().map_or(Ok(()), |ring| {
            ring.disable_notification(guest).map_err(QueueError::Ring)
        })
    }

    /// Whether the driver wants an interrupt for what was used since the last call.
    pub(super) fn take_signal(&mut self, guest: &GuestRam) -> Result<bool, QueueError> {
        let Some(ring) = self.ring.as_mut().filter(|_| self.unsignalled) else {
            return Ok(false);
        };
        self.unsignalled = false;
        let before = std::mem::replace(&mut self.considered, ring.next_used());
        // The used index must be visible before the driver's wish is read, section 2.7.7.2.
        fence(Ordering::SeqCst);
        let read = |address| -> Result<u16, QueueError> {
            guest
                .load(GuestAddress(address), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(virtio_queue::Error::GuestMemory)
                .map_err(QueueError::Ring)
        };
        if ring.event_idx_enabled() {
            // Whether what the driver waits for is among those used since, section 2.7.10.
            let event = read(ring.avail_ring() + 4 + 2 * u64::from(ring.size()))?;
            let behind = self.considered.wrapping_sub(event).wrapping_sub(1);
            return Ok(behind < self.considered.wrapping_sub(before));
        }
        let flags = read(ring.avail_ring())?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

impl Chain {
    /// The descriptor that it starts with, which names it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Fills this chain from the descriptor table; see the head of the file for what is refused.
    fn walk(
        &mut self,
        guest: &GuestRam,
        table: u64,
        size: u16,
        head: u16,
    ) -> Result<(), QueueError> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut index = head;
        let mut write_seen = false;
        for _ in 0..size {
            if index >= size {
                return Err(QueueError::Index { index, size });
            }
            // In range: the whole table was checked to lie in RAM when the queue was started.
            let descriptor: Descriptor = guest
                .read_obj(GuestAddress(table + 16 * u64::from(index)))
                .map_err(virtio_queue::Error::GuestMemory)
                .map_err(QueueError::Ring)?;
            let flags = u32::from(descriptor.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                return Err(QueueError::Indirect(index));
            }
            let piece = Piece {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if flags & VRING_DESC_F_WRITE != 0 {
                write_seen = true;
                self.writable.push(guest, piece)?;
            } else if !write_seen {
                self.readable.push(guest, piece)?;
            } else {
                return Err(QueueError::Order(index));
            }
            if flags & VRING_DESC_F_NEXT == 0 {
                return match self.readable.len().checked_add(self.writable.len()) {
                    Some(sum) if u32::try_from(sum).is_ok() => Ok(()),
                    _ => Err(QueueError::TooLong),
                };
            }
            index = descriptor.next();
        }
        Err(QueueError::Loop(head))
    }
}
