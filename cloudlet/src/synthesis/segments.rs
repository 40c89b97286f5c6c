//! Which segments of an overlay have been asked for, are here, are applied. Each is applied once,
//! by whoever claims it, however many ask.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use cloudlet_overlay::SegmentId;

const ABSENT: u8 = 0;
const CLAIMED: u8 = 1;
const APPLIED: u8 = 2;

/// The state of every segment.
#[derive(Debug)]
pub(super) struct SegmentTable {
    states: Vec<AtomicU8>,
    remaining: AtomicU32,
}

impl SegmentTable {
    /// `count` segments, none of them here.
    #[must_use]
    pub(super) fn new(count: u32) -> Self {
        let states = (0..count).map(|_| AtomicU8::new(ABSENT)).collect();
        Self {
            states,
            remaining: AtomicU32::new(count),
        }
    }

    fn state(&self, id: SegmentId) -> Option<&AtomicU8> {
        self.states.get(usize::try_from(id.0).ok()?)
    }

    /// Whether the caller is now the one that brings and applies `id`. The claim is never given
    /// back: a claimer that fails ends the whole transfer.
    pub(super) fn claim(&self, id: SegmentId) -> bool {
        // Relaxed: the claim orders nothing but itself.
        self.state(id).is_some_and(|state| {
            state
                .compare_exchange(ABSENT, CLAIMED, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// `id`, which the caller claimed, is applied; whether it was the last.
    pub(super) fn applied(&self, id: SegmentId) -> bool {
        let Some(state) = self.state(id) else {
            return false;
        };
        // Release/acquire on `remaining`: whoever sees the last one sees what all have placed.
        state.store(APPLIED, Ordering::Relaxed);
        self.remaining.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// How many segments are not applied yet.
    #[must_use]
    pub(super) fn remaining(&self) -> u32 {
        self.remaining.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_claimed_once_and_the_last_is_known() {
        let table = SegmentTable::new(2);
        assert!(table.claim(SegmentId(1)));
        assert!(!table.claim(SegmentId(1)));
        assert!(!table.claim(SegmentId(2)), "there is no such segment");
        assert!(!table.applied(SegmentId(1)));
        assert!(table.claim(SegmentId(0)));
        assert!(table.applied(SegmentId(0)));
        assert_eq!(table.remaining(), 0);
    }
}
