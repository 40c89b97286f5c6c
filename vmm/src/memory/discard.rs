//! Giving guest pages back to the host, because the guest says that it needs their contents no
//! longer.
//!
//! What a page reads as afterwards follows from what is behind it, and everything that asks about
//! memory later (`private_pages`, images, overlays) goes by that:
//!
//! | piece | what is done | the page then reads as |
//! | --- | --- | --- |
//! | zero | its memory is freed | zeros |
//! | base | the private copy is freed, so that it leaves the delta | the base's page |
//! | delta, all of RAM is there | its memory is freed | zeros |
//! | delta, pages still missing | a page that has not come becomes zeros and is not needed any more; one that has come stays | zeros, or as before |
//!
//! The last row is what keeps a discard and a placement apart. A page that was placed and dropped
//! again while its piece is registered with userfaultfd would be missing for ever, as everybody
//! takes it for placed; so nothing is dropped there before the last page is there and the piece is
//! out of userfaultfd's hands ([`Placer::is_released`]), after which nobody places anything. A page
//! that is missing goes through the placer's own gate: the kernel lets either the zeros or the
//! contents in, never both, and wakes whoever waits.
//!
//! Faults, vCPUs and KVM need no care: the kernel takes a page out of all page tables at once (KVM
//! hears of it through its MMU notifier), so a touch meets the old page or the new one, whole. Who
//! must not touch a page while it is discarded is the guest, by the rules of its balloon, and one
//! that does harms itself. Devices run on the thread that discards.
//!
//! A discarded page counts as written by a device, after the fact, so that the dirty log has it and
//! a copy of RAM that follows the log reads as RAM does.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::layout::{
    LayoutError, PAGE, PAGE_BYTES, PageRun, PageSet, RamLayout, RamPage, to_u64, to_usize,
};
use super::pagemap::{Pagemap, PagemapError};
use super::pieces::{Backing, Piece};
use super::placer::{PlaceError, Placer};
use super::ram::{GuestRam, Slot};
use crate::sparse::{self, is_zero};

/// Pages that are looked at in one go.
const CHUNK_PAGES: u64 = 64;

