//! What ends a VM from outside, other than a request: its parent is gone, a signal has come, or its
//! directory is no longer where it was, so that nobody could find it again. Watched from the process'
//! first instant to its last, by whichever thread serves the control socket.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cloudlet_vmm::exit::ExitReason;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use vmm_sys_util::timerfd::TimerFd;

use super::Failure;
use crate::registry::VmLock;

/// How often it is looked whether the directory is there. Nothing in the kernel tells of every way in
/// which a path can come to lead elsewhere.
const DIR_PERIOD: Duration = Duration::from_secs(3);

/// Signals that end a VM.
pub(super) const SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// Why a VM is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Its parent is gone, and nobody else looks after what it leaves.
    ParentGone,
    /// Its process was asked by a signal.
    Signal,
    /// Its directory is gone.
    DirGone,
}

/// The watch over one VM.
pub(super) struct Watch {
    lock: Arc<VmLock>,
    attached: bool,
    /// Whether the VM runs: from then on one that is not attached needs no parent.
    ready: bool,
    /// A byte comes out for each signal.
    signals: OwnedFd,
    timer: TimerFd,
    ending: Option<Ending>,
}

impl Watch {
    /// Begins the watch. From now on SIGTERM, SIGINT and SIGHUP end the VM in order.
    pub(super) fn new(lock: Arc<VmLock>, attached: bool) -> Result<Self, Failure> {
        // A pipe, because writing to one is in every thread's policy.
        let (signals, raise) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        for signal in SIGNALS {
            pipe::register(signal, raise.try_clone()?)?;
        }
        let mut timer = TimerFd::new()?;
        timer.reset(DIR_PERIOD, Some(DIR_PERIOD))?;
        Ok(Self {
            lock,
            attached,
            ready: false,
            signals,
            timer,
            ending: None,
        })
    }

    /// The VM runs now.
    pub(super) fn set_ready(&mut self) {
        self.ready = true;
    }

    /// Why the VM is to end, if it is.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// The reason that the VM ends with.
    pub(super) fn reason(ending: Ending) -> ExitReason {
        match ending {
            Ending::ParentGone | Ending::Signal => ExitReason::Stopped,
            Ending::DirGone => ExitReason::HostError {
                message:
                    "the VM's directory below the runtime directory is gone, and nobody could \
                          find the VM any more: it was ended, its disks' layers are flushed"
                        .to_owned(),
            },
        }
    }

    /// Reads a byte of standard input, of which there is none while the parent lives.
    fn hear_parent(&mut self, ops: &mut EventOps) {
        let mut byte = [0];
        if matches!(io::stdin().lock().read(&mut byte), Ok(1)) {
            return;
        }
        if self.attached || !self.ready {
            self.ending.get_or_insert(Ending::ParentGone);
        }
        ops.remove(Events::empty(&io::stdin()))
            .expect("a watched descriptor is known");
    }

    fn look(&mut self) {
        // Without the count the timer stays readable; what it was does not matter.
        let _ = self.timer.wait();
        if !self.lock.is_in_place() {
            self.ending.get_or_insert(Ending::DirGone);
        }
    }
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.signals.as_raw_fd() {
            let mut bytes = [0; 64];
            if rustix::io::read(&self.signals, &mut bytes).is_ok_and(|length| length > 0) {
                self.ending.get_or_insert(Ending::Signal);
            }
        } else if fd == self.timer.as_raw_fd() {
            self.look();
        } else {
            self.hear_parent(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let mut fds = vec![self.signals.as_raw_fd(), self.timer.as_raw_fd()];
        if self.ending != Some(Ending::ParentGone) {
            fds.push(io::stdin().as_raw_fd());
        }
        for fd in fds {
            ops.add(Events::new_raw(fd, EventSet::IN))
                .expect("pipes and timers can be watched");
        }
    }
}
