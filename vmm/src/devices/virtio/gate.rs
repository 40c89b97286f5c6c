//! What keeps a restored guest apart from the world until it differs from its clones. While the gate is
//! closed, network cards carry nothing, and of the socket device's connections only those that were made
//! by [`Gate::call`] get anything to the guest. What comes meanwhile waits.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One for each machine; clones are the same gate. Open when it is made.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<State>);

#[derive(Debug, Default)]
struct State {
    closed: AtomicBool,
    /// The guest has a driver for the socket device.
    driven: AtomicBool,
    calls: Mutex<VecDeque<Call>>,
}

/// A connection that may pass the closed gate, and the guest's port that it is for.
type Call = (UnixStream, u32);

impl Gate {
    /// Closes it. Devices look when they are next at work.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
    }

    /// Opens it. Whoever does that wakes the devices.
    pub fn open(&self) {
        self.0.closed.store(false, Ordering::SeqCst);
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// A connection to the guest's `port` that may pass, as a host program's would be after its opening
    /// line. The socket device takes it when it is next at work.
    ///
    /// # Errors
    /// When the system gives no socket.
    pub fn call(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        self.calls().push_back((theirs, port));
        Ok(ours)
    }

    /// Whether the guest has a driver for the socket device, which answers calls.
    pub fn is_driven(&self) -> bool {
        self.0.driven.load(Ordering::SeqCst)
    }

    pub(super) fn set_driven(&self, driven: bool) {
        self.0.driven.store(driven, Ordering::SeqCst);
    }

    /// The next call that the socket device is to make.
    pub(super) fn take_call(&self) -> Option<Call> {
        self.calls().pop_front()
    }

    fn calls(&self) -> std::sync::MutexGuard<'_, VecDeque<Call>> {
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
