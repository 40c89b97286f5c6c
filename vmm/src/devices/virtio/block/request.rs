//! What a chain asks of a disk.
//!
//! The chain is a header of 16 bytes to read, data either way, and a status byte at the very end of
//! what may be written. A chain without header or status is not a request at all and stops the
//! device; one that asks for something that cannot be is answered with an error status.

use crate::devices::disk::{Disk, SECTOR};
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::queue::{Chain, QueueError};

/// Bytes in the header, section 5.2.6.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
const RANGE_BYTES: usize = 16;
/// Ranges in one discard or write-zeroes request at most.
pub(super) const RANGES_MAX: usize = 32;
/// Sectors in one such range at most: 2 GiB.
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 22;
/// Data of one read or write at most. Overlapping buffers could make it 4 GiB.
pub(super) const DATA_BYTES_MAX: usize = 64 << 20;

/// Request types, section 5.2.6.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// The flag of a write-zeroes range that allows unmapping.
const FLAG_UNMAP: u32 = 1;

/// Status of a request, section 5.2.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// A range of a disk, in bytes; it lies on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// Ranges of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranges {
    ranges: [Range; RANGES_MAX],
    count: usize,
}

impl Ranges {
    pub(super) fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        self.ranges.iter().take(self.count).copied()
    }
}

/// A request that can be done, or the status that says why not.
#[derive(Debug)]
pub(super) enum Request {
    Read(Range),
    Write(Range),
    Flush,
    Id,
    Discard(Ranges),
    WriteZeroes(Ranges),
    Refused(Status),
}

impl Request {
    /// Reads the request in `chain`.
    ///
    /// # Errors
    /// When the chain has no header or no status byte.
    pub(super) fn parse(guest: &GuestRam, chain: &Chain, disk: &Disk) -> Result<Self, QueueError> {
        let mut header = [0; HEADER_BYTES];
        if chain.readable.read_at(guest, 0, &mut header) < HEADER_BYTES {
            return Err(QueueError::Shape("a request header"));
        }
        if chain.writable.is_empty() {
            return Err(QueueError::Shape("room for a status"));
        }
        // type 4 | reserved 4 | sector 8
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([a, b, c, d]);
        let sector = u64::from_le_bytes(sector);
        let from_device = chain.writable.len() - 1;
        let to_device = chain.readable.len() - HEADER_BYTES;
        let writable = !disk.is_read_only();
        Ok(match kind {
            kind::IN => data(disk, sector, from_device).map_or_else(Self::Refused, Self::Read),
            kind::OUT if !writable => Self::Refused(Status::IoError),
            kind::OUT => data(disk, sector, to_device).map_or_else(Self::Refused, Self::Write),
            kind::FLUSH => Self::Flush,
            kind::GET_ID => Self::Id,
            kind::DISCARD | kind::WRITE_ZEROES if !writable => Self::Refused(Status::IoError),
            kind::DISCARD => {
                ranges(guest, chain, disk, 0).map_or_else(Self::Refused, Self::Discard)
            }
            kind::WRITE_ZEROES => {
                ranges(guest, chain, disk, FLAG_UNMAP).map_or_else(Self::Refused, Self::WriteZeroes)
            }
            _ => Self::Refused(Status::Unsupported),
        })
    }

    /// Bytes of the disk that it reads or writes through the guest's buffers.
    pub(super) fn data_len(&self) -> usize {
        match self {
            Self::Read(range) | Self::Write(range) => {
                usize::try_from(range.len).unwrap_or(usize::MAX)
            }
            _ => 0,
        }
    }

    /// Whether all blocks it needs are there; those that are not are demanded, and waited for if
    /// `wait`.
    pub(super) fn is_ready(&self, disk: &Disk, wait: bool) -> bool {
        match self {
            Self::Read(range) => disk.is_ready(range.at, range.len, false, wait),
            Self::Write(range) => disk.is_ready(range.at, range.len, true, wait),
            Self::WriteZeroes(ranges) => ranges
                .iter()
                .all(|range| disk.is_ready(range.at, range.len, true, wait)),
            // A discard leaves alone what is less than a block.
            Self::Discard(_) | Self::Flush | Self::Id | Self::Refused(_) => true,
        }
    }
}

/// The bytes of a read or write.
fn data(disk: &Disk, sector: u64, len: usize) -> Result<Range, Status> {
    let bytes = u64::try_from(len).unwrap_or(u64::MAX);
    if len == 0 || len > DATA_BYTES_MAX || !bytes.is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    on_disk(disk, sector, bytes)
}

/// A range that lies on the disk.
fn on_disk(disk: &Disk, sector: u64, len: u64) -> Result<Range, Status> {
    let at = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    disk.check(at, len).map_err(|_| Status::IoError)?;
    Ok(Range { at, len })
}

/// The ranges behind the header: sector 8 | sectors 4 | flags 4. All of them hold, or none is done.
fn ranges(
    guest: &GuestRam,
    chain: &Chain,
    disk: &Disk,
    flags_known: u32,
) -> Result<Ranges, Status> {
    let len = chain.readable.len() - HEADER_BYTES;
    let count = len / RANGE_BYTES;
    if count == 0 || count > RANGES_MAX || !len.is_multiple_of(RANGE_BYTES) {
        return Err(Status::IoError);
    }
    let mut all = Ranges {
        ranges: [Range::default(); RANGES_MAX],
        count,
    };
    for (index, slot) in all.ranges.iter_mut().take(count).enumerate() {
        let mut bytes = [0; RANGE_BYTES];
        chain
            .readable
            .read_at(guest, HEADER_BYTES + index * RANGE_BYTES, &mut bytes);
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if u32::from_le_bytes(flags) & !flags_known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors == 0 || sectors > RANGE_SECTORS_MAX {
            return Err(Status::IoError);
        }
        *slot = on_disk(disk, sector, u64::from(sectors) * SECTOR)?;
    }
    Ok(all)
}
