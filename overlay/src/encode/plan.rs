//! From pages in order to slots and places: what of them is stored, and in which segment.

use std::collections::HashSet;

use super::read::{Batch, Class, Pool, Reader, inside, page_bytes};
use super::sink::{SealedSegment, Sink};
use super::slots::SlotTable;
use super::{EncodeError, Progress, check_limit};
use crate::bytes::{to_u64, to_usize};
use crate::digest::Digest;
use crate::format::{
    DerivedRun, DerivedSource, EARLY_SEGMENT_PAGES, RUN_PAGES_MAX, RUNS_MAX, SEGMENT_PAGES,
    SEGMENTS_MAX,
};
use crate::page::{PAGE_BYTES, PageAt, PageSpan};
use crate::stages::Between;

/// From this many runs on, pages that could be found elsewhere are stored instead, which takes fewer.
const RUNS_ENOUGH: u64 = RUNS_MAX as u64 / 2;

/// A segment before compression.
pub(super) struct Chunk {
    pub(super) number: u32,
    pub(super) early: bool,
    pub(super) runs: Vec<PageSpan>,
    pub(super) bytes: Vec<u8>,
}

/// Counts of pages by what became of them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) unchanged: u64,
    pub(super) zero: u64,
    pub(super) base: u64,
    pub(super) repeated: u64,
    pub(super) literal: u64,
}

impl Counts {
    /// All pages.
    pub(super) fn listed(&self) -> u64 {
        self.unchanged + self.zero + self.base + self.repeated + self.literal
    }
}

/// The pages of the segment that is being filled.
#[derive(Default)]
struct Filling {
    pages: Vec<(PageAt, Digest)>,
    bytes: Vec<u8>,
    /// Further places of its own slots, which get their final numbers when it is full.
    further: Vec<(PageAt, u32)>,
}

/// Puts pages into segments, in the order in which they come.
pub(super) struct Planner<'a> {
    sink: &'a mut dyn Sink,
    pool: &'a Pool,
    progress: &'a mut dyn FnMut(Progress),
    table: SlotTable,
    filling: Filling,
    /// Number of the first slot of the segment that is being filled.
    slots: u32,
    /// Where each segment that is full ends, in slots.
    segment_ends: Vec<u32>,
    runs: u64,
    last: Option<DerivedRun>,
    /// The early pages that are done with; none once they have all come.
    early: Option<HashSet<PageAt>>,
    done: u64,
    total: u64,
    pub(super) counts: Counts,
}

impl<'a> Planner<'a> {
    /// For about `total` pages.
    pub(super) fn new(
        sink: &'a mut dyn Sink,
        pool: &'a Pool,
        total: u64,
        progress: &'a mut dyn FnMut(Progress),
    ) -> Self {
        progress(Progress { done: 0, total });
        Self {
            sink,
            pool,
            progress,
            table: SlotTable::new(total),
            filling: Filling::default(),
            slots: 0,
            segment_ends: Vec::new(),
            runs: 0,
            last: None,
            early: Some(HashSet::new()),
            done: 0,
            total,
            counts: Counts::default(),
        }
    }

    /// The early pages have all come: which of them are done with.
    pub(super) fn end_early(&mut self) -> HashSet<PageAt> {
        self.early.take().unwrap_or_default()
    }

    /// Passes the last derived run on.
    pub(super) fn end(&mut self) -> Result<(), EncodeError> {
        self.last
            .take()
            .map_or(Ok(()), |run| self.sink.derived(&run))
            .map_err(EncodeError::Write)
    }

    fn page(
        &mut self,
        at: PageAt,
        class: Class,
        bytes: &[u8],
        pieces: &mut Vec<Chunk>,
    ) -> Result<(), EncodeError> {
        let thrifty = self.runs >= RUNS_ENOUGH;
        match class {
            // In the order of places there are fewer runs of them: they come again with the rest.
            Class::Unchanged | Class::Zero | Class::BasePage(_) if self.early.is_some() => {
                return Ok(());
            }
            Class::Unchanged => self.counts.unchanged += 1,
            Class::Zero => {
                self.counts.zero += 1;
                self.derived(at, DerivedSource::Zero)?;
            }
            Class::BasePage(source) if !thrifty => {
                self.counts.base += 1;
                self.derived(at, DerivedSource::BasePages(source))?;
            }
            Class::BasePage(_) => self.own(at, Digest::of(bytes), bytes, pieces)?,
            Class::Own(hash) => {
                let known = if thrifty {
                    None
                } else {
                    self.table.find(&hash)
                };
                match known {
                    Some(slot) => {
                        self.counts.repeated += 1;
                        if slot >= self.slots {
                            self.filling.further.push((at, slot));
                        } else {
                            self.derived(at, DerivedSource::Slots(slot))?;
                        }
                    }
                    None => self.own(at, hash, bytes, pieces)?,
                }
                if let Some(early) = &mut self.early {
                    early.insert(at);
                }
            }
        }
        self.done += 1;
        Ok(())
    }

