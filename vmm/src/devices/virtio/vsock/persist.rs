//! What a save keeps: the guest's context id, and the host port that the next connection gets. The
//! ports go on where they were because packets of old connections may still lie in the saved queues:
//! they must not meet a new connection of the same port.
//!
//! Connections are not kept, since the programs at their other ends do not move with the VM. The
//! restored device tells the driver so (a transport reset event), gives it no packet before it has
//! dealt with that, and answers packets of the old connections with resets.

use serde::{Deserialize, Serialize};

use super::device::{FIRST_HOST_PORT, News, Vsock};
use crate::devices::virtio::RestoreError;

/// A saved socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    guest_cid: u64,
    next_host_port: u32,
}

impl Vsock {
    pub(super) fn save_state(&self) -> VsockState {
        VsockState {
            guest_cid: self.guest_cid(),
            next_host_port: self.next_host_port,
        }
    }

    pub(super) fn restore_state(&mut self, state: &VsockState) -> Result<(), RestoreError> {
        // 0 to 2 and 2^32 - 1 are reserved, the upper half is zero (section 5.10.4).
        if !(3..u64::from(u32::MAX)).contains(&state.guest_cid) {
            return Err(RestoreError::Field("guest context id"));
        }
        if state.next_host_port < FIRST_HOST_PORT {
            return Err(RestoreError::Field("next host port"));
        }
        self.next_host_port = state.next_host_port;
        self.set_guest_cid(state.guest_cid);
        self.news = News::Due;
        Ok(())
    }
}
