//! A vCPU as it is saved: every register that KVM tells, in the order in which KVM can be asked
//! and told without one call undoing another.
//!
//! Order when saving: the MP state first, because asking for it lets KVM finish a pending INIT or
//! SIPI; events last, because the calls before may change them. Order when restoring: CPUID before
//! everything that is checked against it; segments before the LAPIC, whose base register is among
//! them; XCRs before the state they enable; the LAPIC before the MSRs, because the deadline timer
//! needs its mode; general registers before events, because setting them drops pending exceptions.

use kvm_bindings::{
    KVMIO, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::msrs::{self, HostMsrs, Msr};
use super::tsc::{self, Frequency};
use super::{CpuError, cpuid};

use ioctls::{KVM_GET_SREGS2, KVM_SET_SREGS2};

/// Ioctl numbers that kvm-ioctls does not have.
mod ioctls {
    #![allow(
        missing_docs,
        reason = "the macros make functions that cannot be documented"
    )]
    use super::{KVMIO, kvm_sregs2};
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

    ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
}

/// `KVM_CAP_SREGS2` of linux/kvm.h, which kvm-ioctls has no name for.
const KVM_CAP_SREGS2: libc::c_ulong = 200;

/// Bytes of the legacy `struct kvm_xsave`, the least that the XSAVE ioctls move.
const XSAVE_BYTES_MIN: usize = 4096;

/// Largest XSAVE area that is believed: AMX needs 11 KiB, this leaves room.
const XSAVE_BYTES_MAX: usize = 64 << 10;

/// What of KVM the saving and restoring of vCPUs depends on, asked for once a VM.
#[derive(Debug, Clone)]
pub struct VcpuCaps {
    /// Bytes of the XSAVE area.
    xsave_bytes: usize,
    /// `KVM_GET_XSAVE2` exists.
    xsave2: bool,
    xcrs: bool,
    debugregs: bool,
    vcpu_events: bool,
    sregs2: bool,
    tsc_control: bool,
    /// MSRs to save and to restore.
    msrs: HostMsrs,
}

impl VcpuCaps {
    /// Ask KVM.
    ///
    /// # Errors
    /// The list of MSRs cannot be read, or the XSAVE area is beyond all bounds.
    pub fn read(kvm: &Kvm, vm: &VmFd) -> Result<VcpuCaps, CpuError> {
        let reported = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        if reported > XSAVE_BYTES_MAX {
            let why = format!("this host's XSAVE area has {reported} bytes");
            return Err(CpuError::State { cpu: 0, why });
        }
        Ok(VcpuCaps {
            xsave_bytes: reported.max(XSAVE_BYTES_MIN),
            xsave2: reported > 0,
            xcrs: vm.check_extension(Cap::Xcrs),
            debugregs: vm.check_extension(Cap::Debugregs),
            vcpu_events: vm.check_extension(Cap::VcpuEvents),
            sregs2: vm.check_extension_raw(KVM_CAP_SREGS2) > 0,
            tsc_control: vm.check_extension(Cap::TscControl),
            msrs: HostMsrs::read(kvm).map_err(|source| CpuError::Msrs { cpu: 0, source })?,
        })
    }

    /// An XSAVE buffer of this host's size, zeroed.
    fn xsave_buffer(&self, cpu: u8) -> Result<Xsave, CpuError> {
        let extra = (self.xsave_bytes - XSAVE_BYTES_MIN).div_ceil(size_of::<u32>());
        Xsave::new(extra).map_err(|error| CpuError::State {
            cpu,
            why: format!("XSAVE buffer: {error:?}"),
        })
    }
}

/// Types of a 64-bit task-state segment (AMD APM volume 2, table 4-6).
///
/// KVM on SVM says of every task register that it is busy, whatever the hardware holds after the
/// guest's `ltr` (`svm_get_segment` in linux `arch/x86/kvm/svm/svm.c`), and puts back what it is
/// given. VMX demands a busy one; SVM takes both, but an emulated SVM (QEMU's) grants port I/O by
/// the permission bitmap for an available one only, which is what it holds itself.
const TSS_64_AVAILABLE: u8 = 9;
const TSS_64_BUSY: u8 = 11;

/// The page-directory pointers of 32-bit PAE paging, which hardware holds in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pdptrs {
    /// `KVM_SREGS2_FLAGS_*`.
    pub flags: u64,
    /// The four registers.
    pub values: [u64; 4],
}

