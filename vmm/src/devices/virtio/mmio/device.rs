//! Registers, status, activation and reset of one virtio-mmio device.
//!
//! A [`MmioTransport`] is a handle: one clone goes on the bus, one to the event loop, one stays
//! with the machine. The registers that an interrupt handler touches are atomics, so that a vCPU
//! does not wait there for a request that the control thread has in hand.
//!
//! What a driver may do wrong here has three answers. Accesses of a width or at a place the
//! specification does not know are ignored. Features that were not offered keep `FEATURES_OK` from
//! being set. All other nonsense (a status out of order, a queue that is not in RAM, a broken
//! chain) sets `DEVICE_NEEDS_RESET` and stops the device until the driver resets it.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::devices::EventLine;
use crate::devices::virtio::queue::VirtQueue;
use crate::devices::virtio::{DeviceError, DeviceIo, GuestRam, VirtioDevice, device_type};

/// Bytes of guest physical address space one device takes.
pub const WINDOW_BYTES: u64 = 0x1000;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Version of the register layout that virtio 1.x uses.
const VERSION: u32 = 2;
/// "CLDL".
const VENDOR: u32 = 0x4c44_4c43;
/// Feature bits that the transport brings to every device.
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
/// Status bits in the order in which a driver sets them, section 3.1.1.
const STATUS_ORDER: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];

/// A virtio device's registers, queues and events. Clones are handles to the same device.
#[derive(Clone)]
pub struct MmioTransport {
    pub(super) shared: Arc<Shared>,
}

/// What needs no lock, and the lock for the rest.
pub(super) struct Shared {
    pub(super) core: Mutex<Core>,
    pub(super) interrupt_status: AtomicU32,
    pub(super) irq: EventFd,
    pub(super) irq_line: EventLine,
    /// One for each queue: the driver's kicks.
    pub(super) kicks: Vec<EventFd>,
    /// Calls the control thread after activation and resume.
    pub(super) wake: EventFd,
    pub(super) backend_fds: Vec<RawFd>,
    pub(super) failures: AtomicU64,
}

/// The device and what the driver agreed with it.
pub(super) struct Core {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) guest: Arc<GuestRam>,
    pub(super) queues: Vec<VirtQueue>,
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    /// Counts changes of configuration space, so that a driver notices one while it reads.
    pub(super) config_generation: u32,
    /// The machine is paused: no guest memory may change.
    pub(super) paused: bool,
    /// Backend descriptors (bit by index) taken out of the event loop while the device could do
    /// nothing about them.
    pub(super) masked: u32,
    /// Why the device asked for its reset.
    pub(super) error: Option<DeviceError>,
}

impl MmioTransport {
    /// Puts `device` behind registers, as after power-on.
    ///
    /// # Errors
    /// When an eventfd cannot be made.
    pub fn new(guest: Arc<GuestRam>, device: Box<dyn VirtioDevice>) -> Result<Self, DeviceError> {
        let eventfd = || {
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(DeviceError::host("eventfd"))
        };
        let sizes = device.queue_sizes();
        let irq = eventfd()?;
        let shared = Shared {
            interrupt_status: AtomicU32::new(0),
            irq_line: EventLine::new(irq.try_clone().map_err(DeviceError::host("dup"))?),
            irq,
            kicks: sizes.iter().map(|_| eventfd()).collect::<Result<_, _>>()?,
            wake: eventfd()?,
            backend_fds: device.backend_fds(),
            failures: AtomicU64::new(0),
            core: Mutex::new(Core {
                queues: sizes.iter().map(|size| VirtQueue::new(*size)).collect(),
                device,
                guest,
                status: 0,
                device_features_select: 0,
                driver_features_select: 0,
                driver_features: 0,
                queue_select: 0,
                config_generation: 0,
                paused: false,
                masked: 0,
                error: None,
            }),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// The eventfd to register as the device's irqfd.
    pub fn irq_fd(&self) -> &EventFd {
        &self.shared.irq
    }

    /// Queue indices and the eventfds to register as ioeventfds for writes of that index to
    /// [`MmioTransport::NOTIFY_OFFSET`]. A write that reaches the bus instead has the same effect.
    pub fn notify_fds(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        (0_u32..).zip(&self.shared.kicks)
    }

    /// Offset of the notification register in the device's window.
    pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    /// How often the device stopped because of its driver or its host.
    pub fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::Relaxed)
    }

