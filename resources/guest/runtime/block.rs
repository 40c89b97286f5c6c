//! virtio-blk (virtio 1.2, section 5.2): one request at a time, as installing and loading need it.

use alloc::boxed::Box;
use core::fmt;

use crate::virtio::{Device, Part, Queue};

const FEATURE_RO: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
/// Bytes of a sector, the unit of every position here.
pub const SECTOR: usize = 512;
const CHUNK: usize = 256 << 10;

/// Why a request was not done.
#[derive(Debug)]
pub enum BlockError {
    /// Beyond the end of the disk.
    Range,
    /// The disk is read-only.
    ReadOnly,
    /// The device said so, with this status byte.
    Device(u8),
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BlockError::Range => write!(f, "beyond the end of the disk"),
            BlockError::ReadOnly => write!(f, "the disk is read-only"),
            BlockError::Device(status) => write!(f, "the disk failed with status {status}"),
        }
    }
}

/// Header and status of the request under way.
#[repr(C)]
struct Request {
    kind: u32,
    reserved: u32,
    sector: u64,
    discard_sector: u64,
    discard_count: u32,
    discard_flags: u32,
    status: u8,
}

/// A disk.
pub struct Disk {
    device: Device,
    queue: Queue,
    request: Box<Request>,
    sectors: u64,
    features: u64,
    discard_max: u32,
}

impl Disk {
    /// Takes over the device.
    pub fn new(device: Device) -> Disk {
        let features = device.negotiate(FEATURE_RO | FEATURE_FLUSH | FEATURE_DISCARD);
        let queue = device.queue(0);
        device.start();
        let sectors = device.config64(0);
        let discard_max = if features & FEATURE_DISCARD != 0 {
            device.config32(36)
        } else {
            0
        };
        let request = Request {
            kind: 0,
            reserved: 0,
            sector: 0,
            discard_sector: 0,
            discard_count: 0,
            discard_flags: 0,
            status: 0,
        };
        Disk {
            device,
            queue,
            request: Box::new(request),
            sectors,
            features,
            discard_max,
        }
    }

    /// The size in bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors * SECTOR as u64
    }

    /// Whether it can be written.
    pub fn writable(&self) -> bool {
        self.features & FEATURE_RO == 0
    }

    fn submit(&mut self, kind: u32, sector: u64, data: Option<Part>) -> Result<(), BlockError> {
        self.request.kind = kind;
        self.request.sector = sector;
        self.request.status = 0xff;
        let request: *mut Request = &mut *self.request;
        let header = Part::read(request.cast(), 16);
        // SAFETY: the address of a field, not read here.
        let status = Part::write(unsafe { &raw mut (*request).status }, 1);
        match data {
            Some(data) => self.queue.push(&[header, data, status]),
            None => self.queue.push(&[header, status]),
        };
        self.queue.kick();
        self.queue.wait(&self.device);
        // SAFETY: the device is done; it may have written the field, hence volatile.
        match unsafe { (&raw const (*request).status).read_volatile() } {
            0 => Ok(()),
            status => Err(BlockError::Device(status)),
        }
    }

    fn check(&self, sector: u64, len: usize) -> Result<(), BlockError> {
        assert!(len % SECTOR == 0, "disks are used in whole sectors");
        let end = sector.checked_add((len / SECTOR) as u64);
        end.filter(|&end| end <= self.sectors)
            .map(|_| ())
            .ok_or(BlockError::Range)
    }

    /// Reads whole sectors.
    pub fn read(&mut self, sector: u64, out: &mut [u8]) -> Result<(), BlockError> {
        self.check(sector, out.len())?;
        let mut at = sector;
        for part in out.chunks_mut(CHUNK) {
            self.submit(READ, at, Some(Part::write(part.as_mut_ptr(), part.len())))?;
            at += (part.len() / SECTOR) as u64;
        }
        Ok(())
    }

    /// Writes whole sectors.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check(sector, data.len())?;
        if !self.writable() {
            return Err(BlockError::ReadOnly);
        }
        let mut at = sector;
        for part in data.chunks(CHUNK) {
            self.submit(WRITE, at, Some(Part::read(part.as_ptr(), part.len())))?;
            at += (part.len() / SECTOR) as u64;
        }
        Ok(())
    }

    /// Makes everything written so far durable.
    pub fn flush(&mut self) -> Result<(), BlockError> {
        if self.features & FEATURE_FLUSH == 0 {
            return Ok(()); // without the feature each write is durable by itself (5.2.6.2)
        }
        self.submit(FLUSH, 0, None)
    }

    /// Tells the disk that the sectors' contents are not needed any more, where it listens.
    pub fn discard(&mut self, mut sector: u64, mut count: u64) -> Result<(), BlockError> {
        if self.discard_max == 0 {
            return Ok(());
        }
        while count > 0 {
            let some = count.min(u64::from(self.discard_max));
            self.request.discard_sector = sector;
            self.request.discard_count = some as u32;
            let request: *const Request = &*self.request;
            // SAFETY: the address of the segment's first field, 16 bytes long with the next two.
            let segment = unsafe { &raw const (*request).discard_sector };
            self.submit(DISCARD, 0, Some(Part::read(segment.cast(), 16)))?;
            sector += some;
            count -= some;
        }
        Ok(())
    }
}
