//! The same pieces in the same order on any number of threads, and an end whatever goes wrong.

use super::*;

/// Batches are the numbers times three; pieces are sums of four of them.
struct Sums {
    fail_at: Option<u32>,
    panic_at: Option<u32>,
}

impl Work for Sums {
    type Context = u32;
    type Job = u32;
    type Batch = u32;
    type Piece = u32;
    type Done = u32;
    type Error = u32;

    fn context(&self) -> u32 {
        0
    }

    fn batch(&self, jobs: &mut u32, job: u32) -> Result<u32, u32> {
        *jobs += 1;
        assert_ne!(self.panic_at, Some(job), "on purpose");
        if self.fail_at.is_some_and(|at| job >= at) {
            return Err(job);
        }
        Ok(job * 3)
    }

    fn finish(&self, _: &mut u32, piece: u32) -> Result<u32, u32> {
        Ok(piece)
    }
}

#[derive(Default)]
struct Collected {
    open: Vec<u32>,
    /// Batches passed less those in pieces taken, at its highest.
    under_way_max: usize,
    under_way: usize,
    sums: Vec<u32>,
}

impl Between<Sums> for Collected {
    fn pass(&mut self, batch: Option<u32>, pieces: &mut Vec<u32>) -> Result<(), u32> {
        let end = batch.is_none();
        self.under_way += usize::from(!end);
        self.under_way_max = self.under_way_max.max(self.under_way);
        self.open.extend(batch);
        if self.open.len() == 4 || end {
            pieces.push(self.open.drain(..).sum());
        }
        Ok(())
    }

    fn take(&mut self, sum: u32) -> Result<(), u32> {
        self.under_way = self.under_way.saturating_sub(4);
        self.sums.push(sum);
        Ok(())
    }
}

fn run_sums(threads: usize, sums: &Sums, jobs: u32) -> (Result<(), u32>, Collected) {
    let mut collected = Collected::default();
    let outcome = run(threads, sums, (0..jobs).map(Ok), &mut collected);
    (outcome, collected)
}

const GOOD: Sums = Sums {
    fail_at: None,
    panic_at: None,
};

#[test]
fn pieces_come_in_order_and_few_are_under_way() {
    let expected: Vec<u32> = (0..250).map(|n| (16 * n + 6) * 3).chain([0]).collect();
    for threads in [1, 2, 7] {
        let (outcome, collected) = run_sums(threads, &GOOD, 1000);
        assert_eq!(outcome, Ok(()));
        assert_eq!(collected.sums, expected);
        assert!(collected.under_way_max <= 4 * (threads * WINDOW + 1));
    }
    let (outcome, collected) = run_sums(3, &GOOD, 0);
    assert_eq!((outcome, collected.sums), (Ok(()), vec![0]));
}

#[test]
fn the_first_error_ends_it() {
    let bad = Sums {
        fail_at: Some(50),
        ..GOOD
    };
    let (outcome, collected) = run_sums(3, &bad, 1000);
    assert_eq!(outcome, Err(50));
    assert!(collected.sums.len() <= 12);
    let jobs = (0..100).map(|job| if job == 7 { Err(999) } else { Ok(job) });
    assert_eq!(run(2, &GOOD, jobs, &mut Collected::default()), Err(999));
}

#[test]
#[should_panic(expected = "a scoped thread panicked")]
fn a_panic_in_a_worker_does_not_hang() {
    let bad = Sums {
        panic_at: Some(10),
        ..GOOD
    };
    let _ = run_sums(2, &bad, 1000);
}
