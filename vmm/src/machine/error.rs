//! Everything that can go wrong with a machine as a whole.

use std::io;

use crate::boot::BootError;
use crate::bus::BusError;
use crate::config::ConfigError;
use crate::cpu::CpuError;
use crate::cpu::cpuid::CpuidError;
use crate::devices::serial::SerialError;
use crate::devices::virtio::vsock::VsockError;
use crate::devices::virtio::{DeviceError, RestoreError};
use crate::memory::{DirtyError, DiscardError, RamError};

/// Why a machine cannot be built, run or saved.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// There is no KVM.
    #[error(
        "there is no /dev/kvm: load the kernel's kvm module (kvm_intel, kvm_amd or kvm_pvm), and in \
         a cloud VM ask for nested virtualisation"
    )]
    NoKvm,
    /// KVM may not be used.
    #[error("/dev/kvm may not be opened: add this user to the group that owns it (usually kvm)")]
    KvmPermission,
    /// KVM speaks another language.
    #[error("KVM has API version {0}, this program speaks 12")]
    KvmVersion(i32),
    /// KVM lacks something that nothing can stand in for.
    #[error("this host's KVM lacks {0}")]
    KvmLacks(&'static str),
    /// A KVM call was refused.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// More memory in one piece than KVM takes.
    #[error("{0} bytes of memory in one piece are more than KVM takes")]
    SlotTooLarge(u64),
    /// The description of the VM is refused.
    #[error("the VM's configuration is refused")]
    Config(#[from] ConfigError),
    /// The guest memory that was handed in is not what the configuration says.
    #[error("guest memory has {given} bytes, the VM's configuration says {wanted}")]
    RamSize {
        /// Bytes of the memory.
        given: u64,
        /// Bytes of the configuration.
        wanted: u64,
    },
    /// The host's resources are not what the configuration says.
    #[error("the VM's configuration says {wanted} {what}, the host gives {given}")]
    Backends {
        /// Of which resource.
        what: &'static str,
        /// How many the configuration has.
        wanted: usize,
        /// How many there are.
        given: usize,
    },
    /// Guest memory cannot be had.
    #[error("guest memory")]
    Ram(#[from] RamError),
    /// Pages that the guest does not use cannot be given back.
    #[error("free pages cannot be given back")]
    Discard(#[from] DiscardError),
    /// It cannot be said what the guest has written.
    #[error("the guest's writes cannot be observed")]
    Dirty(#[from] DirtyError),
    /// The kernel cannot be started.
    #[error("the guest cannot be started")]
    Boot(#[from] BootError),
    /// Something about a vCPU failed.
    #[error("virtual CPU")]
    Cpu(#[from] CpuError),
    /// The guest's CPUID is refused.
    #[error("the guest's CPU model is refused")]
    Cpuid(#[from] CpuidError),
    /// Two devices want the same place.
    #[error("the bus")]
    Bus(#[from] BusError),
    /// The serial port cannot be restored.
    #[error("the serial port")]
    Serial(#[from] SerialError),
    /// The vsock device cannot be made.
    #[error("the vsock device")]
    Vsock(#[from] VsockError),
    /// A virtio device cannot be made.
    #[error("a virtio device cannot be made")]
    Virtio(#[source] DeviceError),
    /// A virtio device cannot be restored.
    #[error("virtio device {index} cannot be restored")]
    RestoreVirtio {
        /// Its place in the order of devices.
        index: usize,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// A system call failed.
    #[error("{what} failed")]
    Host {
        /// Which.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The event loop failed.
    #[error("the event loop")]
    Events(#[source] event_manager::Error),
    /// The machine is not in a state in which this can be done.
    #[error("the VM is {is} and cannot be {wanted}")]
    Phase {
        /// What it is.
        is: &'static str,
        /// What was wanted.
        wanted: &'static str,
    },
    /// The guest knows of no power button.
    #[error("the guest has no power button: it was booted without ACPI tables")]
    NoButton,
    /// The page of the generation id cannot be mapped.
    #[error("memory for the VM generation id")]
    Generation(#[source] vm_memory::mmap::MmapRegionError),
    /// The saved state as a whole is not readable.
    #[error("the saved machine state")]
    Container(#[from] cloudlet_snapshot::ContainerError),
    /// A section cannot be written.
    #[error("section {section} cannot be encoded")]
    Encode {
        /// The section.
        section: String,
        /// What the encoder said.
        #[source]
        source: postcard::Error,
    },
    /// A section cannot be read.
    #[error("section {section} cannot be decoded")]
    Decode {
        /// The section.
        section: String,
        /// What the decoder said.
        #[source]
        source: postcard::Error,
    },
    /// A section holds what no machine can have had.
    #[error("section {section} holds {why}")]
    State {
        /// The section.
        section: String,
        /// What is wrong with it.
        why: &'static str,
    },
}
