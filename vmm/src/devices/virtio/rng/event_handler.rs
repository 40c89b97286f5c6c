//! The device as its transport sees it.

use std::os::fd::RawFd;

use super::device::{REQUEST_QUEUE, Rng};
use crate::devices::virtio::{
    CHAINS_A_TURN_MAX, DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice, device_type,
};

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        device_type::RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn queue_event(&mut self, _queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let drained = self.serve(io, CHAINS_A_TURN_MAX)?;
        if !drained || io.enable_kicks(REQUEST_QUEUE)? {
            io.come_back(REQUEST_QUEUE);
        }
        Ok(())
    }

    fn backend_event(&mut self, _: usize, _: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(self.save_state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Rng(state) => self.restore_state(state),
            _ => Err(RestoreError::OtherDevice("random number generator")),
        }
    }
}
