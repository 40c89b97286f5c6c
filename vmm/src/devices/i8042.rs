//! The keyboard controller, of which only the CPU reset command is there.
//!
//! A kernel that is told to reboot writes 0xFE to port 0x64. That raises the event the machine's
//! control thread waits for. Reads give zero: no keyboard, no mouse, buffers empty.

use vm_superio::I8042Device;
use vmm_sys_util::eventfd::EventFd;

use super::EventLine;
use crate::bus::BusDevice;

/// First port of the controller.
pub const PORT: u64 = 0x60;
/// Ports it occupies: data at offset 0, command and status at offset 4.
pub const PORTS: u64 = 5;

/// Port of commands.
pub const COMMAND_PORT: u64 = 0x64;
/// The command that resets the CPU.
pub const RESET: u8 = 0xfe;

/// The controller.
pub struct I8042(I8042Device<EventLine>);

impl I8042 {
    /// A controller that writes to `reset` when the guest asks for a CPU reset.
    pub fn new(reset: EventFd) -> Self {
        Self(I8042Device::new(EventLine::new(reset)))
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset), [first, ..]) = (u8::try_from(offset), data) {
            *first = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            // The eventfd is the machine's own; were it gone, so would be whoever waits for it.
            let _ = self.0.write(offset, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_raises_the_event() {
        let reset = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut i8042 = I8042::new(reset.try_clone().unwrap());
        let mut data = [0xff; 4];
        i8042.read(4, &mut data);
        assert_eq!(data, [0; 4]);
        for (offset, bytes) in [
            (4, &[0xfd][..]),
            (0, &[0xfe]),
            (4, &[0xfe, 0xfe]),
            (900, &[0xfe]),
        ] {
            i8042.write(offset, bytes);
            assert!(reset.read().is_err());
        }
        i8042.write(4, &[0xfe]);
        assert_eq!(reset.read().unwrap(), 1);
    }
}
