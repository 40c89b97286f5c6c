//! The devices a guest sees: a serial port, the reset line of an i8042, and virtio over MMIO.
//!
//! A device does no I/O that it was not handed: interrupts are eventfds, output is a writer, disks
//! and sockets are opened by the caller. Everything a guest writes is an allegation until it went
//! through a gate ([`virtio::queue`] for descriptor chains, [`virtio::mmio`] for registers), and
//! every write to guest memory goes through vm-memory, whose bitmap records it as dirty.

pub mod disk;
pub mod i8042;
pub mod rate;
pub mod serial;
pub mod virtio;

use std::io;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// An interrupt or event line that is raised by writing to an eventfd.
#[derive(Debug)]
pub struct EventLine(EventFd);

impl EventLine {
    /// Raises `fd` whenever the device wants attention.
    pub fn new(fd: EventFd) -> Self {
        Self(fd)
    }

    /// Raises the line. A counter that is full stands for a line that is up already.
    pub fn raise(&self) -> io::Result<()> {
        match self.0.write(1) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }
}

impl Trigger for EventLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.raise()
    }
}
