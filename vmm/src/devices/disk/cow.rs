//! A base image and its layer as one disk.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::faults::{self, DiskFaults, FaultKind};
use super::layer::Layer;
use super::map::{BlockKind, BlockRun};
use super::medium::{Medium, SECTOR_BYTES};
use super::pending::PendingBlocks;
use super::{BLOCK, BLOCK_U64, BlockNumber, SECTOR};
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::buffers::Buffers;
use crate::sparse;

/// Why a disk could not be put together, or an access failed.
#[derive(Debug, Error)]
pub enum DiskError {
    /// A base image no guest can use.
    #[error("the image has {0} bytes: it must be a multiple of 512 and not 0")]
    Size(u64),
    /// A base that is larger than the disk.
    #[error("the base image has {base} bytes, more than the layer's disk of {disk}")]
    BaseTooLarge {
        /// Bytes of the base image.
        base: u64,
        /// Bytes of the disk.
        disk: u64,
    },
    /// A write to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// An access beyond the disk's end.
    #[error("{len:#x} bytes at {at:#x} are beyond the disk's end")]
    OutOfRange {
        /// Byte offset.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The system refused.
    #[error("the disk could not be {0}")]
    Io(&'static str, #[source] io::Error),
}

/// A disk. Clones are handles to the same one.
///
/// One thread at a time may call the guest's operations (`read`, `write`, `discard`,
/// `write_zeroes`): the control thread, through its block device. Everything else may be called
/// from anywhere at any time.
#[derive(Clone)]
pub struct Disk {
    shared: Arc<Shared>,
}

/// What all handles share.
pub(super) struct Shared {
    base: Option<File>,
    base_bytes: u64,
    sector_bytes: u32,
    bytes: u64,
    layer: Option<Layer>,
    faults: faults::Counted,
    pending: Mutex<PendingBlocks>,
    /// Raised when what a parked request waits for has arrived.
    arrived: EventFd,
}

/// Bytes of a request that lie in one block, or in whole blocks.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// Less than a block: its number, the offset in it, the length.
    Piece(u64, usize, usize),
    /// Whole blocks: the first, how many.
    Whole(u64, u64),
}

impl Disk {
    /// A disk that cannot be written: the image alone.
    ///
    /// # Errors
    /// When its size is no disk's or the system refuses.
    pub fn read_only(base: File) -> Result<Self, DiskError> {
        let medium = examine(&base)?;
        if medium.bytes == 0 || !medium.bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size(medium.bytes));
        }
        Self::with(Some((base, medium)), medium.bytes, None)
    }

    /// A disk of the layer's size: `base` (zeros where it ends, or where there is none) under
    /// `layer`.
    ///
    /// # Errors
    /// When the base is larger than the disk or the system refuses.
    pub fn new(base: Option<File>, layer: Layer) -> Result<Self, DiskError> {
        let examined = |base| examine(&base).map(|medium| (base, medium));
        let base = base.map(examined).transpose()?;
        let base_bytes = base.as_ref().map_or(0, |(_, medium)| medium.bytes);
        let bytes = layer.virtual_bytes();
        if base_bytes > bytes {
            return Err(DiskError::BaseTooLarge {
                base: base_bytes,
                disk: bytes,
            });
        }
        Self::with(base, bytes, Some(layer))
    }

    fn with(
        base: Option<(File, Medium)>,
        bytes: u64,
        layer: Option<Layer>,
    ) -> Result<Self, DiskError> {
        let arrived = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|source| DiskError::Io("given an eventfd", source))?;
        let (base, medium) = base.unzip();
        let shared = Shared {
            base,
            base_bytes: medium.map_or(0, |medium| medium.bytes),
            sector_bytes: medium.map_or(SECTOR_BYTES, |medium| medium.sector_bytes),
            bytes,
            layer,
            faults: faults::Counted::default(),
            pending: Mutex::new(PendingBlocks::none()),
            arrived,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Size in bytes, a multiple of 512.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes
    }

    /// Bytes of the sectors that the guest is to count in, if it has not seen others: 512 to 4096.
    pub fn sector_bytes(&self) -> u32 {
        self.shared.sector_bytes
    }

    /// What the host could not do for the guest so far.
    pub fn faults(&self) -> DiskFaults {
        self.shared.faults.get()
    }

    /// How many there were, for whoever asks often.
    pub fn fault_count(&self) -> u64 {
        self.shared.faults.total()
    }

    /// Counts a request of the guest that failed, if the host is to blame.
    pub(crate) fn count_fault(&self, kind: FaultKind, error: &DiskError) {
        self.shared.faults.count(kind, error);
    }

    /// Size in blocks; the last one may be cut short by the disk's end.
    pub fn blocks(&self) -> u64 {
        self.shared.bytes.div_ceil(BLOCK_U64)
    }

    /// Whether it cannot be written.
    pub fn is_read_only(&self) -> bool {
        self.shared.layer.is_none()
    }

    /// What `block` is.
    pub fn kind(&self, block: BlockNumber) -> BlockKind {
        self.shared.run(block.0, 1).kind
    }

    /// Reads neighbouring blocks, as many as `out` has room for, with a call for each stretch of one
    /// kind; beyond the disk's end they are zero.
    ///
    /// # Errors
    /// The system's.
    pub fn read_blocks(&self, first: BlockNumber, out: &mut [u8]) -> Result<(), DiskError> {
        self.shared
            .read_blocks(first.0, out)
            .map_err(|source| DiskError::Io("read", source))
    }

    /// All that differs from the base, in order: blocks of kind present and zero.
    pub fn changed_runs(&self) -> Vec<BlockRun> {
        self.shared
            .layer
            .as_ref()
            .map_or_else(Vec::new, |layer| layer.map().changed())
    }

    /// What the disk's contents are read through.
    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Makes everything written so far survive a crash of the host.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&self) -> Result<(), DiskError> {
        match &self.shared.layer {
            Some(layer) => layer
                .flush()
                .map_err(|source| DiskError::Io("flushed", source)),
            None => Ok(()),
        }
    }

    /// The VM's end: flushes, and leaves a layer with a name to the next VM before this process is
    /// gone.
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn finish(&self) -> Result<(), DiskError> {
        let flushed = self.flush();
        if let Some(layer) = &self.shared.layer {
            layer.unlock();
        }
        flushed
    }

    /// Writes the layer as it is now into `out`, an empty file, which [`Layer::open`] then takes.
    /// The guest is paused. `out` is not synced.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`] when there is no layer; the system's.
    pub fn copy_layer(&self, out: &File) -> Result<(), DiskError> {
        let layer = self.shared.layer.as_ref().ok_or(DiskError::ReadOnly)?;
        layer
            .copy_to(out)
            .map_err(|source| DiskError::Io("copied", source))
    }

    // ---- pending blocks ----

    /// Says which blocks have yet to arrive. Called before the guest runs.
    pub fn set_pending(&self, pending: PendingBlocks) {
        *self.shared.pending() = pending;
    }

    /// How many blocks have yet to arrive.
    pub fn pending_blocks(&self) -> u64 {
        self.shared.pending().remaining()
    }

    /// Brings in a pending block: its contents, or None for zeros. False if it was not pending
    /// (any more): it is left as it is then, since the guest has written to it.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`]; the system's, and the block stays pending.
    pub fn apply_block(
        &self,
        block: BlockNumber,
        contents: Option<&[u8; BLOCK]>,
    ) -> Result<bool, DiskError> {
        let applied = match contents {
            Some(contents) => self.apply_run(block, contents)?,
            None => self.apply_zero_run(block, 1)?,
        };
        Ok(applied == 1)
    }

    /// Brings in neighbouring pending blocks; `contents` is a whole number of blocks. Returns how
    /// many of them were pending.
    ///
    /// # Errors
    /// As [`Disk::apply_block`].
    pub fn apply_run(&self, first: BlockNumber, contents: &[u8]) -> Result<u64, DiskError> {
        let layer = self.shared.layer.as_ref().ok_or(DiskError::ReadOnly)?;
        let io = |source| DiskError::Io("written", source);
        let (chunks, rest) = contents.as_chunks::<BLOCK>();
        if !rest.is_empty() {
            return Err(io(io::ErrorKind::InvalidInput.into()));
        }
        // Held across the write: no write of the guest to a pending block comes in between.
        let mut pending = self.shared.pending();
        let mut applied = 0;
        let mut woken = false;
        let mut at = 0;
        while at < chunks.len() {
            let number = |at: usize| first.0 + u64::try_from(at).unwrap_or(u64::MAX - first.0);
            let run = (at..chunks.len())
                .take_while(|at| pending.contains(number(*at)))
                .count();
            if run == 0 {
                at += 1;
                continue;
            }
            let bytes = contents.get(at * BLOCK..(at + run) * BLOCK).unwrap_or(&[]);
            let count = number(at + run) - number(at);
            layer
                .file
                .write_all_at(bytes, layer.offset(number(at) * BLOCK_U64))
                .map_err(io)?;
            layer.map().set(number(at), count, BlockKind::Present);
            woken |= pending.remove_range(number(at), count);
            applied += count;
            at += run;
        }
        self.shared.wake(woken);
        Ok(applied)
    }

    /// As [`Disk::apply_run`], for `count` blocks of zeros.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`].
    pub fn apply_zero_run(&self, first: BlockNumber, count: u64) -> Result<u64, DiskError> {
        let layer = self.shared.layer.as_ref().ok_or(DiskError::ReadOnly)?;
        let mut pending = self.shared.pending();
        let mut applied = 0;
        let mut woken = false;
        for block in first.0..first.0.saturating_add(count).min(self.blocks()) {
            if pending.contains(block) {
                layer.map().set(block, 1, BlockKind::Zero);
                woken |= pending.remove(block);
                applied += 1;
            }
        }
        self.shared.wake(woken);
        Ok(applied)
    }

    /// The descriptor that becomes readable when what a parked request waits for is there.
    pub(crate) fn arrived_fd(&self) -> RawFd {
        self.shared.arrived.as_raw_fd()
    }

    /// Clears [`Disk::arrived_fd`].
    pub(crate) fn take_arrived(&self) {
        // Nobody else reads it; a failure means it was not raised.
        let _ = self.shared.arrived.read();
    }

    /// Whether an access can go ahead, or has to wait for pending blocks. It demands those, and
    /// `wait` makes their arrival raise [`Disk::arrived_fd`].
    pub(crate) fn is_ready(&self, at: u64, len: u64, overwrites: bool, wait: bool) -> bool {
        let mut pending = self.shared.pending();
        if pending.remaining() == 0 || len == 0 {
            return true;
        }
        let mut missing = Vec::new();
        for part in parts(at, len) {
            match part {
                Part::Piece(block, ..) => pending.find(block, 1, &mut missing),
                // Nothing of what it overwrites is needed.
                Part::Whole(..) if overwrites => {}
                Part::Whole(first, count) => pending.find(first, count, &mut missing),
            }
        }
        if missing.is_empty() {
            return true;
        }
        if wait {
            pending.wait_for(&missing);
        }
        let demand = pending.take_demand();
        drop(pending);
        // Without the lock: whoever is told may have to take another lock, under which it applies.
        if let Some(demand) = demand {
            missing.iter().for_each(|block| demand(*block));
            self.shared.pending().put_demand(demand);
        }
        false
    }

    // ---- the guest's operations ----

    /// Refuses what is not on the disk.
    pub(crate) fn check(&self, at: u64, len: u64) -> Result<(), DiskError> {
        match at.checked_add(len) {
            Some(end) if end <= self.bytes() => Ok(()),
            _ => Err(DiskError::OutOfRange { at, len }),
        }
    }

    /// Reads `len` bytes at `at` into the guest's buffers, from their byte 0 on.
    pub(crate) fn read(
        &self,
        guest: &GuestRam,
        buffers: &Buffers,
        at: u64,
        len: usize,
    ) -> Result<(), DiskError> {
        self.check(at, u64::try_from(len).unwrap_or(u64::MAX))?;
        let mut done = 0;
        while done < len {
            let now = at + u64::try_from(done).unwrap_or(0);
            let left = u64::try_from(len - done).unwrap_or(0);
            let blocks = (now + left).div_ceil(BLOCK_U64) - now / BLOCK_U64;
            let run = self.shared.run(now / BLOCK_U64, blocks);
            let end = ((run.first + run.count) * BLOCK_U64).min(now + left);
            let part = usize::try_from(end - now).unwrap_or(0);
            self.shared
                .read_run(guest, buffers, run.kind, now, done, part)
                .map_err(|source| DiskError::Io("read", source))?;
            done += part;
        }
        Ok(())
    }

    /// Writes `len` bytes at `at`, from byte `offset` of the guest's buffers on.
    pub(crate) fn write(
        &self,
        guest: &GuestRam,
        buffers: &Buffers,
        at: u64,
        offset: usize,
        len: usize,
    ) -> Result<(), DiskError> {
        let layer = self.shared.layer.as_ref().ok_or(DiskError::ReadOnly)?;
        let bytes = u64::try_from(len).unwrap_or(u64::MAX);
        self.check(at, bytes)?;
        let mut offset = offset;
        for part in parts(at, bytes) {
            let written = match part {
                Part::Piece(block, start, len) => {
                    self.shared.write_piece(layer, block, start, len, |bytes| {
                        buffers.read_at(guest, offset, bytes);
                    })
                }
                Part::Whole(first, count) => {
                    let len = usize::try_from(count * BLOCK_U64).unwrap_or(usize::MAX);
                    // They need not arrive any more, and must not from here on.
                    self.shared.cancel(first, count);
                    let at = layer.offset(first * BLOCK_U64);
                    let result = buffers.write_file(guest, layer.file.as_fd(), at, offset, len);
                    if result.is_ok() {
                        layer.map().set(first, count, BlockKind::Present);
                    }
                    result
                }
            };
            written.map_err(|source| DiskError::Io("written", source))?;
            offset += part.len();
        }
        Ok(())
    }

    /// The guest does not need these bytes any more: whole blocks become zeros and their room is
    /// given back, the rest keeps its contents.
    pub(crate) fn discard(&self, at: u64, len: u64) -> Result<(), DiskError> {
        let layer = self.shared.layer.as_ref().ok_or(DiskError::ReadOnly)?;
        self.check(at, len)?;
        for part in parts(at, len) {
            if let Part::Whole(first, count) = part {
                self.shared.zero_blocks(layer, first, count);
            }
        }
        Ok(())
    }

    /// Sets these bytes to zero, without room where they are whole blocks.
    pub(crate) fn write_zeroes(&self, at: u64, len: u64) -> Result<(), DiskError> {
        let layer = self.shared.layer.as_ref().ok_or(DiskError::ReadOnly)?;
        self.check(at, len)?;
        for part in parts(at, len) {
            match part {
                Part::Whole(first, count) => self.shared.zero_blocks(layer, first, count),
                Part::Piece(block, start, len) => self
                    .shared
                    .write_piece(layer, block, start, len, |bytes| bytes.fill(0))
                    .map_err(|source| DiskError::Io("written", source))?,
            }
        }
        Ok(())
    }
}

