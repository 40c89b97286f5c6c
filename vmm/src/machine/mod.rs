//! The machine: one VM with its memory, vCPUs and devices, built to boot or from a saved state,
//! run by its control thread in turns, paused, saved, ended.
//!
//! | file | what |
//! | --- | --- |
//! | `build.rs` | `boot` and `restore`: putting a machine together |
//! | `kvm.rs` | the VM as KVM knows it, and the state of interrupt controllers and timer |
//! | `clock.rs` | the guest's clocks over a save |
//! | `devices.rs` | which devices there are, where they sit, how they are wired |
//! | `acpi.rs` | what the host can tell an ACPI guest: the power button, the generation id |
//! | `apart.rs` | keeping a restored guest apart from the world |
//! | `hints.rs` | pausing without the pages that the guest does not use |
//! | `power.rs` | the power-off port |
//! | `handle.rs` | requests from other threads |
//! | `state.rs` | the sections of a saved state |
//! | `error.rs` | what can go wrong |
//!
//! Life of a machine: `boot` or `restore`; `start` brings up the vCPU threads, each with its
//! filter, paused; `resume` lets the guest run; `turn` handles events until it returns an exit
//! reason. `pause` stops the guest at an instruction boundary, and only then can it be saved.

mod acpi;
mod apart;
mod build;
mod clock;
mod devices;
mod error;
mod handle;
mod hints;
mod kvm;
pub mod power;
mod state;

use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use cloudlet_snapshot::Writer;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::VmFd;

pub use acpi::GenerationId;
pub use devices::{VIRTIO_BASE, VIRTIO_GSI, VIRTIO_MAX, VirtioPlace};
pub use error::MachineError;
pub use handle::MachineHandle;
pub use hints::Hinted;
pub use power::EXIT_CODE_PORT;

use crate::config::MachineConfig;
use crate::cpu::CpuError;
use crate::cpu::thread::{ANSWER_MAX, Shared, Vcpu, VcpuThread};
use crate::devices::disk::Disk;
use crate::devices::rate::Limits;
use crate::devices::serial::{Output, Serial};
use crate::devices::virtio::DeviceError;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::net::{NetBackend, NetStats};
use crate::devices::virtio::vsock::HostSocket;
use crate::exit::ExitReason;
use crate::memory::Ram;
use crate::threads::ThreadHook;

use devices::Devices;
use handle::{Inbox, Request};
use kvm::VmState;

/// Something that the machine's event loop serves.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// How long the other vCPUs are waited for when a VM is at its end.
const END_PATIENCE: Duration = Duration::from_millis(500);

/// How long a turn of the event loop waits for a vCPU to pause.
const SOFT_PATIENCE: Duration = Duration::from_millis(20);

/// The host's resources that a machine is given. None of them is part of its saved state.
pub struct Backends {
    /// Takes what the guest writes to its serial port. A writer that blocks stops the guest.
    pub serial_out: Output,
    /// Where the host's side of the vsock device listens, for a VM that has one.
    pub vsock: Option<HostSocket>,
    /// The disks in their order.
    pub disks: Vec<Disk>,
    /// Limits of the disks in the same order; those it does not reach have none.
    pub disk_limits: Vec<Limits>,
    /// What the network cards are connected to, in their order. There may be fewer than cards: the
    /// rest have their link down.
    pub nets: Vec<NetBackend>,
}

/// Where a machine is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// No vCPU thread exists yet.
    Built,
    /// vCPUs have been asked to stand still, and one of them is still on its way: it waits in the
    /// kernel for a page of memory.
    Pausing,
    /// vCPUs stand still at instruction boundaries, devices touch nothing.
    Paused,
    /// The guest runs.
    Running,
    /// The guest is at its end.
    Ended(ExitReason),
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Phase::Built => "not started",
            Phase::Pausing => "pausing",
            Phase::Paused => "paused",
            Phase::Running => "running",
            Phase::Ended(_) => "at its end",
        }
    }
}

/// Who wants the VM to stand still.
#[derive(Debug, Clone, Copy, Default)]
struct Holds {
    /// Its owner, by [`Machine::pause`].
    owner: bool,
    /// Another thread, by [`MachineHandle::pause`].
    handle: bool,
}

/// A VM.
pub struct Machine {
    config: MachineConfig,
    phase: Phase,
    holds: Holds,
    // Fields are dropped in this order. vCPUs that have no thread yet, and the threads, are gone before
    // the VM, and the VM with its memory slots before what is mapped behind them: `shared` holds the
    // generation page, `ram` guest RAM.
    vcpus: Vec<Vcpu>,
    threads: Vec<VcpuThread>,
    vm: VmFd,
    shared: Shared,
    events: EventManager<Subscriber>,
    inbox: Inbox,
    devices: Devices,
    ram: Ram,
}

