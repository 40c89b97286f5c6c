//! The host's side of the balloon: wishes, which the device takes up on the event loop's next turn,
//! and what it has heard from the guest.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::feature;
use super::statistics::Statistics;
use crate::memory::{Discarder, PageRun, PageSet};

/// The driver is to stop hinting, and to keep what it has hinted.
pub(super) const COMMAND_STOP: u32 = 0;
/// Hinting is over: the driver may use the pages again.
pub(super) const COMMAND_DONE: u32 = 1;
/// The first command that asks for hints.
const COMMAND_FIRST: u32 = 2;

/// Hints on their way.
#[derive(Debug)]
struct Round {
    command: u32,
    started: bool,
    finished: bool,
    pages: PageSet,
}

/// How far hinting has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hints {
    /// The driver has named all that it had, or will name no more.
    pub finished: bool,
    /// What it has named.
    pub pages: PageSet,
}

/// What the balloon is and what has gone through it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Features that the guest's driver has accepted; none if there is no driver.
    pub features: u64,
    /// Pages that the host wants in the balloon.
    pub wanted_pages: u64,
    /// Pages that the driver says are in it.
    pub actual_pages: u64,
    /// Pages that were inflated, in all.
    pub inflated_pages: u64,
    /// Pages that were deflated, in all.
    pub deflated_pages: u64,
    /// Pages that were reported as free, in all.
    pub reported_pages: u64,
    /// Pages that were hinted as free, in all.
    pub hinted_pages: u64,
    /// Pages that inflating and reporting gave back to the host, in all.
    pub discarded_pages: u64,
    /// Page numbers that named no RAM.
    pub refused: u64,
    /// What the guest said last of its memory, and when.
    pub statistics: Option<(Statistics, Instant)>,
}

impl BalloonStatus {
    /// Whether the driver has accepted a feature, one of [`feature`].
    #[must_use]
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

/// What both sides know.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) status: BalloonStatus,
    pub(super) num_pages: u32,
    pub(super) hint_command: u32,
    pub(super) last_command: u32,
    /// Statistics are wanted.
    pub(super) poll: bool,
    pages: u64,
    round: Option<Round>,
}

impl Control {
    /// The driver has put a command id into the hint queue.
    pub(super) fn command_seen(&mut self, command: u32) {
        if let Some(round) = &mut self.round {
            if command == round.command {
                round.started = true;
            } else {
                // Pages that follow belong to no command that holds.
                round.finished |= round.started && command == COMMAND_STOP;
                round.started = false;
            }
        }
    }

    /// The driver has hinted a run of pages.
    pub(super) fn hint(&mut self, run: &PageRun) {
        if let Some(round) = self.round.as_mut().filter(|round| round.started) {
            round.pages.insert_run(run);
            self.status.hinted_pages = self.status.hinted_pages.saturating_add(run.count);
        }
    }

    /// The driver is gone, and with it what it has said.
    pub(super) fn forget_driver(&mut self) {
        self.status.features = 0;
        self.status.actual_pages = 0;
        self.status.statistics = None;
        self.hint_command = COMMAND_STOP;
        // What it has hinted may be in use by whoever comes next.
        self.round = None;
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    control: Mutex<Control>,
    /// Raised when the device has to look at the wishes.
    pub(super) event: EventFd,
}

impl Shared {
    /// For RAM of `pages` pages.
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        let control = Control {
            status: BalloonStatus::default(),
            num_pages: 0,
            hint_command: COMMAND_STOP,
            last_command: COMMAND_FIRST - 1,
            poll: false,
            pages,
            round: None,
        };
        Ok(Self {
            control: Mutex::new(control),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the device look.
    pub(super) fn raise(&self) {
        // An eventfd of our own: a write can only find it raised already.
        let _ = self.event.write(1);
    }
}

/// Asks things of a balloon and tells how it does. Clones are handles to the same balloon.
#[derive(Debug, Clone)]
pub struct BalloonHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) discarder: Discarder,
}

impl BalloonHandle {
    /// How the balloon does.
    #[must_use]
    pub fn status(&self) -> BalloonStatus {
        let control = self.shared.lock();
        BalloonStatus {
            wanted_pages: control.num_pages.into(),
            ..control.status
        }
    }

    /// Who gives back what the guest has hinted.
    #[must_use]
    pub fn discarder(&self) -> &Discarder {
        &self.discarder
    }

    /// Asks the guest to have so many pages in the balloon, or as many as RAM has.
    pub fn set_wanted_pages(&self, pages: u64) {
        let mut control = self.shared.lock();
        // RAM has fewer pages than 2^32, see `RAM_BYTES_MAX`.
        control.num_pages = u32::try_from(pages.min(control.pages)).unwrap_or(u32::MAX);
        drop(control);
        self.shared.raise();
    }

    /// Asks the guest for statistics. False if its driver has none.
    #[must_use]
    pub fn poll_statistics(&self) -> bool {
        let mut control = self.shared.lock();
        let can = control.status.has(feature::STATS_VQ);
        control.poll |= can;
        drop(control);
        self.shared.raise();
        can
    }

    /// Whether the guest's driver can name its free pages, and that would gain anything.
    #[must_use]
    pub fn can_hint(&self) -> bool {
        let status = self.status();
        status.has(feature::FREE_PAGE_HINT) && !status.has(feature::PAGE_POISON)
    }

    /// Asks the guest for its free pages, for somebody who ends that with
    /// [`BalloonHandle::end_hints`].
    pub fn start_hints(&self) {
        let mut control = self.shared.lock();
        let command = control.last_command.wrapping_add(1).max(COMMAND_FIRST);
        control.last_command = command;
        control.hint_command = command;
        control.round = Some(Round {
            command,
            started: false,
            finished: false,
            pages: PageSet::new(control.pages),
        });
        drop(control);
        self.shared.raise();
    }

    /// What the guest has hinted since [`BalloonHandle::start_hints`]; `None` without that.
    #[must_use]
    pub fn hints(&self) -> Option<Hints> {
        self.shared.lock().round.as_ref().map(|round| Hints {
            finished: round.finished,
            pages: round.pages.clone(),
        })
    }

    /// Whether the guest has no more to hint, or was not asked.
    #[must_use]
    pub fn hints_finished(&self) -> bool {
        let control = self.shared.lock();
        control.round.as_ref().is_none_or(|round| round.finished)
    }

    /// Ends hinting: the guest may use the pages again. Whoever discards hinted pages has done so.
    pub fn end_hints(&self) {
        let mut control = self.shared.lock();
        if control.round.take().is_some() && control.hint_command != COMMAND_STOP {
            control.hint_command = COMMAND_DONE;
        }
        drop(control);
        self.shared.raise();
    }
}
