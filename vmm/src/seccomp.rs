//! What each thread may ask of the kernel: one seccomp filter a thread kind, and the report when
//! a thread asks for something else.
//!
//! The filters are compiled by the build script from the policies in `resources/seccomp`. Order
//! of use in a VMM process:
//!
//! 1. [`prepare`], once, before the first filter: where a violation is reported, and the handler
//!    that does it.
//! 2. Each thread calls [`install`] with its [`ThreadKind`] as the first thing that it does. A
//!    new thread inherits the filter of the thread that started it and can only narrow it
//!    further, so threads that may do what the control thread may not (vCPUs, pager, fetch) are
//!    started first, and the control thread installs its filter last, before it lets the vCPUs
//!    enter the guest. Workers may be started later: control may do all that they may.
//!
//! A call that is not in the policy ends the process with [`EXIT_CODE_VIOLATION`] and one line on
//! the report descriptor, which [`explain`] turns into a sentence on the parent's side. A call
//! through a foreign ABI (i386, x32) kills the process with SIGSYS at once.

mod handler;
#[cfg(test)]
mod policy;
mod report;
#[cfg(test)]
mod tables;
#[cfg(test)]
mod tests;

pub use handler::prepare;
pub use report::{Violation, explain, parse_report};

use seccompiler::sock_filter;
use thiserror::Error;

include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));

/// Exit code of a process that a violation ended: 128 + SIGSYS, which is also what a shell shows
/// for a process that SIGSYS killed.
pub const EXIT_CODE_VIOLATION: i32 = 128 + libc::SIGSYS;

/// The kinds of threads of a VMM process, each with a policy of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main thread: event loop over devices and the control socket.
    Control,
    /// Runs one vCPU.
    Vcpu,
    /// Serves page faults.
    Pager,
    /// Decodes and places segments, encodes deltas.
    Worker,
    /// Receives an overlay from the network.
    Fetch,
    /// The only thread of the process that reads a disk image of another format.
    Image,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Control,
        Self::Vcpu,
        Self::Pager,
        Self::Worker,
        Self::Fetch,
        Self::Image,
    ];

    /// The name of its policy file, and what the name of such a thread starts with.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Vcpu => "vcpu",
            Self::Pager => "pager",
            Self::Worker => "worker",
            Self::Fetch => "fetch",
            Self::Image => "image",
        }
    }

    const fn program(self) -> &'static [sock_filter] {
        match self {
            Self::Control => &CONTROL,
            Self::Vcpu => &VCPU,
            Self::Pager => &PAGER,
            Self::Worker => &WORKER,
            Self::Fetch => &FETCH,
            Self::Image => &IMAGE,
        }
    }
}

/// Why a thread has no filter.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// [`install`] before [`prepare`].
    #[error("seccomp: no violation handler is prepared")]
    NotPrepared,
    /// [`prepare`] twice.
    #[error("seccomp: the violation handler is prepared already")]
    AlreadyPrepared,
    /// The kernel refused the signal handler.
    #[error("seccomp: cannot handle SIGSYS")]
    Handler(#[source] std::io::Error),
    /// malloc did not take its setting: it would open a file on a confined thread.
    #[error("seccomp: malloc cannot be kept to one arena")]
    Arena,
    /// SIGSYS could not be unblocked: a violation would kill without a report.
    #[error("seccomp: cannot unblock SIGSYS")]
    Unblock(#[source] std::io::Error),
    /// The kernel refused the filter (a kernel without CONFIG_SECCOMP_FILTER).
    #[error("seccomp: cannot install the filter of a {kind} thread")]
    Install {
        /// Which policy.
        kind: &'static str,
        /// Why.
        #[source]
        source: seccompiler::Error,
    },
}

/// Puts the calling thread under the filter of its kind, for good. Threads that it starts later
/// are under the same filter.
///
/// # Errors
/// Without [`prepare`] before it, or when the kernel refuses: the thread must not go on then.
pub fn install(kind: ThreadKind) -> Result<(), SeccompError> {
    handler::label_thread(kind)?;
    seccompiler::apply_filter(kind.program()).map_err(|source| SeccompError::Install {
        kind: kind.name(),
        source,
    })
}

/// The name of a system call of x86-64.
fn syscall_name(number: i32) -> Option<&'static str> {
    let name = SYSCALL_NAMES.get(usize::try_from(number).ok()?)?;
    (!name.is_empty()).then_some(*name)
}
