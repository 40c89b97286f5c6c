//! What a save keeps: whether the link was up, so that the driver hears of it if it is not as it
//! was. The address is a part of the machine's configuration; frames on their way are lost, as on
//! any network.

use serde::{Deserialize, Serialize};

use super::device::Net;
use crate::devices::virtio::RestoreError;

/// A saved network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    link_up: bool,
}

impl Net {
    pub(super) fn save_state(&self) -> NetState {
        NetState {
            // A driver that has yet to hear of a change is told so again.
            link_up: self.is_link_up() != self.announce,
        }
    }

    pub(super) fn restore_state(&mut self, state: &NetState) -> Result<(), RestoreError> {
        self.announce = state.link_up != self.is_link_up();
        Ok(())
    }
}
