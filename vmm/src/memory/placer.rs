//! Placing pages: the one gate through which contents from outside enter guest memory.
//!
//! A [`Placer`] is shared by the pager (faults) and the workers (the stream). It takes contiguous
//! pages, places them with as few ioctls as the kernel allows, and keeps count of what is there.
//! Every page is placed once: whoever comes second is told so by the kernel and counts as
//! redundant. Pages that the plan did not expect from outside are refused.
//!
//! The userfaultfd lives as long as a placer does. If the last one goes while pages are missing,
//! the pieces they are in are made inaccessible first: closing the userfaultfd would turn missing
//! pages into zeros, and a guest must never run on a hole.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::filling::{Contents, Counters, Missing, RETRIES_MAX, for_words, is_within};
use super::layout::{PAGE, PAGE_BYTES, PageRun, RamPage, to_u64, to_usize};
use super::pieces::{Backing, Plan};
use super::poll::{self, Wait};
use super::ram::{GuestRam, Slot};
use super::uffd::{Uffd, UffdError};

/// Why pages were not placed.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The contents are no whole number of pages, or none.
    #[error("{bytes} bytes are no positive number of pages")]
    Ragged {
        /// Their number.
        bytes: usize,
    },
    /// Contents were offered for a page that does not wait for any.
    #[error("pages {first} + {count} are not all in the delta")]
    Outside {
        /// First page of the run.
        first: u64,
        /// Pages in the run.
        count: u64,
    },
    /// The kernel refused.
    #[error("placing failed at page {page}")]
    Kernel {
        /// The page it stopped at.
        page: u64,
        /// Why.
        #[source]
        source: UffdError,
    },
    /// The address space kept changing.
    #[error("placing page {page} was put off {RETRIES_MAX} times, as mappings kept changing")]
    Unsettled {
        /// The page.
        page: u64,
    },
    /// The kernel no longer has the page registered, although it is missing.
    #[error("page {page} is missing, but not registered with userfaultfd")]
    Unregistered {
        /// The page.
        page: u64,
    },
    /// The base's memory file could not be read.
    #[error("cannot read page {page} from the base's memory file")]
    Base {
        /// The page.
        page: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody could be told that the last page is there.
    #[error("cannot signal that all pages are there")]
    Signal(#[source] io::Error),
}

/// What became of pages that were handed in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Placed {
    /// Pages that are there because of this call.
    pub new: u64,
    /// Pages that were there already.
    pub redundant: u64,
}

/// What all users of a placer did so far, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlacerStats {
    /// Placed with contents from outside.
    pub placed: u64,
    /// Placed as zeros.
    pub zero: u64,
    /// Placed from the base's memory file.
    pub base: u64,
    /// Handed in although they were there.
    pub redundant: u64,
    /// Ioctls that placed pages.
    pub calls: u64,
    /// Still missing.
    pub remaining: u64,
}

impl PlacerStats {
    /// Bytes that were copied into guest memory.
    pub fn bytes(&self) -> u64 {
        (self.placed + self.base) * PAGE_BYTES
    }
}

/// What a missing page waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaits {
    /// Nothing: it is there, or was never missing.
    Nothing,
    /// Contents from outside.
    Source,
    /// Its copy from the base's memory file.
    Base,
    /// Zeros.
    Zero,
}

/// Places pages. Clones share everything.
#[derive(Debug, Clone)]
pub struct Placer {
    shared: Arc<Missing>,
    /// In record mode, the one page that may be placed through this clone.
    only: Option<RamPage>,
}

impl Placer {
    /// Registers the delta pieces of a plan and takes charge of them.
    ///
    /// # Safety
    /// The slots must be those of `guest`, and the delta pieces fresh private anonymous memory
    /// inside them.
    pub(super) unsafe fn new(
        guest: &Arc<GuestRam>,
        slots: &[Slot],
        plan: &Plan,
        base: Option<File>,
    ) -> Result<Self, PlacerBuildError> {
        let uffd = Uffd::open()?;
        let registered: Vec<PageRun> = plan.runs_of(Backing::Delta).collect();
        let pages: u64 = slots.iter().map(|slot| slot.run().count).sum();
        let placed: Vec<AtomicU64> = (0..pages.div_ceil(64))
            .map(|_| AtomicU64::new(u64::MAX))
            .collect();
        for run in &registered {
            for_words(run, |word, mask| {
                placed[word].fetch_and(!mask, Ordering::Relaxed);
            });
        }
        let remaining = registered.iter().map(|run| run.count).sum();
        let complete = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(PlacerBuildError::Event)?;
        if remaining == 0 {
            complete.write(1).map_err(PlacerBuildError::Event)?;
        }
        let shared = Missing {
            _guest: Arc::clone(guest),
            slots: slots.to_vec(),
            uffd,
            registered,
            delta: plan.delta.clone(),
            absorbed_base: plan.absorbed_base.clone(),
            absorbed_zero: plan.absorbed_zero.clone(),
            base,
            placed,
            pages,
            remaining: AtomicU64::new(remaining),
            absorbed_next: AtomicU64::new(0),
            counters: Counters::default(),
            complete,
            finished: AtomicBool::new(false),
            released: AtomicBool::new(false),
        };
        for run in &shared.registered {
            let (host, len) = shared.host_of(run);
            // SAFETY: the caller vouches for the memory; a run that is in no slot has length 0,
            // which the kernel refuses.
            unsafe { shared.uffd.register(host, len) }?;
        }
        Ok(Self {
            shared: Arc::new(shared),
            only: None,
        })
    }

