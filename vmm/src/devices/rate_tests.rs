//! The arithmetic with a clock that the test moves, and the timer with the real one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

fn rate(per_second: u64, burst: u64) -> Rate {
    Rate {
        per_second: NonZeroU64::new(per_second).unwrap(),
        burst: NonZeroU64::new(burst).unwrap(),
    }
}

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

#[test]
fn a_bucket_starts_full_and_fills_at_its_rate() {
    let mut bucket = Bucket::new(Rate::new(NonZeroU64::new(1000).unwrap()), ms(0));
    for _ in 0..1000 {
        assert_eq!(bucket.wait(ms(0)), Duration::ZERO);
        bucket.take(1);
    }
    assert!(bucket.wait(ms(0)) > Duration::ZERO);
    assert!(bucket.wait(ms(0)) <= ms(1));
    assert_eq!(bucket.wait(ms(1)), Duration::ZERO);
    bucket.take(1);
    assert!(bucket.wait(ms(1)) > Duration::ZERO);
    // What is not used is saved up to the burst and no further.
    bucket.wait(ms(10_000));
    bucket.take(1000);
    assert!(bucket.wait(ms(10_000)) > Duration::ZERO);
}

#[test]
fn what_is_overdrawn_is_waited_for() {
    let mut bucket = Bucket::new(rate(1_000_000, 10_000), ms(0));
    assert_eq!(bucket.wait(ms(0)), Duration::ZERO);
    bucket.take(5_010_000);
    let wait = bucket.wait(ms(0));
    assert!(wait > ms(5000) && wait <= ms(5001), "{wait:?}");
    assert!(bucket.wait(ms(4999)) > Duration::ZERO);
    assert_eq!(bucket.wait(wait), Duration::ZERO);
}

#[test]
fn the_largest_numbers_are_numbers() {
    let mut bucket = Bucket::new(rate(u64::MAX, u64::MAX), ms(0));
    for _ in 0..4 {
        bucket.take(u64::MAX);
    }
    assert!(bucket.wait(Duration::ZERO) > Duration::ZERO);
    assert_eq!(bucket.wait(Duration::MAX), Duration::ZERO);
    let mut slow = Bucket::new(rate(1, 1), Duration::MAX);
    slow.take(u64::MAX);
    assert!(slow.wait(Duration::ZERO) > Duration::from_secs(1 << 30));
}

proptest! {
    /// Whoever begins only when allowed gets the rate, plus at most the burst and one operation.
    #[test]
    fn the_rate_holds_in_the_long_run(
        per_second in 100_u64..10_000_000,
        divisor in 1_u64..200,
        sizes in prop::collection::vec(1_u64..100_000, 1..200),
    ) {
        let burst = (per_second / divisor).max(1);
        let mut bucket = Bucket::new(rate(per_second, burst), ms(0));
        let (mut now, mut taken, mut last) = (Duration::ZERO, 0, 0);
        for size in sizes {
            now += bucket.wait(now);
            prop_assert_eq!(bucket.wait(now), Duration::ZERO);
            bucket.take(size);
            taken += size;
            last = size;
        }
        let brought = u128::from(per_second) * now.as_nanos() / 1_000_000_000;
        let most = brought + u128::from(burst.max(per_second / 100)) + u128::from(last);
        prop_assert!(u128::from(taken) <= most + 1, "{taken} of {most}");
        // And no slower: it never waited with tokens in hand.
        prop_assert!(u128::from(taken) + 1 >= brought, "{taken} of {brought}");
    }
}

#[test]
fn a_limiter_without_limits_is_open_and_has_no_timer() {
    let mut limiter = Limiter::new(Limits::default()).unwrap();
    assert_eq!(limiter.fd(), None);
    limiter.charge(usize::MAX);
    assert!(limiter.is_open().unwrap());
    limiter.wake().unwrap();
    assert_eq!(limiter.throttled(), 0);
}

#[test]
fn either_limit_closes_and_time_opens() {
    let time = Arc::new(AtomicU64::new(0));
    for limits in [
        Limits {
            bytes: Some(rate(1000, 1000)),
            operations: None,
        },
        Limits {
            bytes: None,
            operations: Some(rate(1, 1)),
        },
        Limits {
            bytes: Some(rate(1000, 1000)),
            operations: Some(rate(1_000_000, 1)),
        },
    ] {
        let clock = time.clone();
        let clock = move || Duration::from_millis(clock.load(Ordering::Relaxed));
        let mut limiter = Limiter::with_clock(limits, Box::new(clock)).unwrap();
        assert!(limiter.is_open().unwrap());
        limiter.charge(1000);
        assert!(!limiter.is_open().unwrap());
        assert!(!limiter.is_open().unwrap());
        assert_eq!(limiter.throttled(), 1);
        time.fetch_add(1001, Ordering::Relaxed);
        assert!(limiter.is_open().unwrap());
    }
}

/// Whether `fd` is readable within `timeout_ms`.
fn is_readable(fd: RawFd, timeout_ms: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, which lives across the call.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
}

#[test]
fn the_timer_tells_when_it_opens() {
    let limits = Limits {
        bytes: Some(rate(1_000_000, 1000)),
        operations: None,
    };
    let mut limiter = Limiter::new(limits).unwrap();
    let fd = limiter.fd().unwrap();
    assert!(limiter.is_open().unwrap());
    limiter.charge(60_000);
    let begin = Instant::now();
    assert!(!limiter.is_open().unwrap());
    assert!(!is_readable(fd, 0));
    assert!(is_readable(fd, 10_000));
    assert!(begin.elapsed() >= ms(45));
    limiter.wake().unwrap();
    assert!(!is_readable(fd, 0));
    assert!(limiter.is_open().unwrap());
}
