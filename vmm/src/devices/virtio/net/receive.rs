//! Frames to the guest.
//!
//! A frame's length is known only when it is there, so buffers are gathered before it is read: one
//! chain, or as many as the longest frame needs when frames have been long. What has no room in
//! them is read into host memory and copied to further chains. If there are none, the frame waits
//! in host memory until there are. Chains that no frame needed stay in the ring.

use std::collections::VecDeque;

use super::backend::{Backend, Received};
use super::device::{FRAME_BYTES_MAX, HEADER_BYTES};
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::queue::{Chain, QueueError, VirtQueue};

/// A frame longer than this lets as much as the longest needs be gathered for the next.
const SHORT_BYTES_MAX: usize = 2048;
/// Pieces that are gathered at most: a chain may be made of as many as its queue is long.
const PIECES_MAX: usize = 1024;
/// Where the header says over how many chains a frame goes, section 5.1.6.
const NUM_BUFFERS_OFFSET: usize = 10;

/// What came of trying to hand the guest a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The guest has a frame of so many bytes.
    Frame(usize),
    /// A frame is lost: the guest's buffers are not made for one of its length.
    Dropped,
    /// The backend has none.
    Nothing,
    /// The guest has to give more buffers first.
    NoBuffers,
    /// The backend is gone.
    Gone,
}

/// The receiving side of a device.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Chains that are taken from the ring and not given back, in their order.
    held: VecDeque<Chain>,
    /// Chains whose room is used again.
    spare: Vec<Chain>,
    /// The pieces of those held.
    gathered: Buffers,
    /// Heads of the chains of one frame, with what was written to each.
    used: Vec<(u16, usize)>,
    /// What has no room in the gathered pieces.
    overflow: Vec<u8>,
    /// A whole frame of this length waits in `overflow`.
    pending: Option<usize>,
    /// Bytes to gather for the next frame.
    expected: usize,
    /// A frame may go over several chains.
    mergeable: bool,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            held: VecDeque::new(),
            spare: Vec::new(),
            gathered: Buffers::default(),
            used: Vec::new(),
            overflow: vec![0; FRAME_BYTES_MAX],
            pending: None,
            expected: HEADER_BYTES,
            mergeable: false,
        }
    }

    /// As after construction, for a driver that merges chains or not.
    pub(super) fn reset(&mut self, mergeable: bool) {
        self.spare.extend(self.held.drain(..));
        self.gathered.clear();
        self.pending = None;
        self.expected = HEADER_BYTES;
        self.mergeable = mergeable;
    }

    /// Hands the guest the next frame of `backend`.
    pub(super) fn step(
        &mut self,
        guest: &GuestRam,
        queue: &mut VirtQueue,
        backend: &mut dyn Backend,
    ) -> Result<Step, QueueError> {
        if let Some(len) = self.pending {
            return self.deliver(guest, queue, len, 0);
        }
        self.gather(guest, queue, self.expected)?;
        if self.held.is_empty() {
            return Ok(Step::NoBuffers);
        }
        match backend.receive(guest, &self.gathered, &mut self.overflow) {
            Received::Nothing => Ok(Step::Nothing),
            Received::Gone => Ok(Step::Gone),
            Received::Frame { len, .. } if !(HEADER_BYTES..=FRAME_BYTES_MAX).contains(&len) => {
                Ok(Step::Dropped)
            }
            Received::Frame { len, direct } => self.deliver(guest, queue, len, direct),
        }
    }

    /// Completes a frame of which `direct` bytes are in the gathered buffers and the rest is in
    /// `overflow`, and gives it to the guest. If that takes more buffers, it becomes pending.
    fn deliver(
        &mut self,
        guest: &GuestRam,
        queue: &mut VirtQueue,
        len: usize,
        direct: usize,
    ) -> Result<Step, QueueError> {
        if direct < len {
            self.gather(guest, queue, len)?;
            if self.gathered.len() < len {
                return Ok(self.wait_or_drop(guest, len, direct));
            }
            let rest = self.overflow.get(..len - direct).unwrap_or(&[]);
            self.gathered.write_at(guest, direct, rest);
        }
        self.pending = None;
        self.finish(guest, queue, len)?;
        self.expected = if len > SHORT_BYTES_MAX {
            FRAME_BYTES_MAX
        } else {
            HEADER_BYTES
        };
        Ok(Step::Frame(len))
    }

    /// A frame that the gathered buffers are too short for.
    fn wait_or_drop(&mut self, guest: &GuestRam, len: usize, direct: usize) -> Step {
        let is_hopeless = !self.mergeable && !self.held.is_empty();
        if is_hopeless || self.gathered.pieces() >= PIECES_MAX {
            self.pending = None;
            return Step::Dropped;
        }
        // The buffers go back into the ring, and with them what lies there of the frame.
        self.overflow.copy_within(..len - direct, direct);
        if let Some(begin) = self.overflow.get_mut(..direct) {
            self.gathered.read_at(guest, 0, begin);
        }
        self.pending = Some(len);
        Step::NoBuffers
    }

    /// Takes chains until they have room for `bytes`, there are no more, or there is no use in more.
    fn gather(
        &mut self,
        guest: &GuestRam,
        queue: &mut VirtQueue,
        bytes: usize,
    ) -> Result<(), QueueError> {
        while self.gathered.len() < bytes
            && self.gathered.pieces() < PIECES_MAX
            && (self.mergeable || self.held.is_empty())
        {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(guest, &mut chain)? {
                self.spare.push(chain);
                return Ok(());
            }
            if chain.writable.len() < HEADER_BYTES {
                return Err(QueueError::Shape("room for a header"));
            }
            self.gathered.append(guest, &chain.writable)?;
            self.held.push_back(chain);
        }
        Ok(())
    }

    /// Gives the guest the first `len` bytes of what is gathered.
    fn finish(
        &mut self,
        guest: &GuestRam,
        queue: &mut VirtQueue,
        len: usize,
    ) -> Result<(), QueueError> {
        self.used.clear();
        let mut left = len;
        while left > 0 {
            let Some(chain) = self.held.pop_front() else {
                break;
            };
            let written = left.min(chain.writable.len());
            left -= written;
            self.used.push((chain.head(), written));
            self.spare.push(chain);
        }
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        self.gathered
            .write_at(guest, NUM_BUFFERS_OFFSET, &count.to_le_bytes());
        self.gathered.clear();
        for chain in &self.held {
            self.gathered.append(guest, &chain.writable)?;
        }
        queue.push_used_together(guest, &self.used)
    }

    /// Puts the chains that no frame needed back into the ring.
    pub(super) fn put_back(&mut self, queue: &mut VirtQueue) {
        let held = u16::try_from(self.held.len()).unwrap_or(u16::MAX);
        queue.rewind(queue.position().wrapping_sub(held));
        self.spare.extend(self.held.drain(..));
        self.gathered.clear();
    }
}
