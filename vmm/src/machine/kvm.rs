//! The VM as KVM knows it: created, given its interrupt controllers, timer and memory, and the
//! state of those parts.

use kvm_bindings::{
    KVM_API_VERSION, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};

use super::MachineError;
use super::acpi::GenerationId;
use super::clock::Clock;
use crate::memory::Ram;

/// Where KVM on Intel puts the task state segment that it needs for real mode: three pages below
/// the firmware area, with its identity map in the page before, as KVM's default has it. Far from
/// RAM (which has its hole there) and from the LAPIC and IOAPIC.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What this VMM cannot do without, with KVM's names.
const REQUIRED: [(Cap, &str); 9] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// Most pages KVM takes in one memory slot: its count is signed and 31 bits wide.
const SLOT_PAGES_MAX: u64 = (1 << 31) - 1;

/// For `map_err` on KVM calls.
pub(super) fn kvm_error(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { call, source }
}

/// Open `/dev/kvm` and check that it is what we need.
pub(super) fn open() -> Result<Kvm, MachineError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => MachineError::NoKvm,
        libc::EACCES | libc::EPERM => MachineError::KvmPermission,
        _ => kvm_error("opening /dev/kvm")(error),
    })?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(MachineError::KvmVersion(version));
    }
    Ok(kvm)
}

/// Create the VM with its in-kernel interrupt controllers and timer, and give it its memory.
pub(super) fn create_vm(
    kvm: &Kvm,
    ram: &Ram,
    generation: Option<&GenerationId>,
) -> Result<VmFd, MachineError> {
    let vm = loop {
        match kvm.create_vm() {
            // A signal arrived while KVM waited for something; it asks to be called again.
            Err(error) if error.errno() == libc::EINTR => {}
            result => break result.map_err(kvm_error("KVM_CREATE_VM"))?,
        }
    };
    if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !vm.check_extension(*cap)) {
        return Err(MachineError::KvmLacks(name));
    }
    if vm.check_extension(Cap::SetTssAddr) {
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(kvm_error("KVM_SET_TSS_ADDR"))?;
    }
    // Memory first: replacing the (empty) list of slots waits for a grace period of the VM's SRCU,
    // which takes microseconds now and several milliseconds once the devices below have queued
    // their own.
    for slot in ram.slots() {
        if slot.run().count > SLOT_PAGES_MAX {
            return Err(MachineError::SlotTooLarge(slot.len));
        }
        // SAFETY: the slot's address range is mapped for as long as a clone of `Ram::guest` lives
        // (the rule of memory/ram.rs), and `Machine` and every vCPU thread hold such a clone
        // until after their descriptors of this VM are closed.
        unsafe { vm.set_user_memory_region(slot.kvm_region(0)) }
            .map_err(kvm_error("KVM_SET_USER_MEMORY_REGION"))?;
    }
    if let Some(generation) = generation {
        let slot = ram.slots().iter().map(|slot| slot.index + 1).max();
        // SAFETY: the page is mapped for as long as a clone of the `GenerationId` lives, and
        // `Machine` and every vCPU thread hold one until after their descriptors of this VM are
        // closed.
        unsafe { vm.set_user_memory_region(generation.kvm_region(slot.unwrap_or(0))) }
            .map_err(kvm_error("KVM_SET_USER_MEMORY_REGION"))?;
    }
    vm.create_irq_chip()
        .map_err(kvm_error("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(kvm_error("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

/// State of what all vCPUs share in the kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct VmState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    pub(super) clock: Clock,
}

impl VmState {
    /// Read it; all vCPUs are paused.
    pub(super) fn save(vm: &VmFd) -> Result<VmState, MachineError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(kvm_error("KVM_GET_IRQCHIP"))?;
            Ok::<_, MachineError>(chip)
        };
        Ok(VmState {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().map_err(kvm_error("KVM_GET_PIT2"))?,
            clock: Clock::read(vm)?,
        })
    }

    /// Write all but the clock into a new VM whose vCPUs have their LAPICs already: the IOAPIC hands them what
    /// is pending.
    pub(super) fn restore(&self, vm: &VmFd) -> Result<(), MachineError> {
        let chips = [
            (&self.pic_master, KVM_IRQCHIP_PIC_MASTER),
            (&self.pic_slave, KVM_IRQCHIP_PIC_SLAVE),
            (&self.ioapic, KVM_IRQCHIP_IOAPIC),
        ];
        for (chip, id) in chips {
            if chip.chip_id != id {
                return Err(MachineError::State {
                    section: "vm".into(),
                    why: "an interrupt controller in another one's place",
                });
            }
            vm.set_irqchip(chip).map_err(kvm_error("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(kvm_error("KVM_SET_PIT2"))
    }
}
