//! What other threads tell the control thread: the overlay has arrived or will not, its source is
//! silent.

use std::fs::File;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::MachineHandle;

use crate::fetch::{Kind, Trouble};
use crate::report;
use crate::synthesis::{Notice, Notify};

/// How long the control thread may take to end the VM. It may itself be waiting for a page that
/// will not come, and then the thread that knows ends the process.
const END_GRACE: Duration = Duration::from_secs(3);

/// What the arrival tells: failures end the VM.
pub(super) fn notify(handle: Arc<OnceLock<MachineHandle>>, report: File) -> Notify {
    Arc::new(move |notice| match notice {
        // The event wakes the control thread, which looks at the arrival itself.
        Notice::Complete => handle.get().into_iter().for_each(MachineHandle::wake),
        Notice::Failed(reason) => {
            let reason = ExitReason::HostError { message: reason };
            if let Some(handle) = handle.get() {
                handle.end(reason.clone());
            }
            std::thread::sleep(END_GRACE);
            report::write(&report, &reason);
            std::process::exit(i32::from(reason.code()));
        }
    })
}

/// Holds the VM while the source of its overlay is silent.
pub(super) fn on_trouble(
    handle: Arc<OnceLock<MachineHandle>>,
) -> Arc<dyn Fn(&Trouble<'_>) + Send + Sync> {
    let troubled = AtomicU8::new(0);
    let bit = |kind: &Kind| if *kind == Kind::Stream { 1 } else { 2 };
    Arc::new(move |trouble| match trouble {
        Trouble::Retrying { kind, .. } => {
            if troubled.fetch_or(bit(kind), Ordering::AcqRel) == 0 {
                handle.get().into_iter().for_each(MachineHandle::pause);
            }
        }
        Trouble::Recovered { kind, .. } => {
            if troubled.fetch_and(!bit(kind), Ordering::AcqRel) == bit(kind) {
                handle.get().into_iter().for_each(MachineHandle::resume);
            }
        }
    })
}
