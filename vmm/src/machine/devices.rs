//! The machine's devices: which there are, where they sit, how they are wired to KVM, and their
//! part of the saved state.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloudlet_snapshot::{Reader, Writer};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::acpi::{self, Events, GenerationId};
use super::handle::Inbox;
use super::kvm::kvm_error;
use super::power::{self, PowerPort};
use super::state::{self, SERIAL, virtio_section};
use super::{Backends, MachineError};
use crate::boot::acpi::{Hardware, SerialPort, VirtioMmio};
use crate::bus::{Bus, SharedBusDevice};
use crate::config::{Discovery, MachineConfig};
use crate::devices::i8042::{self, I8042};
use crate::devices::rate::Limits;
use crate::devices::serial::{self, Serial, SerialState};
use crate::devices::virtio::balloon::{Balloon, BalloonHandle};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::mmio::{MmioState, MmioTransport, WINDOW_BYTES};
use crate::devices::virtio::net::{Net, NetStats};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::{Gate, VirtioDevice};
use crate::memory::Ram;

/// Guest physical address of the first virtio window; the others follow without a gap.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Interrupt of the first virtio device; the others follow. Edge-triggered pins of the IOAPIC.
pub const VIRTIO_GSI: u32 = 5;
/// Most virtio devices: the IOAPIC has 24 pins.
pub const VIRTIO_MAX: usize = 19;

/// Where a virtio device sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioPlace {
    /// First address of its window.
    pub base: u64,
    /// Its interrupt.
    pub gsi: u32,
}

impl VirtioPlace {
    /// All places in order.
    fn all() -> impl Iterator<Item = VirtioPlace> {
        let bases = (0..).map(|index| VIRTIO_BASE + index * WINDOW_BYTES);
        bases
            .zip(VIRTIO_GSI..)
            .take(VIRTIO_MAX)
            .map(|(base, gsi)| VirtioPlace { base, gsi })
    }
}

/// All devices that are ours (the interrupt controllers and the timer are KVM's).
pub(super) struct Devices {
    serial: Arc<Mutex<Serial>>,
    serial_irq: EventFd,
    i8042: SharedBusDevice,
    power: SharedBusDevice,
    /// What an ACPI guest is told of by the host.
    events: Option<Events>,
    virtio: Vec<(VirtioPlace, MmioTransport)>,
    handles: Handles,
}

