//! Blocks that have yet to arrive: a VM may run while they do.
//!
//! A request that needs one is parked by the block device, which says so through `demand`; whoever
//! fetches blocks brings that one forward. When the last block a parked request waits for has been
//! applied, the disk's `arrived` eventfd is raised and the queue goes on. A block the guest
//! overwrites or discards whole need not arrive any more.

use std::collections::HashSet;

use super::BlockNumber;
use super::map::BlockRun;

/// Blocks a parked request waits for at a time; the others of a longer one follow when these are
/// there.
pub(super) const AWAITED_MAX: usize = 256;

/// Told, from the control thread, that the guest waits for a block. It must not block, and may be
/// told of the same block again.
pub type Demand = Box<dyn Fn(BlockNumber) + Send>;

/// The set of blocks that have yet to arrive.
pub struct PendingBlocks {
    bits: Vec<u64>,
    remaining: u64,
    demand: Option<Demand>,
    awaited: HashSet<u64>,
}

impl PendingBlocks {
    /// The blocks of `runs` (first, count) are pending, on a disk of `blocks` blocks. Those beyond
    /// the end are left out.
    pub fn new(blocks: u64, runs: impl IntoIterator<Item = (u64, u64)>, demand: Demand) -> Self {
        let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(0);
        let mut pending = Self {
            bits: vec![0; words],
            remaining: 0,
            demand: Some(demand),
            awaited: HashSet::new(),
        };
        for (first, count) in runs {
            for block in first..first.saturating_add(count).min(blocks) {
                pending.insert(block);
            }
        }
        pending
    }

    pub(super) fn none() -> Self {
        Self {
            bits: Vec::new(),
            remaining: 0,
            demand: None,
            awaited: HashSet::new(),
        }
    }

    fn insert(&mut self, block: u64) {
        if let Some(word) = word(block).and_then(|at| self.bits.get_mut(at)) {
            self.remaining += u64::from(*word >> (block % 64) & 1 == 0);
            *word |= 1 << (block % 64);
        }
    }

    pub(super) fn remaining(&self) -> u64 {
        self.remaining
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        self.remaining != 0
            && word(block)
                .and_then(|at| self.bits.get(at))
                .is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// The block has arrived, or is not needed any more. Whether that ends a parked request's wait.
    pub(super) fn remove(&mut self, block: u64) -> bool {
        if !self.contains(block) {
            return false;
        }
        if let Some(word) = word(block).and_then(|at| self.bits.get_mut(at)) {
            *word &= !(1 << (block % 64));
        }
        self.remaining -= 1;
        self.awaited.remove(&block) && self.awaited.is_empty()
    }

    /// As [`PendingBlocks::remove`], for a range; quick when nothing is pending.
    pub(super) fn remove_range(&mut self, first: u64, count: u64) -> bool {
        let mut block = first;
        let end = first.saturating_add(count);
        let mut woken = false;
        while self.remaining != 0 && block < end {
            let Some(word) = word(block).and_then(|at| self.bits.get(at)) else {
                break;
            };
            if *word == 0 {
                block = (block / 64 + 1) * 64;
                continue;
            }
            woken |= self.remove(block);
            block += 1;
        }
        woken
    }

    /// The pending blocks among `count` from `first`, at most [`AWAITED_MAX`] with those in `found`.
    pub(super) fn find(&self, first: u64, count: u64, found: &mut Vec<BlockNumber>) {
        if self.remaining == 0 {
            return;
        }
        for block in first..first.saturating_add(count) {
            if found.len() >= AWAITED_MAX {
                return;
            }
            if self.contains(block) {
                found.push(BlockNumber(block));
            }
        }
    }

    /// A parked request waits for these.
    pub(super) fn wait_for(&mut self, blocks: &[BlockNumber]) {
        self.awaited.clear();
        self.awaited.extend(blocks.iter().map(|block| block.0));
    }

    pub(super) fn take_demand(&mut self) -> Option<Demand> {
        self.demand.take()
    }

    pub(super) fn put_demand(&mut self, demand: Demand) {
        self.demand.get_or_insert(demand);
    }
}

fn word(block: u64) -> Option<usize> {
    usize::try_from(block / 64).ok()
}

/// Runs as the constructor takes them.
impl From<BlockRun> for (u64, u64) {
    fn from(run: BlockRun) -> Self {
        (run.first, run.count)
    }
}
