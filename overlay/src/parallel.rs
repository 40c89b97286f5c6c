//! Work spread over threads, results in order, memory bounded.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// How far, in jobs a thread, workers may be ahead of the result that is taken next.
const WINDOW: usize = 4;

/// Number of threads to use: `wanted`, or as many as there are cores where that is 0.
pub(crate) fn threads(wanted: usize) -> usize {
    match wanted {
        0 => thread::available_parallelism().map_or(1, NonZeroUsize::get),
        _ => wanted.min(256),
    }
}

struct State<T, E> {
    job_next: usize,
    result_next: usize,
    results: BTreeMap<usize, Result<T, E>>,
    /// Set when the taker has given up or a worker is gone without a result.
    stopped: bool,
}

struct Shared<T, E> {
    state: Mutex<State<T, E>>,
    /// A result has come, or a worker is gone.
    arrived: Condvar,
    /// The window has moved, or nothing more is wanted.
    moved: Condvar,
}

impl<T, E> Shared<T, E> {
    fn lock(&self) -> MutexGuard<'_, State<T, E>> {
        // A panic elsewhere ends the scope anyway; the state is valid at each release.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stops everybody when a worker unwinds, so that the taker does not wait for its result.
struct StopOnPanic<'a, T, E>(&'a Shared<T, E>);

impl<T, E> Drop for StopOnPanic<'_, T, E> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lock().stopped = true;
            self.0.arrived.notify_all();
            self.0.moved.notify_all();
        }
    }
}

/// Runs `work` for the jobs 0 to `jobs` - 1 on `threads` threads, each with a context of its
/// own, and gives the results to `take` on the calling thread in the order of the jobs. At most
/// `WINDOW` results a thread are waiting at any time. The first error, in that order, ends it.
pub(crate) fn ordered<C, T: Send, E: Send>(
    threads: usize,
    jobs: usize,
    context: impl Fn() -> C + Sync,
    work: impl Fn(&mut C, usize) -> Result<T, E> + Sync,
    mut take: impl FnMut(usize, T) -> Result<(), E>,
) -> Result<(), E> {
    let threads = threads.min(jobs);
    let shared = Shared {
        state: Mutex::new(State {
            job_next: 0,
            result_next: 0,
            results: BTreeMap::new(),
            stopped: false,
        }),
        arrived: Condvar::new(),
        moved: Condvar::new(),
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| run_jobs(&shared, jobs, threads * WINDOW, &context, &work));
        }
        let mut outcome = Ok(());
        for job in 0..jobs {
            let Some(result) = wait_for(&shared, job) else {
                break;
            };
            outcome = result.and_then(|value| take(job, value));
            if outcome.is_err() {
                break;
            }
        }
        shared.lock().stopped = true;
        shared.moved.notify_all();
        outcome
    })
}

fn run_jobs<C, T, E>(
    shared: &Shared<T, E>,
    jobs: usize,
    window: usize,
    context: impl Fn() -> C,
    work: impl Fn(&mut C, usize) -> Result<T, E>,
) {
    let _stop = StopOnPanic(shared);
    let mut context = context();
    loop {
        let job = {
            let mut state = shared.lock();
            while !state.stopped && state.job_next >= state.result_next + window {
                state = shared
                    .moved
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if state.stopped || state.job_next == jobs {
                return;
            }
            state.job_next += 1;
            state.job_next - 1
        };
        let result = work(&mut context, job);
        let failed = result.is_err();
        shared.lock().results.insert(job, result);
        shared.arrived.notify_all();
        if failed {
            return;
        }
    }
}

/// The result of `job`; none if a worker has panicked, which the scope reports.
fn wait_for<T, E>(shared: &Shared<T, E>, job: usize) -> Option<Result<T, E>> {
    let mut state = shared.lock();
    loop {
        if let Some(result) = state.results.remove(&job) {
            state.result_next = job + 1;
            drop(state);
            shared.moved.notify_all();
            return Some(result);
        }
        if state.stopped {
            return None;
        }
        state = shared
            .arrived
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn results_come_in_order() {
        for threads in [1, 2, 7] {
            let mut seen = Vec::new();
            let context = || ();
            let work = |(): &mut (), job| Ok::<_, Infallible>(job * 3);
            ordered(threads, 1000, context, work, |job, value| {
                seen.push((job, value));
                Ok(())
            })
            .unwrap();
            assert_eq!(
                seen,
                (0..1000).map(|job| (job, job * 3)).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn the_first_error_ends_it() {
        let taken = AtomicUsize::new(0);
        let work = |(): &mut (), job| if job >= 50 { Err(job) } else { Ok(()) };
        let outcome = ordered(
            3,
            1000,
            || (),
            work,
            |_, ()| {
                taken.fetch_add(1, Ordering::Relaxed);
                Ok(())
            },
        );
        assert_eq!(outcome, Err(50));
        assert_eq!(taken.into_inner(), 50);
    }

    #[test]
    fn the_taker_can_end_it() {
        let work = |(): &mut (), job| Ok(job);
        let outcome = ordered(
            2,
            1000,
            || (),
            work,
            |job, _| if job == 5 { Err(()) } else { Ok(()) },
        );
        assert_eq!(outcome, Err(()));
        ordered(2, 0, || (), work, |_, _| Err(())).unwrap();
    }

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn a_panic_in_a_worker_does_not_hang() {
        let work = |(): &mut (), job| {
            assert!(job != 10, "on purpose");
            Ok::<_, ()>(())
        };
        let _ = ordered(2, 1000, || (), work, |_, ()| Ok(()));
    }
}
