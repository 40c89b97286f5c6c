//! A limit on what a device does a second: bytes (bandwidth) and operations (frames, requests), each
//! a token bucket. [`Bucket`] is the arithmetic, told the time; [`Limiter`] adds the clock and a
//! timer for the device's event loop.
//!
//! A bucket holds at most its burst, which is what one second brings unless said otherwise, and starts
//! full. The size of an operation is often known only when it is done, so an operation may begin as
//! long as the bucket is not empty, and may take more than is there: what it overdrew is waited for
//! before the next. The rate is kept exactly in the long run, and an operation of any size gets through.
//!
//! How a device uses a limiter, one for each direction or queue:
//!
//! - [`Limiter::fd`] is among its backend descriptors, if there is one.
//! - Before each chain it asks [`Limiter::is_open`]. If not, it leaves the chain in the ring and its
//!   turn is over; kicks are then of no use. It does not ask for another turn: the timer brings it.
//! - After each chain it tells [`Limiter::charge`] how many bytes it moved.
//! - When the timer's descriptor is readable it calls [`Limiter::wake`], then serves the queue as after a
//!   kick.
//!
//! Limits are the host's: no part of a saved state. Those of a restored device start full.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

const NANOS_A_SECOND: u64 = 1_000_000_000;
/// Least time between two openings, so that a high rate is no storm of timer events.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// The clock is looked at again after so long, however much was overdrawn.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// A burst is at least what this fraction of a second brings, or waiting would lose tokens.
const BURSTS_A_SECOND_MAX: u64 = 100;

/// So much a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Units a second.
    pub per_second: NonZeroU64,
    /// Most units that are saved up; less than a hundredth of `per_second` counts as that.
    pub burst: NonZeroU64,
}

impl Rate {
    /// `per_second` units a second with a burst of as many.
    pub fn new(per_second: NonZeroU64) -> Self {
        Self {
            per_second,
            burst: per_second,
        }
    }
}

/// What is limited, and to what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes a second.
    pub bytes: Option<Rate>,
    /// Operations a second.
    pub operations: Option<Rate>,
}

/// A token bucket. Time is what its owner says: a duration since some fixed moment.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// Units a second, which are also billionths of a unit a nanosecond.
    rate: i128,
    /// Most billionths of a unit that it holds.
    burst: i128,
    /// Billionths of a unit; below zero is a debt.
    level: i128,
    at: Duration,
}

impl Bucket {
    /// A full bucket at the time `now`.
    pub fn new(rate: Rate, now: Duration) -> Self {
        let least = rate.per_second.get() / BURSTS_A_SECOND_MAX;
        let burst = units(rate.burst.get().max(least).max(1));
        Self {
            rate: rate.per_second.get().into(),
            burst,
            level: burst,
            at: now,
        }
    }

    /// How long until an operation may begin; zero if it may now.
    pub fn wait(&mut self, now: Duration) -> Duration {
        // A clock that goes back brings nothing.
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        // Nanoseconds of a Duration need 94 bits, and no u64 rate makes the product overflow where
        // the burst has been reached long before.
        let passed = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        let brought = self.rate.saturating_mul(passed);
        self.level = self.level.saturating_add(brought).min(self.burst);
        if self.level > 0 {
            return Duration::ZERO;
        }
        let missing = 1 - self.level;
        let nanos = (missing + self.rate - 1) / self.rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `count` units, more than there are if need be.
    pub fn take(&mut self, count: u64) {
        self.level = self.level.saturating_sub(units(count));
    }
}

/// `count` units in billionths.
fn units(count: u64) -> i128 {
    i128::from(count) * i128::from(NANOS_A_SECOND)
}

/// Tells the time as a duration since some fixed moment.
type Clock = Box<dyn Fn() -> Duration + Send>;

/// A device's limits, with clock and timer.
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    clock: Clock,
    /// None when nothing is limited.
    timer: Option<TimerFd>,
    throttled: u64,
    closed: bool,
}

impl Limiter {
    /// A limiter over the system's monotonic clock.
    ///
    /// # Errors
    /// When there is no descriptor for its timer.
    pub fn new(limits: Limits) -> io::Result<Self> {
        let begin = Instant::now();
        Self::with_clock(limits, Box::new(move || begin.elapsed()))
    }

    /// As [`Limiter::new`] with another clock. Its timer keeps to the system's.
    ///
    /// # Errors
    /// As [`Limiter::new`].
    pub fn with_clock(limits: Limits, clock: Clock) -> io::Result<Self> {
        let now = clock();
        let is_limited = limits.bytes.or(limits.operations).is_some();
        Ok(Self {
            bytes: limits.bytes.map(|rate| Bucket::new(rate, now)),
            operations: limits.operations.map(|rate| Bucket::new(rate, now)),
            clock,
            timer: is_limited.then(TimerFd::new).transpose()?,
            throttled: 0,
            closed: false,
        })
    }

    /// The timer's descriptor, constant for the limiter's life; none when nothing is limited.
    pub fn fd(&self) -> Option<RawFd> {
        self.timer.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether an operation may begin. If not, the timer is set to when one may.
    ///
    /// # Errors
    /// When the timer cannot be set.
    pub fn is_open(&mut self) -> io::Result<bool> {
        let Some(timer) = self.timer.as_mut() else {
            return Ok(true);
        };
        let now = (self.clock)();
        let waits = [&mut self.bytes, &mut self.operations]
            .into_iter()
            .flatten()
            .map(|bucket| bucket.wait(now));
        let wait = waits.max().unwrap_or(Duration::ZERO);
        if wait.is_zero() {
            self.closed = false;
            return Ok(true);
        }
        if !self.closed {
            self.throttled += 1;
        }
        self.closed = true;
        timer.reset(wait.clamp(WAIT_MIN, WAIT_MAX), None)?;
        Ok(false)
    }

    /// One operation was done and moved `bytes`.
    pub fn charge(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(u64::try_from(bytes).unwrap_or(u64::MAX));
        }
    }

    /// The timer's descriptor is readable: it is not any more.
    ///
    /// # Errors
    /// When the timer cannot be set.
    pub fn wake(&mut self) -> io::Result<()> {
        // Setting a timer clears it without a read, which would block if it was set anew in between.
        Ok(self.timer.as_mut().map_or(Ok(()), TimerFd::clear)?)
    }

    /// How often the device had to wait.
    pub fn throttled(&self) -> u64 {
        self.throttled
    }
}

#[cfg(test)]
#[path = "rate_tests.rs"]
mod tests;
