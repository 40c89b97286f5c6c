//! One connection between a guest port and a Unix socket.
//!
//! ```text
//!            CONNECT line            RESPONSE from the guest
//!   Opening ------------> Requested ------------------------> Open
//!                         REQUEST to the guest                  ^
//!   a guest's REQUEST, the socket connected: RESPONSE owed -----'
//! ```
//!
//! Each side may close each direction. What ends a connection is an RST of either side, or a
//! SHUTDOWN of both directions by the guest once its last bytes have reached the socket.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use super::host::Line;
use super::packet::{HEADER_BYTES, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::buffers::Buffers;

/// Bytes from the guest that a connection holds while its socket takes no more; also the credit the
/// guest is told.
pub const BUFFER_BYTES: u32 = 256 * 1024;
/// The guest is told of freed buffer once this much has been freed since it was last told.
const CREDIT_STEP_BYTES: u32 = BUFFER_BYTES / 4;
/// Payload of one packet to the guest at most.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// Where a connection is in its life.
#[derive(Debug)]
pub(super) enum Phase {
    /// A host program has connected and has yet to say to which port.
    Opening(Line),
    /// The guest was asked, or is about to be.
    Requested,
    /// Bytes flow.
    Open,
}

/// Packets a connection owes the guest (a set of bits). RW is not among them: see
/// [`Connection::has_data`].
pub(super) mod owe {
    pub(in super::super) const RST: u8 = 1;
    pub(in super::super) const REQUEST: u8 = 2;
    pub(in super::super) const RESPONSE: u8 = 4;
    pub(in super::super) const SHUTDOWN: u8 = 8;
    pub(in super::super) const CREDIT_UPDATE: u8 = 16;
    pub(in super::super) const CREDIT_REQUEST: u8 = 32;
}

/// What the connection made of the chance to send a packet.
#[derive(Debug)]
pub(super) enum Turn {
    /// A packet: its header (without ports and ids) and the payload bytes already in place.
    Packet(Header),
    /// The last packet of this connection.
    Last(Header),
    /// Nothing to send after all.
    Nothing,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) phase: Phase,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    /// Tells this connection from earlier ones in the same slot.
    pub(super) generation: u32,
    /// It passes a closed gate.
    pub(super) may_pass: bool,
    /// It is in the device's list of connections with something to send.
    pub(super) listed: bool,
    pub(super) owed: u8,
    /// The socket may have bytes, or its end, for us.
    pub(super) readable: bool,
    writable: bool,
    /// The host program has closed both directions.
    hung_up: bool,
    /// The host program sends no more.
    host_eof: bool,
    /// Directions the guest has closed, and those it was told are closed here.
    guest_closed: u32,
    told_closed: u32,
    /// Directions of the socket that were shut.
    shut: u32,
    /// Bytes of the guest that the socket did not take yet; at most [`BUFFER_BYTES`].
    pending: VecDeque<u8>,
    /// Bytes the socket took, modulo 2^32, and the value the guest was last told.
    forwarded: u32,
    told_forwarded: u32,
    /// Bytes sent to the guest, and what the guest said of its buffer.
    sent: u32,
    guest_alloc: u32,
    guest_forwarded: u32,
    credit_requested: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, phase: Phase, generation: u32) -> Self {
        Self {
            stream,
            phase,
            host_port: 0,
            guest_port: 0,
            generation,
            may_pass: false,
            listed: false,
            owed: 0,
            readable: false,
            writable: true,
            hung_up: false,
            host_eof: false,
            guest_closed: 0,
            told_closed: 0,
            shut: 0,
            pending: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            guest_alloc: 0,
            guest_forwarded: 0,
            credit_requested: false,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// Both directions are closed on this side and the guest has yet to let go.
    pub(super) fn is_lingering(&self) -> bool {
        self.told_closed == SHUTDOWN_BOTH
    }

    /// Takes what a packet of the guest says about its buffer.
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.credit_requested = false;
    }

    /// Bytes the guest has room for. Values that make no sense leave none.
    fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        let free = self.guest_alloc.saturating_sub(in_flight);
        usize::try_from(free).unwrap_or(0)
    }

    /// Whether the socket may give bytes that the guest wants.
    fn wants_data(&self) -> bool {
        self.is_open()
            && self.readable
            && !self.host_eof
            && self.guest_closed & SHUTDOWN_RECEIVE == 0
    }

    /// Whether there is a packet to send. Asks for credit when that is all that is missing.
    pub(super) fn has_work(&mut self) -> bool {
        if self.wants_data() && self.credit() == 0 && !self.credit_requested {
            self.credit_requested = true;
            self.owed |= owe::CREDIT_REQUEST;
        }
        self.owed != 0 || self.wants_data() && self.credit() > 0
    }

    /// The kernel says the socket is readable, writable, or gone.
    pub(super) fn ready(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.hung_up |= hung_up;
        if writable || hung_up {
            self.writable = true;
            self.flush();
        }
        if self.hung_up && self.host_eof {
            // It closed the one direction first, of which the guest was told, and now the other.
            self.tell_closed(SHUTDOWN_BOTH);
        }
    }

    /// The guest accepted a host program's connection.
    pub(super) fn accepted(&mut self) {
        let line = format!("OK {}\n", self.host_port);
        // A fresh socket has room for a line; one that has not belongs to a program that is gone.
        if send(&self.stream, line.as_bytes()).ok() != Some(line.len()) {
            self.owed |= owe::RST;
        }
        self.phase = Phase::Open;
    }

    /// The guest sends `len` bytes, at `offset` in `buffers`.
    pub(super) fn receive(
        &mut self,
        guest: &GuestRam,
        buffers: &Buffers,
        offset: usize,
        len: usize,
    ) {
        let room = usize::try_from(BUFFER_BYTES)
            .unwrap_or(0)
            .saturating_sub(self.pending.len());
        if !self.is_open() || len > room || self.guest_closed & SHUTDOWN_SEND != 0 {
            // It sends before it may, more than it may, or after it said it would not.
            self.owed |= owe::RST;
            return;
        }
        let mut done = 0;
        while self.pending.is_empty() && self.writable && done < len {
            match buffers.write_stream(guest, self.stream.as_fd(), offset + done, len - done) {
                Ok(count) => {
                    done += count;
                    self.forward(count);
                }
                Err(error) => self.write_failed(&error),
            }
        }
        if self.told_closed & SHUTDOWN_RECEIVE != 0 {
            // Nobody will read it; the guest has been told.
            self.forward(len - done);
            return;
        }
        let mut chunk = [0; 4096];
        while done < len {
            let part = chunk.len().min(len - done);
            let Some(chunk) = chunk.get_mut(..part) else {
                break;
            };
            buffers.read_at(guest, offset + done, chunk);
            self.pending.extend(&*chunk);
            done += part;
        }
    }

    /// The guest closes the directions in `flags`.
    pub(super) fn close_from_guest(&mut self, flags: u32) {
        self.guest_closed |= flags & SHUTDOWN_BOTH;
        if self.guest_closed & SHUTDOWN_RECEIVE != 0 {
            self.shut(SHUTDOWN_RECEIVE, Shutdown::Read);
        }
        self.finish_if_drained();
    }

    /// Shuts a direction of the socket, once: each call raises an edge, which would lead here again.
    fn shut(&mut self, flag: u32, how: Shutdown) {
        if self.shut & flag == 0 {
            self.shut |= flag;
            // Failing means the socket is gone, which its events tell.
            let _ = self.stream.shutdown(how);
        }
    }

    /// Hands bytes that waited to the socket.
    fn flush(&mut self) {
        while self.writable && !self.pending.is_empty() {
            let (first, _) = self.pending.as_slices();
            match send(&self.stream, first) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.forward(count);
                }
                Err(error) => self.write_failed(&error),
            }
        }
        self.finish_if_drained();
    }

    /// Passes a closed direction on, once everything that came before it is through.
    fn finish_if_drained(&mut self) {
        if !self.pending.is_empty() {
            return;
        }
        self.pending = VecDeque::new();
        if self.guest_closed & SHUTDOWN_SEND != 0 {
            self.shut(SHUTDOWN_SEND, Shutdown::Write);
        }
        if self.guest_closed == SHUTDOWN_BOTH {
            self.owed |= owe::RST;
        }
    }

    /// `count` bytes left the buffer.
    fn forward(&mut self, count: usize) {
        // One packet is shorter than 2^32.
        self.forwarded = self
            .forwarded
            .wrapping_add(u32::try_from(count).unwrap_or(0));
        if self.forwarded.wrapping_sub(self.told_forwarded) >= CREDIT_STEP_BYTES {
            self.owed |= owe::CREDIT_UPDATE;
        }
    }

    fn write_failed(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => self.writable = false,
            _ => {
                // The program does not read any more. What waits for it is lost, as on any socket.
                self.writable = false;
                let waiting = self.pending.len();
                self.pending.clear();
                self.forward(waiting);
                self.tell_closed(SHUTDOWN_RECEIVE);
            }
        }
    }

    fn tell_closed(&mut self, flags: u32) {
        if self.told_closed | flags != self.told_closed {
            self.told_closed |= flags;
            self.owed |= owe::SHUTDOWN;
        }
    }

    /// Makes the next packet, its payload read straight into `buffers` behind the header.
    pub(super) fn next_packet(&mut self, guest: &GuestRam, buffers: &Buffers) -> Turn {
        let once = |owed: &mut u8, bit: u8| {
            let set = *owed & bit != 0;
            *owed &= !bit;
            set
        };
        if self.owed & owe::RST != 0 {
            return Turn::Last(self.header(op::RST));
        }
        for (bit, op) in [(owe::REQUEST, op::REQUEST), (owe::RESPONSE, op::RESPONSE)] {
            if once(&mut self.owed, bit) {
                return Turn::Packet(self.header(op));
            }
        }
        if self.wants_data() && self.credit() > 0 {
            let room = buffers.len().saturating_sub(HEADER_BYTES);
            let want = room.min(self.credit()).min(PAYLOAD_BYTES_MAX);
            if let Some(len) = self.read_payload(guest, buffers, want) {
                self.sent = self.sent.wrapping_add(len);
                return Turn::Packet(Header {
                    len,
                    ..self.header(op::RW)
                });
            }
        }
        if once(&mut self.owed, owe::SHUTDOWN) {
            return Turn::Packet(Header {
                flags: self.told_closed,
                ..self.header(op::SHUTDOWN)
            });
        }
        if once(&mut self.owed, owe::CREDIT_UPDATE) {
            return Turn::Packet(self.header(op::CREDIT_UPDATE));
        }
        if once(&mut self.owed, owe::CREDIT_REQUEST) {
            return Turn::Packet(self.header(op::CREDIT_REQUEST));
        }
        Turn::Nothing
    }

    /// Reads up to `want` bytes; None when there are none now.
    fn read_payload(&mut self, guest: &GuestRam, buffers: &Buffers, want: usize) -> Option<u32> {
        if want == 0 {
            return None;
        }
        loop {
            match buffers.read_stream(guest, self.stream.as_fd(), HEADER_BYTES, want) {
                Ok(0) => break,
                Ok(count) => return u32::try_from(count).ok(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                Err(_) => {
                    self.hung_up = true;
                    break;
                }
            }
        }
        self.host_eof = true;
        self.readable = false;
        self.tell_closed(if self.hung_up {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        });
        None
    }

    /// A header with this connection's credit, which the guest thereby knows.
    fn header(&mut self, op: u16) -> Header {
        self.told_forwarded = self.forwarded;
        self.owed &= !owe::CREDIT_UPDATE;
        Header {
            op,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}

/// One write that raises no signal.
fn send(stream: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: `bytes` is a live slice whose length is passed with it; the descriptor is open for
    // the stream's life.
    let result = unsafe {
        libc::send(
            stream.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
