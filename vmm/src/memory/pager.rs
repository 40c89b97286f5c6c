//! The pager: the thread that answers faults on missing pages, before anything else.
//!
//! It sleeps until a fault, the stop signal or the last page comes. For a fault it looks what the
//! page waits for: a page that is there meanwhile is woken; a base or zero page that lies between
//! delta pages is placed at once; for everything else the [`PageSource`] is asked, once a page,
//! which places it now or notes the demand for another thread. The path of a fault takes no
//! contended lock and allocates nothing.
//!
//! An error leaves the faulting thread where it is, blocked: the callback tells whoever is in
//! charge, so that the VM is paused and ended. Even when the pager has gone, nobody runs on a
//! hole (see `placer.rs`).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::{PageSet, RamPage, to_usize};
use super::placer::{Awaits, PlaceError, Placer};
use super::poll::{self, Wait};
use super::uffd::{Messages, UffdError};

/// An error of whoever supplies pages or prepares the thread.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Where missing pages come from.
pub trait PageSource: Send + Sync {
    /// A thread waits for `page`, which is in the delta and was not placed a moment ago. Called on
    /// the pager thread, once a page: either place it now (and its neighbours, if they are at
    /// hand), or note the demand without blocking, so that another thread places it later. Must not
    /// touch guest memory itself: its own fault would have nobody to answer it.
    ///
    /// # Errors
    /// Anything that means that the page will not come. The VM is then ended.
    fn on_fault(&self, page: RamPage, placer: &Placer) -> Result<(), SourceError>;
}

