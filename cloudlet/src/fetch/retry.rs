//! When to try again: bounded tries, exponential back-off, and word of it to whoever has to pause
//! the VM meanwhile.

use std::time::{Duration, Instant};

use super::cause::Cause;
use super::http::Context;
use super::link::Kind;
use super::{Error, Options};

/// Wait before the second further try; the first one follows at once.
const BACK_OFF: Duration = Duration::from_millis(200);
/// Longest wait.
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// Progress that starts the count of tries anew, in bytes.
const PROGRESS_BYTES: usize = 64 * 1024;

/// A fetch that does not go smoothly. One that ends in trouble returns its error instead.
#[derive(Debug)]
pub enum Trouble<'a> {
    /// A try failed and there will be another.
    Retrying {
        /// Which fetch.
        kind: Kind,
        /// First byte that is missing.
        offset: u64,
        /// Number of the coming try, from 1.
        retry: u32,
        /// How many there can be.
        retries: u32,
        /// How long it waits before.
        wait: Duration,
        /// Why the last try failed.
        cause: &'a Cause,
    },
    /// Bytes arrive again.
    Recovered {
        /// Which fetch.
        kind: Kind,
        /// How long there were none.
        lost: Duration,
    },
}

/// Counts the tries of one fetch.
#[derive(Debug)]
pub(super) struct Retrier {
    kind: Kind,
    retry: u32,
    fed: usize,
    troubled_since: Option<Instant>,
}

impl Retrier {
    pub(super) fn new(kind: Kind) -> Retrier {
        Retrier {
            kind,
            retry: 0,
            fed: 0,
            troubled_since: None,
        }
    }

    /// Whether the next try comes after a failed one.
    pub(super) fn is_again(&self) -> bool {
        self.retry > 0
    }

    /// A try failed: waits and returns for the next one, or says why there is none.
    pub(super) fn failed(
        &mut self,
        context: &Context,
        place: impl FnOnce() -> String,
        offset: u64,
        opening: bool,
        cause: Cause,
    ) -> Result<(), Error> {
        if matches!(cause, Cause::Cancelled) {
            return Err(Error::Cancelled);
        }
        let retries = context.options.retries;
        if self.retry >= retries || !cause.is_transient(opening) {
            return Err(Error::Transfer {
                place: place(),
                offset,
                tries: self.retry + 1,
                cause,
            });
        }
        self.retry += 1;
        self.fed = 0;
        let wait = back_off(self.retry);
        self.troubled_since.get_or_insert_with(Instant::now);
        let retry = self.retry;
        let kind = self.kind;
        tell(
            &context.options,
            &Trouble::Retrying {
                kind,
                offset,
                retry,
                retries,
                wait,
                cause: &cause,
            },
        );
        Ok(context.link.pause(wait)?)
    }

    /// Bytes arrived.
    pub(super) fn progressed(&mut self, options: &Options, bytes: usize) {
        self.fed = self.fed.saturating_add(bytes);
        if self.fed >= PROGRESS_BYTES {
            (self.retry, self.fed) = (0, 0);
        }
        if let Some(since) = self.troubled_since.take() {
            tell(
                options,
                &Trouble::Recovered {
                    kind: self.kind,
                    lost: since.elapsed(),
                },
            );
        }
    }
}

fn tell(options: &Options, trouble: &Trouble<'_>) {
    if let Some(hook) = &options.on_trouble {
        hook(trouble);
    }
}

/// Before further try `retry` (from 1): none, then 200 ms, doubled each time up to 5 s.
fn back_off(retry: u32) -> Duration {
    match retry.checked_sub(2) {
        None => Duration::ZERO,
        Some(doublings) => (BACK_OFF * (1 << doublings.min(10))).min(BACK_OFF_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_grows_to_its_limit() {
        let waits: Vec<_> = [1, 2, 3, 4, 5, 7, 1000]
            .map(|n| back_off(n).as_millis())
            .into();
        assert_eq!(waits, [0, 200, 400, 800, 1600, 5000, 5000]);
    }
}
