//! What a save keeps: the configuration as the driver will find it. Which pages are in the balloon
//! is the driver's to know; statistics and counters begin anew.
//!
//! A round of hints ends with the save: the restored driver finds that it is done, so that it does
//! not keep its free pages for somebody who is not there. That is why a restored device always sends
//! a configuration change; a driver takes one too many.

use serde::{Deserialize, Serialize};

use super::device::{ACTUAL, Balloon, POISON};
use super::handle::{COMMAND_DONE, COMMAND_STOP};
use crate::devices::virtio::RestoreError;

/// A saved balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    num_pages: u32,
    actual: u32,
    poison_val: u32,
    hint_command: u32,
    last_command: u32,
}

impl Balloon {
    pub(super) fn save_state(&self) -> BalloonState {
        let control = self.shared.lock();
        BalloonState {
            num_pages: control.num_pages,
            actual: self.field(ACTUAL),
            poison_val: self.field(POISON),
            hint_command: match control.hint_command {
                COMMAND_STOP => COMMAND_STOP,
                _ => COMMAND_DONE,
            },
            last_command: control.last_command,
        }
    }

    pub(super) fn restore_state(&mut self, state: &BalloonState) -> Result<(), RestoreError> {
        if u64::from(state.num_pages) > self.discarder.layout().pages() {
            return Err(RestoreError::Field("number of pages"));
        }
        if ![COMMAND_STOP, COMMAND_DONE].contains(&state.hint_command) {
            return Err(RestoreError::Field("hint command"));
        }
        self.set_field(ACTUAL, state.actual);
        self.set_field(POISON, state.poison_val);
        {
            let mut control = self.shared.lock();
            control.num_pages = state.num_pages;
            control.hint_command = state.hint_command;
            control.last_command = state.last_command;
            control.status.actual_pages = state.actual.into();
        }
        self.take_wishes();
        self.announce = true;
        self.shared.raise();
        Ok(())
    }
}
