//! The queues, the link, and what the device waits for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::{Backend, Sent};
use super::mac::MacAddr;
use super::receive::{Receiver, Step};
use super::tap;
use crate::devices::rate::{Limiter, Limits};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::{DeviceError, DeviceIo, Gate};

/// Bytes of the header before each frame, section 5.1.6.
pub const HEADER_BYTES: usize = 12;
/// Longest frame with its header: an IP packet of 64 KiB, as segmentation offload makes them, behind
/// an Ethernet header with a VLAN tag.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + 18 + (64 << 10);
/// Frames in each direction before the event loop gets its turn.
const FRAMES_A_TURN_MAX: u32 = 128;
/// Bytes of the configuration space: address and status, section 5.1.4.
const CONFIG_BYTES: usize = 8;

/// Device to driver.
pub(super) const RX_QUEUE: usize = 0;
/// Driver to device.
pub(super) const TX_QUEUE: usize = 1;

/// Epoll data of the backend, and of the timers of the two limits.
const BACKEND: u64 = 0;
const RX_TIMER: u64 = 1;
const TX_TIMER: u64 = 2;
/// Events taken at once: there are no more.
const EVENTS_MAX: usize = 3;

/// What a network card is given of the host.
pub struct NetBackend {
    /// Where frames come from and go to.
    pub backend: Box<dyn Backend>,
    /// So much in each direction.
    pub limits: Limits,
}

/// What a device says of itself while it works.
#[derive(Debug, Default)]
pub struct NetStats {
    backend: Option<String>,
    link_up: AtomicBool,
    received: AtomicU64,
    sent: AtomicU64,
    dropped: AtomicU64,
}

impl NetStats {
    /// What was put behind the device, if anything was.
    pub fn backend(&self) -> Option<&str> {
        self.backend.as_deref()
    }

    /// Whether it is there and of use.
    pub fn is_link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed)
    }

    /// Frames that the guest got.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Frames that the guest sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Frames in either direction that were lost here: sent while the link was down, refused by the
    /// backend, too long for the guest's buffers.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The device.
pub struct Net {
    pub(super) config: [u8; CONFIG_BYTES],
    pub(super) epoll: Epoll,
    backend: Option<Box<dyn Backend>>,
    /// What the backend is watched for.
    armed: EventSet,
    /// What it should be watched for.
    wanted: EventSet,
    receiver: Receiver,
    rx_limiter: Limiter,
    tx_limiter: Limiter,
    tx: Chain,
    stats: Arc<NetStats>,
    features: u64,
    /// The backend has yet to hear of the features: this happens on the control thread, as a vCPU
    /// that activates the device has no calls for it.
    set_up_due: bool,
    /// The driver has yet to hear that the link changed.
    pub(super) announce: bool,
    /// While it is closed no frame passes in either direction.
    gate: Gate,
}

impl Net {
    /// A card with the address `mac`, whose link is up if there is a backend.
    ///
    /// # Errors
    /// When the system gives no epoll or timer.
    pub fn new(mac: MacAddr, backend: Option<NetBackend>) -> io::Result<Self> {
        let (backend, limits) = match backend {
            Some(NetBackend { backend, limits }) => (Some(backend), limits),
            None => (None, Limits::default()),
        };
        let limiters = (Limiter::new(limits)?, Limiter::new(limits)?);
        Self::with_limiters(mac, backend, limiters)
    }

    /// As [`Net::new`], with the limiters of receiving and sending.
    pub(super) fn with_limiters(
        mac: MacAddr,
        backend: Option<Box<dyn Backend>>,
        (rx_limiter, tx_limiter): (Limiter, Limiter),
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (limiter, data) in [(&rx_limiter, RX_TIMER), (&tx_limiter, TX_TIMER)] {
            if let Some(fd) = limiter.fd() {
                let event = EpollEvent::new(EventSet::IN, data);
                epoll.ctl(ControlOperation::Add, fd, event)?;
            }
        }
        if let Some(backend) = &backend {
            let event = EpollEvent::new(EventSet::ONE_SHOT, BACKEND);
            epoll.ctl(ControlOperation::Add, backend.fd(), event)?;
        }
        let stats = NetStats {
            backend: backend.as_ref().map(|backend| backend.name()),
            ..NetStats::default()
        };
        let mut net = Self {
            config: [0; CONFIG_BYTES],
            epoll,
            backend,
            armed: EventSet::empty(),
            wanted: EventSet::empty(),
            receiver: Receiver::new(),
            rx_limiter,
            tx_limiter,
            tx: Chain::default(),
            stats: Arc::new(stats),
            features: 0,
            set_up_due: false,
            announce: false,
            gate: Gate::default(),
        };
        for (slot, byte) in net.config.iter_mut().zip(mac.bytes()) {
            *slot = byte;
        }
        net.show_link();
        Ok(net)
    }

