//! The queues, and which connection a packet belongs to.
//!
//! Connections live in slots. The device has an epoll of its own over the listening socket and the
//! connections' sockets (edge-triggered: a socket that cannot be served for want of credit or
//! buffers costs nothing while it waits), and the event loop watches that epoll. A connection with
//! something to send stands in a list; the list is served in turns, one packet each.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Phase, Turn, owe};
use super::host::{HostSocket, Line, Opening, VsockError};
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use crate::devices::virtio::buffers::Buffers;
use crate::devices::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::devices::virtio::{DeviceError, DeviceIo, Gate, GuestRam};

/// Connections at once; more are refused.
pub const CONNECTIONS_MAX: usize = 256;
/// Resets that may wait for buffers; a guest that provokes more does not get them all.
const RESETS_MAX: usize = 256;
/// Packets in each direction before the event loop gets its turn.
const PACKETS_A_TURN_MAX: u32 = 256;
/// First port of those that stand for host programs in the guest's eyes.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;
/// Epoll data of the listening socket; no connection has it, slots being few.
const LISTENER: u64 = u64::MAX;
/// Socket events taken at once.
const EVENTS_MAX: usize = 64;

/// Device to driver.
pub(super) const RX_QUEUE: usize = 0;
/// Driver to device.
pub(super) const TX_QUEUE: usize = 1;
/// Events of the device, section 5.10.6.7.
pub(super) const EVENT_QUEUE: usize = 2;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Ports of a connection: the host's, the guest's.
type Ports = (u32, u32);

/// The device.
pub struct Vsock {
    pub(super) config: [u8; 8],
    guest_cid: u64,
    host: HostSocket,
    pub(super) epoll: Epoll,
    /// The epoll watches the listening socket.
    listening: bool,
    slots: Vec<Option<Connection>>,
    by_ports: HashMap<Ports, usize>,
    /// Slots with something to send; an entry whose connection is not `listed` is void.
    senders: VecDeque<usize>,
    resets: VecDeque<Header>,
    pub(super) next_host_port: u32,
    next_generation: u32,
    rx: Chain,
    tx: Chain,
    pub(super) news: News,
    /// While it is closed only its own calls get anything to the guest.
    pub(super) gate: Gate,
    /// It was closed when it was last looked at.
    held: bool,
}

/// What the driver knows of a restore, which took all its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// Nothing happened that it does not know.
    None,
    /// It is to be told.
    Due,
    /// It was told when it had made this many chains available in the event queue.
    Told(u16),
}

impl Vsock {
    /// A device for the guest with context id `guest_cid` (3 to 2^32 - 2), served at `host`.
    ///
    /// # Errors
    /// When the system gives no epoll.
    pub fn new(guest_cid: u64, host: HostSocket) -> Result<Self, VsockError> {
        let epoll = Epoll::new().map_err(|source| VsockError::Listen {
            path: host.path().to_path_buf(),
            source,
        })?;
        let mut device = Self {
            config: guest_cid.to_le_bytes(),
            guest_cid,
            host,
            epoll,
            listening: false,
            slots: Vec::new(),
            by_ports: HashMap::new(),
            senders: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            next_generation: 0,
            rx: Chain::default(),
            tx: Chain::default(),
            news: News::None,
            gate: Gate::default(),
            held: false,
        };
        // From here on, for good: the event loop does not look at the epoll before the device is
        // active, and a vCPU that activates or resets it has no epoll_ctl.
        device.listen().map_err(|source| VsockError::Listen {
            path: device.host.path().to_path_buf(),
            source,
        })?;
        Ok(device)
    }