fn examine(base: &File) -> Result<Medium, DiskError> {
    Medium::of(base).map_err(|source| DiskError::Io("examined", source))
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, PendingBlocks> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, woken: bool) {
        if woken {
            // Our own eventfd: it can only be raised already.
            let _ = self.arrived.write(1);
        }
    }

    fn cancel(&self, first: u64, count: u64) {
        let woken = self.pending().remove_range(first, count);
        self.wake(woken);
    }

    fn run(&self, first: u64, count_max: u64) -> BlockRun {
        match &self.layer {
            Some(layer) => layer.map().run(first, count_max),
            None => BlockRun {
                first,
                count: count_max,
                kind: BlockKind::Base,
            },
        }
    }

    fn read_blocks(&self, first: u64, out: &mut [u8]) -> io::Result<()> {
        out.fill(0);
        let mut block = first;
        let mut rest = out;
        while !rest.is_empty() {
            let at = block
                .checked_mul(BLOCK_U64)
                .ok_or(io::ErrorKind::InvalidInput)?;
            let there = self.bytes.saturating_sub(at);
            if there == 0 {
                break;
            }
            let left = u64::try_from(rest.len().div_ceil(BLOCK)).unwrap_or(u64::MAX);
            let run = self.run(block, left);
            let len = usize::try_from(there.min(run.count.saturating_mul(BLOCK_U64)))
                .unwrap_or(usize::MAX)
                .min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            self.read_kind(run.kind, at, part)?;
            rest = after;
            block += run.count;
        }
        Ok(())
    }

    /// Reads what is at `at`, all of `kind` and within the disk, into `out`, which is zero.
    pub(super) fn read_kind(&self, kind: BlockKind, at: u64, out: &mut [u8]) -> io::Result<()> {
        match (kind, &self.layer, &self.base) {
            (BlockKind::Present, Some(layer), _) => layer.file.read_exact_at(out, layer.offset(at)),
            (BlockKind::Base, _, Some(base)) => {
                let there = self.base_bytes.saturating_sub(at);
                let there = usize::try_from(there).unwrap_or(usize::MAX).min(out.len());
                base.read_exact_at(out.get_mut(..there).unwrap_or_default(), at)
            }
            _ => Ok(()),
        }
    }

    /// Calls `each` with all stretches that may hold anything but zeros, in order: their kind and
    /// their bytes. Ends with the first error.
    pub(super) fn for_data(
        &self,
        mut each: impl FnMut(BlockKind, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let blocks = self.bytes.div_ceil(BLOCK_U64);
        let mut first = 0;
        while first < blocks {
            let run = self.run(first, blocks - first);
            let end = ((first + run.count) * BLOCK_U64).min(self.bytes);
            let range = first * BLOCK_U64..end;
            match (run.kind, &self.base) {
                (BlockKind::Present, _) => each(run.kind, range)?,
                (BlockKind::Base, Some(base)) => {
                    let range = range.start..range.end.min(self.base_bytes);
                    sparse::data(base, range).try_for_each(|extent| each(run.kind, extent?))?;
                }
                _ => {}
            }
            first += run.count;
        }
        Ok(())
    }

    /// Reads `len` bytes at `at`, which are all of `kind`, to `offset` in the guest's buffers.
    fn read_run(
        &self,
        guest: &GuestRam,
        buffers: &Buffers,
        kind: BlockKind,
        at: u64,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        let mut zero_from = 0;
        match (kind, &self.layer, &self.base) {
            (BlockKind::Present, Some(layer), _) => {
                let at = layer.offset(at);
                return buffers.read_file(guest, layer.file.as_fd(), at, offset, len);
            }
            (BlockKind::Base, _, Some(base)) => {
                let there = usize::try_from(self.base_bytes.saturating_sub(at)).unwrap_or(len);
                zero_from = there.min(len);
                buffers.read_file(guest, base.as_fd(), at, offset, zero_from)?;
            }
            _ => {}
        }
        buffers.zero_at(guest, offset + zero_from, len - zero_from);
        Ok(())
    }

    /// Writes less than a block. A block that is not in the layer yet gets there whole.
    fn write_piece(
        &self,
        layer: &Layer,
        block: u64,
        start: usize,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let mut contents = [0; BLOCK];
        self.read_blocks(block, &mut contents)?;
        if let Some(piece) = contents.get_mut(start..start + len) {
            fill(piece);
        }
        // Whole, even where only a piece changed: a block is one page of the page cache.
        layer
            .file
            .write_all_at(&contents, layer.offset(block * BLOCK_U64))?;
        layer.map().set(block, 1, BlockKind::Present);
        Ok(())
    }

    /// Makes whole blocks zero and gives their room back.
    fn zero_blocks(&self, layer: &Layer, first: u64, count: u64) {
        self.cancel(first, count);
        let mut block = first;
        while block < first + count {
            let run = layer.map().run(block, first + count - block);
            layer.map().set(run.first, run.count, BlockKind::Zero);
            if run.kind == BlockKind::Present {
                layer.punch(run.first * BLOCK_U64, run.count * BLOCK_U64);
            }
            block += run.count;
        }
    }
}

impl Part {
    fn len(self) -> usize {
        match self {
            Self::Piece(_, _, len) => len,
            Self::Whole(_, count) => usize::try_from(count * BLOCK_U64).unwrap_or(usize::MAX),
        }
    }
}

/// Splits a range of bytes at block borders: a piece, whole blocks, a piece; each may be missing.
fn parts(at: u64, len: u64) -> impl Iterator<Item = Part> {
    let end = at + len;
    let piece = |from: u64, to: u64| {
        let start = usize::try_from(from % BLOCK_U64).unwrap_or(0);
        let len = usize::try_from(to - from).unwrap_or(0);
        (from < to).then_some(Part::Piece(from / BLOCK_U64, start, len))
    };
    let first = at.div_ceil(BLOCK_U64) * BLOCK_U64;
    let last = end / BLOCK_U64 * BLOCK_U64;
    let all = if first > last {
        // Within one block.
        [piece(at, end), None, None]
    } else {
        let count = (last - first) / BLOCK_U64;
        let whole = (count > 0).then_some(Part::Whole(first / BLOCK_U64, count));
        [piece(at, first), whole, piece(last, end)]
    };
    all.into_iter().flatten()
}
