//! The interrupt controllers and the clock.
//!
//! Time comes from the LAPIC timer alone, running periodically: periods counted by the handler plus
//! the current count. There is no TSC in it, so a machine restored on another host keeps its pace.

use crate::cpu::{self, Register};

const LAPIC: usize = 0xfee0_0000;
const IOAPIC: usize = 0xfec0_0000;
const TIMER_VECTOR: u32 = 0x20;
const SPURIOUS_VECTOR: u32 = 0x2f;
const PIN_VECTOR: u32 = 0x30;
const PERIODIC: u32 = 1 << 17;
/// KVM's and QEMU's LAPIC clock, in force where no hypervisor leaf tells another.
const BUS_KHZ: u32 = 1_000_000;

const fn lapic(offset: usize) -> Register {
    // SAFETY: the LAPIC page is mapped by boot.s; offsets are the SDM's (volume 3, table 12-1).
    unsafe { Register::new(LAPIC + offset) }
}
const ID: Register = lapic(0x20);
const SPURIOUS: Register = lapic(0xf0);
const LVT_TIMER: Register = lapic(0x320);
const INITIAL: Register = lapic(0x380);
const CURRENT: Register = lapic(0x390);
const DIVIDE: Register = lapic(0x3e0);
// SAFETY: the IOAPIC's index and data registers, mapped by boot.s.
const IOAPIC_INDEX: Register = unsafe { Register::new(IOAPIC) };
// SAFETY: as above.
const IOAPIC_DATA: Register = unsafe { Register::new(IOAPIC + 0x10) };

/// Lets interrupts of an IOAPIC pin through, edge triggered, to this processor.
pub fn enable_pin(pin: u32) {
    IOAPIC_INDEX.write(0x11 + 2 * pin);
    IOAPIC_DATA.write(ID.read() & 0xff00_0000);
    IOAPIC_INDEX.write(0x10 + 2 * pin);
    IOAPIC_DATA.write(PIN_VECTOR + pin);
}

/// The clock: nanoseconds since boot, and a tick that wakes the processor.
pub struct Clock {
    khz: u64,
    /// LAPIC counts up to the start of the present period length.
    base: u64,
    /// `cpu::ticks()` at that start.
    ticks: u32,
    period: u32,
}

impl Clock {
    /// Enables the LAPIC and starts the clock with ticks four seconds apart.
    pub fn start() -> Clock {
        SPURIOUS.write(0x100 | SPURIOUS_VECTOR);
        DIVIDE.write(0b1011);
        LVT_TIMER.write(TIMER_VECTOR | PERIODIC);
        let khz = u64::from(cpu::bus_clock_khz().unwrap_or(BUS_KHZ));
        let mut clock = Clock {
            khz,
            base: 0,
            ticks: cpu::ticks(),
            period: 0,
        };
        clock.set_tick(4_000_000_000);
        clock
    }

    fn counts(&mut self) -> u64 {
        if self.period == 0 {
            return 0;
        }
        loop {
            let ticks = cpu::ticks();
            let left = CURRENT.read();
            if ticks == cpu::ticks() {
                let whole = u64::from(ticks.wrapping_sub(self.ticks));
                // Move the base along, so that the 32-bit tick counter may wrap.
                self.base += whole * u64::from(self.period);
                self.ticks = ticks;
                return self.base + u64::from(self.period - left.min(self.period));
            }
        }
    }

    /// Nanoseconds since the clock was started. It never runs backwards.
    pub fn now(&mut self) -> u64 {
        self.counts() * 1_000_000 / self.khz
    }

    /// Sets the distance of ticks, 1 ms to 4 s.
    pub fn set_tick(&mut self, nanoseconds: u64) {
        let counts = nanoseconds.clamp(1_000_000, 4_000_000_000) * self.khz / 1_000_000;
        self.base = self.counts();
        self.period = u32::try_from(counts).unwrap_or(u32::MAX);
        INITIAL.write(self.period);
        self.ticks = cpu::ticks();
    }
}