    /// The same device, whose connections wait while `gate` is closed.
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// Makes the gate's calls, and goes on with what waited if it has been opened.
    pub(super) fn look_at_gate(&mut self) {
        while let Some((stream, port)) = self.gate.take_call() {
            // Without room the stream is closed, which is the answer.
            if let Some(slot) = self.add(stream, Phase::Requested) {
                if let Some(connection) = self.connection(slot) {
                    connection.may_pass = true;
                }
                self.request(slot, port);
                self.touch(slot);
            }
        }
        let was_held = std::mem::replace(&mut self.held, self.gate.is_closed());
        if was_held && !self.held {
            (0..self.slots.len()).for_each(|slot| self.touch(slot));
        }
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    pub(super) fn set_guest_cid(&mut self, guest_cid: u64) {
        self.guest_cid = guest_cid;
        self.config = guest_cid.to_le_bytes();
    }

    /// Connections there are, in whatever phase.
    pub fn connections(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Takes connections, from now on or again.
    pub(super) fn listen(&mut self) -> io::Result<()> {
        if !self.listening {
            let event = EpollEvent::new(EventSet::IN, LISTENER);
            self.epoll
                .ctl(ControlOperation::Add, self.host_fd(), event)?;
            self.listening = true;
        }
        Ok(())
    }

    fn host_fd(&self) -> i32 {
        use std::os::fd::AsFd;
        self.host.as_fd().as_raw_fd()
    }

    fn stop_listening(&mut self) {
        if self.listening {
            // It was added; removing a descriptor that is there cannot fail.
            let _ = self.epoll.ctl(
                ControlOperation::Delete,
                self.host_fd(),
                EpollEvent::default(),
            );
            self.listening = false;
        }
    }

    /// Drops all connections. Runs on a vCPU, so it only closes descriptors, which takes them out
    /// of the epoll as well.
    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.by_ports.clear();
        self.senders.clear();
        self.resets.clear();
        self.news = News::None;
    }

    // ---- connections ----

    /// Finds a slot for a new connection and watches its socket; None when there is no room.
    fn add(&mut self, stream: UnixStream, phase: Phase) -> Option<usize> {
        let free = self.slots.iter().position(Option::is_none);
        let slot = match free {
            Some(slot) => slot,
            None if self.slots.len() < CONNECTIONS_MAX => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => self.evict()?,
        };
        self.next_generation = self.next_generation.wrapping_add(1);
        let generation = self.next_generation;
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let data = u64::from(generation) << 32 | u64::try_from(slot).ok()?;
        self.epoll
            .ctl(
                ControlOperation::Add,
                stream.as_raw_fd(),
                EpollEvent::new(events, data),
            )
            .ok()?;
        *self.slots.get_mut(slot)? = Some(Connection::new(stream, phase, generation));
        Some(slot)
    }

    /// Makes room by letting go of a connection that only waits for the guest to let go of it.
    fn evict(&mut self) -> Option<usize> {
        let slot = self
            .slots
            .iter()
            .position(|slot| slot.as_ref().is_some_and(Connection::is_lingering))?;
        if let Some(gone) = self.remove(slot) {
            let ports = (gone.host_port, gone.guest_port);
            self.reset_ports(ports, TYPE_STREAM);
        }
        Some(slot)
    }

    fn remove(&mut self, slot: usize) -> Option<Connection> {
        let gone = self.slots.get_mut(slot)?.take()?;
        let ports = (gone.host_port, gone.guest_port);
        // One that is still opening has no ports, and another may hold the place of zeros.
        if self.by_ports.get(&ports) == Some(&slot) {
            self.by_ports.remove(&ports);
        }
        if !self.listening {
            // There is a descriptor to spare again. Where that is not enough, the next one that
            // goes tries again.
            let _ = self.listen();
        }
        Some(gone)
    }

    fn connection(&mut self, slot: usize) -> Option<&mut Connection> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Puts the connection in the list of senders if it has something to send.
    fn touch(&mut self, slot: usize) {
        let closed = self.gate.is_closed();
        if let Some(connection) = self.connection(slot)
            && (connection.may_pass || !closed)
            && !connection.listed
            && connection.has_work()
        {
            connection.listed = true;
            self.senders.push_back(slot);
        }
    }

    fn reset_ports(&mut self, ports: Ports, kind: u16) {
        if self.resets.len() < RESETS_MAX {
            self.resets.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: ports.0,
                dst_port: ports.1,
                kind,
                op: op::RST,
                ..Header::default()
            });
        }
    }

    // ---- the host's side ----

    /// Takes what the sockets have to say.
    pub(super) fn poll_sockets(&mut self) -> Result<(), DeviceError> {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(source) => {
                return Err(DeviceError::Host {
                    what: "epoll_wait",
                    source,
                });
            }
        };
        for event in events.iter().take(count) {
            if event.data() == LISTENER {
                self.accept();
            } else {
                self.socket_event(event);
            }
        }
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..EVENTS_MAX {
            match self.host.accept() {
                // Without room the socket is closed, which is the answer.
                Ok(stream) => drop(self.add(stream, Phase::Opening(Line::default()))),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    io::ErrorKind::WouldBlock => return,
                    // No descriptors, most likely. Those who wait stay in the backlog.
                    _ => return self.stop_listening(),
                },
            }
        }
    }

    fn socket_event(&mut self, event: &EpollEvent) {
        let Ok(slot) = usize::try_from(event.data() & u64::from(u32::MAX)) else {
            return;
        };
        let set = event.event_set();
        let Some(connection) = self
            .connection(slot)
            .filter(|connection| u64::from(connection.generation) == event.data() >> 32)
        else {
            return;
        };
        let hung_up = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match &mut connection.phase {
            Phase::Opening(line) => match line.read(&connection.stream) {
                Opening::More => {}
                Opening::Port(port) => self.request(slot, port),
                Opening::Refused => drop(self.remove(slot)),
            },
            Phase::Requested if hung_up => {
                if connection.owed & owe::REQUEST != 0 {
                    drop(self.remove(slot));
                } else {
                    connection.owed |= owe::RST;
                }
            }
            Phase::Requested => connection.readable |= set.contains(EventSet::IN),
            Phase::Open => {
                let readable = set.intersects(EventSet::IN | EventSet::READ_HANG_UP);
                connection.ready(readable, set.contains(EventSet::OUT), hung_up);
            }
        }
        self.touch(slot);
    }

    /// A host program wants the guest's `port`.
    fn request(&mut self, slot: usize, port: u32) {
        while self.by_ports.contains_key(&(self.next_host_port, port)) {
            self.next_host_port = next_port(self.next_host_port);
        }
        let host_port = self.next_host_port;
        self.next_host_port = next_port(host_port);
        if let Some(connection) = self.connection(slot) {
            connection.phase = Phase::Requested;
            connection.host_port = host_port;
            connection.guest_port = port;
            connection.owed = owe::REQUEST;
            // What came behind the line raises no further edge.
            connection.readable = true;
            self.by_ports.insert((host_port, port), slot);
        }
    }

    // ---- from the guest ----

    /// Handles packets of the driver; false if there may be more.
    pub(super) fn receive(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        let Some(queue) = io.queues.get_mut(TX_QUEUE) else {
            return Ok(true);
        };
        let mut chain = std::mem::take(&mut self.tx);
        let mut drained = false;
        let mut result = Ok(());
        for _ in 0..PACKETS_A_TURN_MAX {
            result = match queue.pop(io.guest, &mut chain) {
                Ok(true) => {
                    self.packet(io.guest, &chain.readable);
                    queue.push_used(io.guest, &chain, 0)
                }
                Ok(false) => {
                    drained = true;
                    break;
                }
                Err(error) => Err(error),
            };
            if result.is_err() {
                break;
            }
        }
        self.tx = chain;
        result.map_err(DeviceError::queue(TX_QUEUE))?;
        Ok(drained)
    }

    fn packet(&mut self, guest: &GuestRam, buffers: &Buffers) {
        let mut bytes = [0; HEADER_BYTES];
        if buffers.read_at(guest, 0, &mut bytes) < HEADER_BYTES {
            return;
        }
        let header = Header::decode(&bytes);
        // A guest that speaks for another, or to another than the host, is not answered.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = (header.dst_port, header.src_port);
        let payload = usize::try_from(header.len).unwrap_or(usize::MAX);
        let stream = header.kind == TYPE_STREAM;
        let valid = stream && payload <= buffers.len() - HEADER_BYTES;
        let known = self.by_ports.get(&ports).copied().filter(|_| stream);
        match known {
            Some(slot) if !valid => {
                if let Some(connection) = self.connection(slot) {
                    connection.owed |= owe::RST;
                }
                self.touch(slot);
            }
            Some(slot) => self.known_packet(guest, buffers, slot, &header, payload),
            None if header.op == op::RST => {}
            None if valid && header.op == op::REQUEST && self.open_out(&header) => {}
            None => self.reset_ports(ports, header.kind),
        }
    }

    fn known_packet(
        &mut self,
        guest: &GuestRam,
        buffers: &Buffers,
        slot: usize,
        header: &Header,
        payload: usize,
    ) {
        let Some(connection) = self.connection(slot) else {
            return;
        };
        connection.take_credit(header);
        let asked = connection.owed & owe::REQUEST == 0;
        match header.op {
            op::RST => drop(self.remove(slot)),
            op::RESPONSE if asked && !connection.is_open() => connection.accepted(),
            op::SHUTDOWN if connection.is_open() => connection.close_from_guest(header.flags),
            op::RW => connection.receive(guest, buffers, HEADER_BYTES, payload),
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => connection.owed |= owe::CREDIT_UPDATE,
            // A second REQUEST, a RESPONSE to nothing, an operation that does not exist.
            _ => connection.owed |= owe::RST,
        }
        self.touch(slot);
    }

    /// The guest connects to a host program. False when nobody listens or there is no room.
    fn open_out(&mut self, header: &Header) -> bool {
        let Ok(stream) = self.host.connect_out(header.dst_port) else {
            return false;
        };
        let Some(slot) = self.add(stream, Phase::Open) else {
            return false;
        };
        if let Some(connection) = self.connection(slot) {
            connection.host_port = header.dst_port;
            connection.guest_port = header.src_port;
            connection.take_credit(header);
            connection.owed = owe::RESPONSE;
        }
        self.by_ports
            .insert((header.dst_port, header.src_port), slot);
        self.touch(slot);
        true
    }

    // ---- to the guest ----

    /// Sends what waits, while the driver has buffers.
    pub(super) fn send(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        if !self.news_are_known(io)? {
            return Ok(());
        }
        let mut chain = std::mem::take(&mut self.rx);
        let result = self
            .send_into(io, &mut chain)
            .map_err(DeviceError::queue(RX_QUEUE));
        self.rx = chain;
        result
    }

    fn send_into(&mut self, io: &mut DeviceIo<'_>, chain: &mut Chain) -> Result<(), QueueError> {
        let guest = io.guest;
        let mut left = PACKETS_A_TURN_MAX;
        while self.has_sender() {
            if left == 0 {
                io.come_back(RX_QUEUE);
                return Ok(());
            }
            let Some(queue) = io.queues.get_mut(RX_QUEUE) else {
                return Ok(());
            };
            if !queue.pop(guest, chain)? {
                // The driver's next buffers are news now, and only now.
                if queue.enable_kicks(guest)? {
                    left -= 1;
                    continue;
                }
                return Ok(());
            }
            left -= 1;
            if chain.writable.len() <= HEADER_BYTES {
                return Err(QueueError::Shape("room for a packet"));
            }
            match self.send_one(guest, &chain.writable) {
                Some(written) => queue.push_used(guest, chain, written)?,
                None => queue.put_back(),
            }
        }
        match io.queues.get_mut(RX_QUEUE) {
            Some(queue) => queue.disable_kicks(guest),
            None => Ok(()),
        }
    }

    /// Whether there is a packet to send; drops list entries that turned out void.
    fn has_sender(&mut self) -> bool {
        if !self.resets.is_empty() {
            return true;
        }
        while let Some(slot) = self.senders.front().copied() {
            if let Some(connection) = self.connection(slot).filter(|connection| connection.listed) {
                if connection.has_work() {
                    return true;
                }
                connection.listed = false;
            }
            self.senders.pop_front();
        }
        false
    }

    /// Writes the next packet into `buffers`; its length, or None when there was none after all.
    fn send_one(&mut self, guest: &GuestRam, buffers: &Buffers) -> Option<usize> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(buffers.write_at(guest, 0, &reset.encode()));
        }
        let slot = self.senders.pop_front()?;
        let guest_cid = self.guest_cid;
        let connection = self.connection(slot)?;
        connection.listed = false;
        let turn = connection.next_packet(guest, buffers);
        let (header, last) = match turn {
            Turn::Packet(header) => (header, false),
            Turn::Last(header) => (header, true),
            Turn::Nothing => {
                self.touch(slot);
                return None;
            }
        };
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: connection.host_port,
            dst_port: connection.guest_port,
            kind: TYPE_STREAM,
            ..header
        };
        if last {
            drop(self.remove(slot));
        } else {
            self.touch(slot);
        }
        let payload = usize::try_from(header.len).unwrap_or(0);
        Some(buffers.write_at(guest, 0, &header.encode()) + payload)
    }

    /// Whether the driver knows that the connections from before a restore are gone. It drops all
    /// connections that it has when it deals with the event, which may be after packets that it was
    /// given later: it gets none before. That it has dealt with it shows in the buffer that it then
    /// makes available in place of the event's (linux `net/vmw_vsock/virtio_transport.c`,
    /// `virtio_transport_event_work`).
    fn news_are_known(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        let guest = io.guest;
        let Some(queue) = io.queues.get_mut(EVENT_QUEUE) else {
            return Ok(true);
        };
        let broken = |error| DeviceError::queue(EVENT_QUEUE)(error);
        if self.news == News::Due && !self.send_event(guest, queue).map_err(broken)? {
            if queue.enable_kicks(guest).map_err(broken)? {
                io.come_back(EVENT_QUEUE);
            }
            return Ok(false);
        }
        if let News::Told(available) = self.news {
            if !queue
                .enable_kicks_beyond(guest, available)
                .map_err(broken)?
            {
                return Ok(false);
            }
            self.news = News::None;
        }
        Ok(true)
    }

    /// Tells the driver that all its connections are gone, if it has a buffer for that.
    fn send_event(&mut self, guest: &GuestRam, queue: &mut VirtQueue) -> Result<bool, QueueError> {
        let available = queue.available(guest)?;
        if !queue.pop(guest, &mut self.rx)? {
            return Ok(false);
        }
        let event = EVENT_TRANSPORT_RESET.to_le_bytes();
        if self.rx.writable.write_at(guest, 0, &event) < event.len() {
            return Err(QueueError::Shape("room for an event"));
        }
        queue.push_used(guest, &self.rx, event.len())?;
        self.news = News::Told(available);
        Ok(true)
    }
}

/// The host port after `port`, staying clear of the low ones, which guests connect to.
fn next_port(port: u32) -> u32 {
    port.checked_add(1).unwrap_or(FIRST_HOST_PORT)
}
