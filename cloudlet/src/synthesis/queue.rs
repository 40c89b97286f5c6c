//! Segments on their way from the link to the workers that decode and apply them. What was
//! demanded goes to the front; the stream waits while the queue is full, a demand never does.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use cloudlet_overlay::SegmentId;

/// Stored bytes that the stream may have queued: eight of the largest segments.
const QUEUED_LEN_MAX: usize = 8 << 20;
/// Buffers kept for reuse.
const SPARE_MAX: usize = 10;

/// A segment as it is stored, still to be verified.
#[derive(Debug)]
pub(super) struct Arrived {
    /// Which.
    pub(super) id: SegmentId,
    /// Its stored bytes.
    pub(super) stored: Vec<u8>,
}

#[derive(Default)]
struct State {
    queued: VecDeque<Arrived>,
    queued_len: usize,
    demands: VecDeque<SegmentId>,
    spare: Vec<Vec<u8>>,
    closed: bool,
}

/// The queue between link and workers, and the list of demands the other way.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change below leaves the state whole, whoever panics in between.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer to receive a segment in.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.lock().spare.pop().unwrap_or_default()
    }

    /// Gives a buffer back.
    pub(super) fn recycle(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut state = self.lock();
        if state.spare.len() < SPARE_MAX {
            state.spare.push(buffer);
        }
    }

    /// Queues what the stream brought, when there is room. `false` once closed.
    pub(super) fn push_streamed(&self, arrived: Arrived) -> bool {
        let mut state = self.lock();
        while !state.closed
            && state.queued_len > 0
            && state.queued_len + arrived.stored.len() > QUEUED_LEN_MAX
        {
            state = self.wait(state);
        }
        if state.closed {
            return false;
        }
        state.queued_len += arrived.stored.len();
        state.queued.push_back(arrived);
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Queues what was demanded, before everything else.
    pub(super) fn push_demanded(&self, arrived: Arrived) {
        let mut state = self.lock();
        state.queued_len += arrived.stored.len();
        state.queued.push_front(arrived);
        drop(state);
        self.changed.notify_all();
    }

    /// The next segment to decode; none once closed and empty.
    pub(super) fn pop(&self) -> Option<Arrived> {
        let mut state = self.lock();
        loop {
            if let Some(arrived) = state.queued.pop_front() {
                state.queued_len -= arrived.stored.len();
                drop(state);
                self.changed.notify_all();
                return Some(arrived);
            }
            if state.closed {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// Asks for `id`, which the caller has claimed, before everything else. Never waits.
    pub(super) fn demand(&self, id: SegmentId) {
        self.lock().demands.push_back(id);
        self.changed.notify_all();
    }

    /// The next demand; none once closed.
    pub(super) fn next_demand(&self) -> Option<SegmentId> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(id) = state.demands.pop_front() {
                return Some(id);
            }
            state = self.wait(state);
        }
    }

    /// Nothing more comes: whoever waits goes home. What is queued is still handed out.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn arrived(id: u32, length: usize) -> Arrived {
        Arrived {
            id: SegmentId(id),
            stored: vec![0; length],
        }
    }

    #[test]
    fn demands_overtake_and_the_stream_waits_for_room() {
        let queue = Arc::new(Queue::default());
        assert!(queue.push_streamed(arrived(0, QUEUED_LEN_MAX)));
        let pusher = Arc::clone(&queue);
        let stream = std::thread::spawn(move || pusher.push_streamed(arrived(1, 1)));
        queue.push_demanded(arrived(2, 5));
        let order: Vec<u32> = (0..3)
            .filter_map(|_| queue.pop())
            .map(|next| next.id.0)
            .collect();
        assert_eq!(order, [2, 0, 1]);
        assert!(stream.join().unwrap());
    }

    #[test]
    fn closing_frees_everybody() {
        let queue = Arc::new(Queue::default());
        queue.push_streamed(arrived(0, QUEUED_LEN_MAX));
        let waiters: Vec<_> = (0..2)
            .map(|number| {
                let queue = Arc::clone(&queue);
                std::thread::spawn(move || match number {
                    0 => queue.push_streamed(arrived(1, 1)),
                    _ => queue.next_demand().is_some(),
                })
            })
            .collect();
        queue.close();
        assert!(waiters.into_iter().all(|waiter| !waiter.join().unwrap()));
        assert!(queue.pop().is_some());
        assert!(queue.pop().is_none());
    }
}
