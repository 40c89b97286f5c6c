//! The guest's clocks over a save: KVM's clock and the counters of the vCPUs.
//!
//! A guest that keeps KVM's clock finds both where they would be had it never stood still, so that
//! its idea of the date is right (linux `Documentation/virt/kvm/devices/vcpu.rst`, section 4.1).
//! It is told that it stood still, so that its watchdogs do not bark. A guest that does not keep
//! that clock finds both where they were, as it has no date.

use std::arch::x86_64::_rdtsc;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};

use super::MachineError;
use super::kvm::kvm_error;
use crate::cpu::CpuError;
use crate::cpu::msrs;
use crate::cpu::state::VcpuState;
use crate::cpu::thread::Vcpu;
use crate::cpu::tsc;

/// KVM's clock and what the host's clocks were at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Clock {
    /// KVM's clock in ns.
    kvm_ns: u64,
    /// Real time, ns since 1970.
    real_ns: u64,
    /// The host's TSC.
    host_tsc: u64,
}

impl Clock {
    /// Read it. Where KVM does not tell the host's clocks with its own (it does since 5.16, if the
    /// host keeps time by its TSC), they are read right after, which is microseconds later.
    pub(super) fn read(vm: &VmFd) -> Result<Clock, MachineError> {
        let data = vm.get_clock().map_err(kvm_error("KVM_GET_CLOCK"))?;
        let has = |flag| data.flags & flag != 0;
        Ok(Clock {
            kvm_ns: data.clock,
            real_ns: if has(KVM_CLOCK_REALTIME) {
                data.realtime
            } else {
                real_ns()
            },
            host_tsc: if has(KVM_CLOCK_HOST_TSC) {
                data.host_tsc
            } else {
                // SAFETY: reading the counter has no effect; every x86-64 has it.
                unsafe { _rdtsc() }
            },
        })
    }

    /// Set KVM's clock to what it was.
    pub(super) fn restore_as_it_was(&self, vm: &VmFd) -> Result<(), MachineError> {
        let data = kvm_clock_data {
            clock: self.kvm_ns,
            ..Default::default()
        };
        vm.set_clock(&data).map_err(kvm_error("KVM_SET_CLOCK"))
    }

    /// Set KVM's clock to what it would be by now; a host whose clock is behind leaves it as it
    /// was.
    fn restore_as_of_now(&self, vm: &VmFd) -> Result<(), MachineError> {
        let offered = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let data = if offered & KVM_CLOCK_REALTIME != 0 {
            kvm_clock_data {
                clock: self.kvm_ns,
                realtime: self.real_ns,
                flags: KVM_CLOCK_REALTIME,
                ..Default::default()
            }
        } else {
            let elapsed = real_ns().saturating_sub(self.real_ns);
            kvm_clock_data {
                clock: self.kvm_ns.saturating_add(elapsed),
                ..Default::default()
            }
        };
        vm.set_clock(&data).map_err(kvm_error("KVM_SET_CLOCK"))
    }

    /// How much the offsets of the vCPUs' counters have to change, modulo 2^64, if the counters
    /// shall have run on with KVM's clock from `self` to `now`: the host's counter may be another
    /// host's, or have started anew.
    fn offset_change(&self, now: &Clock, khz: u32) -> u64 {
        let elapsed_ns = i128::from(now.kvm_ns) - i128::from(self.kvm_ns);
        let ticks = elapsed_ns * i128::from(khz) / 1_000_000;
        let change = ticks + i128::from(self.host_tsc) - i128::from(now.host_tsc);
        // The lower 64 bits, which is what "modulo" says.
        let [low @ .., _, _, _, _, _, _, _, _] = change.to_le_bytes();
        u64::from_le_bytes(low)
    }

    /// Make the clocks of a machine whose vCPUs have their registers go on.
    pub(super) fn go_on(
        &self,
        vm: &VmFd,
        vcpus: &[Vcpu],
        saved: &[VcpuState],
    ) -> Result<(), MachineError> {
        if !saved.iter().any(keeps_kvm_clock) {
            return self.restore_as_it_was(vm);
        }
        self.restore_as_of_now(vm)?;
        let now = Clock::read(vm)?;
        for (vcpu, saved) in vcpus.iter().zip(saved) {
            if let Some(offset) = saved.tsc_offset
                && !vcpu.tsc.is_scaled
                && tsc::has_offset(&vcpu.fd)
            {
                let change = self.offset_change(&now, vcpu.tsc.khz);
                tsc::set_offset(&vcpu.fd, vcpu.id, offset.wrapping_add(change))?;
                // The timer was armed by the counter as it was.
                if let Some(deadline) = msrs::deadline(&saved.msrs) {
                    msrs::write(&vcpu.fd, &[deadline]).map_err(|source| CpuError::Msrs {
                        cpu: vcpu.id,
                        source,
                    })?;
                }
            }
            tell_pause(vm, vcpu)?;
        }
        Ok(())
    }
}

/// Tell the guest that it stood still.
fn tell_pause(vm: &VmFd, vcpu: &Vcpu) -> Result<(), MachineError> {
    if !vm.check_extension(Cap::KvmclockCtrl) {
        return Ok(());
    }
    match vcpu.fd.kvmclock_ctrl() {
        Ok(()) => Ok(()),
        // Documented: this vCPU does not keep KVM's clock.
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        Err(error) => Err(kvm_error("KVM_KVMCLOCK_CTRL")(error)),
    }
}

/// `MSR_KVM_SYSTEM_TIME_NEW` and its older number; bit 0 says that the guest keeps the clock
/// (linux `Documentation/virt/kvm/x86/msr.rst`).
const SYSTEM_TIME: [u32; 2] = [0x4b56_4d01, 0x12];

fn keeps_kvm_clock(vcpu: &VcpuState) -> bool {
    vcpu.msrs
        .iter()
        .any(|msr| SYSTEM_TIME.contains(&msr.index) && msr.value & 1 != 0)
}

fn real_ns() -> u64 {
    // A clock before 1970 counts as one that is behind.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok();
    since
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 2_000_000;

    fn clock(kvm_ns: u64, host_tsc: u64) -> Clock {
        Clock {
            kvm_ns,
            real_ns: 0,
            host_tsc,
        }
    }

    /// The guest's counter is the host's plus the offset: it must have advanced by the elapsed
    /// time, whatever the host's counter did.
    #[test]
    fn counters_run_on_with_the_clock() {
        let saved = clock(5_000_000_000, 700_000_000_000);
        let offset = 0u64.wrapping_sub(690_000_000_000);
        let guest_tsc = saved.host_tsc.wrapping_add(offset);
        for host_tsc in [0, 1_000, 700_000_000_000, u64::MAX] {
            let now = clock(8_000_000_000, host_tsc);
            let change = saved.offset_change(&now, KHZ);
            let after = host_tsc.wrapping_add(offset).wrapping_add(change);
            assert_eq!(after, guest_tsc + 3 * 2_000_000_000);
        }
        assert_eq!(saved.offset_change(&saved, KHZ), 0);
    }

    #[test]
    fn no_saved_clock_overflows() {
        for saved in [clock(0, 0), clock(u64::MAX, 0), clock(u64::MAX, u64::MAX)] {
            for now in [clock(0, u64::MAX), clock(u64::MAX, 0)] {
                saved.offset_change(&now, u32::MAX);
            }
        }
    }
}
