//! Virtual CPUs: what CPUID says, the registers as they are saved, and the thread that runs each.
//!
//! | file | what |
//! | --- | --- |
//! | `features.rs` | names of CPUID bits, the psABI levels as masks |
//! | `cpuid.rs` | the guest's CPUID table, baselines, the check at restore |
//! | `msrs.rs` | model-specific registers |
//! | `tsc.rs` | the time stamp counter's frequency and offset |
//! | `state.rs` | everything a vCPU is, saved and restored |
//! | `kick.rs` | the signal that gets a thread out of the guest |
//! | `run.rs` | one entry into the guest and what to do with its exit |
//! | `thread.rs` | the vCPU thread: paused, running, ended |

pub mod cpuid;
mod features;
mod kick;
pub mod msrs;
mod run;
pub mod state;
pub mod thread;
pub mod tsc;

use std::time::Duration;

use crate::threads::HookError;

/// Why something about a vCPU failed.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// A KVM call was refused.
    #[error("{call} failed for vCPU {cpu}")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// The vCPU.
        cpu: u8,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The CPUID table is refused.
    #[error("CPUID")]
    Cpuid(#[from] cpuid::CpuidError),
    /// Model-specific registers cannot be saved or restored.
    #[error("model-specific registers of vCPU {cpu}")]
    Msrs {
        /// The vCPU.
        cpu: u8,
        /// Which and why.
        #[source]
        source: msrs::MsrError,
    },
    /// A saved vCPU does not fit this host or is no state that a vCPU can have.
    #[error("the saved state of vCPU {cpu} cannot be used: {why}")]
    State {
        /// The vCPU.
        cpu: u8,
        /// What is wrong with it.
        why: String,
    },
    /// The thread could not be started.
    #[error("cannot start the thread of vCPU {cpu}")]
    Spawn {
        /// The vCPU.
        cpu: u8,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The signal handler that kicks vCPUs could not be installed.
    #[error("cannot install the signal handler that interrupts vCPUs")]
    Signal(#[source] vmm_sys_util::errno::Error),
    /// The hook at the start of the thread failed.
    #[error("vCPU {cpu} could not prepare its thread")]
    Hook {
        /// The vCPU.
        cpu: u8,
        /// What the hook said.
        #[source]
        source: HookError,
    },
    /// The thread did not answer in time.
    #[error("vCPU {cpu} did not answer within {} ms", waited.as_millis())]
    Unresponsive {
        /// The vCPU.
        cpu: u8,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The thread is gone.
    #[error("the thread of vCPU {0} is gone")]
    Gone(u8),
    /// Asked to do what the vCPU's present state does not allow.
    #[error("vCPU {cpu} is {state} and cannot be {wanted}")]
    WrongState {
        /// The vCPU.
        cpu: u8,
        /// What it is.
        state: &'static str,
        /// What was wanted of it.
        wanted: &'static str,
    },
}
