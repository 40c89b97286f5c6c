//! How much background data may be on its way: the receive window of the stream's connection.
//! Bytes that the kernel has already asked for cannot be overtaken by a demand fetch, so the
//! window is what some 50 ms of the link carry, and not what the kernel would let it grow to.

use std::time::{Duration, Instant};

use super::link::Rate;

/// Background data in flight, beyond what the distance itself needs.
const QUEUE: Duration = Duration::from_millis(50);
/// Smallest window, in bytes.
const WINDOW_MIN: usize = 32 * 1024;
/// First window without a known rate, in bytes.
const WINDOW_START: usize = 128 * 1024;
/// Largest window asked for, in bytes.
const WINDOW_MAX: usize = 4 * 1024 * 1024;
/// How long throughput is measured before the window is judged.
const PERIOD: Duration = Duration::from_millis(100);

/// What to do about the window.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Keep,
    /// Ask for this many bytes.
    Grow(usize),
    /// Connect again without a limit: the path is long and fast, and the largest window that the
    /// system gives to a fixed size would be the bottleneck.
    Release,
}

/// See the module's description. With a rate the window is fixed. Without one it starts small and
/// doubles as long as the throughput shows that the window is what limits it: half a window or
/// more arrives in each round trip. It ends within a factor of four of what the path can hold.
#[derive(Debug)]
pub(super) struct Window {
    rate: Option<Rate>,
    bytes: usize,
    released: bool,
    at_limit: bool,
    round_trip: Duration,
    since: Instant,
    arrived: usize,
}

impl Window {
    pub(super) fn new(rate: Option<Rate>) -> Window {
        Window {
            rate,
            bytes: WINDOW_START,
            released: false,
            at_limit: false,
            round_trip: Duration::ZERO,
            since: Instant::now(),
            arrived: 0,
        }
    }

    /// The window for a new connection; `None` leaves it to the kernel.
    pub(super) fn connected(&mut self, round_trip: Duration, now: Instant) -> Option<usize> {
        self.round_trip = round_trip;
        (self.since, self.arrived) = (now, 0);
        if let Some(rate) = self.rate {
            self.bytes = rate
                .bytes_in(QUEUE + 2 * round_trip, WINDOW_MAX)
                .max(WINDOW_MIN);
        }
        (!self.released).then_some(self.bytes)
    }

    /// Tells what the kernel granted.
    pub(super) fn granted(&mut self, bytes: usize) {
        self.at_limit = bytes < self.bytes || self.bytes >= WINDOW_MAX;
        self.bytes = bytes;
    }

    /// Bytes that may be on their way, roughly.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Tells that `count` bytes arrived.
    pub(super) fn arrived(&mut self, count: usize, now: Instant) -> Step {
        self.arrived = self.arrived.saturating_add(count);
        let period = now.saturating_duration_since(self.since);
        if self.rate.is_some() || self.released || period < PERIOD {
            return Step::Keep;
        }
        let arrived = std::mem::take(&mut self.arrived);
        self.since = now;
        // arrived / period * round_trip >= bytes / 2, in whole numbers.
        let in_round_trip = as_u128(arrived) * self.round_trip.as_micros() / period.as_micros();
        if in_round_trip * 2 < as_u128(self.bytes) {
            return Step::Keep;
        }
        if self.at_limit {
            self.released = true;
            return Step::Release;
        }
        self.bytes = (self.bytes * 2).min(WINDOW_MAX);
        Step::Grow(self.bytes)
    }
}

fn as_u128(bytes: usize) -> u128 {
    u128::try_from(bytes).unwrap_or(u128::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path of `capacity` bytes a second and this round trip: what the window grows to.
    fn settle(capacity: u64, round_trip: Duration) -> (usize, bool) {
        let mut window = Window::new(None);
        let mut now = Instant::now();
        window.connected(round_trip, now);
        let micros = u64::try_from(round_trip.as_micros()).expect("short");
        for _ in 0..100 {
            let by_window = u64::try_from(window.bytes()).expect("small") * 1_000_000 / micros;
            now += PERIOD;
            let count = usize::try_from(by_window.min(capacity) / 10).expect("small");
            match window.arrived(count, now) {
                Step::Keep => {}
                Step::Grow(bytes) => window.granted(bytes),
                Step::Release => return (window.bytes(), true),
            }
        }
        (window.bytes(), false)
    }

    #[test]
    fn without_a_rate_it_follows_the_path() {
        // 38 Mbit/s at 20 ms: 95 kB fit on the path, the start is enough.
        assert_eq!(
            settle(4_750_000, Duration::from_millis(20)),
            (WINDOW_START * 2, false)
        );
        // 1 Gbit/s at 10 ms: 1.25 MB.
        let (bytes, released) = settle(125_000_000, Duration::from_millis(10));
        assert!(
            (1_250_000..=5_000_000).contains(&bytes) && !released,
            "{bytes}"
        );
        // 10 Gbit/s at 50 ms: no fixed window is enough.
        assert!(settle(1_250_000_000, Duration::from_millis(50)).1);
    }

    #[test]
    fn with_a_rate_it_is_fixed() {
        let mut window = Window::new(Some(Rate::from_mbit(38.0).expect("fine")));
        let now = Instant::now();
        assert_eq!(window.connected(Duration::ZERO, now), Some(237_500));
        assert_eq!(window.arrived(10_000_000, now + PERIOD), Step::Keep);
        let mut slow = Window::new(Some(Rate::from_mbit(0.1).expect("fine")));
        assert_eq!(slow.connected(Duration::ZERO, now), Some(WINDOW_MIN));
    }

    #[test]
    fn a_small_system_limit_releases_the_window() {
        let mut window = Window::new(None);
        let now = Instant::now();
        assert_eq!(
            window.connected(Duration::from_millis(10), now),
            Some(WINDOW_START)
        );
        assert_eq!(
            window.arrived(2_000_000, now + PERIOD),
            Step::Grow(WINDOW_START * 2)
        );
        window.granted(212_992);
        assert_eq!(window.arrived(2_000_000, now + 2 * PERIOD), Step::Release);
        assert_eq!(window.connected(Duration::from_millis(10), now), None);
    }
}
