//! The pager beside a bare userfaultfd probe: what a fault costs whose page is at hand, and how
//! fast pages are placed ahead of demand.

use std::sync::Arc;
use std::time::Instant;

use cloudlet_vmm::memory::{
    PAGE, PAGE_BYTES, PageRun, PageSource, Pager, PagerHooks, Placer, Ram, RamLayout, RamPage,
    SourceError,
};

use super::bare_uffd::{Region, touch_each};
use super::{Figure, Sheet, median};
use crate::failure::{Failure, Outcome};

/// Runs of each figure; each is a pair of probe and product.
const RUNS: usize = 9;
/// Faults in a run.
const FAULTS: usize = 4096;
/// Memory that is filled in a run.
const BULK_BYTES: usize = 256 << 20;
/// What the bare probe places with one call.
const BARE_BYTES: usize = 64 << 10;
/// What is handed to the placer at a time: a decoded segment.
const SEGMENT_BYTES: usize = 1 << 20;

/// Measures `pager.fault` and `pager.bulk`.
pub(super) fn run(sheet: &mut Sheet) -> Outcome {
    let faults = pairs(pager_faults, bare_faults)?;
    sheet.put(&Figure::beside(
        "pager.fault",
        "us",
        &faults,
        "bare userfaultfd probe",
    )?)?;
    let bulk = pairs(placer_bulk, bare_bulk)?;
    sheet.put(&Figure::beside(
        "pager.bulk",
        "MB/s",
        &bulk,
        "bare UFFDIO_COPY of 64 KiB",
    )?)
}

/// Runs both, alternately, once for nothing and then [`RUNS`] times.
fn pairs(product: fn() -> Outcome<f64>, probe: fn() -> Outcome<f64>) -> Outcome<Vec<(f64, f64)>> {
    let pair = || Ok((product()?, probe()?));
    pair()?;
    (0..RUNS).map(|_| pair()).collect()
}

/// Memory of `bytes` that is all missing.
fn missing_ram(bytes: usize) -> Outcome<(Ram, Placer)> {
    let layout = RamLayout::new(u64::try_from(bytes)?)?;
    let delta = [PageRun::new(0, layout.pages())];
    Ok(Ram::with_delta(&layout, None, &delta, &[])?)
}

/// Has every page at hand, and places the one that is asked for.
struct Local([u8; PAGE]);

impl PageSource for Local {
    fn on_fault(&self, page: RamPage, placer: &Placer) -> Result<(), SourceError> {
        placer.place(page, &self.0)?;
        Ok(())
    }
}

/// The median fault of a thread that touches one page after the other, in us.
fn pager_faults() -> Outcome<f64> {
    let (ram, placer) = missing_ram(FAULTS * PAGE)?;
    let hooks = PagerHooks {
        on_start: Box::new(|| Ok(())),
        // The toucher would wait for ever: better no bench than one that hangs.
        on_error: Box::new(|error| {
            eprintln!("pager: {error}");
            std::process::exit(1);
        }),
        record: false,
    };
    let _pager = Pager::spawn(placer, Arc::new(Local([7; PAGE])), hooks)?;
    // SAFETY: `ram` keeps the pages mapped.
    median(&unsafe { touch_each(usize::try_from(ram.slots()[0].host)?, FAULTS) })
}

/// The same with the bare probe.
fn bare_faults() -> Outcome<f64> {
    let region = Region::new(FAULTS * PAGE)?;
    std::thread::scope(|scope| {
        let answers = scope.spawn(|| region.answer(FAULTS, &[7; PAGE]));
        // SAFETY: `region` keeps the pages mapped.
        let times_us = unsafe { touch_each(region.start(), FAULTS) };
        answers
            .join()
            .map_err(|_| Failure::new("the probe panicked"))??;
        median(&times_us)
    })
}

/// MB/s of the placer, a segment at a time.
fn placer_bulk() -> Outcome<f64> {
    let (_ram, placer) = missing_ram(BULK_BYTES)?;
    let segment = vec![7; SEGMENT_BYTES];
    let begin = Instant::now();
    for offset in (0..BULK_BYTES).step_by(SEGMENT_BYTES) {
        placer.place(RamPage(u64::try_from(offset)? / PAGE_BYTES), &segment)?;
    }
    Ok(rate(begin))
}

/// MB/s of the bare call.
fn bare_bulk() -> Outcome<f64> {
    let region = Region::new(BULK_BYTES)?;
    let segment = vec![7; SEGMENT_BYTES];
    let begin = Instant::now();
    for offset in (0..BULK_BYTES).step_by(SEGMENT_BYTES) {
        for part in (0..SEGMENT_BYTES).step_by(BARE_BYTES) {
            region.copy(offset + part, &segment[part..part + BARE_BYTES])?;
        }
    }
    Ok(rate(begin))
}

fn rate(begin: Instant) -> f64 {
    BULK_BYTES as f64 / 1e6 / begin.elapsed().as_secs_f64()
}
