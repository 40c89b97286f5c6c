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

/// `IA32_ARCH_CAPABILITIES`: which of the CPU's weaknesses are not there (Intel SDM volume 4, table
/// 2-2; `arch/x86/include/asm/msr-index.h`).
const ARCH_CAPABILITIES: u32 = 0x10a;
const CAPABILITIES: [(u8, &str); 24] = [
    (0, "rdcl_no"),
    (1, "ibrs_all"),
    (2, "no rsba"),
    (3, "skip_l1dfl"),
    (4, "ssb_no"),
    (5, "mds_no"),
    (6, "pschange_mc_no"),
    (7, "tsx_ctrl"),
    (8, "taa_no"),
    (10, "misc_package_ctrls"),
    (13, "sbdr_ssdp_no"),
    (14, "fbsdp_no"),
    (15, "psdp_no"),
    (17, "fb_clear"),
    (18, "fb_clear_ctrl"),
    (19, "no rrsba"),
    (20, "bhi_no"),
    (24, "pbrsb_no"),
    (25, "gds_ctrl"),
    (26, "gds_no"),
    (27, "rfds_no"),
    (28, "rfds_clear"),
    (32, "itlb_mc_no"),
    (62, "its_no"),
];

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
    /// The saved state has a register that this host does not list.
    #[error("this host has no MSR {index:#x}, which the VM had with the value {value:#x}")]
    Unlisted {
        /// The register.
        index: u32,
        /// The saved value.
        value: u64,
    },
    /// The guest was told of immunities that this host does not have.
    #[error("this host's CPU does not have what ARCH_CAPABILITIES told the VM: {missing}")]
    Capabilities {
        /// Names of the bits.
        missing: String,
    },
    /// More registers than any host has.
    #[error("{0} MSRs are more than the limit of {MSRS_MAX}")]
    TooMany(usize),
}

/// What this host has of registers.
#[derive(Debug, Clone)]
pub struct HostMsrs {
    /// Those that are saved, and the only ones that are restored.
    pub indices: Vec<u32>,
    /// `IA32_ARCH_CAPABILITIES`.
    capabilities: u64,
}

impl HostMsrs {
    /// Ask KVM.
    ///
    /// # Errors
    /// KVM refuses its list.
    pub fn read(kvm: &Kvm) -> Result<Self, MsrError> {
        Ok(Self {
            indices: index_list(kvm)?,
            capabilities: host_capabilities(kvm),
        })
    }
}

fn index_list(kvm: &Kvm) -> Result<Vec<u32>, MsrError> {
    let list = kvm.get_msr_index_list().map_err(MsrError::List)?;
    let mut indices: Vec<u32> = list
        .as_slice()
        .iter()
        .copied()
        .filter(|index| !is_hyperv(*index) && !is_nested(*index))
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
        0x8b | ARCH_CAPABILITIES | 0x345 | 0xce | 0x34
    )
}

/// IA32_VMX_*: what nested virtualisation would offer. No guest has it.
fn is_nested(index: u32) -> bool {
    matches!(index, 0x480..=0x491)
}

/// What this host's CPU says of its immunities; 0 where it has no such register.
fn host_capabilities(kvm: &Kvm) -> u64 {
    let entry = kvm_msr_entry {
        index: ARCH_CAPABILITIES,
        ..Default::default()
    };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else {
        return 0;
    };
    match kvm.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice()[0].data,
        // A CPU or a KVM without the register.
        _ => 0,
    }
}

/// Checks that this host's CPU is as immune as the guest was told. RSBA and RRSBA say the opposite: a
/// guest that was not told of them does not guard against them.
fn check_capabilities(saved: u64, host: u64) -> Result<(), MsrError> {
    let weaknesses = (1 << 2) | (1 << 19);
    let missing = (saved & !host & !weaknesses) | (host & !saved & weaknesses);
    if missing == 0 {
        return Ok(());
    }
    let names = (0u8..64)
        .filter(|bit| missing & (1 << bit) != 0)
        .map(|bit| match CAPABILITIES.iter().find(|(of, _)| *of == bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("bit {bit}"),
        });
    let missing = names.collect::<Vec<_>>().join(", ");
    Err(MsrError::Capabilities { missing })
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

/// Write a saved state's registers back: those that this host lists, and no others, whoever made the
/// state. `told_capabilities` says whether the guest was told that `IA32_ARCH_CAPABILITIES` exists.
///
/// # Errors
/// The first register that this host does not list or refuses, or what its CPU is not immune to.
pub fn restore(
    vcpu: &VcpuFd,
    saved: &[Msr],
    host: &HostMsrs,
    told_capabilities: bool,
) -> Result<(), MsrError> {
    if saved.len() > MSRS_MAX {
        return Err(MsrError::TooMany(saved.len()));
    }
    let capabilities = saved.iter().find(|msr| msr.index == ARCH_CAPABILITIES);
    if let Some(msr) = capabilities.filter(|_| told_capabilities) {
        check_capabilities(msr.value, host.capabilities)?;
    }
    write(vcpu, &listed(saved, host)?)
}

/// Those of `saved` that `host` lists. All others are missed, but for those that are not state.
fn listed(saved: &[Msr], host: &HostMsrs) -> Result<Vec<Msr>, MsrError> {
    let mut listed = Vec::with_capacity(saved.len());
    for msr in saved {
        let Msr { index, value } = *msr;
        if host.indices.contains(&index) {
            listed.push(*msr);
        } else if !refusal_is_harmless(index) && !is_nested(index) {
            return Err(MsrError::Unlisted { index, value });
        }
    }
    Ok(listed)
}

/// Write registers.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn host(indices: &[u32]) -> HostMsrs {
        HostMsrs {
            indices: indices.to_vec(),
            capabilities: 0,
        }
    }

    #[test]
    fn only_listed_registers_are_restored() {
        let msr = |index, value| Msr { index, value };
        let saved = [msr(0x10, 5), msr(0x8b, 7), msr(0x480, 9)];
        assert_eq!(listed(&saved, &host(&[0x10])).unwrap(), [msr(0x10, 5)]);
        for value in [0, 1] {
            let hostile = [msr(0x10, 5), msr(0xc000_0080, value)];
            let error = listed(&hostile, &host(&[0x10])).unwrap_err().to_string();
            assert!(error.contains("no MSR 0xc0000080"), "{error}");
        }
    }

    #[test]
    fn a_guest_does_not_go_on_with_immunities_that_are_not_there() {
        let immune = (1 << 0) | (1 << 5);
        check_capabilities(immune, immune | (1 << 8)).unwrap();
        let error = check_capabilities(immune, 1).unwrap_err().to_string();
        assert!(error.ends_with("told the VM: mds_no"), "{error}");
        // It never heard that its return predictions may come from elsewhere.
        let error = check_capabilities(1, 1 | (1 << 19)).unwrap_err();
        assert!(error.to_string().ends_with("no rrsba"), "{error}");
        check_capabilities(1 | (1 << 19), 1).unwrap();
    }
}
