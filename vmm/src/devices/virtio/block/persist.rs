//! What a save keeps of a disk's device: what the guest has seen of it. The contents are the disk's
//! own affair, and requests that were not done yet are still in the ring.

use serde::{Deserialize, Serialize};

use super::device::{Block, ID_BYTES};
use crate::devices::virtio::RestoreError;

/// A saved block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    pub(super) bytes: u64,
    pub(super) read_only: bool,
    pub(super) id: [u8; ID_BYTES],
}

impl Block {
    pub(super) fn save_state(&self) -> BlockState {
        BlockState {
            bytes: self.disk.bytes(),
            read_only: self.disk.is_read_only(),
            id: self.id,
        }
    }

    pub(super) fn restore_state(&mut self, state: &BlockState) -> Result<(), RestoreError> {
        let differs = |what, saved, given| Err(RestoreError::Resource { what, saved, given });
        if state.bytes != self.disk.bytes() {
            return differs("a size in bytes of", state.bytes, self.disk.bytes());
        }
        if state.read_only != self.disk.is_read_only() {
            let given = u64::from(self.disk.is_read_only());
            return differs("a read-only flag of", u64::from(state.read_only), given);
        }
        self.id = state.id;
        Ok(())
    }
}
