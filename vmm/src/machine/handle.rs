//! Asking a machine for something from another thread, and the descriptors through which its
//! control thread hears of it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::power::ExitCode;
use crate::exit::ExitReason;

/// What the control thread is asked for.
#[derive(Debug)]
pub(super) enum Request {
    /// Hold the VM until the same asker lets it go.
    Hold,
    /// Let it go.
    Release,
    /// The VM is at its end.
    End(ExitReason),
}

/// Asks a machine for something from any thread. Nothing waits: the control thread does it in its
/// next [`super::Machine::turn`], which the handle wakes up.
#[derive(Clone)]
pub struct MachineHandle {
    requests: Sender<Request>,
    wake: Arc<EventFd>,
}

impl MachineHandle {
    /// Pause the VM because something it needs is not there. This pause is apart from that of
    /// [`super::Machine::pause`]: the VM runs when neither holds it.
    pub fn pause(&self) {
        self.send(Request::Hold);
    }

    /// End the pause of [`MachineHandle::pause`].
    pub fn resume(&self) {
        self.send(Request::Release);
    }

    /// End the VM: the host cannot keep it running.
    pub fn fail(&self, error: &(dyn std::error::Error + 'static)) {
        self.end(ExitReason::host_error(error));
    }

    /// End the VM for a reason.
    pub fn end(&self, reason: ExitReason) {
        self.send(Request::End(reason));
    }

    /// Make the control thread's turn return, so that it looks at what it waits for.
    pub fn wake(&self) {
        // A counter at its limit wakes as well as one more would.
        let _ = self.wake.write(1);
    }

    fn send(&self, request: Request) {
        // Neither can fail while the machine lives; when it is gone nobody wants the request.
        let _ = self.requests.send(request);
        self.wake();
    }
}

/// The control thread's end of all handles, and the devices' own ways to end the VM.
pub(super) struct Inbox {
    requests: Receiver<Request>,
    handle: MachineHandle,
    reset: EventFd,
    off: EventFd,
    code: ExitCode,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Inbox> {
        let (requests, receiver) = channel();
        let handle = MachineHandle {
            requests,
            wake: Arc::new(eventfd()?),
        };
        Ok(Inbox {
            requests: receiver,
            handle,
            reset: eventfd()?,
            off: eventfd()?,
            code: ExitCode::new(),
        })
    }

    pub(super) fn handle(&self) -> &MachineHandle {
        &self.handle
    }

    /// A copy of the descriptor that a reset request is written to.
    pub(super) fn reset_fd(&self) -> io::Result<EventFd> {
        self.reset.try_clone()
    }

    /// A copy of the descriptor that a power-off is written to.
    pub(super) fn off_fd(&self) -> io::Result<EventFd> {
        self.off.try_clone()
    }

    /// Where the guest's exit code is put before it powers off.
    pub(super) fn exit_code(&self) -> ExitCode {
        self.code.clone()
    }

    /// What makes the event loop return when there is something in the inbox.
    pub(super) fn bell(&self) -> io::Result<Bell> {
        Ok(Bell {
            fds: [
                self.handle.wake.try_clone()?,
                self.reset.try_clone()?,
                self.off.try_clone()?,
            ],
            broken: None,
        })
    }

    /// The next request.
    pub(super) fn next(&self) -> Option<Request> {
        if let Ok(request) = self.requests.try_recv() {
            return Some(request);
        }
        if self.off.read().is_ok() {
            let reason = match self.code.get() {
                Some(code) => ExitReason::Exited { code },
                None => ExitReason::Shutdown,
            };
            return Some(Request::End(reason));
        }
        self.reset
            .read()
            .is_ok()
            .then_some(Request::End(ExitReason::Reset))
    }
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// Watches the inbox's descriptors. It does nothing with them: returning from the event loop is
/// the point, and the machine looks into its inbox after each turn.
pub(super) struct Bell {
    fds: [EventFd; 3],
    broken: Option<event_manager::Error>,
}

impl Bell {
    /// Why the descriptors are not watched, if they are not.
    pub(super) fn take_error(&mut self) -> Option<event_manager::Error> {
        self.broken.take()
    }
}

impl MutEventSubscriber for Bell {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Only the wake-up is cleared here; the others say what happened and are read by `next`.
        let [wake, _, _] = &self.fds;
        let _ = wake.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        for fd in &self.fds {
            if let Err(error) = ops.add(Events::new(fd, EventSet::IN)) {
                self.broken = Some(error);
            }
        }
    }
}
