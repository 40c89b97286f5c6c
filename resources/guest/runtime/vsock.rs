//! virtio-vsock (virtio 1.2, section 5.10): stream connections that the host opens to one port.
//!
//! The driver moves bytes and keeps the credit of both directions; what the bytes mean is the
//! server's business. Buffers given back to the device are zeroed first: what was received stays
//! nowhere but where the server put it.

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::virtio::{Device, Part, Queue};

const HEADER: usize = 44;
const BUFFER: usize = 64 << 10;
const BUFFERS: u16 = 16;
/// What a connection may have on the way to us: what all receive buffers hold.
const CREDIT: u32 = (BUFFERS as u32) * (BUFFER as u32);
/// Data bytes of one packet to the host.
const SEND_MAX: usize = 64 << 10;
/// Control packets kept while the transmit queue is full.
const WAITING_MAX: usize = 256;
/// Connections at a time; more are refused.
pub const CONNECTIONS_MAX: usize = 16;

const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;
const TYPE_STREAM: u16 = 1;
const HOST_CID: u64 = 2;
const EVENT_TRANSPORT_RESET: u32 = 0;

/// The packet header, field by field.
#[derive(Clone, Copy)]
struct Header {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Header {
    fn decode(b: &[u8; HEADER]) -> Header {
        let u64_at = |at| u64::from(u32_at(b, at + 4)) << 32 | u64::from(u32_at(b, at));
        let kinds = u32_at(b, 28);
        Header {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(b, 16),
            dst_port: u32_at(b, 20),
            len: u32_at(b, 24),
            kind: kinds as u16,
            op: (kinds >> 16) as u16,
            flags: u32_at(b, 32),
            buf_alloc: u32_at(b, 36),
            fwd_cnt: u32_at(b, 40),
        }
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        b[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        b[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        b[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        b[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        b[24..28].copy_from_slice(&self.len.to_le_bytes());
        b[28..30].copy_from_slice(&self.kind.to_le_bytes());
        b[30..32].copy_from_slice(&self.op.to_le_bytes());
        b[32..36].copy_from_slice(&self.flags.to_le_bytes());
        b[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        b[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        b
    }
}

/// Names a connection; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnId(u64);

struct Conn {
    id: ConnId,
    peer_port: u32,
    /// The host's buffer and what it has consumed of our bytes.
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    /// What we have consumed of the host's bytes, and what it was last told of that.
    consumed: u32,
    told: u32,
    /// What has come in, consumed or not.
    received: u32,
}

impl Conn {
    fn room(&self) -> usize {
        let on_the_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(on_the_way) as usize
    }
}

/// What the server is told of. Bytes must be taken, and are `consumed` when they need no room.
pub trait Listener {
    /// A new connection.
    fn opened(&mut self, id: ConnId);
    /// Bytes came in.
    fn data(&mut self, id: ConnId, bytes: &[u8]);
    /// The connection is gone.
    fn closed(&mut self, id: ConnId);
    /// The machine runs somewhere else now; all connections have been closed.
    fn moved(&mut self);
}

/// The socket device, listening on one port.
pub struct Vsock {
    device: Device,
    rx: Queue,
    tx: Queue,
    events: Queue,
    buffers: [*mut u8; BUFFERS as usize],
    /// Which buffer a receive chain holds.
    rx_slots: Vec<usize>,
    event_buffer: Box<[u8; 8]>,
    /// Packet headers on the way out, one a transmit chain, by chain id.
    headers: Vec<[u8; HEADER]>,
    /// Control packets that found no room in the transmit queue.
    waiting: Vec<Header>,
    /// Data chains that the device still reads.
    data_chains: Vec<u16>,
    conns: Vec<Conn>,
    cid: u64,
    port: u32,
    next_id: u64,
}

impl Vsock {
    /// Takes over the device and listens on `port`.
    pub fn new(device: Device, port: u32) -> Vsock {
        device.negotiate(0);
        let (rx, tx, events) = (device.queue(0), device.queue(1), device.queue(2));
        let slots = usize::from(rx.size());
        let mut vsock = Vsock {
            buffers: [core::ptr::null_mut(); BUFFERS as usize],
            rx_slots: alloc::vec![0; slots],
            event_buffer: Box::new([0; 8]),
            headers: alloc::vec![[0; HEADER]; usize::from(tx.size())],
            waiting: Vec::new(),
            data_chains: Vec::with_capacity(usize::from(tx.size())),
            conns: Vec::with_capacity(CONNECTIONS_MAX),
            cid: device.config64(0),
            port,
            next_id: 1,
            device,
            rx,
            tx,
            events,
        };
        vsock.tx.interrupts(false);
        vsock.device.start();
        let layout = Layout::from_size_align(BUFFER, 4096).expect("a buffer has a sane size");
        for slot in 0..usize::from(BUFFERS.min(vsock.rx.size())) {
            // SAFETY: the layout is not empty. Never freed: the device may use it for ever.
            let buffer = unsafe { alloc_zeroed(layout) };
            assert!(!buffer.is_null(), "no memory for receive buffers");
            vsock.buffers[slot] = buffer;
            vsock.post(slot);
        }
        vsock.rx.kick();
        vsock.post_event();
        vsock
    }

    /// Our context id.
    pub fn cid(&self) -> u64 {
        self.cid
    }

    fn post(&mut self, slot: usize) {
        let head = self.rx.push(&[Part::write(self.buffers[slot], BUFFER)]);
        self.rx_slots[usize::from(head)] = slot;
    }

    fn post_event(&mut self) {
        self.events
            .push(&[Part::write(self.event_buffer.as_mut_ptr(), 8)]);
        self.events.kick();
    }

    /// Does what the device has for us. True if there was anything.
    pub fn poll(&mut self, listener: &mut dyn Listener) -> bool {
        self.device.acknowledge();
        let mut busy = self.take_events(listener);
        self.reap();
        let mut reposted = false;
        while let Some((head, len)) = self.rx.pop() {
            busy = true;
            // A device that moved says so before it passes on a connection of its new place. The
            // event may have come since the look above, and would end that connection.
            self.take_events(listener);
            let slot = self.rx_slots[usize::from(head)];
            let len = len.min(BUFFER);
            // SAFETY: the device is done with the buffer until it is posted again.
            let packet = unsafe { core::slice::from_raw_parts_mut(self.buffers[slot], len) };
            self.receive(packet, listener);
            packet.fill(0);
            self.post(slot);
            reposted = true;
        }
        if reposted {
            self.rx.kick();
        }
        self.flush();
        busy
    }

    /// Does what the event queue says. True if it said anything.
    fn take_events(&mut self, listener: &mut dyn Listener) -> bool {
        let mut busy = false;
        while self.events.pop().is_some() {
            busy = true;
            // SAFETY: the device is done with the buffer; it wrote it, hence volatile.
            let event = unsafe { self.event_buffer.as_ptr().cast::<u32>().read_volatile() };
            if event == EVENT_TRANSPORT_RESET {
                self.transport_reset(listener);
            }
            self.post_event();
        }
        busy
    }

    /// The machine was restored elsewhere: connections are gone, the id may be another one.
    fn transport_reset(&mut self, listener: &mut dyn Listener) {
        for conn in self.conns.drain(..) {
            listener.closed(conn.id);
        }
        self.waiting.clear();
        self.cid = self.device.config64(0);
        listener.moved();
    }

    fn receive(&mut self, packet: &[u8], listener: &mut dyn Listener) {
        let Some((header, data)) = packet.split_first_chunk::<HEADER>() else {
            return;
        };
        let header = Header::decode(header);
        if header.dst_cid != self.cid || header.kind != TYPE_STREAM || header.src_cid != HOST_CID {
            self.refuse(&header);
            return;
        }
        let found = self
            .conns
            .iter()
            .position(|c| c.peer_port == header.src_port);
        let found = found.filter(|_| header.dst_port == self.port);
        let Some(at) = found else {
            match header.op {
                OP_REQUEST if header.dst_port == self.port => self.open(&header, listener),
                OP_RST => {}
                _ => self.refuse(&header),
            }
            return;
        };
        let conn = &mut self.conns[at];
        conn.peer_alloc = header.buf_alloc;
        conn.peer_forwarded = header.fwd_cnt;
        match header.op {
            OP_RW => {
                let len = header.len as usize;
                conn.received = conn.received.wrapping_add(header.len);
                let unread = conn.received.wrapping_sub(conn.consumed);
                let id = conn.id;
                if len != data.len() || unread > CREDIT {
                    self.reset(id);
                    listener.closed(id);
                } else {
                    listener.data(id, data);
                }
            }
            OP_CREDIT_UPDATE => {}
            OP_CREDIT_REQUEST => self.tell_credit(at),
            // A shutdown of either direction ends a connection of requests and answers.
            OP_SHUTDOWN | OP_RST => {
                let conn = self.conns.swap_remove(at);
                if header.op == OP_SHUTDOWN {
                    self.refuse(&header);
                }
                listener.closed(conn.id);
            }
            _ => {
                let id = conn.id;
                self.reset(id);
                listener.closed(id);
            }
        }
    }

    fn open(&mut self, header: &Header, listener: &mut dyn Listener) {
        if self.conns.len() == CONNECTIONS_MAX {
            self.refuse(header);
            return;
        }
        let id = ConnId(self.next_id);
        self.next_id += 1;
        self.conns.push(Conn {
            id,
            peer_port: header.src_port,
            peer_alloc: header.buf_alloc,
            peer_forwarded: header.fwd_cnt,
            sent: 0,
            consumed: 0,
            told: 0,
            received: 0,
        });
        self.control(self.conns.len() - 1, OP_RESPONSE);
        listener.opened(id);
    }

    fn header(&self, conn: &Conn, op: u16, len: u32) -> Header {
        Header {
            src_cid: self.cid,
            dst_cid: HOST_CID,
            src_port: self.port,
            dst_port: conn.peer_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: CREDIT,
            fwd_cnt: conn.consumed,
        }
    }

    fn control(&mut self, at: usize, op: u16) {
        let header = self.header(&self.conns[at], op, 0);
        self.conns[at].told = self.conns[at].consumed;
        self.send_control(header);
    }

    fn tell_credit(&mut self, at: usize) {
        self.control(at, OP_CREDIT_UPDATE);
    }

    /// Answers a packet that belongs to nothing we have.
    fn refuse(&mut self, to: &Header) {
        if to.op == OP_RST {
            return;
        }
        self.send_control(Header {
            src_cid: to.dst_cid,
            dst_cid: to.src_cid,
            src_port: to.dst_port,
            dst_port: to.src_port,
            len: 0,
            kind: to.kind,
            op: OP_RST,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    fn send_control(&mut self, header: Header) {
        self.reap();
        if self.tx.room() == 0 || !self.waiting.is_empty() {
            // A host that sends without end and takes nothing loses answers, not our memory.
            if self.waiting.len() < WAITING_MAX {
                self.waiting.push(header);
            }
            return;
        }
        self.push(header, None);
        self.tx.kick();
    }

    fn push(&mut self, header: Header, data: Option<Part>) -> u16 {
        // Chains are numbered by their first descriptor, which is the next free one, so the header
        // is written where the chain will look for it.
        let slot = usize::from(self.tx.next_id());
        self.headers[slot] = header.encode();
        let part = Part::read(self.headers[slot].as_ptr(), HEADER);
        match data {
            Some(data) => self.tx.push(&[part, data]),
            None => self.tx.push(&[part]),
        }
    }

    /// Takes back transmit chains that the device is done with.
    fn reap(&mut self) {
        while let Some((head, _)) = self.tx.pop() {
            self.data_chains.retain(|&chain| chain != head);
        }
    }

    fn flush(&mut self) {
        let mut sent = 0;
        while sent < self.waiting.len() && self.tx.room() > 0 {
            self.push(self.waiting[sent], None);
            sent += 1;
        }
        if sent > 0 {
            self.waiting.drain(..sent);
            self.tx.kick();
        }
    }

    /// Sends what the host has room for, from the start of `data`; returns how much that was. The
    /// memory must stay as it is until `sending` says no.
    pub fn send(&mut self, id: ConnId, data: &[u8]) -> usize {
        self.reap();
        self.flush();
        let Some(at) = self.conns.iter().position(|c| c.id == id) else {
            return 0;
        };
        let mut done = 0;
        while done < data.len() && self.tx.room() >= 2 && self.waiting.is_empty() {
            let len = SEND_MAX.min(data.len() - done).min(self.conns[at].room());
            if len == 0 {
                break;
            }
            let header = self.header(&self.conns[at], OP_RW, len as u32);
            self.conns[at].told = self.conns[at].consumed;
            let chain = self.push(header, Some(Part::read(data[done..].as_ptr(), len)));
            self.data_chains.push(chain);
            self.conns[at].sent = self.conns[at].sent.wrapping_add(len as u32);
            done += len;
        }
        if done > 0 {
            self.tx.kick();
        }
        done
    }

    /// Whether the device still reads memory given to `send`.
    pub fn sending(&mut self) -> bool {
        self.reap();
        !self.data_chains.is_empty()
    }

    /// Whether transmit chains should interrupt: while something waits for room or for their end.
    pub fn want_tx_interrupts(&mut self, wanted: bool) {
        self.tx.interrupts(wanted || !self.waiting.is_empty());
    }

    /// The server needs no more room for `bytes` of what the connection brought.
    pub fn consumed(&mut self, id: ConnId, bytes: usize) {
        let Some(at) = self.conns.iter().position(|c| c.id == id) else {
            return;
        };
        let conn = &mut self.conns[at];
        conn.consumed = conn.consumed.wrapping_add(bytes as u32);
        if conn.consumed.wrapping_sub(conn.told) >= CREDIT / 4 {
            self.tell_credit(at);
        }
    }

    /// Ends a connection at once.
    pub fn reset(&mut self, id: ConnId) {
        if let Some(at) = self.conns.iter().position(|c| c.id == id) {
            self.control(at, OP_RST);
            self.conns.swap_remove(at);
        }
    }
}
