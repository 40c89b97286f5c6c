//! Virtio socket device (virtio 1.2 section 5.10), stream sockets, with a Unix socket as the host's
//! side of it.
//!
//! - `packet.rs`: the packet header, bytes only
//! - `connection.rs`: one connection: its phases, its credit, its half-closes
//! - `host.rs`: the listening socket, connections out to the host, the line that opens one
//! - `device.rs`: the queues, and which connection a packet belongs to
//! - `event_handler.rs`, `persist.rs`: the device as its transport sees it, and what a save keeps
//!
//! A host program connects to the device's path and sends `CONNECT port\n`; once the guest has
//! accepted it reads `OK hostport\n`, and from then on the bytes are the connection's. A guest that
//! connects to port P of CID 2 is connected to the Unix socket at the path with `_P` appended.
//!
//! Nobody can make the device hold more than [`CONNECTIONS_MAX`] connections of [`BUFFER_BYTES`]
//! each. Bytes to the guest go from the socket straight into the guest's buffers and are read only
//! when the guest has room, so the host's sender feels the guest's pace; bytes from the guest wait
//! in the connection's buffer while the host's reader is slow, and the credit the guest is told
//! never exceeds that buffer.

mod connection;
mod device;
mod event_handler;
mod host;
mod packet;
mod persist;

#[cfg(test)]
mod tests;

pub use self::connection::BUFFER_BYTES;
pub use self::device::{CONNECTIONS_MAX, Vsock};
pub use self::host::{HostSocket, VsockError};
pub use self::packet::{HEADER_BYTES, HOST_CID, Header};
pub use self::persist::VsockState;
