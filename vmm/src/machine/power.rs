//! The power-off port: a 16-bit register at the place and with the meaning of ACPI's PM1a control
//! (ACPI 6.5, 4.8.3.2.1), of which only "sleep enable" is there. A halted guest cannot be told
//! from an idle one when the interrupt controllers are in the kernel, so a guest that is done says
//! so here, or asks the i8042 for a reset.

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// I/O port; where ACPI tables of other virtual machines have it too.
pub const PORT: u64 = 0x604;
/// Number of ports.
pub const PORTS: u64 = 2;

/// SLP_EN: enter the sleep state in SLP_TYP (bits 10 to 12), of which there is one here: off.
const SLEEP_ENABLE: u16 = 1 << 13;

/// The register.
pub(super) struct PowerPort {
    off: EventFd,
}

impl PowerPort {
    /// `off` is written when the guest powers itself off.
    pub(super) fn new(off: EventFd) -> PowerPort {
        PowerPort { off }
    }
}

impl BusDevice for PowerPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset != 0 {
            return;
        }
        if let Ok(bytes) = <[u8; 2]>::try_from(data)
            && u16::from_le_bytes(bytes) & SLEEP_ENABLE != 0
        {
            // The eventfd is the machine's own; were it gone, so would be whoever waits for it.
            let _ = self.off.write(1);
        }
    }
}
