//! A vCPU's time stamp counter: its frequency, and its offset from the host's.
//!
//! The counter's value is among the MSRs and goes on from there when it is written back. For a
//! guest that keeps real time by it, it has to go on from where it would be by now, on all vCPUs
//! alike: that takes the offset (linux `Documentation/virt/kvm/devices/vcpu.rst`, section 4).

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::CpuError;

use ioctls::{KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};

/// Ioctl numbers that kvm-ioctls does not have for vCPUs of this architecture.
mod ioctls {
    #![allow(
        missing_docs,
        reason = "the macros make functions that cannot be documented"
    )]
    use super::{KVMIO, kvm_device_attr};
    use vmm_sys_util::ioctl_iow_nr;

    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
    ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);
}

/// A host whose TSC differs by less than this share (in parts per million) is taken as equal: NTP
/// corrects more than that, and KVM itself uses the same bound (`tsc_tolerance_ppm`).
const TOLERANCE_PPM: u64 = 250;

/// How fast a vCPU's counter runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frequency {
    /// What the guest was told, in kHz.
    pub khz: u32,
    /// The hardware scales the host's counter to that.
    pub is_scaled: bool,
}

/// The host's frequency, which a new vCPU has.
///
/// # Errors
/// KVM does not tell.
pub fn host_frequency(vcpu: &VcpuFd, cpu: u8) -> Result<Frequency, CpuError> {
    let khz = vcpu.get_tsc_khz().map_err(|source| CpuError::Kvm {
        call: "KVM_GET_TSC_KHZ",
        cpu,
        source,
    })?;
    Ok(Frequency {
        khz,
        is_scaled: false,
    })
}

/// Give a new vCPU the frequency that the guest was told, if it is not the host's already.
///
/// # Errors
/// The host cannot scale its counter to that.
pub fn set_frequency(
    vcpu: &VcpuFd,
    cpu: u8,
    can_scale: bool,
    saved: u32,
) -> Result<Frequency, CpuError> {
    let host = host_frequency(vcpu, cpu)?.khz;
    let tolerance = u64::from(saved) * TOLERANCE_PPM / 1_000_000;
    let is_scaled = u64::from(host.abs_diff(saved)) > tolerance;
    if is_scaled && !can_scale {
        let why = format!(
            "its TSC runs at {saved} kHz, this host's at {host} kHz, and this host cannot scale it"
        );
        return Err(CpuError::State { cpu, why });
    }
    if is_scaled {
        vcpu.set_tsc_khz(saved).map_err(|source| CpuError::Kvm {
            call: "KVM_SET_TSC_KHZ",
            cpu,
            source,
        })?;
    }
    Ok(Frequency {
        khz: saved,
        is_scaled,
    })
}

/// The attribute "offset", whose value is or goes to `value`.
fn attribute(value: &u64) -> kvm_device_attr {
    let pointer: *const u64 = value;
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: u64::try_from(pointer.expose_provenance()).unwrap_or(0),
    }
}

/// Whether this KVM tells and takes the offset (since Linux 5.16).
#[must_use]
pub fn has_offset(vcpu: &VcpuFd) -> bool {
    // SAFETY: `vcpu` is a KVM vCPU, and the kernel reads one `kvm_device_attr` and nothing else.
    (unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute(&0)) }) == 0
}

/// What is added to the host's counter, modulo 2^64.
///
/// # Errors
/// KVM does not tell.
pub fn offset(vcpu: &VcpuFd, cpu: u8) -> Result<u64, CpuError> {
    let mut value = 0u64;
    let pointer: *mut u64 = &raw mut value;
    let attribute = kvm_device_attr {
        addr: u64::try_from(pointer.expose_provenance()).unwrap_or(0),
        ..attribute(&0)
    };
    // SAFETY: `vcpu` is a KVM vCPU; the kernel reads one `kvm_device_attr` and writes one `u64`,
    // for which `value` lives.
    if unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } != 0 {
        let source = kvm_ioctls::Error::last();
        return Err(CpuError::Kvm {
            call: "KVM_GET_DEVICE_ATTR",
            cpu,
            source,
        });
    }
    Ok(value)
}

/// Change what is added to the host's counter.
///
/// # Errors
/// KVM refuses.
pub fn set_offset(vcpu: &VcpuFd, cpu: u8, offset: u64) -> Result<(), CpuError> {
    // SAFETY: `vcpu` is a KVM vCPU; the kernel reads one `kvm_device_attr` and one `u64`, for
    // which `offset` lives.
    if unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute(&offset)) } != 0 {
        let source = kvm_ioctls::Error::last();
        return Err(CpuError::Kvm {
            call: "KVM_SET_DEVICE_ATTR",
            cpu,
            source,
        });
    }
    Ok(())
}