impl Machine {
    fn assemble(
        config: MachineConfig,
        ram: Ram,
        vm: VmFd,
        devices: Devices,
        vcpus: Vec<Vcpu>,
        shared: Shared,
        inbox: Inbox,
    ) -> Result<Machine, MachineError> {
        let mut events: EventManager<Subscriber> =
            EventManager::new().map_err(MachineError::Events)?;
        let mut bell = inbox.bell().map_err(devices::host)?;
        let error = bell.take_error();
        events.add_subscriber(Box::new(bell));
        if let Some(error) = error {
            return Err(MachineError::Events(error));
        }
        for transport in devices.transports() {
            transport.pause();
            events.add_subscriber(Box::new(transport.clone()));
        }
        Ok(Machine {
            config,
            phase: Phase::Built,
            holds: Holds {
                owner: true,
                handle: false,
            },
            vcpus,
            threads: Vec::new(),
            shared,
            events,
            inbox,
            devices,
            vm,
            ram,
        })
    }

    /// Start the vCPU threads, paused. `hook` has run on each of them when this returns. The
    /// caller installs its own thread's filter after this and before [`Machine::resume`].
    ///
    /// # Errors
    /// A thread cannot be started, a hook failed, or the machine was started before.
    pub fn start(&mut self, hook: &ThreadHook) -> Result<(), MachineError> {
        if self.phase != Phase::Built {
            return Err(self.not_possible("started"));
        }
        for vcpu in self.vcpus.drain(..) {
            self.threads
                .push(VcpuThread::spawn(vcpu, self.shared.clone(), hook)?);
        }
        self.phase = Phase::Paused;
        Ok(())
    }

