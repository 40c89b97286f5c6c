//! What only a guest with ACPI tables has: two interrupts by which the host tells it something,
//! and the VM generation id. `boot/acpi.rs` has the tables.
//!
//! The id lies in a page that is not part of guest RAM: it is made anew with each machine, whether
//! that boots or is restored, and neither saved nor placed.

use std::io;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use super::devices::{VIRTIO_BASE, host, line};
use super::kvm::kvm_error;
use crate::devices::EventLine;
use crate::memory::PAGE_BYTES;

/// Interrupt of the power button: the pin of a keyboard, of which there is none.
pub(super) const BUTTON_GSI: u32 = 1;
/// Interrupt of a changed generation id: the pin of the second serial port.
pub(super) const GENERATION_GSI: u32 = 3;

/// Bytes of the id.
const ID_BYTES: usize = 16;

/// The two interrupts.
pub(super) struct Events {
    button: EventFd,
    generation: EventFd,
}

impl Events {
    pub(super) fn new() -> Result<Events, MachineError> {
        Ok(Events {
            button: line()?,
            generation: line()?,
        })
    }

    pub(super) fn connect(&self, vm: &VmFd) -> Result<(), MachineError> {
        for (line, gsi) in [
            (&self.button, BUTTON_GSI),
            (&self.generation, GENERATION_GSI),
        ] {
            vm.register_irqfd(line, gsi)
                .map_err(kvm_error("KVM_IRQFD"))?;
        }
        Ok(())
    }

    pub(super) fn press_button(&self) -> Result<(), MachineError> {
        raise(&self.button)
    }

    /// The machine is another one than the guest ran on before.
    pub(super) fn tell_generation(&self) -> Result<(), MachineError> {
        raise(&self.generation)
    }
}

fn raise(line: &EventFd) -> Result<(), MachineError> {
    let line = line.try_clone().map_err(host)?;
    EventLine::new(line).raise().map_err(host)
}

/// The page with the VM generation id: 16 random bytes at its start. It stays mapped as long as
/// any clone lives.
#[derive(Debug, Clone)]
pub struct GenerationId(Arc<MmapRegion>);

impl GenerationId {
    /// Where the guest finds it: in the hole of RAM, below the devices.
    pub const AT: u64 = VIRTIO_BASE - PAGE_BYTES;

    pub(super) fn new() -> Result<GenerationId, MachineError> {
        let bytes = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
        let page = MmapRegion::new(bytes).map_err(MachineError::Generation)?;
        let mut id = [0u8; ID_BYTES];
        // SAFETY: the kernel writes at most `ID_BYTES` bytes, which `id` has.
        let count = unsafe { libc::getrandom(id.as_mut_ptr().cast(), ID_BYTES, 0) };
        if usize::try_from(count) != Ok(ID_BYTES) {
            return Err(MachineError::Host {
                what: "getrandom",
                source: io::Error::last_os_error(),
            });
        }
        page.as_volatile_slice().copy_from(&id);
        Ok(GenerationId(Arc::new(page)))
    }

    /// What `KVM_SET_USER_MEMORY_REGION` takes.
    pub(super) fn kvm_region(&self, slot: u32) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: Self::AT,
            memory_size: PAGE_BYTES,
            userspace_addr: u64::try_from(self.0.as_ptr().addr()).unwrap_or(0),
        }
    }
}
