//! Model-specific registers: which ones a host has, reading them all, and writing them back.
//!
//! Saving is generous and restoring is strict. A register that the host lists but refuses to read
//! is left out of the saved state; one that was saved and is refused when it is written back is an
//! error that names it. The exceptions are in [`refusal_is_harmless`].

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// Most registers that one ioctl takes (`MSR_ENTRIES` in the kernel is 256; the list itself is
/// bounded by the same number in kvm-bindings).
const CHUNK: usize = 128;

/// Most registers that a saved state may have.
const MSRS_MAX: usize = 512;

/// `MSR_IA32_TSC_DEADLINE`: meaningful only after the TSC and the LAPIC are set, hence written
/// last.
const TSC_DEADLINE: u32 = 0x6e0;

/// Memory type ranges, which older kernels keep out of their list although they are state: the
/// default type, the fixed ranges and eight variable ones.
const MTRRS: [u32; 28] = [
    0x2ff, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x200,
    0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d,
    0x20e, 0x20f,
];

/// One register's number and value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The number.
    pub index: u32,
    /// The value.
    pub value: u64,
}

/// Why registers cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The host's list cannot be read.
    #[error("KVM does not list its MSRs")]
    List(#[source] kvm_ioctls::Error),
    /// The ioctl that reads failed as a whole.
    #[error("MSRs from {index:#x} on cannot be read")]
    Get {
        /// The first register of the chunk.
        index: u32,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The ioctl that writes failed as a whole.
    #[error("MSRs from {index:#x} on cannot be written")]
    Set {
        /// The first register of the chunk.
        index: u32,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host refuses a saved register.
    #[error("this host refuses MSR {index:#x} with the saved value {value:#x}")]
    Refused {
        /// The register.
        index: u32,
        /// The saved value.
        value: u64,
    },
    /// More registers than any host has.
    #[error("{0} MSRs are more than the limit of {MSRS_MAX}")]
    TooMany(usize),
}

/// The registers to save on this host.
///
/// # Errors
/// KVM refuses its list.
pub fn index_list(kvm: &Kvm) -> Result<Vec<u32>, MsrError> {
    let list = kvm.get_msr_index_list().map_err(MsrError::List)?;
    let mut indices: Vec<u32> = list
        .as_slice()
        .iter()
        .copied()
        .filter(|index| !is_hyperv(*index))
        .collect();
    for index in MTRRS {
        if !indices.contains(&index) {
            indices.push(index);
        }
    }
    Ok(indices)
}

/// Synthetic registers of Hyper-V, which no guest of ours is offered (its CPUID leaves are KVM's):
/// they hold nothing, and one of them is a clock that runs on while the VM stands still.
fn is_hyperv(index: u32) -> bool {
    matches!(index, 0x4000_0000..=0x4000_01ff)
}

/// Registers whose refusal changes nothing: those that a guest cannot write to either way, and
/// whose value another host reports for itself. They are saved because the list has them.
fn refusal_is_harmless(index: u32) -> bool {
    matches!(
        index,
        // IA32_BIOS_SIGN_ID, IA32_ARCH_CAPABILITIES, IA32_PERF_CAPABILITIES, PLATFORM_INFO,
        // SMI_COUNT.
        0x8b | 0x10a | 0x345 | 0xce | 0x34
        // IA32_VMX_*: what nested virtualisation offers, not state.
        | 0x480..=0x491
    )
}

/// The saved deadline of the LAPIC's timer, if it is armed.
#[must_use]
pub fn deadline(saved: &[Msr]) -> Option<Msr> {
    saved
        .iter()
        .find(|msr| msr.index == TSC_DEADLINE && msr.value != 0)
        .copied()
}

/// Read all of `indices` that this host is willing to read.
///
/// # Errors
/// An ioctl fails as a whole.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, MsrError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while let Some(&first) = rest.first() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        let entries: Vec<kvm_msr_entry> = chunk
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(indices.len()))?;
        let count = vcpu
            .get_msrs(&mut msrs)
            .map_err(|source| MsrError::Get {
                index: first,
                source,
            })?
            .min(chunk.len());
        saved.extend(msrs.as_slice()[..count].iter().map(|msr| Msr {
            index: msr.index,
            value: msr.data,
        }));
        // KVM stops at the first register that it refuses: leave that one out and go on.
        let skip = usize::from(count < chunk.len());
        rest = &rest[count + skip..];
    }
    Ok(saved)
}

/// Write saved registers back.
///
/// # Errors
/// The first register that is refused, by name.
pub fn write(vcpu: &VcpuFd, saved: &[Msr]) -> Result<(), MsrError> {
    if saved.len() > MSRS_MAX {
        return Err(MsrError::TooMany(saved.len()));
    }
    let (last, first): (Vec<Msr>, Vec<Msr>) =
        saved.iter().partition(|msr| msr.index == TSC_DEADLINE);
    let ordered = [first, last].concat();
    let mut rest = ordered.as_slice();
    while let Some(&first) = rest.first() {
        let chunk = &rest[..rest.len().min(CHUNK)];
        let entries: Vec<kvm_msr_entry> = chunk
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany(saved.len()))?;
        let count = vcpu
            .set_msrs(&msrs)
            .map_err(|source| MsrError::Set {
                index: first.index,
                source,
            })?
            .min(chunk.len());
        let mut skip = 0;
        if let Some(refused) = chunk.get(count) {
            if !refusal_is_harmless(refused.index) {
                return Err(MsrError::Refused {
                    index: refused.index,
                    value: refused.value,
                });
            }
            skip = 1;
        }
        rest = &rest[count + skip..];
    }
    Ok(())
}
