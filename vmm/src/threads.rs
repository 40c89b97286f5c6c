//! The hook that each thread of a VMM process calls before it does anything for the guest, which is
//! where its seccomp filter is installed; and which thread takes which signals.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

pub use crate::seccomp::ThreadKind;

/// What a hook may fail with.
pub type HookError = Box<dyn std::error::Error + Send + Sync>;

/// Called at the start of each thread, on that thread, before the first guest instruction.
pub type ThreadHook = Arc<dyn Fn(ThreadKind) -> Result<(), HookError> + Send + Sync>;

/// A hook that does nothing, for VMs that run without filters.
#[must_use]
pub fn no_hook() -> ThreadHook {
    Arc::new(|_| Ok(()))
}

/// Whether the calling thread, and those that it starts from now on, take `signals` that are sent to
/// the process. The kernel tries a thread that may be waiting for a disk, where no signal wakes it, as
/// readily as any other.
///
/// # Errors
/// A number is no signal's.
pub fn take_signals(signals: &[i32], taken: bool) -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    for &signal in signals {
        // SAFETY: sigset_t is a bit set for which zeros are a value; the call changes only `set`.
        if unsafe { libc::sigaddset(set.as_mut_ptr(), signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let how = if taken {
        libc::SIG_UNBLOCK
    } else {
        libc::SIG_BLOCK
    };
    // SAFETY: the call only reads `set`, which is initialised, and writes nothing.
    match unsafe { libc::pthread_sigmask(how, set.as_ptr(), ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
