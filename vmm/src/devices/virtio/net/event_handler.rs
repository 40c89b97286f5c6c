//! The device as its transport sees it.

use std::os::fd::{AsRawFd, RawFd};

use super::device::{Net, RX_QUEUE, TX_QUEUE};
use crate::devices::virtio::{
    DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice, device_type,
};

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        device_type::NET
    }

    fn features(&self) -> u64 {
        self.device_features()
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        vec![self.epoll.as_raw_fd()]
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.start(Some(features));
        Ok(())
    }

    fn reset(&mut self) {
        self.start(None);
    }

    fn queue_event(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.begin();
        match queue {
            RX_QUEUE => self.receive(io)?,
            TX_QUEUE => self.transmit(io)?,
            _ => {}
        }
        self.end(io)
    }

    fn backend_event(&mut self, _: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.begin();
        self.poll(io)?;
        self.end(io)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(self.save_state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Net(state) => self.restore_state(state),
            _ => Err(RestoreError::OtherDevice("network device")),
        }
    }
}
