//! The device as its transport sees it.

use std::os::fd::{AsRawFd, RawFd};

use super::device::{
    ACTUAL, Balloon, DEFLATE_QUEUE, HINT_QUEUE, INFLATE_QUEUE, POISON, REPORT_QUEUE, STATS_QUEUE,
    feature,
};
use crate::devices::virtio::{
    DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice, device_type,
};

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        device_type::BALLOON
    }

    fn features(&self) -> u64 {
        feature::ALL
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128; 5]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, at: usize, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            // The poison value stands once the driver runs (section 5.5.6.6.1).
            let writable = (ACTUAL..ACTUAL + 4).contains(&at)
                || self.features.is_none() && (POISON..POISON + 4).contains(&at);
            if writable {
                self.config[at] = *byte;
            }
        }
        self.shared.lock().status.actual_pages = self.field(ACTUAL).into();
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        vec![self.shared.event.as_raw_fd()]
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.features = Some(features);
        self.shared.lock().status.features = features;
        // The driver reads it as soon as it is through with this.
        self.take_wishes();
        Ok(())
    }

    fn reset(&mut self) {
        self.features = None;
        self.report_done = 0;
        self.set_field(ACTUAL, 0);
        self.set_field(POISON, 0);
        self.shared.lock().forget_driver();
        self.take_wishes();
    }

    fn queue_event(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let drained = match queue {
            INFLATE_QUEUE => self.inflate(io)?,
            DEFLATE_QUEUE => self.deflate(io)?,
            // Its buffer stays in the queue, so there is always one.
            STATS_QUEUE if self.has(feature::STATS_VQ) => return self.read_statistics(io),
            HINT_QUEUE if self.has(feature::FREE_PAGE_HINT) => self.collect_hints(io)?,
            REPORT_QUEUE if self.has(feature::REPORTING) => self.take_reports(io)?,
            // A queue of a feature that the driver has not accepted.
            _ => return Ok(()),
        };
        if !drained || io.enable_kicks(queue)? {
            io.come_back(queue);
        }
        Ok(())
    }

    fn backend_event(&mut self, _: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        // Reading clears it; a failure means that it was clear.
        let _ = self.shared.event.read();
        io.config_changed |= self.take_wishes() | std::mem::take(&mut self.announce);
        if std::mem::take(&mut self.shared.lock().poll) {
            self.ask_statistics(io)?;
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(self.save_state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Balloon(state) => self.restore_state(state),
            _ => Err(RestoreError::OtherDevice("memory balloon")),
        }
    }
}