    /// A placer through which only `page` can be placed.
    pub(super) fn only(&self, page: RamPage) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            only: Some(page),
        }
    }

    /// Places the contents of neighbouring pages from `first` on. Pages that are there already
    /// stay as they are and count as redundant. Threads that wait for one of the pages go on.
    ///
    /// Safe to call from any thread at any time; does not block on other threads.
    ///
    /// # Errors
    /// [`PlaceError`]: contents that are no whole pages or not for pages of the delta are refused
    /// as a whole; if the kernel fails, pages before the one it names are there.
    pub fn place(&self, first: RamPage, bytes: &[u8]) -> Result<Placed, PlaceError> {
        if bytes.is_empty() || !bytes.len().is_multiple_of(PAGE) {
            return Err(PlaceError::Ragged { bytes: bytes.len() });
        }
        let run = PageRun {
            first,
            count: to_u64(bytes.len() / PAGE),
        };
        if !is_within(&self.shared.delta, &run) {
            return Err(PlaceError::Outside {
                first: first.0,
                count: run.count,
            });
        }
        match self.clip(&run) {
            None => Ok(Placed::default()),
            Some(part) => {
                let skipped = to_usize(part.first.offset() - first.offset());
                let bytes = &bytes[skipped..skipped + to_usize(part.bytes())];
                self.shared.fill(&part, Contents::Bytes(bytes))
            }
        }
    }

    /// Places zero pages.
    ///
    /// # Errors
    /// As [`Placer::place`].
    pub fn zero(&self, run: &PageRun) -> Result<Placed, PlaceError> {
        let shared = &self.shared;
        if !is_within(&shared.delta, run) && !is_within(&shared.absorbed_zero, run) {
            return Err(PlaceError::Outside {
                first: run.first.0,
                count: run.count,
            });
        }
        match self.clip(run) {
            None => Ok(Placed::default()),
            Some(part) => shared.fill(&part, Contents::Zero),
        }
    }

    /// Places up to `pages_max` of the pages that lie between delta pages but are the base's or
    /// zero. Returns how many it took on; 0 means that none are left. For the stream: call it
    /// until it returns 0; several threads may.
    ///
    /// # Errors
    /// [`PlaceError`] if the base cannot be read or the kernel fails.
    pub fn place_base_pages(&self, pages_max: u64) -> Result<u64, PlaceError> {
        let shared = &self.shared;
        let first = shared.absorbed_next.fetch_add(pages_max, Ordering::Relaxed);
        let mut skip = first;
        let mut left = pages_max;
        let base = shared.absorbed_base.iter().map(|run| (run, true));
        let zero = shared.absorbed_zero.iter().map(|run| (run, false));
        for (run, from_base) in base.chain(zero) {
            if skip >= run.count {
                skip -= run.count;
                continue;
            }
            let count = (run.count - skip).min(left);
            let part = PageRun::new(run.first.0 + skip, count);
            skip = 0;
            if from_base {
                shared.fill_from_base(&part)?;
            } else {
                shared.fill(&part, Contents::Zero)?;
            }
            left -= count;
            if left == 0 {
                break;
            }
        }
        Ok(pages_max - left)
    }

    /// Whether a page can be touched without waiting: placed, or never missing. False outside RAM.
    pub fn is_placed(&self, page: RamPage) -> bool {
        self.shared.is_placed(page)
    }

    /// How many pages are missing.
    pub fn remaining(&self) -> u64 {
        self.shared.remaining.load(Ordering::Acquire)
    }

    /// What has been done so far.
    pub fn stats(&self) -> PlacerStats {
        let counters = &self.shared.counters;
        PlacerStats {
            placed: counters.placed.load(Ordering::Relaxed),
            zero: counters.zero.load(Ordering::Relaxed),
            base: counters.base.load(Ordering::Relaxed),
            redundant: counters.redundant.load(Ordering::Relaxed),
            calls: counters.calls.load(Ordering::Relaxed),
            remaining: self.remaining(),
        }
    }

    /// Becomes readable when the last page is there, and stays so: for event loops. Nobody may
    /// read from it.
    pub fn complete_event(&self) -> &EventFd {
        &self.shared.complete
    }

    /// Waits until no page is missing, or the time is over; says which (true: none is missing).
    ///
    /// # Errors
    /// If poll fails.
    pub fn wait_complete(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            if self.remaining() == 0 {
                return Ok(true);
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            poll::wait(
                &mut [Wait::readable(self.shared.complete.as_raw_fd())],
                left,
            )?;
        }
    }

    /// Takes the pages out of userfaultfd's hands once none is missing, so that they become
    /// memory like any other; before that it does nothing. Returns whether that is so now.
    ///
    /// # Errors
    /// [`PlaceError::Kernel`] if the kernel refuses.
    pub fn finish(&self) -> Result<bool, PlaceError> {
        let shared = &self.shared;
        if self.remaining() != 0 {
            return Ok(false);
        }
        if shared.finished.swap(true, Ordering::AcqRel) {
            return Ok(true);
        }
        for run in &shared.registered {
            let (host, len) = shared.host_of(run);
            shared
                .uffd
                .unregister(host, len)
                .map_err(|source| PlaceError::Kernel {
                    page: run.first.0,
                    source,
                })?;
        }
        shared.released.store(true, Ordering::Release);
        Ok(true)
    }

    /// Whether the memory is back in the kernel's ordinary care: [`Placer::finish`] is through, and
    /// nothing will be placed any more.
    pub(super) fn is_released(&self) -> bool {
        self.shared.released.load(Ordering::Acquire)
    }

    /// Puts zeros where pages of `run`, which lies in delta pieces, are missing: nobody needs their
    /// contents. Returns for how many; contents that come later are redundant.
    pub(super) fn give_up(&self, run: &PageRun) -> Result<u64, PlaceError> {
        self.shared.give_up(run)
    }

    /// The userfaultfd, for the pager.
    pub(super) fn uffd(&self) -> &Uffd {
        &self.shared.uffd
    }

    pub(super) fn uffd_fd(&self) -> RawFd {
        self.shared.uffd.as_raw_fd()
    }

    pub(super) fn complete_fd(&self) -> RawFd {
        self.shared.complete.as_raw_fd()
    }

    /// Pages of RAM.
    pub(super) fn pages(&self) -> u64 {
        self.shared.pages
    }

    /// The page at an address of this process.
    pub(super) fn page_at_host(&self, host: u64) -> Option<RamPage> {
        self.shared
            .slots
            .iter()
            .find_map(|slot| slot.page_at_host(host))
    }

    /// What a page waits for.
    pub(super) fn awaits(&self, page: RamPage) -> Awaits {
        let shared = &self.shared;
        let run = PageRun {
            first: page,
            count: 1,
        };
        if shared.is_placed(page) {
            Awaits::Nothing
        } else if is_within(&shared.delta, &run) {
            Awaits::Source
        } else if is_within(&shared.absorbed_base, &run) {
            Awaits::Base
        } else {
            Awaits::Zero
        }
    }

    /// Wakes whoever waits for a page that is there.
    pub(super) fn wake(&self, page: RamPage) -> Result<(), PlaceError> {
        let (host, len) = self.shared.host_of(&PageRun {
            first: page,
            count: 1,
        });
        self.shared
            .uffd
            .wake(host, len)
            .map_err(|source| PlaceError::Kernel {
                page: page.0,
                source,
            })
    }

    /// Places the page that awaits its copy from the base, or zeros.
    pub(super) fn place_absorbed(&self, page: RamPage, awaits: Awaits) -> Result<(), PlaceError> {
        let run = PageRun {
            first: page,
            count: 1,
        };
        match awaits {
            Awaits::Base => self.shared.fill_from_base(&run).map(|_| ()),
            Awaits::Zero => self.shared.fill(&run, Contents::Zero).map(|_| ()),
            Awaits::Source | Awaits::Nothing => Ok(()),
        }
    }

    fn clip(&self, run: &PageRun) -> Option<PageRun> {
        match self.only {
            None => Some(*run),
            Some(page) => run.overlap(&PageRun {
                first: page,
                count: 1,
            }),
        }
    }
}

/// Why a placer could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PlacerBuildError {
    /// userfaultfd cannot be had or does not take the memory.
    #[error("guest memory cannot be paged in by userfaultfd")]
    Uffd(#[from] UffdError),
    /// No eventfd could be made or used.
    #[error("cannot make the eventfd that says when all pages are there")]
    Event(#[source] io::Error),
}
