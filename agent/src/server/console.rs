//! The size of terminals: a serial line cannot tell it.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::termios::Winsize;

use super::Error;
use crate::protocol::Size;

/// The terminal of COM1, which is the console of a VM.
pub(super) const SERIAL: &str = "/dev/ttyS0";

/// Gives the terminal at `path` a size; who runs in front of it hears of that by SIGWINCH.
pub(super) fn resize(path: &Path, size: Size) -> Result<(), Error> {
    // Without waiting for a carrier, and not as a terminal of our own.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resized = rustix::fs::open(path, flags, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|terminal| set_size(terminal, size));
    resized.map_err(|error| Error::System("resize the serial console", error))
}

/// Gives a terminal a size.
pub(super) fn set_size(terminal: impl AsFd, size: Size) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

#[cfg(test)]
mod tests {
    use rustix::pty::OpenptFlags;

    use super::*;

    #[test]
    fn a_terminal_gets_its_size_and_a_file_none() {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let path = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let path = Path::new(path.to_str().unwrap());
        let size = Size {
            rows: 47,
            columns: 132,
        };
        resize(path, size).unwrap();
        let seen = rustix::termios::tcgetwinsize(&master).unwrap();
        assert_eq!((seen.ws_row, seen.ws_col), (47, 132));
        assert!(resize(Path::new("/dev/null"), size).is_err());
        assert!(resize(Path::new("/no/such/terminal"), size).is_err());
    }
}
