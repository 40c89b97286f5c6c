//! Pausing a machine without the pages that its guest does not use: before a snapshot or an overlay,
//! so that free memory is in neither.
//!
//! The guest's balloon driver is asked to name its free pages (see `devices/virtio/balloon/`). It
//! may use a page again at any time, so a dirty log runs from before the question until the guest
//! stands still, and only what was hinted and not written since is discarded. A driver whose kernel
//! clears pages when it allocates them (`init_on_alloc` in Linux) writes to each page that it hints.
//! Those hold zeros then, which is as good for a snapshot or an overlay; where that makes no
//! difference to the guest they are discarded too, and the guest reports the others once they are
//! free again. Until then they count as the VM's memory.

use std::time::{Duration, Instant};

use super::{Machine, MachineError};
use crate::devices::virtio::balloon::BalloonHandle;
use crate::memory::{Afterwards, DirtyLog, Discarder, PageRun, PageSet};

/// Longest turn of the event loop while hints come.
const TURN: Duration = Duration::from_millis(10);
/// What hints were good for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hinted {
    /// Whether the guest was asked at all.
    pub asked: bool,
    /// Pages that it hinted.
    pub pages: u64,
    /// Of these: given back to the host.
    pub discarded: u64,
}

impl Machine {
    /// The memory balloon, if the VM has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.devices.balloon()
    }

    /// As [`Machine::pause`], after the guest has been asked for its free pages and these have been
    /// discarded. That takes `patience` at the most, and no time where the guest does not run, has no
    /// balloon driver, or one that does not hint.
    ///
    /// # Errors
    /// As [`Machine::pause`]; the dirty log or the memory cannot be had.
    pub fn pause_without_free_pages(&mut self, patience: Duration) -> Result<Hinted, MachineError> {
        let balloon = self.balloon().filter(|balloon| balloon.can_hint());
        let Some(balloon) = balloon.cloned().filter(|_| self.is_running()) else {
            self.pause()?;
            return Ok(Hinted::default());
        };
        let log = DirtyLog::start(&self.vm, &self.ram)?;
        balloon.start_hints();
        let paused = self
            .await_hints(&balloon, patience)
            .and_then(|()| self.pause());
        let result = paused.and_then(|()| {
            let dirty = log.take(&self.vm, &self.ram)?;
            match balloon.hints() {
                Some(hints) => discard(balloon.discarder(), &hints.pages, &dirty),
                None => Ok((0, 0)),
            }
        });
        balloon.end_hints();
        log.stop(&self.vm, &self.ram)?;
        let (pages, discarded) = result?;
        Ok(Hinted {
            asked: true,
            pages,
            discarded,
        })
    }

    /// Lets the guest run until it has hinted all, or time is over.
    fn await_hints(
        &mut self,
        balloon: &BalloonHandle,
        patience: Duration,
    ) -> Result<(), MachineError> {
        let deadline = Instant::now() + patience;
        while !balloon.hints_finished() && Instant::now() < deadline && self.is_running() {
            // If this ends the VM, it cannot be paused, which the caller will be told.
            self.turn(Some(TURN))?;
        }
        Ok(())
    }
}

/// What is in `pages` and not in `dirty`.
fn clean(pages: &PageSet, dirty: &PageSet) -> PageSet {
    let mut clean = pages.clone();
    dirty.runs().for_each(|run| clean.remove_run(&run));
    clean
}

/// Discards what was hinted: clean pages whatever they hold, written ones if they hold zeros. The VM
/// is paused. Returns how many there were, and how many of them went.
fn discard(
    discarder: &Discarder,
    hinted: &PageSet,
    dirty: &PageSet,
) -> Result<(u64, u64), MachineError> {
    let clean = clean(hinted, dirty);
    let mut written = hinted.clone();
    clean.runs().for_each(|run| written.remove_run(&run));
    let clean = clean
        .runs()
        .map(|run: PageRun| discarder.discard(&run, Afterwards::Any))
        .sum::<Result<u64, _>>()?;
    let zeros = written
        .runs()
        .map(|run| discarder.discard_zeros(&run))
        .sum::<Result<u64, _>>()?;
    Ok((hinted.count(), clean + zeros))
}