impl Devices {
    /// New devices, as after power-on.
    pub(super) fn new(
        config: &MachineConfig,
        ram: &Ram,
        backends: Backends,
        inbox: &Inbox,
    ) -> Result<Devices, MachineError> {
        let serial_irq = line()?;
        let Made {
            output,
            devices,
            handles,
        } = backends.into_devices(config, ram)?;
        let serial = Serial::new(serial_irq.try_clone().map_err(host)?, output);
        let transports = devices
            .into_iter()
            .map(|device| {
                MmioTransport::new(ram.guest().clone(), device).map_err(MachineError::Virtio)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Devices::assemble(config, serial, serial_irq, transports, handles, inbox)
    }

    /// Saved devices over this host's resources; paused.
    pub(super) fn restore(
        saved: &SavedDevices,
        config: &MachineConfig,
        ram: &Ram,
        backends: Backends,
        inbox: &Inbox,
    ) -> Result<Devices, MachineError> {
        let serial_irq = line()?;
        let Made {
            output,
            devices,
            handles,
        } = backends.into_devices(config, ram)?;
        handles.gate.close();
        let irq = serial_irq.try_clone().map_err(host)?;
        let serial = Serial::restore(&saved.serial, irq, output)?;
        let transports = devices
            .into_iter()
            .zip(&saved.virtio)
            .enumerate()
            .map(|(index, (device, state))| {
                MmioTransport::restore(state, ram.guest().clone(), device)
                    .map_err(|source| MachineError::RestoreVirtio { index, source })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Devices::assemble(config, serial, serial_irq, transports, handles, inbox)
    }

    fn assemble(
        config: &MachineConfig,
        serial: Serial,
        serial_irq: EventFd,
        transports: Vec<MmioTransport>,
        handles: Handles,
        inbox: &Inbox,
    ) -> Result<Devices, MachineError> {
        Ok(Devices {
            serial: Arc::new(Mutex::new(serial)),
            serial_irq,
            i8042: Arc::new(Mutex::new(I8042::new(inbox.reset_fd().map_err(host)?))),
            power: Arc::new(Mutex::new(PowerPort::new(
                inbox.off_fd().map_err(host)?,
                inbox.exit_code(),
            ))),
            events: (config.discovery == Discovery::Acpi)
                .then(Events::new)
                .transpose()?,
            virtio: VirtioPlace::all().zip(transports).collect(),
            handles,
        })
    }

    /// The two buses with everything on them.
    pub(super) fn buses(&self) -> Result<(Bus, Bus), MachineError> {
        let mut ports = Bus::ports();
        ports.insert(serial::PORT, serial::PORTS, self.serial.clone())?;
        ports.insert(i8042::PORT, i8042::PORTS, self.i8042.clone())?;
        ports.insert(power::PORT, power::PORTS, self.power.clone())?;
        let mut mmio = Bus::mmio();
        for (place, transport) in &self.virtio {
            mmio.insert(
                place.base,
                WINDOW_BYTES,
                Arc::new(Mutex::new(transport.clone())),
            )?;
        }
        Ok((ports, mmio))
    }

    /// Wire interrupts and notifications to KVM. An interrupt that a restored device has raised
    /// already is delivered by this, which is why the interrupt controllers come first.
    pub(super) fn connect(&self, vm: &VmFd) -> Result<(), MachineError> {
        vm.register_irqfd(&self.serial_irq, serial::GSI)
            .map_err(kvm_error("KVM_IRQFD"))?;
        if let Some(events) = &self.events {
            events.connect(vm)?;
        }
        for (place, transport) in &self.virtio {
            vm.register_irqfd(transport.irq_fd(), place.gsi)
                .map_err(kvm_error("KVM_IRQFD"))?;
            let notify = IoEventAddress::Mmio(place.base + MmioTransport::NOTIFY_OFFSET);
            for (queue, fd) in transport.notify_fds() {
                vm.register_ioevent(fd, &notify, queue)
                    .map_err(kvm_error("KVM_IOEVENTFD"))?;
            }
        }
        Ok(())
    }

    /// What a kernel without ACPI needs to be told on its command line; nothing to one with.
    pub(super) fn cmdline(&self) -> String {
        if self.events.is_some() {
            return String::new();
        }
        self.virtio
            .iter()
            .map(|(place, _)| {
                format!(
                    " virtio_mmio.device={WINDOW_BYTES_K}K@{:#x}:{}",
                    place.base, place.gsi
                )
            })
            .collect()
    }

    /// What a kernel with ACPI is told by its tables.
    pub(super) fn hardware(&self, cpus: u8) -> Option<Hardware> {
        self.events.as_ref()?;
        // Ports, and addresses below 4 GiB: all fit.
        let port = |port| u16::try_from(port).unwrap_or(u16::MAX);
        let word = |value| u32::try_from(value).unwrap_or(u32::MAX);
        Some(Hardware {
            cpus,
            serial: SerialPort {
                port: port(serial::PORT),
                ports: u8::try_from(serial::PORTS).unwrap_or(u8::MAX),
                gsi: serial::GSI,
            },
            virtio: self
                .places()
                .map(|place| VirtioMmio {
                    base: word(place.base),
                    bytes: word(WINDOW_BYTES),
                    gsi: place.gsi,
                })
                .collect(),
            sleep_port: port(power::SLEEP_PORT),
            sleep_type_off: power::SLEEP_TYPE_OFF,
            reset: (port(i8042::COMMAND_PORT), i8042::RESET),
            button_gsi: acpi::BUTTON_GSI,
            generation_at: GenerationId::AT,
            generation_gsi: acpi::GENERATION_GSI,
        })
    }

    /// What the host can tell an ACPI guest.
    pub(super) fn events(&self) -> Option<&Events> {
        self.events.as_ref()
    }

    pub(super) fn transports(&self) -> impl Iterator<Item = &MmioTransport> {
        self.virtio.iter().map(|(_, transport)| transport)
    }

    pub(super) fn places(&self) -> impl Iterator<Item = VirtioPlace> + '_ {
        self.virtio.iter().map(|(place, _)| *place)
    }

    pub(super) fn balloon(&self) -> Option<&BalloonHandle> {
        self.handles.balloon.as_ref()
    }

    /// What keeps a restored guest apart.
    pub(super) fn gate(&self) -> &Gate {
        &self.handles.gate
    }

    pub(super) fn nets(&self) -> impl Iterator<Item = &NetStats> {
        self.handles.nets.iter().map(Arc::as_ref)
    }

    pub(super) fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Add the devices' sections; everything is paused.
    pub(super) fn save(&self, writer: &mut Writer) -> Result<(), MachineError> {
        state::put(writer, SERIAL, &self.serial().save())?;
        for (index, transport) in self.transports().enumerate() {
            state::put(writer, &virtio_section(index), &transport.save())?;
        }
        Ok(())
    }
}

/// KiB of a window.
const WINDOW_BYTES_K: u64 = WINDOW_BYTES / 1024;

/// The devices' sections, decoded.
pub(super) struct SavedDevices {
    serial: SerialState,
    virtio: Vec<MmioState>,
}

impl SavedDevices {
    pub(super) fn take(
        reader: &mut Reader<'_>,
        config: &MachineConfig,
    ) -> Result<SavedDevices, MachineError> {
        Ok(SavedDevices {
            serial: state::take(reader, SERIAL)?,
            virtio: (0..virtio_count(config))
                .map(|index| state::take(reader, &virtio_section(index)))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// How many virtio devices a VM has: rng, vsock and balloon if it has them, its disks, its network
/// cards.
fn virtio_count(config: &MachineConfig) -> usize {
    1 + usize::from(config.vsock_cid.is_some())
        + usize::from(config.balloon)
        + config.disks.len()
        + config.nets.len()
}

/// What the machine asks devices through, once they are behind their transports.
struct Handles {
    balloon: Option<BalloonHandle>,
    nets: Vec<Arc<NetStats>>,
    gate: Gate,
}

/// What backends become.
struct Made {
    /// The serial port's output.
    output: serial::Output,
    /// The virtio devices in their order.
    devices: Vec<Box<dyn VirtioDevice>>,
    handles: Handles,
}

impl Backends {
    fn into_devices(self, config: &MachineConfig, ram: &Ram) -> Result<Made, MachineError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::new())];
        let gate = Gate::default();
        match (config.vsock_cid, self.vsock) {
            (Some(cid), Some(socket)) => {
                let vsock = Vsock::new(cid, socket)?;
                devices.push(Box::new(vsock.behind(gate.clone())));
            }
            (None, None) => {}
            (wanted, given) => {
                return Err(MachineError::Backends {
                    what: "vsock devices",
                    wanted: wanted.iter().len(),
                    given: given.iter().len(),
                });
            }
        }
        let mut handle = None;
        if config.balloon {
            let balloon = Balloon::new(ram.discarder()?).map_err(host)?;
            handle = Some(balloon.handle());
            devices.push(Box::new(balloon));
        }
        if config.disks.len() != self.disks.len() {
            return Err(MachineError::Backends {
                what: "disks",
                wanted: config.disks.len(),
                given: self.disks.len(),
            });
        }
        let limits = self
            .disk_limits
            .into_iter()
            .chain(std::iter::repeat(Limits::default()));
        for ((disk, description), limits) in self.disks.into_iter().zip(&config.disks).zip(limits) {
            let block = Block::new(disk, &description.id).limited(limits);
            devices.push(Box::new(block.map_err(host)?));
        }
        if config.nets.len() < self.nets.len() {
            return Err(MachineError::Backends {
                what: "network cards",
                wanted: config.nets.len(),
                given: self.nets.len(),
            });
        }
        // A card that is given nothing has its link down.
        let backends = self.nets.into_iter().map(Some);
        let backends = backends.chain(std::iter::repeat_with(|| None));
        let mut nets = Vec::new();
        for (backend, description) in backends.zip(&config.nets) {
            let net = Net::new(description.mac, backend).map_err(|source| MachineError::Host {
                what: "watching a network card",
                source,
            })?;
            nets.push(net.stats());
            devices.push(Box::new(net.behind(gate.clone())));
        }
        Ok(Made {
            output: self.serial_out,
            devices,
            handles: Handles {
                balloon: handle,
                nets,
                gate,
            },
        })
    }
}

pub(super) fn line() -> Result<EventFd, MachineError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)
}

pub(super) fn host(source: io::Error) -> MachineError {
    MachineError::Host {
        what: "eventfd",
        source,
    }
}