    /// Let the guest run, unless another thread holds it through a [`MachineHandle`]; then it
    /// runs once that one lets it go.
    ///
    /// # Errors
    /// The machine was not started or is at its end; a vCPU does not answer.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.holds.owner = false;
        match self.phase {
            Phase::Built | Phase::Ended(_) => Err(self.not_possible("resumed")),
            Phase::Pausing | Phase::Paused | Phase::Running => self.follow_holds(ANSWER_MAX),
        }
    }

    /// Stop the guest. When this returns, every vCPU has left it at an instruction boundary and
    /// no device touches guest memory any more.
    ///
    /// # Errors
    /// The machine was not started or is at its end; a vCPU does not answer, as one that waits
    /// for a page of memory which does not come. The guest then goes on as if nobody had asked.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.pause_within(ANSWER_MAX)
    }

    /// As [`Machine::pause`], with the time that the vCPUs have for their answer.
    ///
    /// # Errors
    /// As [`Machine::pause`].
    pub fn pause_within(&mut self, patience: Duration) -> Result<(), MachineError> {
        if matches!(self.phase, Phase::Built | Phase::Ended(_)) {
            return Err(self.not_possible("paused"));
        }
        let before = std::mem::replace(&mut self.holds.owner, true);
        self.follow_holds(patience).inspect_err(|_| {
            self.holds.owner = before;
            // A vCPU that could not even be told to run is gone: the next turn says so.
            let _ = self.follow_holds(Duration::ZERO);
        })
    }

    /// Whether the guest runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// What the machine is doing, in a word or two.
    #[must_use]
    pub fn phase_name(&self) -> &'static str {
        self.phase.name()
    }

    /// Run the event loop once: wait at most `timeout` (`None` is for ever) for something to
    /// happen, handle it, and return the reason if the VM is at its end.
    ///
    /// # Errors
    /// The event loop or a vCPU fails; the VM should be given up.
    pub fn turn(&mut self, timeout: Option<Duration>) -> Result<Option<ExitReason>, MachineError> {
        if let Phase::Ended(reason) = &self.phase {
            return Ok(Some(reason.clone()));
        }
        let milliseconds = timeout.map_or(-1, |timeout| {
            // Rounded up, so that a wait for less than a millisecond is no busy loop.
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        self.events
            .run_with_timeout(milliseconds)
            .map_err(MachineError::Events)?;
        while let Some(request) = self.inbox.next() {
            match request {
                Request::Hold => self.holds.handle = true,
                Request::Release => self.holds.handle = false,
                Request::End(reason) => {
                    self.end(&reason);
                    return Ok(Some(reason));
                }
            }
        }
        if self.phase != Phase::Built {
            match self.follow_holds(SOFT_PATIENCE) {
                // It waits for a page, which is as good as paused; the next turn asks again.
                Ok(()) | Err(MachineError::Cpu(CpuError::Unresponsive { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Turn until the VM is at its end.
    ///
    /// # Errors
    /// As [`Machine::turn`].
    pub fn run(&mut self) -> Result<ExitReason, MachineError> {
        loop {
            if let Some(reason) = self.turn(None)? {
                return Ok(reason);
            }
        }
    }

    /// The machine's state without its memory and disks, as a snapshot container. The machine is
    /// paused and stays so; the state is that of this moment and belongs to the memory and the
    /// disks of this moment.
    ///
    /// # Errors
    /// The machine is not paused, or KVM refuses to tell a part of its state.
    pub fn save(&self) -> Result<Vec<u8>, MachineError> {
        if self.phase != Phase::Paused {
            return Err(self.not_possible("saved"));
        }
        let mut writer = Writer::new();
        state::put(&mut writer, state::CONFIG, &self.config)?;
        for thread in &self.threads {
            thread.ask_save()?;
        }
        // Every answer is taken, so that a failed one does not leave the others in the way of the
        // next command.
        let saved: Vec<_> = self.threads.iter().map(VcpuThread::saved).collect();
        for (id, vcpu) in (0u8..).zip(saved) {
            state::put(&mut writer, &state::vcpu_section(id), &vcpu?)?;
        }
        state::put(&mut writer, state::VM, &VmState::save(&self.vm)?)?;
        self.devices.save(&mut writer)?;
        Ok(writer.finish())
    }

    /// Stop everything for good: the guest runs no further instruction.
    fn end(&mut self, reason: &ExitReason) {
        for thread in &self.threads {
            // One that is gone runs nothing.
            let _ = thread.ask_pause();
        }
        for thread in &self.threads {
            // One that does not answer waits in the kernel for a page and runs nothing either;
            // its command is in its channel, so it will not enter the guest again.
            let _ = thread.paused(END_PATIENCE);
        }
        self.devices
            .transports()
            .for_each(|transport| transport.pause());
        self.phase = Phase::Ended(reason.clone());
    }

    /// Make the phase what the holds say.
    fn follow_holds(&mut self, patience: Duration) -> Result<(), MachineError> {
        let held = self.holds.owner || self.holds.handle;
        if held && self.phase == Phase::Running {
            self.threads.iter().try_for_each(VcpuThread::ask_pause)?;
            self.phase = Phase::Pausing;
        }
        if held && self.phase == Phase::Pausing {
            let until = Instant::now() + patience;
            for thread in &self.threads {
                thread.paused(until.saturating_duration_since(Instant::now()))?;
            }
            self.devices
                .transports()
                .for_each(|transport| transport.pause());
            self.phase = Phase::Paused;
        }
        if !held && matches!(self.phase, Phase::Pausing | Phase::Paused) {
            self.devices
                .transports()
                .for_each(|transport| transport.resume());
            self.threads.iter().try_for_each(VcpuThread::resume)?;
            self.phase = Phase::Running;
        }
        Ok(())
    }

    fn not_possible(&self, wanted: &'static str) -> MachineError {
        MachineError::Phase {
            is: self.phase.name(),
            wanted,
        }
    }

    /// The description of the VM.
    #[must_use]
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Press the power button: the guest is asked to shut itself down.
    ///
    /// # Errors
    /// The guest was not told of a power button, because it has no ACPI tables.
    pub fn press_power_button(&self) -> Result<(), MachineError> {
        self.devices
            .events()
            .ok_or(MachineError::NoButton)?
            .press_button()
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// KVM's side of the VM, for its dirty log.
    #[must_use]
    pub fn vm_fd(&self) -> &VmFd {
        &self.vm
    }

    /// A handle through which other threads can pause, resume or end the VM.
    #[must_use]
    pub fn handle(&self) -> MachineHandle {
        self.inbox.handle().clone()
    }

    /// The event loop, for further subscribers such as a control socket.
    pub fn event_manager(&mut self) -> &mut EventManager<Subscriber> {
        &mut self.events
    }

    /// The serial port, for input.
    pub fn serial(&self) -> MutexGuard<'_, Serial> {
        self.devices.serial()
    }

    /// What the network cards say of themselves, in their order.
    pub fn nets(&self) -> impl Iterator<Item = &NetStats> {
        self.devices.nets()
    }

    /// How often virtio devices have stopped because of their driver or the host.
    #[must_use]
    pub fn device_failures(&self) -> u64 {
        let failures = self.devices.transports().map(MmioTransport::failures);
        failures.fold(0, u64::saturating_add)
    }

    /// Which virtio devices have stopped, and why, each told once.
    #[must_use]
    pub fn take_device_errors(&self) -> Vec<(&'static str, DeviceError)> {
        let transports = self.devices.transports();
        let error = |transport: &MmioTransport| Some((transport.name(), transport.take_error()?));
        transports.filter_map(error).collect()
    }

    /// Where the virtio devices sit, in their order.
    pub fn virtio_places(&self) -> impl Iterator<Item = VirtioPlace> + '_ {
        self.devices.places()
    }

    /// Accesses of the guest that no device answered: to ports, to memory addresses.
    #[must_use]
    pub fn unclaimed(&self) -> (u64, u64) {
        (self.shared.ports.unclaimed(), self.shared.mmio.unclaimed())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for thread in &mut self.threads {
            // A thread that does not end keeps its own hold on guest memory and the VM.
            thread.stop(END_PATIENCE);
        }
    }
}
