//! The virtio-mmio transport and split virtqueues (virtio 1.2, sections 4.2 and 2.7). Guest
//! addresses are physical addresses: memory is mapped one to one.

use alloc::alloc::{Layout, alloc_zeroed};
use core::sync::atomic::{AtomicU16, Ordering, fence};

use crate::bootinfo::MmioDevice;
use crate::cpu::{self, Register};
use crate::irq;

const MAGIC: u32 = 0x7472_6976;
const FEATURE_VERSION_1: u64 = 1 << 32;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
/// Descriptors of a queue, unless the device has fewer.
const QUEUE_SIZE: u16 = 64;

/// A device as found: its registers and its kind.
pub struct Device {
    base: usize,
    /// The virtio device id: 2 block, 4 entropy, 19 socket.
    pub id: u32,
    pin: u32,
}

impl Device {
    /// Looks at a place that the command line names; none if no modern virtio device is there.
    pub fn probe(place: MmioDevice) -> Option<Device> {
        let device = Device {
            base: place.base,
            id: 0,
            pin: place.pin,
        };
        if device.reg(0).read() != MAGIC || device.reg(4).read() != 2 {
            return None;
        }
        let id = device.reg(8).read();
        (id != 0).then_some(Device { id, ..device })
    }

    fn reg(&self, offset: usize) -> Register {
        // SAFETY: the base is 4-byte aligned, below 4 GiB (bootinfo), so mapped, and its magic says
        // that a virtio device is there; offsets are multiples of 4.
        unsafe { Register::new(self.base + offset) }
    }

    /// Changes with the configuration space, and when the machine was restored elsewhere.
    pub fn generation(&self) -> u32 {
        self.reg(0xfc).read()
    }

    /// A 32-bit field of the configuration space; `offset` a multiple of 4.
    pub fn config32(&self, offset: usize) -> u32 {
        self.reg(0x100 + offset).read()
    }

    /// A 64-bit field of the configuration space, read until it holds still.
    pub fn config64(&self, offset: usize) -> u64 {
        loop {
            let generation = self.generation();
            let low = u64::from(self.config32(offset));
            let high = u64::from(self.config32(offset + 4));
            if self.generation() == generation {
                return high << 32 | low;
            }
        }
    }

