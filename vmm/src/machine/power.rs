//! The power-off port: a 16-bit register at the place and with the meaning of ACPI's PM1a control
//! (ACPI 6.5, 4.8.3.2.1), of which only "sleep enable" is there. A halted guest cannot be told
//! from an idle one when the interrupt controllers are in the kernel, so a guest that is done says
//! so here, or asks the i8042 for a reset.
//!
//! Behind it is the sleep control register of hardware-reduced ACPI with its status register
//! (4.8.3.7), which means the same and is what our tables tell of.
//!
//! Behind these is a register of our own: a guest that is there for one process writes the process's
//! exit code to it before it powers itself off, and the VM's end has that code. It takes a byte and
//! keeps the last one. It is no part of the saved state: whoever writes to it powers off next.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// I/O port; where ACPI tables of other virtual machines have it too.
pub const PORT: u64 = 0x604;
/// Number of ports.
pub const PORTS: u64 = 5;
/// The sleep control register; its status register is the next port.
pub const SLEEP_PORT: u64 = PORT + SLEEP_OFFSET;
const SLEEP_OFFSET: u64 = 2;
/// The port that takes the exit code of the guest's process.
pub const EXIT_CODE_PORT: u64 = PORT + EXIT_CODE_OFFSET;
const EXIT_CODE_OFFSET: u64 = 4;
/// SLP_TYP of the one sleep state, which is off.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// SLP_EN: enter the sleep state in SLP_TYP (bits 10 to 12), of which there is one here: off.
const SLEEP_ENABLE: u16 = 1 << 13;
/// The sleep control register's SLP_TYP (bits 2 to 4) and SLP_EN.
const SLEEP_OFF: u8 = (SLEEP_TYPE_OFF << 2) | (1 << 5);

/// What the guest has written to the register for exit codes.
#[derive(Clone)]
pub(super) struct ExitCode(Arc<AtomicU16>);

impl ExitCode {
    /// Nothing was written: no byte has this value.
    const NONE: u16 = u16::MAX;

    pub(super) fn new() -> ExitCode {
        ExitCode(Arc::new(AtomicU16::new(Self::NONE)))
    }

    fn set(&self, code: u8) {
        self.0.store(code.into(), Ordering::Release);
    }

    pub(super) fn get(&self) -> Option<u8> {
        u8::try_from(self.0.load(Ordering::Acquire)).ok()
    }
}

/// The registers.
pub(super) struct PowerPort {
    off: EventFd,
    code: ExitCode,
}

impl PowerPort {
    /// `off` is written when the guest powers itself off, `code` when it says what it ended with.
    pub(super) fn new(off: EventFd, code: ExitCode) -> PowerPort {
        PowerPort { off, code }
    }
}

impl BusDevice for PowerPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let is_off = match (offset, data) {
            (0, &[low, high]) => u16::from_le_bytes([low, high]) & SLEEP_ENABLE != 0,
            (SLEEP_OFFSET, &[value]) => value & SLEEP_OFF == SLEEP_OFF,
            (EXIT_CODE_OFFSET, &[code]) => {
                self.code.set(code);
                false
            }
            _ => false,
        };
        if is_off {
            // The eventfd is the machine's own; were it gone, so would be whoever waits for it.
            let _ = self.off.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_registers_power_off_and_nothing_else_does() {
        let off = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let code = ExitCode::new();
        let mut port = PowerPort::new(off.try_clone().unwrap(), code.clone());
        let harmless: [(u64, &[u8]); 8] = [
            (0, &[0, 0x10]),
            (0, &[0x20]),
            (1, &[0x20]),
            (2, &[0x14]),
            (2, &[0x20]),
            (2, &[0x34, 0]),
            (3, &[0x80]),
            (4, &[0x34, 0x20]),
        ];
        for (offset, data) in harmless {
            port.write(offset, data);
            assert!(off.read().is_err(), "{offset} {data:?}");
        }
        for (offset, data) in [(0, &[0, 0x20][..]), (2, &[0x34])] {
            port.write(offset, data);
            assert_eq!(off.read().unwrap(), 1);
        }
        assert_eq!(code.get(), None);
    }

    #[test]
    fn the_last_exit_code_is_kept_and_powers_nothing_off() {
        let off = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let code = ExitCode::new();
        let mut port = PowerPort::new(off.try_clone().unwrap(), code.clone());
        for byte in [7, 255, 0] {
            port.write(EXIT_CODE_OFFSET, &[byte]);
            assert_eq!(code.get(), Some(byte));
        }
        port.write(EXIT_CODE_OFFSET, &[9, 9]);
        assert_eq!(code.get(), Some(0));
        assert!(off.read().is_err());
    }
}
