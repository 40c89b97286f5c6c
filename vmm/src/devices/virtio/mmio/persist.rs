//! Saving a virtio device with its transport, and restoring it.
//!
//! A saved device names no path, descriptor or address of the host: the caller makes the device
//! anew from its own resources and hands it in. Nothing of a saved state is believed: features must
//! be offered, queues must lie in RAM, the status must be one a driver can reach.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use super::device::MmioTransport;
use crate::devices::virtio::queue::QueueState;
use crate::devices::virtio::{DeviceError, DeviceState, GuestRam, RestoreError, VirtioDevice};

/// Version of [`MmioState`], for the section that holds it.
pub const STATE_VERSION: u16 = 1;

/// A device and its transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    pub(super) status: u32,
    pub(super) interrupt_status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueState>,
    pub(super) device: DeviceState,
}

impl MmioTransport {
    /// The state from which [`MmioTransport::restore`] makes the same device. The machine is
    /// paused, see [`MmioTransport::pause`].
    pub fn save(&self) -> MmioState {
        let core = self.shared.lock();
        MmioState {
            status: core.status,
            interrupt_status: self.shared.interrupt_status.load(Ordering::SeqCst),
            device_features_select: core.device_features_select,
            driver_features_select: core.driver_features_select,
            driver_features: core.driver_features,
            queue_select: core.queue_select,
            queues: core.queues.iter().map(|queue| queue.save()).collect(),
            device: core.device.save(),
        }
    }

    /// The saved device over the host's `device`, which is new. It is paused until
    /// [`MmioTransport::resume`].
    ///
    /// # Errors
    /// When the state is another device's, was not made by a save, or asks for what this host does
    /// not offer.
    pub fn restore(
        state: &MmioState,
        guest: Arc<GuestRam>,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Self, RestoreError> {
        let transport = Self::new(guest, device).map_err(RestoreError::Activate)?;
        transport.shared.lock().restore(state)?;
        let interrupts = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
        if state.interrupt_status & !interrupts != 0 {
            return Err(RestoreError::Field("interrupt status"));
        }
        transport
            .shared
            .interrupt_status
            .store(state.interrupt_status, Ordering::SeqCst);
        if state.interrupt_status != 0 {
            // One that was on its way when the VM was saved; a driver takes one too many.
            transport.shared.interrupt(0);
        }
        Ok(transport)
    }
}

/// A number that the driver has most likely not read before the save: one that compares the numbers from
/// before and after something learns that it went on elsewhere in between.
fn new_generation() -> Result<u32, RestoreError> {
    let mut bytes = [0; 4];
    // SAFETY: the kernel writes at most as many bytes as `bytes` has.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(count) != Ok(bytes.len()) {
        let error = DeviceError::host("getrandom")(std::io::Error::last_os_error());
        return Err(RestoreError::Activate(error));
    }
    Ok(u32::from_le_bytes(bytes))
}

impl super::device::Core {
    fn restore(&mut self, state: &MmioState) -> Result<(), RestoreError> {
        let refused = state.driver_features & !self.offered();
        let driver_ok = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && refused != 0 {
            return Err(RestoreError::Features(refused));
        }
        if state.status > 0xff || driver_ok && state.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return Err(RestoreError::Field("status"));
        }
        if state.queues.len() != self.queues.len() {
            return Err(RestoreError::Field("number of queues"));
        }
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            if !queue.set_size(u32::from(saved.size)) {
                return Err(RestoreError::Field("queue size"));
            }
            queue.ready = saved.ready;
            queue.descriptors = saved.descriptors;
            queue.available = saved.available;
            queue.used = saved.used;
        }
        self.config_generation = new_generation()?;
        self.paused = true;
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.device.restore(&state.device)?;
        // A device that waits for its reset has queues that need not hold.
        if driver_ok && state.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0 {
            let at = |index: usize| {
                state
                    .queues
                    .get(index)
                    .map_or((0, 0), |q| (q.next_available, q.next_used))
            };
            self.activate(at).map_err(|error| match error {
                DeviceError::QueueSetup(queue) => {
                    RestoreError::Queue(usize::try_from(queue).unwrap_or(usize::MAX))
                }
                other => RestoreError::Activate(other),
            })?;
        }
        Ok(())
    }
}