/// Why pages could not be given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// They are not all RAM.
    #[error("cannot discard pages that RAM does not have")]
    Outside(#[source] LayoutError),
    /// The kernel refused.
    #[error("cannot free {count} pages of guest RAM at page {first}")]
    Advise {
        /// First page of the run.
        first: u64,
        /// Pages in the run.
        count: u64,
        /// What madvise said.
        #[source]
        source: io::Error,
    },
    /// A missing page could not be made zero.
    #[error("cannot give up pages that have not arrived")]
    GiveUp(#[source] PlaceError),
    /// The base's memory file cannot be searched for holes.
    #[error("cannot find the holes in the base's memory file")]
    Base(#[source] io::Error),
    /// RAM cannot be read.
    #[error("cannot read page {page} of guest RAM")]
    Read {
        /// The page.
        page: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// It cannot be said which pages have memory of their own.
    #[error("cannot look through the mappings of guest RAM")]
    Pagemap(#[source] PagemapError),
}

/// What discarded pages may read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Afterwards {
    /// Whatever is behind them.
    Any,
    /// Zeros only: a page that would read as anything else stays as it is.
    Zeros,
}

/// Discards pages of one RAM. Clones are handles to the same.
#[derive(Debug, Clone)]
pub struct Discarder {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: RamLayout,
    guest: Arc<GuestRam>,
    slots: Vec<Slot>,
    pieces: Vec<Piece>,
    base: Option<File>,
    placer: Option<Placer>,
    pagemap: Pagemap,
}

impl Discarder {
    /// For RAM that is made of these parts.
    pub(super) fn new(
        layout: RamLayout,
        guest: Arc<GuestRam>,
        slots: Vec<Slot>,
        pieces: Vec<Piece>,
        base: Option<File>,
        placer: Option<Placer>,
    ) -> Result<Self, PagemapError> {
        let pagemap = Pagemap::open()?;
        Ok(Self {
            inner: Arc::new(Inner {
                layout,
                guest,
                slots,
                pieces,
                base,
                placer,
                pagemap,
            }),
        })
    }

    /// Where RAM sits in the guest's address space.
    pub fn layout(&self) -> &RamLayout {
        &self.inner.layout
    }

    /// Gives the pages of `run` back as far as `afterwards` allows; returns how many were. Those may
    /// have had no memory before. Safe at any time, see the head of the file.
    ///
    /// # Errors
    /// [`DiscardError`]; some of the pages may have been discarded.
    pub fn discard(&self, run: &PageRun, afterwards: Afterwards) -> Result<u64, DiscardError> {
        let inner = &self.inner;
        let mut pages = 0;
        for (part, backing) in inner.parts(run)? {
            pages += match backing {
                Backing::Zero => inner.release(&part)?,
                Backing::Base if afterwards == Afterwards::Any => inner.release(&part)?,
                Backing::Base => inner.in_holes(&part, Inner::release)?,
                Backing::Delta => match &inner.placer {
                    Some(placer) if !placer.is_released() => inner.give_up(placer, &part)?,
                    _ => inner.release(&part)?,
                },
            };
        }
        Ok(pages)
    }

    /// Gives back what pages of `run` hold nothing but zeros, and read as zeros afterwards too;
    /// returns how many. Nobody may write to the pages meanwhile: the VM is paused.
    ///
    /// # Errors
    /// [`DiscardError`].
    pub fn discard_zeros(&self, run: &PageRun) -> Result<u64, DiscardError> {
        let inner = &self.inner;
        let mut pages = 0;
        for (part, backing) in inner.parts(run)? {
            pages += match backing {
                Backing::Zero => inner.release_zeros(&part)?,
                Backing::Base => inner.in_holes(&part, Inner::release_zeros)?,
                Backing::Delta => match &inner.placer {
                    Some(placer) if !placer.is_released() => 0,
                    _ => inner.release_zeros(&part)?,
                },
            };
        }
        Ok(pages)
    }
}

impl Inner {
    /// `run`, cut where the backing changes.
    fn parts(
        &self,
        run: &PageRun,
    ) -> Result<impl Iterator<Item = (PageRun, Backing)> + use<'_>, DiscardError> {
        self.layout.check(run).map_err(DiscardError::Outside)?;
        let run = *run;
        let start = self
            .pieces
            .partition_point(|piece| piece.run.end() <= run.first);
        Ok(self.pieces[start..]
            .iter()
            .map_while(move |piece| Some((piece.run.overlap(&run)?, piece.backing))))
    }

    /// Frees the memory of a run inside one piece.
    fn release(&self, run: &PageRun) -> Result<u64, DiscardError> {
        let failed = |source| DiscardError::Advise {
            first: run.first.0,
            count: run.count,
            source,
        };
        let mut slots = self.slots.iter().zip(self.guest.iter());
        let (slot, region) = slots
            .find(|(slot, _)| slot.run().overlap(run) == Some(*run))
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let offset = to_usize(run.first.offset() - slot.first.offset());
        let len = to_usize(run.bytes());
        let start = region.as_ptr().wrapping_add(offset);
        // SAFETY: the range lies in one region, which `guest` keeps mapped; it is private memory,
        // anonymous or of a file, that only volatile accessors and the kernel touch, so that its
        // contents may change at any time. `discard` has made sure that no userfaultfd would
        // wait for the pages to come back.
        let done = unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) };
        if done != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        region.bitmap().mark_dirty(offset, len);
        Ok(run.count)
    }

    /// Does `free` with those parts of a run in a base piece which the base's file has no data for.
    fn in_holes(
        &self,
        run: &PageRun,
        free: impl Fn(&Self, &PageRun) -> Result<u64, DiscardError>,
    ) -> Result<u64, DiscardError> {
        let Some(base) = &self.base else {
            return Ok(0);
        };
        let range = run.first.offset()..run.end().offset();
        let (mut at, end) = (range.start, range.end);
        let mut pages = 0;
        for data in sparse::data(base, range).chain([Ok(end..end)]) {
            let data = data.map_err(DiscardError::Base)?;
            let (first, last) = (at.div_ceil(PAGE_BYTES), data.start / PAGE_BYTES);
            if first < last {
                pages += free(self, &PageRun::new(first, last - first))?;
            }
            at = data.end;
        }
        Ok(pages)
    }

    /// Frees those pages of a run that are the VM's own and hold zeros; without them there are zeros.
    fn release_zeros(&self, run: &PageRun) -> Result<u64, DiscardError> {
        let Some(slot) = self
            .slots
            .iter()
            .find(|slot| slot.run().contains(run.first))
        else {
            return Ok(0);
        };
        let mut own = PageSet::new(self.layout.pages());
        let host = slot.host + (run.first.offset() - slot.first.offset());
        self.pagemap
            .add_own(host, run, &mut own)
            .map_err(DiscardError::Pagemap)?;
        let mut zeros = PageSet::new(self.layout.pages());
        let mut buffer = vec![0; to_usize(CHUNK_PAGES) * PAGE];
        for run in own.runs() {
            let mut at = run.first.0;
            while at < run.end().0 {
                let count = (run.end().0 - at).min(CHUNK_PAGES);
                let bytes = &mut buffer[..to_usize(count) * PAGE];
                self.read(RamPage(at), bytes)?;
                for (number, page) in (at..).zip(bytes.chunks_exact(PAGE)) {
                    if is_zero(page) {
                        zeros.insert(RamPage(number));
                    }
                }
                at += count;
            }
        }
        zeros.runs().map(|run| self.release(&run)).sum()
    }

    fn read(&self, page: RamPage, bytes: &mut [u8]) -> Result<(), DiscardError> {
        let failed = |source| DiscardError::Read {
            page: page.0,
            source,
        };
        let gpa = self
            .layout
            .gpa_of(page)
            .ok_or_else(|| failed(GuestMemoryError::InvalidBackendAddress))?;
        self.guest.read_slice(bytes, gpa).map_err(failed)
    }

    /// Makes zeros of the pages of a run that have not arrived.
    fn give_up(&self, placer: &Placer, run: &PageRun) -> Result<u64, DiscardError> {
        let pages = placer.give_up(run).map_err(DiscardError::GiveUp)?;
        if pages > 0
            && let Some((slot, region)) = self
                .slots
                .iter()
                .zip(self.guest.iter())
                .find(|(slot, _)| slot.run().contains(run.first))
        {
            let offset = to_usize(run.first.offset() - slot.first.offset());
            region.bitmap().mark_dirty(offset, to_usize(run.bytes()));
        }
        Ok(pages)
    }
}

