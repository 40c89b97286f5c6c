//! The link that the background stream and the demand fetches share: one rate, one queue.
//! A demand fetch has strict priority, and closing the link ends every wait and every read on it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Shutdown, TcpStream};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time that an idle link saves up, at most; with one quantum on top this bounds a burst to 20 ms.
const BURST: Duration = Duration::from_millis(15);
/// What one grant may take of the link, so that a demand fetch waits no longer than this.
const QUANTUM: Duration = Duration::from_millis(5);
/// Smallest grant worth a system call, in bytes.
const QUANTUM_BYTES_MIN: usize = 512;
/// Largest grant, and the only limit of one without a rate, in bytes.
const QUANTUM_BYTES_MAX: usize = 256 * 1024;

/// A rate in bytes a second, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(u64);

/// A rate that is no number from 0.001 to 1,000,000 Mbit/s.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a rate has to be a number from 0.001 to 1000000 (Mbit/s)")]
pub struct RateError;

impl Rate {
    /// From megabits (10^6 bits) a second.
    ///
    /// # Errors
    /// Outside 0.001 to 1,000,000, or no number.
    pub fn from_mbit(mbit: f64) -> Result<Rate, RateError> {
        if !(0.001..=1e6).contains(&mbit) {
            return Err(RateError);
        }
        // Between 125 and 1.25e11: the range above makes the conversion exact enough and safe.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Ok(Rate((mbit * 125_000.0) as u64))
    }

    /// Bytes a second.
    pub fn bytes_per_second(self) -> u64 {
        self.0
    }

    /// How long `bytes` occupy the link.
    fn cost(self, bytes: usize) -> Duration {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let (whole, rest) = (bytes / self.0, bytes % self.0);
        // rest < rate <= 1.25e11, times 1e9 needs 128 bits.
        let nanos = u128::from(rest) * 1_000_000_000 / u128::from(self.0);
        Duration::from_secs(whole) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
    }

    /// How many bytes go over the link in `time`, capped at `max`.
    pub(crate) fn bytes_in(self, time: Duration, max: usize) -> usize {
        let bytes = u128::from(self.0) * time.as_micros() / 1_000_000;
        usize::try_from(bytes).unwrap_or(usize::MAX).min(max)
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Rate, RateError> {
        text.parse()
            .map_err(|_| RateError)
            .and_then(Rate::from_mbit)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kilobits = self.0 / 125;
        write!(f, "{}.{:03} Mbit/s", kilobits / 1000, kilobits % 1000)
    }
}

/// A token bucket, kept as the instant from which the link is free again. Grants push it into
/// the future, idle time lets it fall behind by no more than [`BURST`].
#[derive(Debug)]
pub(crate) struct Bucket {
    rate: Option<Rate>,
    free_at: Instant,
}

impl Bucket {
    pub(crate) fn new(rate: Option<Rate>) -> Bucket {
        Bucket {
            rate,
            free_at: Instant::now(),
        }
    }

    /// The largest single grant, in bytes.
    pub(crate) fn quantum(&self) -> usize {
        match self.rate {
            Some(rate) => rate
                .bytes_in(QUANTUM, QUANTUM_BYTES_MAX)
                .max(QUANTUM_BYTES_MIN),
            None => QUANTUM_BYTES_MAX,
        }
    }

    /// How long to wait before the next grant; `None` if there can be one now.
    pub(crate) fn wait(&self, now: Instant) -> Option<Duration> {
        self.rate?;
        self.free_at
            .checked_duration_since(now)
            .filter(|wait| !wait.is_zero())
    }

    pub(crate) fn take(&mut self, bytes: usize, now: Instant) {
        if let Some(rate) = self.rate {
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            self.free_at = self.free_at.max(earliest) + rate.cost(bytes);
        }
    }