    /// The same card, whose frames wait while `gate` is closed.
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// What the device says of itself, also once it is behind its transport.
    pub fn stats(&self) -> Arc<NetStats> {
        Arc::clone(&self.stats)
    }

    pub(super) fn is_link_up(&self) -> bool {
        self.backend.is_some()
    }

    /// Features of the device. Without a backend it offers what any could do, because the driver of a
    /// restored device may have accepted that.
    pub(super) fn device_features(&self) -> u64 {
        let offloads = self
            .backend
            .as_ref()
            .map_or(tap::OFFLOADS, |backend| backend.offloads());
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF | offloads
    }

    /// The driver works with `features`, or resets the device if there are none.
    pub(super) fn start(&mut self, features: Option<u64>) {
        self.features = features.unwrap_or(0);
        self.set_up_due = features.is_some();
        self.receiver
            .reset(self.features >> VIRTIO_NET_F_MRG_RXBUF & 1 == 1);
    }

    /// Puts the state of the link where the driver and `status` see it.
    fn show_link(&mut self) {
        let up = self.is_link_up();
        let bits = if up { VIRTIO_NET_S_LINK_UP } else { 0 };
        let status = u16::try_from(bits).unwrap_or(0).to_le_bytes();
        for (slot, byte) in self.config.iter_mut().skip(6).zip(status) {
            *slot = byte;
        }
        self.stats.link_up.store(up, Ordering::Relaxed);
    }

    /// The backend is of no use any more, for good.
    fn lose_link(&mut self) {
        // Closing it takes it off the epoll.
        self.backend = None;
        (self.armed, self.wanted) = (EventSet::empty(), EventSet::empty());
        self.show_link();
        self.announce = true;
    }

    /// What comes before any frame: the backend hears of the features, the driver of the link.
    pub(super) fn begin(&mut self) {
        if !std::mem::take(&mut self.set_up_due) {
            return;
        }
        let features = self.features;
        if let Some(backend) = &mut self.backend
            && backend.set_up(features).is_err()
        {
            self.lose_link();
        }
    }

    /// What comes after all frames of a turn: tell the driver of the link, watch the backend.
    pub(super) fn end(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        io.config_changed |= std::mem::take(&mut self.announce);
        let Some(backend) = &self.backend else {
            return Ok(());
        };
        if self.wanted.is_empty() || self.wanted == self.armed {
            return Ok(());
        }
        let event = EpollEvent::new(self.wanted | EventSet::ONE_SHOT, BACKEND);
        self.epoll
            .ctl(ControlOperation::Modify, backend.fd(), event)
            .map_err(DeviceError::host("watching the network"))?;
        self.armed = self.wanted;
        Ok(())
    }