/// Everything a vCPU is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest was told it runs on.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// TSC frequency that the guest was told, in kHz.
    pub tsc_khz: u32,
    /// What is added to the host's TSC, where the host tells it and does not scale.
    pub tsc_offset: Option<u64>,
    /// Running, halted, waiting for SIPI...
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// PAE pointers, where the host tells them.
    pub pdptrs: Option<Pdptrs>,
    /// The XSAVE area in the standard format.
    pub xsave: Vec<u8>,
    /// Extended control registers.
    pub xcrs: Option<kvm_xcrs>,
    /// Debug registers.
    pub debugregs: Option<kvm_debugregs>,
    /// Local interrupt controller.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers, the TSC among them.
    pub msrs: Vec<Msr>,
    /// Interrupts and exceptions on their way.
    pub events: Option<kvm_vcpu_events>,
}

impl VcpuState {
    /// Read everything. Called on the vCPU's own thread, with no I/O of the guest pending.
    ///
    /// # Errors
    /// The call that KVM refused.
    pub fn save(
        vcpu: &VcpuFd,
        cpu: u8,
        caps: &VcpuCaps,
        cpuid: &[kvm_cpuid_entry2],
        tsc: Frequency,
    ) -> Result<VcpuState, CpuError> {
        let kvm = |call| move |source| CpuError::Kvm { call, cpu, source };
        let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?;
        let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        // A loaded task register is busy by architecture. Saved states say so whatever this host
        // was given to restore, so that they are alike everywhere and VMX takes them.
        if sregs.tr.type_ == TSS_64_AVAILABLE {
            sregs.tr.type_ = TSS_64_BUSY;
        }
        let pdptrs = if caps.sregs2 {
            Some(get_pdptrs(vcpu, cpu)?)
        } else {
            None
        };
        let xsave = get_xsave(vcpu, cpu, caps)?;
        let xcrs = caps
            .xcrs
            .then(|| vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS")))
            .transpose()?;
        let debugregs = caps
            .debugregs
            .then(|| vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS")))
            .transpose()?;
        let lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        let msrs = msrs::read(vcpu, &caps.msrs.indices)
            .map_err(|source| CpuError::Msrs { cpu, source })?;
        let events = caps
            .vcpu_events
            .then(|| vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS")))
            .transpose()?;
        let tsc_offset = (!tsc.is_scaled && tsc::has_offset(vcpu))
            .then(|| tsc::offset(vcpu, cpu))
            .transpose()?;
        Ok(VcpuState {
            cpuid: cpuid.to_vec(),
            tsc_khz: tsc.khz,
            tsc_offset,
            mp_state,
            regs,
            sregs,
            pdptrs,
            xsave,
            xcrs,
            debugregs,
            lapic,
            msrs,
            events,
        })
    }

    /// Write everything into a new vCPU. The counter goes on from its saved value; the offset is
    /// for whoever knows how much time has passed.
    ///
    /// # Errors
    /// The call that KVM refused, or what of the state does not fit this host.
    pub fn restore(&self, vcpu: &VcpuFd, cpu: u8, caps: &VcpuCaps) -> Result<Frequency, CpuError> {
        let kvm = |call| move |source| CpuError::Kvm { call, cpu, source };
        let tsc = tsc::set_frequency(vcpu, cpu, caps.tsc_control, self.tsc_khz)?;
        vcpu.set_cpuid2(&cpuid::to_kvm(&self.cpuid)?)
            .map_err(kvm("KVM_SET_CPUID2"))?;
        self.restore_sregs(vcpu, cpu, caps)?;
        if let Some(xcrs) = &self.xcrs {
            if !caps.xcrs {
                return Err(absent(cpu, "extended control registers"));
            }
            vcpu.set_xcrs(xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        }
        set_xsave(vcpu, cpu, caps, &self.xsave)?;
        if let Some(debugregs) = &self.debugregs {
            if !caps.debugregs {
                return Err(absent(cpu, "debug registers"));
            }
            vcpu.set_debug_regs(debugregs)
                .map_err(kvm("KVM_SET_DEBUGREGS"))?;
        }
        vcpu.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        let told = cpuid::has_arch_capabilities(&self.cpuid);
        msrs::restore(vcpu, &self.msrs, &caps.msrs, told)
            .map_err(|source| CpuError::Msrs { cpu, source })?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(kvm("KVM_SET_MP_STATE"))?;
        if let Some(events) = &self.events {
            if !caps.vcpu_events {
                return Err(absent(cpu, "pending events"));
            }
            vcpu.set_vcpu_events(events)
                .map_err(kvm("KVM_SET_VCPU_EVENTS"))?;
        }
        Ok(tsc)
    }

    fn restore_sregs(&self, vcpu: &VcpuFd, cpu: u8, caps: &VcpuCaps) -> Result<(), CpuError> {
        let mut sregs = self.sregs;
        if has_svm_states() && sregs.tr.type_ == TSS_64_BUSY {
            sregs.tr.type_ = TSS_64_AVAILABLE;
        }
        // Without pointers, KVM_SET_SREGS makes KVM read them from guest memory, which is what
        // the guest's own load of CR3 did.
        match &self.pdptrs {
            Some(pdptrs) if caps.sregs2 => set_sregs2(vcpu, cpu, &sregs, pdptrs),
            _ => vcpu.set_sregs(&sregs).map_err(|source| CpuError::Kvm {
                call: "KVM_SET_SREGS",
                cpu,
                source,
            }),
        }
    }
}

/// Whether this host's hardware virtualisation is AMD's, by the CPU's vendor (AMD APM volume 3,
/// CPUID function 0).
fn has_svm_states() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    matches!(vendor.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
}

fn absent(cpu: u8, what: &str) -> CpuError {
    CpuError::State {
        cpu,
        why: format!("it has {what}, which this host's KVM cannot set"),
    }
}

fn get_pdptrs(vcpu: &VcpuFd, cpu: u8) -> Result<Pdptrs, CpuError> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: `vcpu` is a KVM vCPU (kvm-ioctls made it), and the kernel writes exactly one
    // `kvm_sregs2`, which is what `sregs` is (the ioctl's number encodes the size).
    let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) };
    if result != 0 {
        let source = kvm_ioctls::Error::last();
        return Err(CpuError::Kvm {
            call: "KVM_GET_SREGS2",
            cpu,
            source,
        });
    }
    Ok(Pdptrs {
        flags: sregs.flags,
        values: sregs.pdptrs,
    })
}

fn set_sregs2(vcpu: &VcpuFd, cpu: u8, sregs: &kvm_sregs, pdptrs: &Pdptrs) -> Result<(), CpuError> {
    // A pending interrupt of `sregs.interrupt_bitmap` has no place here: it is among the events.
    let sregs2 = kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: pdptrs.flags,
        pdptrs: pdptrs.values,
    };
    // SAFETY: `vcpu` is a KVM vCPU, and the kernel reads exactly one `kvm_sregs2`.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), &sregs2) };
    if result != 0 {
        let source = kvm_ioctls::Error::last();
        return Err(CpuError::Kvm {
            call: "KVM_SET_SREGS2",
            cpu,
            source,
        });
    }
    Ok(())
}

