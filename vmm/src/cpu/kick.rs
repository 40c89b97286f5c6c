//! Getting a thread out of the guest: a real-time signal whose handler, on the vCPU's own thread,
//! sets `immediate_exit` in that vCPU's `kvm_run`.
//!
//! No kick is lost. Whoever kicks has put its command into the thread's channel before. The thread
//! clears the flag, then looks into its channel, then enters the guest. A signal that arrives
//! before the flag is cleared has its command seen by the look that follows; one that arrives
//! after has the flag set when the guest is entered, which then returns at once; one that arrives
//! inside the guest interrupts it.

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering, compiler_fence};

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// The flag of the vCPU that this thread runs; null on other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks.
pub(crate) fn kick_signal() -> c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // The thread may be going away; then there is no flag to set.
    let _ = IMMEDIATE_EXIT.try_with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the pointer was put there by `KickFlag::install` on this very thread and is
            // taken away by its drop, which comes before the `kvm_run` mapping goes: it points to
            // a live byte that this thread otherwise accesses only through the same atomic.
            unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Relaxed);
        }
    });
}

/// Install the handler, once a process.
pub(crate) fn install_handler() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(kick_signal(), on_kick))
}

/// The current thread's connection between the kick signal and a vCPU's `immediate_exit`.
pub(crate) struct KickFlag {
    flag: *mut u8,
}

impl KickFlag {
    /// Let kicks of the current thread reach `vcpu`.
    ///
    /// # Safety
    /// `vcpu` must live, at whatever place, until the returned value is dropped, and the value
    /// must stay on this thread.
    pub(crate) unsafe fn install(vcpu: &mut VcpuFd) -> KickFlag {
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.with(|slot| slot.set(flag));
        KickFlag { flag }
    }

    /// Clear the flag: call it before looking for commands.
    pub(crate) fn clear(&self) {
        self.store(0);
    }

    /// Make the next entry into the guest return at once, after finishing pending I/O.
    pub(crate) fn set(&self) {
        self.store(1);
    }

    fn store(&self, value: u8) {
        // The handler runs on this thread, so it is the compiler alone that must keep the order.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: by the contract of `install` the vCPU, and so its mapping, still lives.
        unsafe { AtomicU8::from_ptr(self.flag) }.store(value, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }
}

impl Drop for KickFlag {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|slot| slot.set(ptr::null_mut()));
    }
}
