//! Text on COM1.

use core::fmt::{self, Write};

const COM1: u16 = 0x3f8;

/// The serial port as a `core::fmt` sink.
pub struct Console;

impl Console {
    /// Sends the bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            crate::cpu::out8(COM1, byte);
        }
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.bytes(text.as_bytes());
        Ok(())
    }
}

/// Prints a line on the console.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        // Writing to the console cannot fail.
        let _ = writeln!($crate::console::Console, $($arg)*);
    }};
}