fn get_xsave(vcpu: &VcpuFd, cpu: u8, caps: &VcpuCaps) -> Result<Vec<u8>, CpuError> {
    if !caps.xsave2 {
        let area = vcpu.get_xsave().map_err(|source| CpuError::Kvm {
            call: "KVM_GET_XSAVE",
            cpu,
            source,
        })?;
        return Ok(words_to_bytes(&area.region));
    }
    let mut buffer = caps.xsave_buffer(cpu)?;
    // SAFETY: `xsave_buffer` allocated what KVM_CAP_XSAVE2 reported for this VM, and nothing in
    // this process enables further state components afterwards (no arch_prctl).
    unsafe { vcpu.get_xsave2(&mut buffer) }.map_err(|source| CpuError::Kvm {
        call: "KVM_GET_XSAVE2",
        cpu,
        source,
    })?;
    let mut bytes = words_to_bytes(&buffer.as_fam_struct_ref().xsave.region);
    bytes.extend(words_to_bytes(buffer.as_slice()));
    Ok(bytes)
}

fn set_xsave(vcpu: &VcpuFd, cpu: u8, caps: &VcpuCaps, saved: &[u8]) -> Result<(), CpuError> {
    if !(XSAVE_BYTES_MIN..=XSAVE_BYTES_MAX).contains(&saved.len())
        || !saved.len().is_multiple_of(size_of::<u32>())
    {
        let why = format!("an XSAVE area of {} bytes", saved.len());
        return Err(CpuError::State { cpu, why });
    }
    let mut buffer = caps.xsave_buffer(cpu)?;
    let mut words = saved
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    let mut area = kvm_xsave::default();
    area.region
        .iter_mut()
        .zip(words.by_ref())
        .for_each(|(to, from)| *to = from);
    buffer
        .as_mut_slice()
        .iter_mut()
        .zip(words.by_ref())
        .for_each(|(to, from)| *to = from);
    // What this host has no room for must not hold anything.
    if words.any(|word| word != 0) {
        return Err(absent(cpu, "extended state"));
    }
    // SAFETY: only the fixed part is written; the length of the flexible part stays as allocated.
    unsafe { buffer.as_mut_fam_struct() }.xsave.region = area.region;
    // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 reported for this VM (or the 4096 bytes
    // of a KVM without it), which is what KVM_SET_XSAVE reads.
    unsafe { vcpu.set_xsave2(&buffer) }.map_err(|source| CpuError::Kvm {
        call: "KVM_SET_XSAVE",
        cpu,
        source,
    })
}

fn words_to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