    /// Gives a page a slot of its own.
    fn own(
        &mut self,
        at: PageAt,
        hash: Digest,
        bytes: &[u8],
        pieces: &mut Vec<Chunk>,
    ) -> Result<(), EncodeError> {
        let is_early = self.early.is_some();
        let pages = &self.filling.pages;
        // None but the early segments has pages of two spaces.
        if !is_early && pages.last().is_some_and(|last| last.0.space != at.space) {
            self.seal(pieces)?;
        }
        self.counts.literal += 1;
        let slot = self.slots + u32::try_from(self.filling.pages.len()).unwrap_or(u32::MAX);
        self.table.set(&hash, slot);
        if self.filling.pages.is_empty() {
            self.filling.bytes = self.pool.take();
            self.filling.bytes.clear();
        }
        self.filling.pages.push((at, hash));
        self.filling.bytes.extend_from_slice(bytes);
        let pages_max = if is_early {
            EARLY_SEGMENT_PAGES
        } else {
            SEGMENT_PAGES
        };
        if self.filling.pages.len() == pages_max {
            self.seal(pieces)?;
        }
        Ok(())
    }

    /// The segment is full. Inside of it order has no meaning, so its pages are by place.
    fn seal(&mut self, pieces: &mut Vec<Chunk>) -> Result<(), EncodeError> {
        let Filling {
            pages,
            mut bytes,
            further,
        } = std::mem::take(&mut self.filling);
        if pages.is_empty() {
            return Ok(());
        }
        let mut order: Vec<usize> = (0..pages.len()).collect();
        order.sort_by_key(|number| pages[*number].0);
        if !order.is_sorted() {
            let mut sorted = self.pool.take();
            sorted.clear();
            for number in &order {
                sorted.extend_from_slice(page_bytes(&bytes, *number));
            }
            self.pool.give(std::mem::replace(&mut bytes, sorted));
        }
        let mut slots = vec![0; pages.len()];
        let mut runs: Vec<PageSpan> = Vec::new();
        for (slot, number) in (self.slots..).zip(&order) {
            slots[*number] = slot;
            let at = pages[*number].0;
            match runs.last_mut() {
                Some(run) if run.first.plus(run.pages) == at => run.pages += 1,
                _ => runs.push(PageSpan {
                    first: at,
                    pages: 1,
                }),
            }
        }
        if !order.is_sorted() {
            for (from, ((_, hash), slot)) in (self.slots..).zip(pages.iter().zip(&slots)) {
                self.table.move_to(hash, from, *slot);
            }
        }
        let number = self.segment_ends.len();
        check_limit("the number of segments", number + 1, to_usize(SEGMENTS_MAX))?;
        self.add_runs(to_u64(runs.len()))?;
        let first = self.slots;
        self.slots += u32::try_from(pages.len()).unwrap_or(u32::MAX);
        self.segment_ends.push(self.slots);
        for (at, slot) in further {
            self.derived(at, DerivedSource::Slots(slots[inside(slot, first)]))?;
        }
        pieces.push(Chunk {
            // At most SEGMENTS_MAX.
            number: u32::try_from(number).unwrap_or(u32::MAX),
            early: self.early.is_some(),
            runs,
            bytes,
        });
        Ok(())
    }

    fn add_runs(&mut self, runs: u64) -> Result<(), EncodeError> {
        self.runs += runs;
        if self.runs > u64::from(RUNS_MAX) {
            return Err(EncodeError::Limit {
                what: "the number of runs of changed pages",
                found: self.runs,
                limit: u64::from(RUNS_MAX),
            });
        }
        Ok(())
    }

    /// Adds a page to the last derived run if that goes on, or begins another one.
    fn derived(&mut self, at: PageAt, source: DerivedSource) -> Result<(), EncodeError> {
        if let Some(run) = &self.last
            && run.pages.pages < RUN_PAGES_MAX
            && run.pages.first.plus(run.pages.pages) == at
            && self.goes_on(run, source)
        {
            if let Some(run) = &mut self.last {
                run.pages.pages += 1;
            }
            return Ok(());
        }
        self.end()?;
        self.add_runs(1)?;
        let pages = PageSpan {
            first: at,
            pages: 1,
        };
        self.last = Some(DerivedRun { pages, source });
        Ok(())
    }

    fn goes_on(&self, run: &DerivedRun, source: DerivedSource) -> bool {
        let pages = run.pages.pages;
        match (run.source, source) {
            (DerivedSource::Zero, DerivedSource::Zero) => true,
            (DerivedSource::BasePages(first), DerivedSource::BasePages(next)) => {
                first.plus(pages) == next
            }
            (DerivedSource::Slots(first), DerivedSource::Slots(next)) => {
                // Not into the next segment.
                u64::from(first) + pages == u64::from(next)
                    && self.segment_ends.binary_search(&next).is_err()
            }
            _ => false,
        }
    }
}

impl Between<Reader<'_>> for Planner<'_> {
    fn pass(&mut self, batch: Option<Batch>, pieces: &mut Vec<Chunk>) -> Result<(), EncodeError> {
        let Some(batch) = batch else {
            return self.seal(pieces);
        };
        let (pages, _) = batch.bytes.as_chunks::<PAGE_BYTES>();
        for ((at, class), bytes) in batch.pages.iter().zip(pages) {
            self.page(*at, *class, bytes, pieces)?;
        }
        self.pool.give(batch.bytes);
        let (done, total) = (self.done, self.total.max(self.done));
        (self.progress)(Progress { done, total });
        Ok(())
    }

    fn take(&mut self, segment: SealedSegment) -> Result<(), EncodeError> {
        self.sink.segment(&segment).map_err(EncodeError::Write)?;
        self.pool.give(segment.part.bytes);
        Ok(())
    }
}