    /// The epoll has events. Serves what they are about.
    pub(super) fn poll(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(DeviceError::host("epoll_wait")(error)),
        };
        let (mut rx, mut tx) = (false, false);
        for event in events.iter().take(count) {
            match event.data() {
                BACKEND => {
                    // It is watched no more. Whoever still waits for it says so again.
                    (self.armed, self.wanted) = (EventSet::empty(), EventSet::empty());
                    (rx, tx) = (true, true);
                }
                RX_TIMER => {
                    self.rx_limiter
                        .wake()
                        .map_err(DeviceError::host("setting a timer"))?;
                    rx = true;
                }
                TX_TIMER => {
                    self.tx_limiter
                        .wake()
                        .map_err(DeviceError::host("setting a timer"))?;
                    tx = true;
                }
                _ => {}
            }
        }
        if tx {
            self.transmit(io)?;
        }
        if rx {
            self.receive(io)?;
        }
        Ok(())
    }

    // ---- to the guest ----

    /// Hands the guest frames, until one of the two sides has no more or the turn is over.
    pub(super) fn receive(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        if self.gate.is_closed() {
            return Ok(());
        }
        let result = self.receive_frames(io);
        if let Some(queue) = io.queues.get_mut(RX_QUEUE) {
            self.receiver.put_back(queue);
        }
        result
    }

    fn receive_frames(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let broken = DeviceError::queue;
        self.wanted.remove(EventSet::IN);
        for _ in 0..FRAMES_A_TURN_MAX {
            let Some(backend) = self.backend.as_deref_mut() else {
                return Ok(());
            };
            if !self
                .rx_limiter
                .is_open()
                .map_err(DeviceError::host("setting a timer"))?
            {
                return Ok(());
            }
            let Some(queue) = io.queues.get_mut(RX_QUEUE) else {
                return Ok(());
            };
            let step = self
                .receiver
                .step(io.guest, queue, backend)
                .map_err(broken(RX_QUEUE))?;
            match step {
                Step::Frame(len) => {
                    count(&self.stats.received);
                    self.rx_limiter.charge(len - HEADER_BYTES);
                }
                Step::Dropped => count(&self.stats.dropped),
                Step::Nothing => {
                    self.wanted.insert(EventSet::IN);
                    return queue.disable_kicks(io.guest).map_err(broken(RX_QUEUE));
                }
                // The driver's next buffers are news now, and only now.
                Step::NoBuffers => {
                    if !io.enable_kicks(RX_QUEUE)? {
                        return Ok(());
                    }
                }
                Step::Gone => self.lose_link(),
            }
        }
        io.come_back(RX_QUEUE);
        Ok(())
    }

    // ---- from the guest ----

    /// Sends what the guest gives, until there is no more or the turn is over.
    pub(super) fn transmit(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        if self.gate.is_closed() {
            return Ok(());
        }
        let mut chain = std::mem::take(&mut self.tx);
        let result = self.transmit_frames(io, &mut chain);
        self.tx = chain;
        result
    }

    fn transmit_frames(
        &mut self,
        io: &mut DeviceIo<'_>,
        chain: &mut Chain,
    ) -> Result<(), DeviceError> {
        let broken = DeviceError::queue;
        self.wanted.remove(EventSet::OUT);
        for _ in 0..FRAMES_A_TURN_MAX {
            if !self
                .tx_limiter
                .is_open()
                .map_err(DeviceError::host("setting a timer"))?
            {
                return Ok(());
            }
            if !self.flush() {
                return Ok(());
            }
            let Some(queue) = io.queues.get_mut(TX_QUEUE) else {
                return Ok(());
            };
            if !queue.pop(io.guest, chain).map_err(broken(TX_QUEUE))? {
                if io.enable_kicks(TX_QUEUE)? {
                    continue;
                }
                return Ok(());
            }
            let len = chain.readable.len();
            let sent = match &mut self.backend {
                Some(backend) if (HEADER_BYTES + 1..=FRAME_BYTES_MAX).contains(&len) => {
                    backend.send(io.guest, &chain.readable)
                }
                _ => Sent::Refused,
            };
            match sent {
                Sent::Done => {
                    count(&self.stats.sent);
                    self.tx_limiter.charge(len - HEADER_BYTES);
                }
                Sent::Busy => {
                    queue.put_back();
                    self.wanted.insert(EventSet::OUT);
                    return Ok(());
                }
                Sent::Refused => count(&self.stats.dropped),
                Sent::Gone => {
                    count(&self.stats.dropped);
                    self.lose_link();
                }
            }
            queue
                .push_used(io.guest, chain, 0)
                .map_err(broken(TX_QUEUE))?;
        }
        io.come_back(TX_QUEUE);
        Ok(())
    }

    /// Goes on with what the backend took in part; false if it has to wait for that.
    fn flush(&mut self) -> bool {
        match self
            .backend
            .as_mut()
            .map_or(Sent::Done, |backend| backend.flush())
        {
            Sent::Busy => {
                self.wanted.insert(EventSet::OUT);
                false
            }
            Sent::Gone => {
                self.lose_link();
                true
            }
            Sent::Done | Sent::Refused => true,
        }
    }
}
