//! A driver for tests and fuzz targets: it sets a device up through its registers, builds rings in
//! real guest memory, and turns the event loop. Compiled for tests and with the feature `fuzzing`
//! only; what it finds broken in itself it panics about.

use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};

use super::mmio::MmioTransport;
use super::{GuestRam, VirtioDevice};
use crate::bus::BusDevice;

/// Bytes of RAM from address 0.
pub const LOW_RAM: u64 = 64 << 20;
/// Where the second region of RAM starts.
pub const HIGH_BASE: u64 = 4 << 30;
/// Bytes in it.
pub const HIGH_RAM: u64 = 1 << 20;
/// Where tests put their buffers; rings lie below.
pub const BUFFERS: u64 = 1 << 20;

/// Feature bit 32: VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// Feature bit 29: VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;

/// Descriptor flag: another one follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device may write.
pub const WRITE: u16 = 2;
/// Descriptor flag: a table of descriptors.
pub const INDIRECT: u16 = 4;

/// One ring as the driver sees it.
#[derive(Debug, Clone)]
pub struct DriverQueue {
    /// Descriptors in it.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Descriptor that the next chain starts with.
    pub next_descriptor: u16,
    /// Chains offered so far, modulo 2^16.
    pub available_index: u16,
    /// Chains taken back so far, modulo 2^16.
    pub used_index: u16,
}

/// A driver and its device.
pub struct Driver {
    /// The device.
    pub transport: MmioTransport,
    /// Guest RAM.
    pub guest: Arc<GuestRam>,
    /// The event loop the device is on.
    pub manager: EventManager<MmioTransport>,
    /// The rings, by queue index.
    pub queues: Vec<DriverQueue>,
}

/// RAM in two regions with a hole between them.
pub fn ram() -> Arc<GuestRam> {
    let regions = [
        (GuestAddress(0), usize::try_from(LOW_RAM).unwrap()),
        (GuestAddress(HIGH_BASE), usize::try_from(HIGH_RAM).unwrap()),
    ];
    Arc::new(GuestRam::from_ranges(&regions).unwrap())
}