    /// What kind of device it is, in words.
    pub fn name(&self) -> &'static str {
        device_type::name(self.shared.lock().device.id())
    }

    /// Why the device last asked for a reset, told once.
    pub fn take_error(&self) -> Option<DeviceError> {
        self.shared.lock().error.take()
    }
}

impl Shared {
    /// A panic in a device ends the process in a release build; tests may look at what is left.
    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises the interrupt for the reasons in `bits`.
    pub(super) fn interrupt(&self, bits: u32) {
        self.interrupt_status.fetch_or(bits, Ordering::SeqCst);
        // An eventfd of our own that KVM listens to: a write can only find it raised already.
        let _ = self.irq_line.raise();
    }

    /// Runs the device on `work`, then raises interrupts and handles what went wrong.
    pub(super) fn run(
        &self,
        core: &mut Core,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut DeviceIo<'_>) -> Result<(), DeviceError>,
    ) {
        let mut io = DeviceIo {
            guest: &core.guest,
            queues: &mut core.queues,
            again: 0,
            config_changed: false,
        };
        let mut result = work(core.device.as_mut(), &mut io);
        let (again, config_changed) = (io.again, io.config_changed);
        let mut signal = false;
        for (index, queue) in core.queues.iter_mut().enumerate() {
            match queue.take_signal(&core.guest) {
                Ok(wanted) => signal |= wanted,
                Err(source) => {
                    result = result.and(Err(DeviceError::Queue {
                        queue: index,
                        source,
                    }))
                }
            }
        }
        let mut reasons = 0;
        if signal {
            reasons |= VIRTIO_MMIO_INT_VRING;
        }
        if config_changed {
            core.config_generation = core.config_generation.wrapping_add(1);
            reasons |= VIRTIO_MMIO_INT_CONFIG;
        }
        if reasons != 0 {
            self.interrupt(reasons);
        }
        for (index, kick) in self.kicks.iter().enumerate() {
            if again >> index & 1 == 1 {
                // As with the interrupt: it can only be raised already.
                let _ = kick.write(1);
            }
        }
        if let Err(error) = result {
            self.fail(core, error);
        }
    }

    /// Stops the device until its driver resets it.
    pub(super) fn fail(&self, core: &mut Core, error: DeviceError) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        core.error = Some(error);
        core.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if core.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn reset(&self, core: &mut Core) {
        core.device.reset();
        for queue in &mut core.queues {
            *queue = VirtQueue::new(queue.size_max);
        }
        core.status = 0;
        core.device_features_select = 0;
        core.driver_features_select = 0;
        core.driver_features = 0;
        core.queue_select = 0;
        self.interrupt_status.store(0, Ordering::SeqCst);
    }

    fn write_status(&self, core: &mut Core, value: u32) {
        if value == 0 {
            return self.reset(core);
        }
        let before = core.status;
        // A driver may read the bit that only the device sets and write it back.
        let kept = before & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let wanted = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let known = STATUS_ORDER
            .iter()
            .fold(VIRTIO_CONFIG_S_FAILED, |known, bit| known | bit);
        let mut in_order = true;
        let mut previous = true;
        for bit in STATUS_ORDER {
            let set = wanted & bit != 0;
            in_order &= previous || !set;
            previous = set;
        }
        if wanted & kept != kept || wanted & !known != 0 || !in_order {
            return self.fail(
                core,
                DeviceError::Status {
                    from: before,
                    to: value,
                },
            );
        }
        let new = wanted & !kept;
        core.status |= new & !(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 && core.features_acceptable() {
            core.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            if core.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                return self.fail(
                    core,
                    DeviceError::Status {
                        from: before,
                        to: value,
                    },
                );
            }
            core.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            if core.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0 {
                match core.activate(|_| (0, 0)) {
                    // The control thread takes it from here.
                    Ok(()) => drop(self.wake.write(1)),
                    Err(error) => self.fail(core, error),
                }
            }
        }
    }

