//! Doing requests.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::request::{HEADER_BYTES, RANGE_SECTORS_MAX, RANGES_MAX, Request, Status};
use crate::devices::disk::{BLOCK, Disk, DiskError, FaultKind, SECTOR};
use crate::devices::rate::{Limiter, Limits};
use crate::devices::virtio::queue::{Chain, VirtQueue};
use crate::devices::virtio::{CHAINS_A_TURN_MAX, DeviceError, DeviceIo, GuestRam};

/// The one queue.
pub(super) const REQUEST_QUEUE: usize = 0;
/// Its size.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Bytes of a disk's serial number, section 5.2.6.
pub const ID_BYTES: usize = 20;
/// Data moved before the event loop gets its turn.
const BYTES_A_TURN_MAX: usize = 16 << 20;
/// Requests behind a parked one whose blocks are demanded ahead of time.
const AHEAD_MAX: u32 = 32;

/// The device.
pub struct Block {
    pub(super) disk: Disk,
    pub(super) id: [u8; ID_BYTES],
    pub(super) config: Vec<u8>,
    /// The driver knows of no flush, so each write is made durable at once (section 5.2.6.2).
    pub(super) write_through: bool,
    chain: Chain,
    parked: u64,
    /// None when nothing is limited.
    pub(super) limiter: Option<Limiter>,
}

/// How a request ended: its status, and the bytes put into the guest's buffers before it.
type Done = (Status, usize);

impl Block {
    /// A device for `disk` with the serial number `id`, cut or padded to [`ID_BYTES`].
    pub fn new(disk: Disk, id: &str) -> Self {
        let mut bytes = [0; ID_BYTES];
        for (slot, byte) in bytes.iter_mut().zip(id.bytes()) {
            *slot = byte;
        }
        Self {
            config: config(&disk),
            disk,
            id: bytes,
            write_through: false,
            chain: Chain::default(),
            parked: 0,
            limiter: None,
        }
    }

    /// The device with limits: bytes that requests read and write, and requests of any kind.
    ///
    /// # Errors
    /// When there is no timer for them.
    pub fn limited(self, limits: Limits) -> io::Result<Self> {
        let is_limited = limits != Limits::default();
        Ok(Self {
            limiter: is_limited.then(|| Limiter::new(limits)).transpose()?,
            ..self
        })
    }

    /// How often a request had to wait for a block to arrive.
    pub fn parked(&self) -> u64 {
        self.parked
    }

