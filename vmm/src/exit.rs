//! How a VM ends, and the process exit code of each end.
//!
//! | code | meaning |
//! | --- | --- |
//! | 0 | the guest powered itself off, or the VM was stopped on request |
//! | any | the guest's process ended with this code, and the guest powered itself off |
//! | 1 | an error before the VM ran (also: any other error of the program) |
//! | 2 | the command line was not understood |
//! | 10 | the guest asked for a reset (i8042 or ACPI); a VM is not rebooted in place |
//! | 11 | triple fault |
//! | 12 | KVM internal error: KVM could not go on with the guest's code |
//! | 13 | KVM could not enter the guest |
//! | 14 | an exit of KVM that this VMM does not know or did not ask for |
//! | 15 | an error on the host while the VM ran: memory, files, a broken delta |
//! | 159 | a call outside a thread's policy: [`crate::seccomp::EXIT_CODE_VIOLATION`] |

/// Most instruction bytes that an internal error reports: the longest x86 instruction.
pub const INSTRUCTION_BYTES_MAX: usize = 15;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    Shutdown,
    /// The guest powered itself off after it had said what its process ended with
    /// ([`crate::machine::EXIT_CODE_PORT`]). The code is the guest's, whatever the table says of
    /// its number.
    Exited {
        /// The process's exit code; 128 and its number for a signal.
        code: u8,
    },
    /// Somebody asked for the VM to be stopped.
    Stopped,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU took a fault while it delivered a double fault.
    TripleFault {
        /// The vCPU.
        cpu: u8,
    },
    /// `KVM_EXIT_INTERNAL_ERROR`.
    InternalError {
        /// The vCPU.
        cpu: u8,
        /// `KVM_INTERNAL_ERROR_*` (1 is an instruction that KVM's emulator does not know).
        suberror: u32,
        /// Where the vCPU was.
        rip: u64,
        /// The bytes at `rip`, as KVM reported them or as guest memory has them; empty if
        /// neither knows.
        instruction: Vec<u8>,
    },
    /// `KVM_EXIT_FAIL_ENTRY`.
    FailEntry {
        /// The vCPU.
        cpu: u8,
        /// The hardware's reason.
        reason: u64,
    },
    /// An exit reason that this VMM has no use for.
    UnexpectedExit {
        /// The vCPU.
        cpu: u8,
        /// What KVM reported.
        what: String,
    },
    /// Something on the host's side failed while the VM ran.
    HostError {
        /// What failed, with its causes.
        message: String,
    },
}

impl ExitReason {
    /// The process exit code, from the table at the top of this file.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            ExitReason::Shutdown | ExitReason::Stopped => 0,
            ExitReason::Exited { code } => *code,
            ExitReason::Reset => 10,
            ExitReason::TripleFault { .. } => 11,
            ExitReason::InternalError { .. } => 12,
            ExitReason::FailEntry { .. } => 13,
            ExitReason::UnexpectedExit { .. } => 14,
            ExitReason::HostError { .. } => 15,
        }
    }

    /// A short name for JSON and scripts.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            ExitReason::Shutdown => "shutdown",
            ExitReason::Exited { .. } => "exited",
            ExitReason::Stopped => "stopped",
            ExitReason::Reset => "reset",
            ExitReason::TripleFault { .. } => "triple-fault",
            ExitReason::InternalError { .. } => "internal-error",
            ExitReason::FailEntry { .. } => "fail-entry",
            ExitReason::UnexpectedExit { .. } => "unexpected-exit",
            ExitReason::HostError { .. } => "host-error",
        }
    }

    /// Whether the guest, or somebody on the host, wanted the VM to end.
    #[must_use]
    pub fn is_orderly(&self) -> bool {
        matches!(
            self,
            ExitReason::Shutdown | ExitReason::Exited { .. } | ExitReason::Stopped
        )
    }

    /// A host error with the whole chain of an error's causes.
    #[must_use]
    pub fn host_error(error: &(dyn std::error::Error + 'static)) -> ExitReason {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message.push_str(": ");
            message.push_str(&error.to_string());
            cause = error.source();
        }
        ExitReason::HostError { message }
    }
}

/// What `KVM_INTERNAL_ERROR_*` of linux/kvm.h means.
fn suberror_meaning(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "an exception while another one was delivered at the same time",
        3 => "an exit in the middle of an event's delivery",
        4 => "an exit reason that KVM itself did not expect",
        _ => "of a kind this VMM has no words for",
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitReason::Shutdown => f.write_str("the guest powered itself off"),
            ExitReason::Exited { code } => {
                write!(f, "the guest's process ended with exit code {code}")
            }
            ExitReason::Stopped => f.write_str("the VM was stopped on request"),
            ExitReason::Reset => f.write_str("the guest asked for a reset"),
            ExitReason::TripleFault { cpu } => write!(f, "triple fault on vCPU {cpu}"),
            ExitReason::InternalError {
                cpu,
                suberror,
                rip,
                instruction,
            } => {
                write!(
                    f,
                    "KVM internal error on vCPU {cpu}, suberror {suberror} ({}), at rip {rip:#x}",
                    suberror_meaning(*suberror)
                )?;
                if instruction.is_empty() {
                    return f.write_str(", whose instruction bytes are not readable");
                }
                f.write_str(", instruction bytes")?;
                instruction
                    .iter()
                    .try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            ExitReason::FailEntry { cpu, reason } => {
                write!(
                    f,
                    "KVM could not enter the guest on vCPU {cpu}, hardware reason {reason:#x}"
                )
            }
            ExitReason::UnexpectedExit { cpu, what } => {
                write!(
                    f,
                    "KVM left the guest on vCPU {cpu} for a reason without use here: {what}"
                )
            }
            ExitReason::HostError { message } => f.write_str(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_internal_error_says_where_and_what() {
        let exit = ExitReason::InternalError {
            cpu: 1,
            suberror: 1,
            rip: 0x10_0000,
            instruction: vec![0x0f, 0xc7, 0x1f],
        };
        let text = exit.to_string();
        assert!(
            text.contains("suberror 1") && text.contains("0x100000"),
            "{text}"
        );
        assert!(text.ends_with("0f c7 1f"), "{text}");
        assert_eq!(exit.code(), 12);
    }
}
