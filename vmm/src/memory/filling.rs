//! What is missing, and the calls that fill it: the inside of a [`Placer`](super::Placer).
//!
//! A bit a page says whether it can be touched without the pager. It is set after the kernel has
//! placed the page, so it may lag behind for a moment, never run ahead; two threads that meet at a
//! page are told apart by the kernel (EEXIST).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::layout::{PAGE, PAGE_BYTES, PageRun, RamPage, to_u64, to_usize, word_mask};
use super::placer::{PlaceError, Placed};
use super::ram::{GuestRam, Slot};
use super::uffd::{Filled, Uffd};

/// Bytes that one ioctl places at the most. More would not be faster, but whoever waits for the
/// first page of a call is woken only when the call is over.
const CALL_BYTES_MAX: u64 = 128 << 10;
/// How often a call is repeated while the address space changes under it.
pub(super) const RETRIES_MAX: u32 = 100_000;

/// Pages by what became of them, and calls.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) placed: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) base: AtomicU64,
    pub(super) redundant: AtomicU64,
    pub(super) calls: AtomicU64,
}

/// Where the contents of a run come from.
#[derive(Clone, Copy)]
pub(super) enum Contents<'a> {
    Bytes(&'a [u8]),
    Base(&'a [u8]),
    Zero,
}

/// The delta pieces of a RAM and what is known about their pages. Lists are sorted.
#[derive(Debug)]
pub(super) struct Missing {
    /// Keeps the memory mapped while pages can be placed into it.
    pub(super) _guest: Arc<GuestRam>,
    pub(super) slots: Vec<Slot>,
    pub(super) uffd: Uffd,
    pub(super) registered: Vec<PageRun>,
    pub(super) delta: Vec<PageRun>,
    pub(super) absorbed_base: Vec<PageRun>,
    pub(super) absorbed_zero: Vec<PageRun>,
    pub(super) base: Option<File>,
    /// A bit a page: it can be touched without the pager.
    pub(super) placed: Vec<AtomicU64>,
    pub(super) pages: u64,
    pub(super) remaining: AtomicU64,
    /// The next absorbed page that the stream has to place, counted over both lists.
    pub(super) absorbed_next: AtomicU64,
    pub(super) counters: Counters,
    pub(super) complete: EventFd,
    pub(super) finished: AtomicBool,
    /// `finish` has come to its end: userfaultfd has nothing to do with the memory any more.
    pub(super) released: AtomicBool,
}

impl Missing {
    pub(super) fn is_placed(&self, page: RamPage) -> bool {
        page.0 < self.pages
            && self.placed[to_usize(page.0 / 64)].load(Ordering::Acquire) & (1 << (page.0 % 64))
                != 0
    }

    /// Where a run lies in this process and its length in bytes, cut at the end of its slot;
    /// length 0 outside RAM.
    pub(super) fn host_of(&self, run: &PageRun) -> (u64, u64) {
        let found = self.slots.iter().find_map(|slot| {
            let part = run.overlap(&slot.run())?;
            Some((slot.host_of(run.first)?, part.bytes()))
        });
        found.unwrap_or((0, 0))
    }

    /// The longest run from `at` on, within `end`, whose pages are all placed or all missing.
    fn stretch(&self, at: RamPage, end: RamPage) -> (bool, u64) {
        let placed = self.is_placed(at);
        let flip = if placed { u64::MAX } else { 0 };
        let mut page = at.0 + 1;
        while page < end.0 {
            let word = self.placed[to_usize(page / 64)].load(Ordering::Acquire);
            let other = (word ^ flip) >> (page % 64);
            if other != 0 {
                page += u64::from(other.trailing_zeros());
                break;
            }
            page = (page / 64 + 1) * 64;
        }
        (placed, page.min(end.0) - at.0)
    }

    /// Marks a run as placed.
    fn mark(&self, run: &PageRun) -> Result<(), PlaceError> {
        let mut new = 0;
        for_words(run, |word, mask| {
            let before = self.placed[word].fetch_or(mask, Ordering::AcqRel);
            new += u64::from((mask & !before).count_ones());
        });
        if new > 0 && self.remaining.fetch_sub(new, Ordering::AcqRel) == new {
            self.complete.write(1).map_err(PlaceError::Signal)?;
        }
        Ok(())
    }

    /// Places what is missing of a run that belongs to registered pieces.
    pub(super) fn fill(&self, run: &PageRun, contents: Contents<'_>) -> Result<Placed, PlaceError> {
        let kind = match contents {
            Contents::Bytes(_) => &self.counters.placed,
            Contents::Base(_) => &self.counters.base,
            Contents::Zero => &self.counters.zero,
        };
        let mut placed = Placed::default();
        let mut at = run.first;
        let mut retries = 0;
        while at < run.end() {
            let (there, count) = self.stretch(at, run.end());
            if there {
                placed.redundant += count;
                at.0 += count;
                continue;
            }
            match self.call(run, &PageRun { first: at, count }, contents)? {
                Filled::Bytes(bytes) => {
                    let done = PageRun {
                        first: at,
                        count: bytes / PAGE_BYTES,
                    };
                    kind.fetch_add(done.count, Ordering::Relaxed);
                    self.mark(&done)?;
                    placed.new += done.count;
                    at = done.end();
                    retries = 0;
                }
                // Another thread placed it and has not marked it yet.
                Filled::Exists => {
                    self.mark(&PageRun {
                        first: at,
                        count: 1,
                    })?;
                    placed.redundant += 1;
                    at.0 += 1;
                }
                Filled::Again if retries < RETRIES_MAX => {
                    retries += 1;
                    std::thread::yield_now();
                }
                Filled::Again => return Err(PlaceError::Unsettled { page: at.0 }),
                // All is there and `finish` was called between the look and the call.
                Filled::Unregistered if self.is_placed(at) => {}
                Filled::Unregistered => return Err(PlaceError::Unregistered { page: at.0 }),
            }
        }
        if placed.redundant > 0 {
            self.counters
                .redundant
                .fetch_add(placed.redundant, Ordering::Relaxed);
        }
        Ok(placed)
    }

    /// One ioctl for the start of `part`, whose contents are those of `run` at the same place.
    fn call(
        &self,
        run: &PageRun,
        part: &PageRun,
        contents: Contents<'_>,
    ) -> Result<Filled, PlaceError> {
        let (host, len) = self.host_of(part);
        let len = len.min(CALL_BYTES_MAX);
        self.counters.calls.fetch_add(1, Ordering::Relaxed);
        let filled = match contents {
            Contents::Bytes(bytes) | Contents::Base(bytes) => {
                let from = to_usize(part.first.offset() - run.first.offset());
                self.uffd.copy(host, &bytes[from..from + to_usize(len)])
            }
            Contents::Zero => self.uffd.zero(host, len),
        };
        filled.map_err(|source| PlaceError::Kernel {
            page: part.first.0,
            source,
        })
    }

    /// Places a run of absorbed pages from the base's memory file.
    pub(super) fn fill_from_base(&self, run: &PageRun) -> Result<Placed, PlaceError> {
        let failed = |page: RamPage, source| PlaceError::Base {
            page: page.0,
            source,
        };
        let base = self.base.as_ref().ok_or_else(|| {
            failed(
                run.first,
                io::Error::new(io::ErrorKind::NotFound, "there is no base"),
            )
        })?;
        let mut one = [0u8; PAGE];
        let mut many = Vec::new();
        let buffer: &mut [u8] = if run.count == 1 {
            &mut one
        } else {
            many.resize(to_usize(run.bytes().min(CALL_BYTES_MAX)), 0);
            &mut many
        };
        let mut placed = Placed::default();
        let mut at = run.first;
        while at < run.end() {
            let left = PageRun {
                first: at,
                count: run.end().0 - at.0,
            };
            let part = &mut buffer[..to_usize(left.bytes().min(CALL_BYTES_MAX))];
            base.read_exact_at(part, at.offset())
                .map_err(|source| failed(at, source))?;
            let count = to_u64(part.len()) / PAGE_BYTES;
            let now = self.fill(&PageRun { first: at, count }, Contents::Base(part))?;
            placed.new += now.new;
            placed.redundant += now.redundant;
            at.0 += count;
        }
        Ok(placed)
    }

    /// Puts zeros where pages of a run are missing. Returns for how many.
    pub(super) fn give_up(&self, run: &PageRun) -> Result<u64, PlaceError> {
        let mut at = run.first;
        let mut pages = 0;
        while at < run.end() {
            let (there, count) = self.stretch(at, run.end());
            if !there {
                pages += self
                    .fill(&PageRun { first: at, count }, Contents::Zero)?
                    .new;
            }
            at.0 += count;
        }
        Ok(pages)
    }

    /// Makes pieces with missing pages inaccessible.
    fn seal(&self) {
        for run in &self.registered {
            let (placed, count) = self.stretch(run.first, run.end());
            if placed && count == run.count {
                continue;
            }
            let (host, len) = self.host_of(run);
            let start = std::ptr::with_exposed_provenance_mut(to_usize(host));
            // SAFETY: the range is a delta piece inside memory that `_guest` keeps mapped.
            // Whoever touches it from now on gets SIGSEGV, or EFAULT from the kernel, instead of
            // contents that nobody supplied.
            let done = unsafe { libc::mprotect(start, to_usize(len), libc::PROT_NONE) };
            if done != 0 {
                // Better no process than one that runs on a hole.
                std::process::abort();
            }
        }
    }
}

impl Drop for Missing {
    fn drop(&mut self) {
        if *self.remaining.get_mut() > 0 {
            self.seal();
        }
    }
}

/// Whether a run lies within one run of a sorted list.
pub(super) fn is_within(sorted: &[PageRun], run: &PageRun) -> bool {
    let Some(end) = run.first.0.checked_add(run.count) else {
        return false;
    };
    let at = sorted.partition_point(|piece| piece.end() <= run.first);
    run.count > 0
        && sorted
            .get(at)
            .is_some_and(|piece| piece.first <= run.first && end <= piece.end().0)
}

/// Calls `each` with every word of a bitmap that a run touches and the mask of its bits there.
pub(super) fn for_words(run: &PageRun, mut each: impl FnMut(usize, u64)) {
    let end = run.end().0;
    let mut at = run.first.0;
    while at < end {
        let (word, mask, next) = word_mask(at, end);
        each(word, mask);
        at = next;
    }
}
