//! A restored guest is kept apart from the world until whoever restored it lets it in: its clones have the
//! same random numbers, and nobody is to see any of them.

use std::os::unix::net::UnixStream;

use super::{Machine, MachineError};

impl Machine {
    /// Whether the guest is kept apart, as [`Machine::restore`] leaves it: its network cards carry nothing,
    /// and connections to and from it wait, but for those of [`Machine::call`].
    #[must_use]
    pub fn is_apart(&self) -> bool {
        self.devices.gate().is_closed()
    }

    /// Let the world in. What waited goes on.
    pub fn let_in(&self) {
        self.devices.gate().open();
        self.devices
            .transports()
            .for_each(|transport| transport.wake());
    }

    /// A connection to the guest's vsock `port`, also while it is kept apart. The first line that comes is
    /// `OK` and a number, once the guest has accepted; if it refuses, the stream ends before.
    ///
    /// # Errors
    /// The system gives no socket.
    pub fn call(&self, port: u32) -> Result<UnixStream, MachineError> {
        let stream = self
            .devices
            .gate()
            .call(port)
            .map_err(|source| MachineError::Host {
                what: "socketpair",
                source,
            })?;
        self.devices
            .transports()
            .for_each(|transport| transport.wake());
        Ok(stream)
    }

    /// Whether the guest has a vsock driver that has started its device. Without one a call waits.
    #[must_use]
    pub fn has_vsock_driver(&self) -> bool {
        self.devices.gate().is_driven()
    }
}