/// The whole pages inside `len` bytes at guest address `gpa`, as far as they are RAM: nothing, one
/// run, or one on either side of the hole.
pub fn whole_pages(layout: &RamLayout, gpa: u64, len: u64) -> impl Iterator<Item = PageRun> + '_ {
    let first = gpa.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
    let end = gpa.saturating_add(len) & !(PAGE_BYTES - 1);
    layout.regions().iter().filter_map(move |region| {
        let start = first.max(region.gpa.0);
        let stop = end.min(region.gpa.0 + region.len);
        (start < stop).then(|| {
            let offset = region.file_offset + (start - region.gpa.0);
            PageRun::new(offset / PAGE_BYTES, (stop - start) / PAGE_BYTES)
        })
    })
}

/// The pages that page frame numbers name, each once, as runs in order; numbers that are not RAM are
/// left out, and counted in the second value.
pub fn pages_of_frames(layout: &RamLayout, frames: &[u32]) -> (Vec<PageRun>, u64) {
    let page =
        |frame: &u32| layout.page_at(vm_memory::GuestAddress(u64::from(*frame) * PAGE_BYTES));
    let mut pages: Vec<RamPage> = frames.iter().filter_map(page).collect();
    let outside = to_u64(frames.len() - pages.len());
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<PageRun> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end() == page => run.count += 1,
            _ => runs.push(PageRun {
                first: page,
                count: 1,
            }),
        }
    }
    (runs, outside)
}
