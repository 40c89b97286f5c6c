//! The hook that each thread of a VMM process calls before it does anything for the guest, which is
//! where its seccomp filter is installed.

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
