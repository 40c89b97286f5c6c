//! One entry into the guest, and what to do with the exit it ends in.

use std::sync::Arc;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::bus::Bus;
use crate::exit::{ExitReason, INSTRUCTION_BYTES_MAX};
use crate::memory::GuestRam;

/// What became of an entry into the guest.
#[derive(Debug)]
pub(crate) enum Step {
    /// Go on.
    Continue,
    /// A signal or `immediate_exit` ended it; no I/O of the guest is pending.
    Interrupted,
    /// The VM is at its end.
    End(ExitReason),
}

/// What a vCPU needs to serve its exits.
pub(crate) struct Surroundings {
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    /// Keeps guest memory mapped for as long as the vCPU may run, and shows instruction bytes.
    pub(crate) guest: Arc<GuestRam>,
}

/// Enter the guest once.
pub(crate) fn step(vcpu: &mut VcpuFd, cpu: u8, around: &Surroundings) -> Step {
    let unexpected = |what: String| Step::End(ExitReason::UnexpectedExit { cpu, what });
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(error) => return on_run_error(error, cpu),
    };
    match exit {
        VcpuExit::IoOut(port, data) => {
            around.ports.write(port.into(), data);
            Step::Continue
        }
        VcpuExit::IoIn(port, data) => {
            around.ports.read(port.into(), data);
            Step::Continue
        }
        VcpuExit::MmioWrite(address, data) => {
            around.mmio.write(address, data);
            Step::Continue
        }
        VcpuExit::MmioRead(address, data) => {
            around.mmio.read(address, data);
            Step::Continue
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Step::Continue,
        VcpuExit::Shutdown => Step::End(ExitReason::TripleFault { cpu }),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Step::End(ExitReason::Shutdown),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Step::End(ExitReason::Reset),
        VcpuExit::FailEntry(reason, _) => Step::End(ExitReason::FailEntry { cpu, reason }),
        VcpuExit::InternalError => Step::End(internal_error(vcpu, cpu, &around.guest)),
        VcpuExit::MemoryFault { flags, gpa, size } => Step::End(ExitReason::HostError {
            message: format!(
                "guest memory at {gpa:#x} (+{size:#x}) could not be reached for vCPU {cpu}, \
                 flags {flags:#x}"
            ),
        }),
        // The irqchip is in the kernel: a halted vCPU waits there and causes no exit.
        VcpuExit::Hlt => unexpected("HLT although the irqchip is in the kernel".into()),
        other => unexpected(format!("{other:?}")),
    }
}

fn on_run_error(error: kvm_ioctls::Error, cpu: u8) -> Step {
    match error.errno() {
        libc::EINTR => Step::Interrupted,
        // A vCPU that waited for its start-up interrupt has got it.
        libc::EAGAIN => Step::Continue,
        _ => Step::End(ExitReason::HostError {
            message: format!("KVM_RUN failed for vCPU {cpu}: {error}"),
        }),
    }
}

/// Collect what KVM says of an internal error.
fn internal_error(vcpu: &mut VcpuFd, cpu: u8, guest: &GuestRam) -> ExitReason {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills `internal`;
    // all its fields are plain integers.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let mut instruction = Vec::new();
    if internal.suberror == KVM_INTERNAL_ERROR_EMULATION && internal.ndata >= 1 {
        // SAFETY: as above; `emulation_failure` is the same memory under the names that the
        // kernel documents for this suberror.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        let has_bytes =
            failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if has_bytes && failure.ndata >= 4 {
            // SAFETY: the flag says that the kernel filled this member; it is plain bytes.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let len = usize::from(bytes.insn_size).min(INSTRUCTION_BYTES_MAX);
            instruction = bytes.insn_bytes[..len].to_vec();
        }
    }
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    if instruction.is_empty() {
        instruction = fetch_instruction(vcpu, rip, guest);
    }
    ExitReason::InternalError {
        cpu,
        suberror: internal.suberror,
        rip,
        instruction,
    }
}

/// The bytes at `rip` from guest memory, as far as they are mapped and in the same page.
fn fetch_instruction(vcpu: &VcpuFd, rip: u64, guest: &GuestRam) -> Vec<u8> {
    let base = vcpu.get_sregs().map_or(0, |sregs| sregs.cs.base);
    let linear = rip.wrapping_add(base);
    let Ok(at) = vcpu.translate_gva(linear) else {
        return Vec::new();
    };
    if at.valid == 0 {
        return Vec::new();
    }
    let in_page = 4096 - usize::try_from(linear % 4096).unwrap_or(0);
    let mut bytes = vec![0; INSTRUCTION_BYTES_MAX.min(in_page)];
    match guest.read(&mut bytes, GuestAddress(at.physical_address)) {
        Ok(count) => bytes.truncate(count),
        Err(_) => bytes.clear(),
    }
    bytes
}