    fn write_register(&self, core: &mut Core, register: u32, value: u32) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => core.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => core.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => core.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => core.queue_select = value,
            VIRTIO_MMIO_STATUS => self.write_status(core, value),
            VIRTIO_MMIO_QUEUE_NUM => {
                let select = core.queue_select;
                if core
                    .queue()
                    .is_some_and(|queue| !queue.ready && !queue.set_size(value))
                {
                    self.fail(core, DeviceError::QueueSetup(select));
                }
            }
            _ => core.write_queue(register, value),
        }
    }
}

impl Core {
    /// Whether the device may touch guest memory.
    pub(super) fn is_running(&self) -> bool {
        self.is_activated() && !self.paused && self.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0
    }

    pub(super) fn is_activated(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0
            && self.driver_features >> VIRTIO_F_VERSION_1 & 1 == 1
    }

    /// Starts the queues, each at the positions `at` gives for its index, and the device.
    pub(super) fn activate(&mut self, at: impl Fn(usize) -> (u16, u16)) -> Result<(), DeviceError> {
        let event_idx = self.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if !queue.start(&self.guest, event_idx, at(index)) {
                return Err(DeviceError::QueueSetup(
                    u32::try_from(index).unwrap_or(u32::MAX),
                ));
            }
        }
        self.device.activate(self.driver_features)
    }

    fn queue(&mut self) -> Option<&mut VirtQueue> {
        let index = usize::try_from(self.queue_select).ok()?;
        if self.is_activated() {
            None
        } else {
            self.queues.get_mut(index)
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        // Frozen once FEATURES_OK is set, section 3.1.1.
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
    }

    /// Registers of the selected queue. Once it is ready they are frozen, until a reset.
    fn write_queue(&mut self, register: u32, value: u32) {
        let Some(queue) = self.queue() else {
            return;
        };
        if register == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value & 1 == 1;
            return;
        }
        if queue.ready {
            return;
        }
        let low = |address: u64| address & !u64::from(u32::MAX) | u64::from(value);
        let high = |address: u64| address & u64::from(u32::MAX) | u64::from(value) << 32;
        match register {
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.descriptors = low(queue.descriptors),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.descriptors = high(queue.descriptors),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.available = low(queue.available),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.available = high(queue.available),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.used = low(queue.used),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.used = high(queue.used),
            _ => {}
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        let queue = usize::try_from(self.queue_select)
            .ok()
            .and_then(|at| self.queues.get(at));
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => half(self.offered()),
                1 => half(self.offered() >> 32),
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.size_max)),
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            VIRTIO_MMIO_STATUS => self.status,
            // There is no shared memory region: its length reads as -1, section 4.2.2.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            let core = self.shared.lock();
            let config = usize::try_from(at)
                .ok()
                .and_then(|at| core.device.config().get(at..));
            for (slot, byte) in data.iter_mut().zip(config.unwrap_or(&[])) {
                *slot = *byte;
            }
            return;
        }
        let (Some(register), Ok(out)) = (register(offset), <&mut [u8; 4]>::try_from(data)) else {
            return;
        };
        *out = match register {
            VIRTIO_MMIO_INTERRUPT_STATUS => self.shared.interrupt_status.load(Ordering::SeqCst),
            _ => self.shared.lock().read_register(register),
        }
        .to_le_bytes();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            if let Ok(at) = usize::try_from(at) {
                self.shared.lock().device.write_config(at, data);
            }
            return;
        }
        let (Some(register), Ok(bytes)) = (register(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        match register {
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.shared
                    .interrupt_status
                    .fetch_and(!value, Ordering::SeqCst);
            }
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                let kick = usize::try_from(value)
                    .ok()
                    .and_then(|at| self.shared.kicks.get(at));
                if let Some(kick) = kick {
                    // A full counter is a kick that is on its way already.
                    let _ = kick.write(1);
                }
            }
            _ => self
                .shared
                .write_register(&mut self.shared.lock(), register, value),
        }
    }
}

/// The register at an aligned offset below the configuration space.
fn register(offset: u64) -> Option<u32> {
    let offset = u32::try_from(offset).ok()?;
    (offset < VIRTIO_MMIO_CONFIG && offset.is_multiple_of(4)).then_some(offset)
}

/// The low half of `value`.
fn half(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0)
}