    /// Reset, then negotiation. Returns which of the `wanted` features are agreed upon.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        let status = self.reg(0x70);
        status.write(0);
        while status.read() != 0 {}
        status.write(1);
        status.write(1 | 2);
        let mut offered = 0u64;
        for half in 0..2u32 {
            self.reg(0x14).write(half);
            offered |= u64::from(self.reg(0x10).read()) << (32 * half);
        }
        let agreed = offered & (wanted | FEATURE_VERSION_1);
        for half in 0..2u32 {
            self.reg(0x24).write(half);
            self.reg(0x20).write((agreed >> (32 * half)) as u32);
        }
        status.write(1 | 2 | 8);
        if agreed & FEATURE_VERSION_1 == 0 || status.read() & 8 == 0 {
            panic!(
                "virtio device {} at {:#x} refuses the features {agreed:#x}",
                self.id, self.base
            );
        }
        agreed
    }

    /// Sets up queue `index`.
    pub fn queue(&self, index: u32) -> Queue {
        self.reg(0x30).write(index);
        let max = u16::try_from(self.reg(0x34).read()).unwrap_or(u16::MAX);
        let size = QUEUE_SIZE.min(max);
        if !size.is_power_of_two() {
            panic!(
                "virtio device {} at {:#x}: queue {index} of size {max}",
                self.id, self.base
            );
        }
        let queue = Queue::new(size, index, self.reg(0x50));
        self.reg(0x38).write(u32::from(size));
        for (offset, address) in [
            (0x80, queue.desc as usize),
            (0x90, queue.avail as usize),
            (0xa0, queue.used as usize),
        ] {
            self.reg(offset).write(address as u32);
            self.reg(offset + 4).write((address >> 32) as u32);
        }
        self.reg(0x44).write(1);
        queue
    }

    /// The device may work from now on, and interrupt.
    pub fn start(&self) {
        irq::enable_pin(self.pin);
        self.reg(0x70).write(1 | 2 | 4 | 8);
    }

    /// Takes back the interrupt line. To be called before the queues are looked at.
    pub fn acknowledge(&self) {
        let pending = self.reg(0x60).read();
        if pending != 0 {
            self.reg(0x64).write(pending);
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A piece of memory for the device to read or to write.
#[derive(Clone, Copy)]
pub struct Part {
    address: u64,
    len: u32,
    write: bool,
}

impl Part {
    /// Memory that the device reads. It must stay as it is until the chain is popped.
    pub fn read(address: *const u8, len: usize) -> Part {
        Part {
            address: address as u64,
            len: len as u32,
            write: false,
        }
    }

    /// Memory that the device writes. Nobody else may use it until the chain is popped.
    pub fn write(address: *mut u8, len: usize) -> Part {
        Part {
            address: address as u64,
            len: len as u32,
            write: true,
        }
    }
}

/// A split virtqueue, driver side.
pub struct Queue {
    size: u16,
    index: u32,
    notify: Register,
    desc: *mut Descriptor,
    avail: *mut u16,
    used: *mut u16,
    /// The first free descriptor; `next` fields link the others.
    free: u16,
    free_count: u16,
    avail_index: u16,
    used_index: u16,
}

impl Queue {
    fn new(size: u16, index: u32, notify: Register) -> Queue {
        let n = usize::from(size);
        let (avail, used) = (16 * n, (16 * n + 6 + 2 * n).next_multiple_of(4));
        let bytes = used + 6 + 8 * n;
        let layout = Layout::from_size_align(bytes, 4096).expect("a queue has a sane size");
        // SAFETY: the layout is not empty. The block is never freed: devices live as long as we do.
        let block = unsafe { alloc_zeroed(layout) };
        assert!(!block.is_null(), "no memory for a virtqueue");
        let desc = block.cast::<Descriptor>();
        for i in 0..size {
            // SAFETY: descriptor i lies inside the block.
            unsafe { (*desc.add(usize::from(i))).next = i + 1 };
        }
        Queue {
            size,
            index,
            notify,
            desc,
            // SAFETY: both offsets lie inside the block.
            avail: unsafe { block.add(avail).cast() },
            // SAFETY: as above.
            used: unsafe { block.add(used).cast() },
            free: 0,
            free_count: size,
            avail_index: 0,
            used_index: 0,
        }
    }

    /// How many descriptors the queue has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many descriptors are free.
    pub fn room(&self) -> u16 {
        self.free_count
    }

    /// The id that the next pushed chain will have.
    pub fn next_id(&self) -> u16 {
        self.free
    }

    /// Hands a chain to the device; the returned id comes back from `pop`. The device is told by
    /// `kick`. The caller makes sure that there is room.
    pub fn push(&mut self, parts: &[Part]) -> u16 {
        assert!(
            parts.len() <= usize::from(self.free_count) && !parts.is_empty(),
            "queue is full"
        );
        let head = self.free;
        let mut at = head;
        for (i, part) in parts.iter().enumerate() {
            // SAFETY: free descriptors are inside the table, and ours to write.
            let slot = unsafe { &mut *self.desc.add(usize::from(at)) };
            slot.address = part.address;
            slot.len = part.len;
            slot.flags = if part.write { DESC_WRITE } else { 0 };
            if i + 1 < parts.len() {
                slot.flags |= DESC_NEXT;
            } else {
                self.free = slot.next;
            }
            at = slot.next;
        }
        self.free_count -= parts.len() as u16;
        // SAFETY: the ring has `size` entries after flags and index; the index is published after
        // the entry and the descriptors are written.
        unsafe {
            self.avail
                .add(2 + usize::from(self.avail_index % self.size))
                .write_volatile(head);
            self.avail_index = self.avail_index.wrapping_add(1);
            AtomicU16::from_ptr(self.avail.add(1)).store(self.avail_index, Ordering::Release);
        }
        head
    }

    /// Tells the device about pushed chains, if it wants to know.
    pub fn kick(&self) {
        fence(Ordering::SeqCst);
        // SAFETY: the used ring starts with its flags.
        if unsafe { self.used.read_volatile() } & 1 == 0 {
            self.notify.write(self.index);
        }
    }

    /// A chain the device is done with: its id and the bytes written.
    pub fn pop(&mut self) -> Option<(u16, usize)> {
        // SAFETY: the used ring's index; written by the device after the entry.
        let device = unsafe { AtomicU16::from_ptr(self.used.add(1)).load(Ordering::Acquire) };
        if device == self.used_index {
            return None;
        }
        let slot = usize::from(self.used_index % self.size);
        // SAFETY: the ring has `size` entries of 8 bytes after flags and index.
        let (id, len) = unsafe {
            let entry = self.used.add(2 + 4 * slot).cast::<u32>();
            (entry.read_volatile(), entry.add(1).read_volatile())
        };
        self.used_index = self.used_index.wrapping_add(1);
        let head = u16::try_from(id).ok().filter(|&id| id < self.size);
        let head = head.expect("the device returns a chain it was given");
        let mut last = head;
        let mut count = 1;
        loop {
            // SAFETY: the chain's descriptors are inside the table.
            let slot = unsafe { &mut *self.desc.add(usize::from(last)) };
            if slot.flags & DESC_NEXT == 0 {
                slot.next = self.free;
                break;
            }
            last = slot.next;
            count += 1;
        }
        self.free = head;
        self.free_count += count;
        Some((head, len as usize))
    }

    /// Whether the device should interrupt when it has used a chain of this queue.
    pub fn interrupts(&mut self, wanted: bool) {
        // SAFETY: the avail ring starts with its flags.
        unsafe {
            self.avail
                .write_volatile(if wanted { 0 } else { NO_INTERRUPT })
        };
        fence(Ordering::SeqCst);
    }

    /// Sleeps until the device has used a chain. For devices that answer by themselves.
    pub fn wait(&mut self, device: &Device) -> (u16, usize) {
        loop {
            cpu::clear_seen();
            device.acknowledge();
            if let Some(done) = self.pop() {
                return done;
            }
            cpu::wait();
        }
    }
}
