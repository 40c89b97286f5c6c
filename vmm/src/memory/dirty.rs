//! Which pages were written since the last question: one answer for both writers.
//!
//! vCPUs write through KVM, which keeps a bitmap a memory slot while it is told to log; devices
//! write through vm-memory, which keeps a bitmap a region. Whoever asks gets the union, and both
//! bitmaps start afresh. Pages that the pager places are no writes and appear in neither.
//!
//! The log works in KVM's plain mode, where reading it also protects the pages again:
//! `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` must not be enabled on the VM.

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use vm_memory::GuestMemoryBackend;

use super::layout::{PageSet, to_usize};
use super::ram::Ram;

/// What can go wrong with the log.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// Logging could not be switched.
    #[error("cannot switch dirty logging of memory slot {slot}")]
    Switch {
        /// Number of the slot.
        slot: u32,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The log could not be read.
    #[error("cannot read the dirty log of memory slot {slot}")]
    Read {
        /// Number of the slot.
        slot: u32,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Logging in progress: for one VM and its RAM, the same in every call.
#[derive(Debug)]
pub struct DirtyLog(());

impl DirtyLog {
    /// Starts to log. `ram` must be what the VM runs on: its slots registered with the flags 0
    /// under their own numbers. All pages count as clean from here on.
    ///
    /// # Errors
    /// [`DirtyError::Switch`]; logging is then off.
    pub fn start(vm: &VmFd, ram: &Ram) -> Result<Self, DirtyError> {
        let log = Self(());
        if let Err(error) = log.switch(vm, ram, KVM_MEM_LOG_DIRTY_PAGES) {
            // The first error is the one that matters; switching off is the best that is left.
            let _ = log.switch(vm, ram, 0);
            return Err(error);
        }
        for region in ram.guest().iter() {
            region.bitmap().reset();
        }
        Ok(log)
    }

    /// The pages written since the last call (or the start).
    ///
    /// With vCPUs and devices running, a page that is written during the call is in this answer or
    /// the next one.
    ///
    /// # Errors
    /// [`DirtyError::Read`]. What was read so far is lost: the caller has to take all pages for
    /// dirty.
    pub fn take(&self, vm: &VmFd, ram: &Ram) -> Result<PageSet, DirtyError> {
        let mut dirty = PageSet::new(ram.layout().pages());
        for (slot, region) in ram.slots().iter().zip(ram.guest().iter()) {
            let log = vm
                .get_dirty_log(slot.index, to_usize(slot.len))
                .map_err(|source| DirtyError::Read {
                    slot: slot.index,
                    source,
                })?;
            dirty.insert_bits(slot.first, &log);
            dirty.insert_bits(slot.first, &region.bitmap().get_and_reset());
        }
        Ok(dirty)
    }

    /// Stops to log.
    ///
    /// # Errors
    /// [`DirtyError::Switch`].
    pub fn stop(self, vm: &VmFd, ram: &Ram) -> Result<(), DirtyError> {
        self.switch(vm, ram, 0)
    }

    fn switch(&self, vm: &VmFd, ram: &Ram, flags: u32) -> Result<(), DirtyError> {
        for slot in ram.slots() {
            // SAFETY: the same memory as before under the same number (the contract of `start`);
            // only the flags change. That it stays mapped while the VM has it is the promise of
            // whoever registered the slots.
            unsafe { vm.set_user_memory_region(slot.kvm_region(flags)) }.map_err(|source| {
                DirtyError::Switch {
                    slot: slot.index,
                    source,
                }
            })?;
        }
        Ok(())
    }
}