/// What can go wrong with the pager.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The thread could not be started.
    #[error("cannot start the pager thread")]
    Spawn(#[source] io::Error),
    /// The thread could not be prepared.
    #[error("cannot prepare the pager thread")]
    Start(#[source] SourceError),
    /// Waiting failed.
    #[error("the pager cannot wait for faults")]
    Wait(#[source] io::Error),
    /// Faults could not be read.
    #[error("the pager cannot read faults")]
    Read(#[source] UffdError),
    /// A fault came from elsewhere.
    #[error("a fault at host address {host:#x}, which is not guest RAM")]
    Elsewhere {
        /// The address.
        host: u64,
    },
    /// The source has no page.
    #[error("page {page} of guest RAM cannot be supplied")]
    Source {
        /// The page.
        page: u64,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// A page could not be placed.
    #[error("page {page} of guest RAM cannot be placed")]
    Place {
        /// The page.
        page: u64,
        /// Why.
        #[source]
        source: PlaceError,
    },
}

/// What the pager thread gets besides its source.
pub struct PagerHooks {
    /// Runs first on the thread: the place to install its seccomp filter.
    pub on_start: Box<dyn FnOnce() -> Result<(), SourceError> + Send>,
    /// Called on the thread with the first error; later ones are only counted. The thread that
    /// faulted stays blocked, so whoever is told must not wait for it.
    pub on_error: Box<dyn FnOnce(PagerError) + Send>,
    /// Record mode: exactly one page is placed a fault, whatever the source hands over, so that
    /// [`Pager::first_touch`] is the exact order of first touches.
    pub record: bool,
}

impl std::fmt::Debug for PagerHooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagerHooks")
            .field("record", &self.record)
            .finish_non_exhaustive()
    }
}

/// What the pager did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PagerStats {
    /// Fault messages.
    pub faults: u64,
    /// Of these: the page was there when the message was read.
    pub late: u64,
    /// Of these: the page had been asked for before (a second thread, or a kick out of KVM_RUN).
    pub repeated: u64,
    /// Of these: answered with a page of the base or of zeros.
    pub absorbed: u64,
    /// Of these: the source was asked, and the page was there when it returned.
    pub immediate: u64,
    /// Of these: ended in an error.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Counters {
    faults: AtomicU64,
    late: AtomicU64,
    repeated: AtomicU64,
    absorbed: AtomicU64,
    immediate: AtomicU64,
    failed: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[derive(Debug)]
struct Log {
    counters: Counters,
    placer: Placer,
    /// Has room for every missing page from the start, so pushing never allocates.
    first_touch: Mutex<Vec<RamPage>>,
}

impl Log {
    fn first_touch(&self) -> MutexGuard<'_, Vec<RamPage>> {
        self.first_touch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running pager. It ends by itself when no page is missing, and is stopped when dropped.
#[derive(Debug)]
pub struct Pager {
    stop: Arc<EventFd>,
    log: Arc<Log>,
    thread: Option<JoinHandle<()>>,
}

impl Pager {
    /// Starts the thread and returns when it is prepared (`on_start` has run).
    ///
    /// # Errors
    /// [`PagerError::Spawn`], or [`PagerError::Start`] with what `on_start` said.
    pub fn spawn(
        placer: Placer,
        source: Arc<dyn PageSource>,
        hooks: PagerHooks,
    ) -> Result<Self, PagerError> {
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(PagerError::Spawn)?;
        let stop = Arc::new(stop);
        let log = Arc::new(Log {
            counters: Counters::default(),
            placer: placer.clone(),
            first_touch: Mutex::new(Vec::with_capacity(to_usize(placer.remaining()))),
        });
        let (started, start) = mpsc::sync_channel(1);
        let PagerHooks {
            on_start,
            on_error,
            record,
        } = hooks;
        let mut faults = Faults {
            asked: PageSet::new(placer.pages()),
            placer,
            source,
            log: Arc::clone(&log),
            on_error: Some(on_error),
            record,
        };
        let stop_seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("pager".to_owned())
            .spawn(move || {
                let prepared = on_start();
                let go = prepared.is_ok();
                // The receiver is gone only if `spawn` is, and then nobody needs a pager.
                if started.send(prepared).is_ok() && go {
                    faults.run(&stop_seen);
                }
            })
            .map_err(PagerError::Spawn)?;
        let pager = Self {
            stop,
            log,
            thread: Some(thread),
        };
        match start.recv() {
            Ok(Ok(())) => Ok(pager),
            Ok(Err(source)) => Err(PagerError::Start(source)),
            Err(_) => Err(PagerError::Start(
                "the thread ended while it was prepared".into(),
            )),
        }
    }

    /// What it did so far.
    pub fn stats(&self) -> PagerStats {
        let counters = &self.log.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PagerStats {
            faults: get(&counters.faults),
            late: get(&counters.late),
            repeated: get(&counters.repeated),
            absorbed: get(&counters.absorbed),
            immediate: get(&counters.immediate),
            failed: get(&counters.failed),
        }
    }

    /// The pages for which a thread had to wait, in the order in which they were first touched.
    /// In record mode that is every page that was touched at all.
    pub fn first_touch(&self) -> Vec<RamPage> {
        self.log.first_touch().clone()
    }

    /// The pages that a thread waits for at this moment, in the order in which they were asked for.
    ///
    /// A vCPU among the waiting is not running, but cannot be relied on to leave KVM_RUN when it is
    /// kicked: on most kernels it does so only when its page has come.
    pub fn waiting(&self) -> Vec<RamPage> {
        let touched = self.log.first_touch();
        touched
            .iter()
            .copied()
            .filter(|page| !self.log.placer.is_placed(*page))
            .collect()
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stops the thread and waits until it has ended. Threads that wait for a page go on waiting.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        // The counter of an eventfd that is written once a life cannot overflow.
        let _ = self.stop.write(1);
        // A panic of the source was reported by the panic hook; the pager is over either way.
        let _ = thread.join();
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The thread's own state.
struct Faults {
    placer: Placer,
    source: Arc<dyn PageSource>,
    log: Arc<Log>,
    asked: PageSet,
    on_error: Option<Box<dyn FnOnce(PagerError) + Send>>,
    record: bool,
}

impl Faults {
    fn run(&mut self, stop: &EventFd) {
        if let Err(error) = self.serve(stop) {
            self.report(error);
        }
    }

    /// Answers faults until told to stop, or no page is missing.
    fn serve(&mut self, stop: &EventFd) -> Result<(), PagerError> {
        let mut messages = Messages::new();
        let mut waits = [
            Wait::readable(self.placer.uffd_fd()),
            Wait::readable(stop.as_raw_fd()),
            Wait::readable(self.placer.complete_fd()),
        ];
        loop {
            poll::wait(&mut waits, None).map_err(PagerError::Wait)?;
            if waits.iter().any(Wait::is_broken) {
                return Err(PagerError::Wait(io::Error::from_raw_os_error(libc::EBADF)));
            }
            if waits[0].is_readable()
                && self
                    .placer
                    .uffd()
                    .read(&mut messages)
                    .map_err(PagerError::Read)?
            {
                for fault in messages.faults() {
                    self.handle(fault.map_err(PagerError::Read)?);
                }
                if !waits[1].is_readable() {
                    continue;
                }
            }
            if waits[1].is_readable() {
                return Ok(());
            }
            if waits[2].is_readable() {
                return self.finish();
            }
        }
    }

    /// Lets go of the memory: nothing is missing any more.
    fn finish(&self) -> Result<(), PagerError> {
        match self.placer.finish() {
            Ok(_) => Ok(()),
            Err(PlaceError::Kernel { page, source }) => Err(PagerError::Place {
                page,
                source: PlaceError::Kernel { page, source },
            }),
            Err(source) => Err(PagerError::Place { page: 0, source }),
        }
    }

    fn handle(&mut self, host: u64) {
        let counters = &self.log.counters;
        count(&counters.faults);
        if let Err(error) = self.answer(host) {
            count(&self.log.counters.failed);
            self.report(error);
        }
    }

    /// Answers one fault.
    fn answer(&mut self, host: u64) -> Result<(), PagerError> {
        let counters = &self.log.counters;
        let page = self
            .placer
            .page_at_host(host)
            .ok_or(PagerError::Elsewhere { host })?;
        let place = |source| PagerError::Place {
            page: page.0,
            source,
        };
        let awaits = self.placer.awaits(page);
        if awaits == Awaits::Nothing {
            count(&counters.late);
            return self.placer.wake(page).map_err(place);
        }
        if self.asked.contains(page) {
            count(&counters.repeated);
            return Ok(());
        }
        self.asked.insert(page);
        self.log.first_touch().push(page);
        if awaits != Awaits::Source {
            count(&counters.absorbed);
            return self.placer.place_absorbed(page, awaits).map_err(place);
        }
        let asked = if self.record {
            self.source.on_fault(page, &self.placer.only(page))
        } else {
            self.source.on_fault(page, &self.placer)
        };
        asked.map_err(|source| PagerError::Source {
            page: page.0,
            source,
        })?;
        if self.placer.is_placed(page) {
            count(&counters.immediate);
        }
        Ok(())
    }

    fn report(&mut self, error: PagerError) {
        if let Some(on_error) = self.on_error.take() {
            on_error(error);
        }
    }
}