    pub(super) fn device_features(&self) -> u64 {
        let always =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.is_read_only() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    /// Serves the queue until it is empty, a request has to wait, or the turn is over.
    pub(super) fn serve(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(REQUEST_QUEUE) else {
            return Ok(());
        };
        let mut chain = std::mem::take(&mut self.chain);
        let result = self.serve_queue(io.guest, queue, &mut chain);
        self.chain = chain;
        if result? {
            io.come_back(REQUEST_QUEUE);
        }
        Ok(())
    }

    /// True if there is more to do now. What a limit holds back stays in the ring, and the limiter's
    /// timer brings the device back.
    fn serve_queue(
        &mut self,
        guest: &GuestRam,
        queue: &mut VirtQueue,
        chain: &mut Chain,
    ) -> Result<bool, DeviceError> {
        let broken = DeviceError::queue;
        let mut bytes = 0;
        for _ in 0..CHAINS_A_TURN_MAX {
            if let Some(limiter) = &mut self.limiter
                && !limiter.is_open().map_err(DeviceError::host("timerfd"))?
            {
                return Ok(false);
            }
            let position = queue.position();
            if !queue.pop(guest, chain).map_err(broken(REQUEST_QUEUE))? {
                return queue.enable_kicks(guest).map_err(broken(REQUEST_QUEUE));
            }
            let request =
                Request::parse(guest, chain, &self.disk).map_err(broken(REQUEST_QUEUE))?;
            if !request.is_ready(&self.disk, true) {
                self.parked += 1;
                self.demand_ahead(guest, queue, chain);
                queue.rewind(position);
                return Ok(false);
            }
            let (status, written) = self.perform(guest, chain, &request);
            let last = chain.writable.len() - 1;
            chain.writable.write_at(guest, last, &[status.byte()]);
            let written = if written == last { last + 1 } else { 1 };
            queue
                .push_used(guest, chain, written)
                .map_err(broken(REQUEST_QUEUE))?;
            if let Some(limiter) = &mut self.limiter {
                limiter.charge(request.data_len());
            }
            bytes += chain.readable.len() + chain.writable.len();
            if bytes >= BYTES_A_TURN_MAX {
                break;
            }
        }
        Ok(true)
    }

    /// Demands what the requests behind a parked one will need. The queue is rewound afterwards, so
    /// what is wrong with one of them is found again when its turn comes.
    fn demand_ahead(&self, guest: &GuestRam, queue: &mut VirtQueue, chain: &mut Chain) {
        for _ in 0..AHEAD_MAX {
            let request = match queue.pop(guest, chain) {
                Ok(true) => Request::parse(guest, chain, &self.disk),
                Ok(false) | Err(_) => return,
            };
            match request {
                // The answer does not matter: what is missing has been demanded.
                Ok(request) => drop(request.is_ready(&self.disk, false)),
                Err(_) => return,
            }
        }
    }

    fn perform(&self, guest: &GuestRam, chain: &Chain, request: &Request) -> Done {
        let disk = &self.disk;
        match request {
            Request::Refused(status) => (*status, 0),
            Request::Read(range) => {
                let len = chain.writable.len() - 1;
                let read = disk.read(guest, &chain.writable, range.at, len);
                match self.done(FaultKind::Read, read) {
                    (Status::Ok, _) => (Status::Ok, len),
                    failed => failed,
                }
            }
            Request::Write(range) => {
                let len = chain.readable.len() - HEADER_BYTES;
                self.changed(disk.write(guest, &chain.readable, range.at, HEADER_BYTES, len))
            }
            Request::Discard(ranges) => self.changed(
                ranges
                    .iter()
                    .try_for_each(|range| disk.discard(range.at, range.len)),
            ),
            Request::WriteZeroes(ranges) => self.changed(
                ranges
                    .iter()
                    .try_for_each(|range| disk.write_zeroes(range.at, range.len)),
            ),
            Request::Flush => self.done(FaultKind::Flush, disk.flush()),
            Request::Id => {
                let len = chain.writable.len() - 1;
                let id = self.id.get(..len.min(ID_BYTES)).unwrap_or(&self.id);
                (Status::Ok, chain.writable.write_at(guest, 0, id))
            }
        }
    }

    /// Ends a request that changed the disk.
    fn changed(&self, result: Result<(), DiskError>) -> Done {
        match self.done(FaultKind::Write, result) {
            (Status::Ok, _) if self.write_through => self.done(FaultKind::Flush, self.disk.flush()),
            done => done,
        }
    }

    /// The guest is told no more than that it failed, as there is no channel for more; the disk keeps
    /// why.
    fn done(&self, kind: FaultKind, result: Result<(), DiskError>) -> Done {
        match result {
            Ok(()) => (Status::Ok, 0),
            Err(error) => {
                self.disk.count_fault(kind, &error);
                (Status::IoError, 0)
            }
        }
    }
}

/// Configuration space, section 5.2.4. Offsets are those of `struct virtio_blk_config`.
fn config(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |at: usize, field: &[u8]| {
        if let Some(slot) = bytes.get_mut(at..at + field.len()) {
            slot.copy_from_slice(field);
        }
    };
    put(0, &(disk.bytes() / SECTOR).to_le_bytes());
    // Descriptors of a request less header and status.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &disk.sector_bytes().to_le_bytes());
    // A queue.
    put(34, &1_u16.to_le_bytes());
    if !disk.is_read_only() {
        let ranges = u32::try_from(RANGES_MAX).unwrap_or(0).to_le_bytes();
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &ranges);
        // Smaller discards than a block have no effect.
        put(
            44,
            &u32::try_from(BLOCK)
                .unwrap_or(0)
                .div_euclid(512)
                .to_le_bytes(),
        );
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &ranges);
        put(56, &[1]);
    }
    bytes
}
