//! The device as its transport sees it.

use std::os::fd::RawFd;

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use super::device::{Block, QUEUE_SIZE};
use crate::devices::rate::Limiter;
use crate::devices::virtio::{
    DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice, device_type,
};

/// The place of the limiter's timer among the backend descriptors.
const TIMER: usize = 1;

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        device_type::BLOCK
    }

    fn features(&self) -> u64 {
        self.device_features()
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        let timer = self.limiter.as_ref().and_then(Limiter::fd);
        std::iter::once(self.disk.arrived_fd())
            .chain(timer)
            .collect()
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.write_through = features >> VIRTIO_BLK_F_FLUSH & 1 == 0;
        Ok(())
    }

    fn reset(&mut self) {
        self.write_through = false;
    }

    fn queue_event(&mut self, _queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.serve(io)
    }

    fn backend_event(&mut self, index: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        match &mut self.limiter {
            Some(limiter) if index == TIMER => {
                limiter.wake().map_err(DeviceError::host("timerfd"))?;
            }
            _ => self.disk.take_arrived(),
        }
        self.serve(io)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(self.save_state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Block(state) => self.restore_state(state),
            _ => Err(RestoreError::OtherDevice("block device")),
        }
    }
}
