//! Two kinds of work on the same threads, with a step between them that sees everything in order:
//! jobs become batches on any thread, batches become pieces one after the other on the calling
//! thread, pieces are finished on any thread and taken in order. What is in memory is bounded by a
//! window, whatever the number of jobs, and the same jobs give the same pieces on any number of
//! threads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Jobs and pieces under way, each a thread.
const WINDOW: usize = 2;

/// The work that any thread does.
pub(crate) trait Work: Sync {
    /// What a thread keeps between two pieces of work.
    type Context;
    /// What is to be made a batch.
    type Job: Send;
    /// What the step in between takes.
    type Batch: Send;
    /// What the step in between makes.
    type Piece: Send;
    /// A piece when all is done with it.
    type Done: Send;
    /// Why it did not work.
    type Error: Send;

    fn context(&self) -> Self::Context;
    fn batch(
        &self,
        context: &mut Self::Context,
        job: Self::Job,
    ) -> Result<Self::Batch, Self::Error>;
    fn finish(
        &self,
        context: &mut Self::Context,
        piece: Self::Piece,
    ) -> Result<Self::Done, Self::Error>;
}

/// The work that one thread does, in order.
pub(crate) trait Between<W: Work> {
    /// Takes the next batch, or the end of all batches; adds the pieces that are ready.
    fn pass(&mut self, batch: Option<W::Batch>, pieces: &mut Vec<W::Piece>)
    -> Result<(), W::Error>;
    /// Takes the next finished piece.
    fn take(&mut self, done: W::Done) -> Result<(), W::Error>;
}

struct State<W: Work> {
    jobs: VecDeque<(u64, W::Job)>,
    pieces: VecDeque<(u64, W::Piece)>,
    batches: BTreeMap<u64, Result<W::Batch, W::Error>>,
    done: BTreeMap<u64, Result<W::Done, W::Error>>,
    /// Nothing more is wanted, or a worker is gone.
    stopped: bool,
}

struct Shared<W: Work> {
    state: Mutex<State<W>>,
    /// There is work, or nothing more is wanted.
    given: Condvar,
    /// There is a result, or a worker is gone.
    arrived: Condvar,
}

impl<W: Work> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        // A panic elsewhere ends the scope anyway; the state is valid at each release.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stopped = true;
        self.given.notify_all();
        self.arrived.notify_all();
    }
}

/// Stops everybody when a worker unwinds, so that nobody waits for its result.
struct StopOnPanic<'a, W: Work>(&'a Shared<W>);

impl<W: Work> Drop for StopOnPanic<'_, W> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}

/// Does all of `jobs` on `threads` threads. The first error, in the order of the jobs, ends it.
pub(crate) fn run<W: Work>(
    threads: usize,
    work: &W,
    jobs: impl Iterator<Item = Result<W::Job, W::Error>>,
    between: &mut impl Between<W>,
) -> Result<(), W::Error> {
    let shared = Shared {
        state: Mutex::new(State {
            jobs: VecDeque::new(),
            pieces: VecDeque::new(),
            batches: BTreeMap::new(),
            done: BTreeMap::new(),
            stopped: false,
        }),
        given: Condvar::new(),
        arrived: Condvar::new(),
    };
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| serve(&shared, work));
        }
        let window = u64::try_from(threads.max(1) * WINDOW).unwrap_or(u64::MAX);
        let outcome = conduct(&shared, window, jobs, between);
        shared.stop();
        outcome
    })
}

/// The calling thread's part.
fn conduct<W: Work>(
    shared: &Shared<W>,
    window: u64,
    mut jobs: impl Iterator<Item = Result<W::Job, W::Error>>,
    between: &mut impl Between<W>,
) -> Result<(), W::Error> {
    let (mut jobs_given, mut batches_taken) = (0, 0);
    let (mut pieces_given, mut done_taken) = (0, 0);
    let (mut jobs_ended, mut batches_ended) = (false, false);
    let mut pieces = Vec::new();
    loop {
        while !jobs_ended && jobs_given - batches_taken < window {
            match jobs.next() {
                Some(job) => {
                    shared.lock().jobs.push_back((jobs_given, job?));
                    shared.given.notify_one();
                    jobs_given += 1;
                }
                None => jobs_ended = true,
            }
        }
        let all_taken = jobs_ended && batches_taken == jobs_given;
        if all_taken && !batches_ended {
            batches_ended = true;
            between.pass(None, &mut pieces)?;
        } else if all_taken && done_taken == pieces_given {
            return Ok(());
        } else {
            let room = pieces_given - done_taken < window;
            match next(shared, done_taken, room.then_some(batches_taken)) {
                None => return Ok(()),
                Some(Next::Done(done)) => {
                    done_taken += 1;
                    between.take(done?)?;
                }
                Some(Next::Batch(batch)) => {
                    batches_taken += 1;
                    between.pass(Some(batch?), &mut pieces)?;
                }
            }
        }
        for piece in pieces.drain(..) {
            shared.lock().pieces.push_back((pieces_given, piece));
            shared.given.notify_one();
            pieces_given += 1;
        }
    }
}

enum Next<W: Work> {
    Done(Result<W::Done, W::Error>),
    Batch(Result<W::Batch, W::Error>),
}

/// Waits for the finished piece of number `done`, or for the batch of number `batch` if one is
/// wanted. None if a worker has panicked, which the scope reports.
fn next<W: Work>(shared: &Shared<W>, done: u64, batch: Option<u64>) -> Option<Next<W>> {
    let mut state = shared.lock();
    loop {
        if let Some(result) = state.done.remove(&done) {
            return Some(Next::Done(result));
        }
        if let Some(result) = batch.and_then(|batch| state.batches.remove(&batch)) {
            return Some(Next::Batch(result));
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

/// A worker: pieces before jobs, so that what is under way comes to its end.
fn serve<W: Work>(shared: &Shared<W>, work: &W) {
    let _stop = StopOnPanic(shared);
    let mut context = work.context();
    let mut state = shared.lock();
    while !state.stopped {
        if let Some((number, piece)) = state.pieces.pop_front() {
            drop(state);
            let result = work.finish(&mut context, piece);
            state = shared.lock();
            state.done.insert(number, result);
            shared.arrived.notify_all();
        } else if let Some((number, job)) = state.jobs.pop_front() {
            drop(state);
            let result = work.batch(&mut context, job);
            state = shared.lock();
            state.batches.insert(number, result);
            shared.arrived.notify_all();
        } else {
            state = shared
                .given
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
#[path = "stages_tests.rs"]
mod tests;
