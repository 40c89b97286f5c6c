//! What a disk could not do for its guest. The guest is told of an I/O error and no more; whoever runs
//! the VM wants to know that the host's disk is full.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::DiskError;

/// What could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// Reading.
    Read,
    /// Writing, which includes setting to zero.
    Write,
    /// Making what was written durable.
    Flush,
}

/// How often each kind of request has failed because of the host, and why it last did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskFaults {
    /// Reads that failed.
    pub reads: u64,
    /// Writes that failed.
    pub writes: u64,
    /// Flushes that failed.
    pub flushes: u64,
    /// What the system said the last time, in words.
    pub last: Option<String>,
}

/// The faults of a disk as they are counted.
#[derive(Debug, Default)]
pub(super) struct Counted {
    total: AtomicU64,
    faults: Mutex<DiskFaults>,
}

impl Counted {
    fn lock(&self) -> MutexGuard<'_, DiskFaults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts `error` if it is the host's. What a guest must not do is its own affair.
    pub(super) fn count(&self, kind: FaultKind, error: &DiskError) {
        let DiskError::Io(_, source) = error else {
            return;
        };
        let mut faults = self.lock();
        let count = match kind {
            FaultKind::Read => &mut faults.reads,
            FaultKind::Write => &mut faults.writes,
            FaultKind::Flush => &mut faults.flushes,
        };
        *count = count.saturating_add(1);
        faults.last = Some(format!("{error}: {source}"));
        self.total.fetch_add(1, Ordering::Relaxed);
    }

    /// All of them, which costs little to ask for.
    pub(super) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    pub(super) fn get(&self) -> DiskFaults {
        self.lock().clone()
    }
}