    /// Takes back a part of a grant that was not used.
    pub(crate) fn give_back(&mut self, bytes: usize) {
        if let Some(rate) = self.rate {
            self.free_at = self
                .free_at
                .checked_sub(rate.cost(bytes))
                .unwrap_or(self.free_at);
        }
    }
}

/// What bytes were fetched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The sequential stream in the background.
    Stream,
    /// A range that somebody is waiting for.
    Demand,
}

/// The link was closed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the transfer was cancelled")]
pub struct Closed;

/// See the module's description.
#[derive(Debug)]
pub struct Link {
    state: Mutex<State>,
    changed: Condvar,
    stream_bytes: AtomicU64,
    demand_bytes: AtomicU64,
}

#[derive(Debug)]
struct State {
    bucket: Bucket,
    demands: usize,
    closed: bool,
    sockets: BTreeMap<u64, Arc<TcpStream>>,
    next_socket: u64,
}

impl Link {
    /// A link of this rate; without one it only gives priority and counts.
    pub fn new(rate: Option<Rate>) -> Arc<Link> {
        Arc::new(Link {
            state: Mutex::new(State {
                bucket: Bucket::new(rate),
                demands: 0,
                closed: false,
                sockets: BTreeMap::new(),
                next_socket: 0,
            }),
            changed: Condvar::new(),
            stream_bytes: AtomicU64::new(0),
            demand_bytes: AtomicU64::new(0),
        })
    }

    /// The rate, if there is one.
    pub fn rate(&self) -> Option<Rate> {
        self.lock().bucket.rate
    }

