//! The device as its transport sees it.

use std::os::fd::{AsRawFd, RawFd};

use super::device::{EVENT_QUEUE, RX_QUEUE, TX_QUEUE, Vsock};
use crate::devices::virtio::{
    DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice, device_type,
};

/// `VIRTIO_VSOCK_F_STREAM`, section 5.10.3.
const FEATURE_STREAM: u64 = 1;

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        device_type::VSOCK
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 16]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn backend_fds(&self) -> Vec<RawFd> {
        vec![self.epoll.as_raw_fd()]
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        self.gate.set_driven(true);
        self.listen()
            .map_err(DeviceError::host("watching the vsock socket"))
    }

    fn reset(&mut self) {
        self.gate.set_driven(false);
        self.clear();
    }

    fn queue_event(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        // It may have stopped for want of descriptors before a reset gave them all back.
        self.listen()
            .map_err(DeviceError::host("watching the vsock socket"))?;
        self.look_at_gate();
        match queue {
            TX_QUEUE => {
                if !self.receive(io)? || io.enable_kicks(TX_QUEUE)? {
                    io.come_back(TX_QUEUE);
                }
            }
            RX_QUEUE | EVENT_QUEUE => {}
            _ => return Ok(()),
        }
        self.send(io)
    }

    fn backend_event(&mut self, _: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.look_at_gate();
        self.poll_sockets()?;
        self.send(io)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(self.save_state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Vsock(state) => self.restore_state(state),
            _ => Err(RestoreError::OtherDevice("socket device")),
        }
    }
}