impl Driver {
    /// A device that nobody has set up yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::over(ram(), device)
    }

    /// As [`Driver::new`], over RAM that is there already.
    pub fn over(guest: Arc<GuestRam>, device: Box<dyn VirtioDevice>) -> Self {
        let transport = MmioTransport::new(guest.clone(), device).unwrap();
        Self::with(guest, transport)
    }

    /// A driver for a device that is there already.
    pub fn with(guest: Arc<GuestRam>, transport: MmioTransport) -> Self {
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(transport.clone());
        Self {
            transport,
            guest,
            manager,
            queues: Vec::new(),
        }
    }

    /// A device whose driver accepted `features` and is running.
    pub fn started(device: Box<dyn VirtioDevice>, features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(features | VERSION_1);
        assert_eq!(driver.status(), 15);
        driver
    }

    /// Reads a register.
    pub fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// Writes to the device's window with any width.
    pub fn transport_write(&mut self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
    }

    /// The device status.
    pub fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    /// Whether the device asks for a reset.
    pub fn needs_reset(&mut self) -> bool {
        self.status() & 0x40 != 0
    }

    fn write64(&mut self, register: u64, value: u64) {
        self.write(register, u32::try_from(value & 0xffff_ffff).unwrap());
        self.write(register + 4, u32::try_from(value >> 32).unwrap());
    }

    /// Everything up to and with DRIVER_OK.
    pub fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.set_up_queues();
        self.write(0x70, 15);
        self.turn();
    }

    /// Reset, then up to and with FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(
                0x20,
                u32::try_from(features >> (32 * half) & 0xffff_ffff).unwrap(),
            );
        }
        self.write(0x70, 11);
    }

    /// Gives every queue its largest size and fresh rings.
    pub fn set_up_queues(&mut self) {
        self.queues.clear();
        for index in 0.. {
            self.write(0x30, index);
            let size = self.read(0x34);
            if size == 0 {
                break;
            }
            let base = 0x1000 + u64::from(index) * 0x10000;
            let queue = DriverQueue {
                size: u16::try_from(size).unwrap(),
                descriptors: base,
                available: base + 0x8000,
                used: base + 0xc000,
                next_descriptor: 0,
                available_index: 0,
                used_index: 0,
            };
            self.put(base, &[0; 0x10000]);
            self.set_up_queue(index, &queue);
            self.queues.push(queue);
        }
    }

    /// Tells the device of one ring.
    pub fn set_up_queue(&mut self, index: u32, queue: &DriverQueue) {
        self.write(0x30, index);
        self.write(0x38, u32::from(queue.size));
        self.write64(0x80, queue.descriptors);
        self.write64(0x90, queue.available);
        self.write64(0xa0, queue.used);
        self.write(0x44, 1);
    }

    /// Writes a descriptor.
    pub fn descriptor(
        &self,
        queue: usize,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = self.queues[queue].descriptors + 16 * u64::from(index);
        self.guest
            .write_obj(address.to_le(), GuestAddress(at))
            .unwrap();
        self.guest
            .write_obj(len.to_le(), GuestAddress(at + 8))
            .unwrap();
        self.guest
            .write_obj(flags.to_le(), GuestAddress(at + 12))
            .unwrap();
        self.guest
            .write_obj(next.to_le(), GuestAddress(at + 14))
            .unwrap();
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let guest = self.guest.clone();
        let ring = &mut self.queues[queue];
        let slot = ring.available + 4 + 2 * u64::from(ring.available_index % ring.size);
        guest.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        ring.available_index = ring.available_index.wrapping_add(1);
        let order = std::sync::atomic::Ordering::Release;
        guest
            .store(
                ring.available_index.to_le(),
                GuestAddress(ring.available + 2),
                order,
            )
            .unwrap();
    }

    /// Offers a chain of `(address, len, device may write)`; returns its head.
    pub fn post(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) -> u16 {
        let size = self.queues[queue].size;
        let head = self.queues[queue].next_descriptor % size;
        let mut index = head;
        for (at, (address, len, writable)) in pieces.iter().enumerate() {
            let next = (index + 1) % size;
            let more = if at + 1 < pieces.len() { NEXT } else { 0 };
            let flags = more | if *writable { WRITE } else { 0 };
            self.descriptor(queue, index, *address, *len, flags, next);
            index = next;
        }
        self.queues[queue].next_descriptor = index;
        self.offer(queue, head);
        head
    }

    /// Notifies the device.
    pub fn kick(&mut self, queue: usize) {
        self.write(0x50, u32::try_from(queue).unwrap());
    }

    /// Runs the event loop until nothing is ready.
    pub fn turn(&mut self) {
        while self.manager.run_with_timeout(0).unwrap() > 0 {}
    }

    /// Notifies the device and lets it work.
    pub fn kick_and_turn(&mut self, queue: usize) {
        self.kick(queue);
        self.turn();
    }

    /// The next chain the device gave back: its head and how much was written.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = &mut self.queues[queue];
        let order = std::sync::atomic::Ordering::Acquire;
        let index: u16 = self.guest.load(GuestAddress(ring.used + 2), order).unwrap();
        if index == ring.used_index {
            return None;
        }
        let slot = ring.used + 4 + 8 * u64::from(ring.used_index % ring.size);
        ring.used_index = ring.used_index.wrapping_add(1);
        let head: u32 = self.guest.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.guest.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head, len))
    }

    /// Takes the interrupt: the status bits, or None when there was none.
    pub fn interrupt(&mut self) -> Option<u32> {
        self.transport.irq_fd().read().ok()?;
        let bits = self.read(0x60);
        self.write(0x64, bits);
        Some(bits)
    }

    /// Reads guest memory.
    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.guest
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Writes guest memory.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.guest
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }
}