    /// Ends the transfer: every wait and every read on this link returns [`Closed`] from now on.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for socket in state.sockets.values() {
            // A socket that is no longer connected has nothing to wake up.
            let _ = socket.shutdown(Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Whether [`Link::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Bytes received so far for this purpose, response heads included, TLS framing not.
    pub fn received(&self, kind: Kind) -> u64 {
        self.counter(kind).load(Ordering::Relaxed)
    }

    /// Marks a demand fetch as outstanding until the returned value is dropped; the stream gets
    /// no grant in that time.
    pub(super) fn demand(self: &Arc<Self>) -> Outstanding {
        self.lock().demands += 1;
        Outstanding {
            link: Arc::clone(self),
        }
    }

    /// Waits for a grant of at most `want` bytes (at least one, unless `want` is zero).
    pub(super) fn take(&self, kind: Kind, want: usize) -> Result<usize, Closed> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Err(Closed);
            }
            if kind == Kind::Stream && state.demands > 0 {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let now = Instant::now();
            let Some(wait) = state.bucket.wait(now) else {
                let granted = want.min(state.bucket.quantum());
                state.bucket.take(granted, now);
                return Ok(granted);
            };
            state = self.wait_timeout(state, wait);
        }
    }

    /// Settles a grant: `used` bytes of it arrived.
    pub(super) fn settle(&self, kind: Kind, granted: usize, used: usize) {
        if used < granted {
            self.lock().bucket.give_back(granted - used);
        }
        self.count(kind, used);
    }

    /// Counts bytes that arrived without a grant (response heads); later grants pay for them.
    pub(super) fn charge(&self, kind: Kind, bytes: usize) {
        self.lock().bucket.take(bytes, Instant::now());
        self.count(kind, bytes);
    }

    /// Waits, unless the link is closed first.
    pub(super) fn pause(&self, time: Duration) -> Result<(), Closed> {
        let end = Instant::now() + time;
        let mut state = self.lock();
        loop {
            if state.closed {
                return Err(Closed);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.wait_timeout(state, left);
        }
    }

    /// Has `socket` shut down when the link is closed, until the returned value is dropped.
    pub(super) fn watch(self: &Arc<Self>, socket: &Arc<TcpStream>) -> Result<Watch, Closed> {
        let mut state = self.lock();
        if state.closed {
            return Err(Closed);
        }
        let key = state.next_socket;
        state.next_socket += 1;
        state.sockets.insert(key, Arc::clone(socket));
        Ok(Watch {
            link: Arc::clone(self),
            key,
        })
    }

    fn count(&self, kind: Kind, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.counter(kind).fetch_add(bytes, Ordering::Relaxed);
    }

    fn counter(&self, kind: Kind) -> &AtomicU64 {
        match kind {
            Kind::Stream => &self.stream_bytes,
            Kind::Demand => &self.demand_bytes,
        }
    }

    /// The state is consistent between any two statements, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_timeout<'a>(
        &self,
        state: MutexGuard<'a, State>,
        time: Duration,
    ) -> MutexGuard<'a, State> {
        self.changed
            .wait_timeout(state, time)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }
}

/// An outstanding demand fetch; see [`Link::demand`].
#[derive(Debug)]
pub(super) struct Outstanding {
    link: Arc<Link>,
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        state.demands = state.demands.saturating_sub(1);
        drop(state);
        self.link.changed.notify_all();
    }
}

/// A watched socket; see [`Link::watch`].
#[derive(Debug)]
pub(super) struct Watch {
    link: Arc<Link>,
    key: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.link.lock().sockets.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(mbit: f64) -> Rate {
        Rate::from_mbit(mbit).expect("a good rate")
    }

    #[test]
    fn rates() {
        assert_eq!(rate(38.0).bytes_per_second(), 4_750_000);
        assert_eq!(
            "0.5".parse::<Rate>().expect("fine").to_string(),
            "0.500 Mbit/s"
        );
        for bad in ["0", "-1", "nan", "inf", "1e9", "x", ""] {
            assert_eq!(bad.parse::<Rate>(), Err(RateError), "{bad:?}");
        }
        assert_eq!(rate(8.0).cost(1_000_000), Duration::from_secs(1));
        assert_eq!(
            rate(8.0).bytes_in(Duration::from_millis(50), usize::MAX),
            50_000
        );
    }

    /// On a clock of the test's own: an idle bucket gives at most 20 ms at once, then the rate.
    #[test]
    fn bucket_keeps_rate_and_burst() {
        let mut bucket = Bucket::new(Some(rate(80.0)));
        let start = Instant::now() + Duration::from_secs(10);
        let mut now = start;
        let mut given = 0usize;
        while bucket.wait(now).is_none() {
            bucket.take(bucket.quantum(), now);
            given += bucket.quantum();
        }
        assert!((150_000..=200_000).contains(&given), "burst of {given}");
        while now < start + Duration::from_secs(1) {
            match bucket.wait(now) {
                Some(wait) => now += wait,
                None => {
                    bucket.take(10_000, now);
                    given += 10_000;
                    bucket.take(7_000, now);
                    bucket.give_back(7_000);
                }
            }
        }
        assert!(
            (10_000_000..10_300_000).contains(&given),
            "{given} in a second"
        );
    }

    #[test]
    fn stream_waits_for_demand_and_close_wakes_it() {
        let link = Link::new(None);
        let outstanding = link.demand();
        assert_eq!(link.take(Kind::Demand, 10), Ok(10));
        let waiting = Arc::clone(&link);
        let stream = std::thread::spawn(move || {
            (
                waiting.take(Kind::Stream, 10),
                waiting.take(Kind::Stream, 10),
            )
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!stream.is_finished());
        let second = link.demand();
        drop(outstanding);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!stream.is_finished());
        drop(second);
        assert_eq!(stream.join().expect("no panic"), (Ok(10), Ok(10)));
        let _held = link.demand();
        let waiting = Arc::clone(&link);
        let stream = std::thread::spawn(move || waiting.take(Kind::Stream, 10));
        std::thread::sleep(Duration::from_millis(20));
        link.close();
        assert_eq!(stream.join().expect("no panic"), Err(Closed));
        assert_eq!(link.pause(Duration::from_secs(60)), Err(Closed));
    }
}
