//! What only the processor can do: ports, device registers, the wait for an interrupt, and the
//! variables that boot.s shares with CPL 3. Everything here runs in CPL 3.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

unsafe extern "C" {
    static irq_seen: AtomicU32;
    static timer_ticks: AtomicU32;
    static bus_khz: AtomicU32;
    static fault_record: [u64; 6];
    fn wait_request();
}

/// Writes a byte to a port that the TSS bitmap permits (0x60, 0x64, 0x3f8 to 0x3ff).
pub fn out8(port: u16, value: u8) {
    // SAFETY: a port write touches no memory; a forbidden port faults.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Ends the machine: the keyboard controller's reset line. Does not return.
pub fn reset() -> ! {
    loop {
        out8(0x64, 0xfe);
    }
}

/// One 32-bit device register.
#[derive(Clone, Copy)]
pub struct Register(usize);

impl Register {
    /// # Safety
    /// `address` is a mapped device register, 4-byte aligned.
    pub const unsafe fn new(address: usize) -> Register {
        Register(address)
    }

    /// Reads by a plain `mov`, which every hypervisor's instruction decoder knows.
    pub fn read(self) -> u32 {
        let value: u32;
        // SAFETY: the constructor's promise.
        unsafe { asm!("mov {0:e}, [{1}]", out(reg) value, in(reg) self.0, options(nostack)) }
        value
    }

    /// Writes by a plain `mov`.
    pub fn write(self, value: u32) {
        // SAFETY: the constructor's promise.
        unsafe { asm!("mov [{1}], {0:e}", in(reg) value, in(reg) self.0, options(nostack)) }
    }
}

/// Forgets the interrupts seen so far. Work is looked for after this and before `wait`.
pub fn clear_seen() {
    // SAFETY: boot.s only ever stores 1 to it.
    unsafe { irq_seen.store(0, Ordering::SeqCst) }
}

/// Sleeps until an interrupt has come since `clear_seen`; returns at once if one has.
pub fn wait() {
    // SAFETY: wait_request in boot.s preserves every register.
    unsafe { wait_request() }
}

/// How often the LAPIC timer has fired since boot, modulo 2^32.
pub fn ticks() -> u32 {
    // SAFETY: boot.s only increments it.
    unsafe { timer_ticks.load(Ordering::SeqCst) }
}

/// The LAPIC timer's clock in kHz, where the hypervisor tells it.
pub fn bus_clock_khz() -> Option<u32> {
    // SAFETY: written once, before CPL 3 ran.
    match unsafe { bus_khz.load(Ordering::SeqCst) } {
        0 => None,
        khz => Some(khz),
    }
}

/// A fault as boot.s recorded it.
pub struct Fault {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rsp: u64,
    pub cr2: u64,
}

/// The recorded fault; meaningful in `user_fault` only.
pub fn fault() -> Fault {
    // SAFETY: boot.s wrote it before it entered `user_fault`, and never again.
    let [vector, error, rip, cs, rsp, cr2] = unsafe { fault_record };
    Fault {
        vector,
        error,
        rip,
        cs,
        rsp,
        cr2,
    }
}
