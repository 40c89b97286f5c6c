//! The state of the device: none beyond its queue, which the transport keeps.

use serde::{Deserialize, Serialize};

use super::device::Rng;
use crate::devices::virtio::RestoreError;

/// The device has no state of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl Rng {
    pub(super) fn save_state(&self) -> RngState {
        RngState {}
    }

    pub(super) fn restore_state(&mut self, _state: &RngState) -> Result<(), RestoreError> {
        Ok(())
    }
}
