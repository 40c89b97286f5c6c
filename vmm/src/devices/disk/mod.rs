//! Disks: a read-only base image and a copy-on-write layer over it.
//!
//! - `map.rs`: what each 4 KiB block is: the base's, the layer's, or zero
//! - `layer.rs`: the layer file, its format and its order of writes
//! - `pending.rs`: blocks that have yet to arrive, for a VM that starts before its disk is complete
//! - `qcow2.rs`: images of that format as input
//! - `cow.rs`: both together: reads, writes, discards, and the changes against the base
//! - `image.rs`: all of a disk as one flat file
//! - `medium.rs`: the size of what is under it, file or block device
//! - `faults.rs`: what the host could not do for the guest
//!
//! A [`Disk`] is a handle that several threads may hold. The control thread reads and writes for
//! the guest; worker threads bring in pending blocks. No lock is held while guest memory is
//! touched: a page of it may have to come through the very worker that waits for the lock.

mod cow;
mod faults;
mod image;
mod layer;
mod map;
mod medium;
mod pending;
pub mod qcow2;

#[cfg(test)]
mod tests;

pub use self::cow::{Disk, DiskError};
pub use self::faults::{DiskFaults, FaultKind};
pub use self::layer::{BaseMark, LAYER_BYTES_MAX, Layer, LayerError};
pub use self::map::{BlockKind, BlockRun};
pub use self::medium::Medium;
pub use self::pending::{Demand, PendingBlocks};

/// Bytes in a block.
pub const BLOCK: usize = 4096;
/// Bytes in a block, as a file offset counts them.
const BLOCK_U64: u64 = 4096;
/// Bytes in a sector, the unit of the guest's requests.
pub const SECTOR: u64 = 512;

/// A block of a disk: its byte offset divided by [`BLOCK`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNumber(pub u64);
