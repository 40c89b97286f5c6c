//! The control thread's side of a device: kicks, backend descriptors, pause and resume.
//!
//! Every event is answered under the device's lock. While the device may not touch guest memory
//! (not activated yet, paused, waiting for a reset), kicks are dropped, because everything is looked
//! at again when it goes on, and backend descriptors leave the event loop until then, because they
//! stay readable and would keep it spinning.

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::device::{Core, MmioTransport, Shared};
use crate::devices::virtio::DeviceError;

/// Event data of the wake-up call; queues follow, then backend descriptors.
const WAKE: u32 = 0;
/// Event data of queue 0.
const QUEUES: u32 = 1;
/// Event data of the first backend descriptor.
const BACKENDS: u32 = 0x100;

impl MmioTransport {
    /// Stops all access to guest memory. Called on the control thread, so that nothing of the
    /// device is under way when it returns; vCPUs must stand still already.
    pub fn pause(&self) {
        self.shared.lock().paused = true;
    }

    /// Lets the device go on; the next turn of the event loop looks at everything that waited.
    pub fn resume(&self) {
        self.shared.lock().paused = false;
        self.wake();
    }

    /// Has the next turn of the event loop look at everything, if the device may work.
    pub fn wake(&self) {
        // The eventfd is our own: a write can only find it raised already.
        let _ = self.shared.wake.write(1);
    }
}

impl Shared {
    /// Everything may have changed: watch the backends again and look at every queue.
    fn woken(&self, core: &mut Core, ops: &mut EventOps) {
        if !core.is_running() {
            return;
        }
        for (index, fd) in (0_u32..).zip(&self.backend_fds) {
            if core.masked >> index & 1 == 1 {
                let events = Events::with_data_raw(*fd, BACKENDS + index, EventSet::IN);
                match ops.add(events) {
                    Ok(()) => core.masked &= !(1 << index),
                    Err(error) => return self.fail(core, DeviceError::Watch(error)),
                }
            }
        }
        for queue in 0..core.queues.len() {
            self.run(core, |device, io| device.queue_event(queue, io));
        }
    }

    /// A backend descriptor is readable.
    fn backend(&self, core: &mut Core, index: u32, ops: &mut EventOps) {
        let Some((fd, at)) = usize::try_from(index)
            .ok()
            .and_then(|at| Some((self.backend_fds.get(at)?, at)))
        else {
            return;
        };
        if core.is_running() {
            return self.run(core, |device, io| device.backend_event(at, io));
        }
        match ops.remove(Events::empty_raw(*fd)) {
            Ok(()) => core.masked |= 1 << index,
            Err(error) => self.fail(core, DeviceError::Watch(error)),
        }
    }
}

impl MutEventSubscriber for MmioTransport {
    fn init(&mut self, ops: &mut EventOps) {
        let shared = &self.shared;
        let wake = [(&shared.wake, WAKE)];
        let kicks = shared.kicks.iter().zip(QUEUES..);
        for (fd, data) in wake.into_iter().chain(kicks) {
            if let Err(error) = ops.add(Events::with_data(fd, data, EventSet::IN)) {
                return shared.fail(&mut shared.lock(), DeviceError::Watch(error));
            }
        }
        // Backends join when the device is activated.
        let mut core = shared.lock();
        core.masked = (0..shared.backend_fds.len()).fold(0, |mask, index| mask | 1 << index);
        shared.woken(&mut core, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let shared = &self.shared;
        let mut core = shared.lock();
        let core = &mut *core;
        match events.data() {
            WAKE => {
                // Reading clears it; a failure means somebody else did.
                let _ = shared.wake.read();
                shared.woken(core, ops);
            }
            data if data >= BACKENDS => shared.backend(core, data - BACKENDS, ops),
            data => {
                let queue = usize::try_from(data - QUEUES).unwrap_or(usize::MAX);
                if let Some(kick) = shared.kicks.get(queue) {
                    // As above.
                    let _ = kick.read();
                }
                if core.is_running() && queue < core.queues.len() {
                    shared.run(core, |device, io| device.queue_event(queue, io));
                }
            }
        }
    }
}
