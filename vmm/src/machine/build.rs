//! Putting a machine together: a new one that boots a kernel, or a saved one.

use std::sync::Arc;

use cloudlet_snapshot::Reader;
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::acpi::GenerationId;
use super::devices::{Devices, SavedDevices, host};
use super::handle::Inbox;
use super::kvm::{VmState, create_vm, kvm_error, open};
use super::state::{self, CONFIG, VM, vcpu_section};
use super::{Backends, Machine, MachineError};
use crate::boot::{self, Entry, Given, Image, Kernel};
use crate::config::{Discovery, MachineConfig};
use crate::cpu::CpuError;
use crate::cpu::cpuid::{HostCpuid, for_vcpu, to_kvm};
use crate::cpu::msrs::{self, Msr};
use crate::cpu::state::{VcpuCaps, VcpuState};
use crate::cpu::thread::{Shared, Vcpu};
use crate::cpu::tsc;
use crate::memory::Ram;

/// `IA32_MTRR_DEF_TYPE`: ranges enabled, memory is write-back where no range says otherwise, as
/// firmware leaves it.
const MTRR_DEFAULT_TYPE: Msr = Msr {
    index: 0x2ff,
    value: (1 << 11) | 6,
};

/// What a build works with before there is a machine.
struct Site {
    kvm: Kvm,
    vm: VmFd,
    host_cpuid: HostCpuid,
    inbox: Inbox,
    generation: Option<GenerationId>,
}

impl Site {
    /// `config.discovery` is decided.
    fn prepare(config: &MachineConfig, ram: &Ram) -> Result<Site, MachineError> {
        config.validate()?;
        let given = ram.layout().bytes();
        if given != config.memory_bytes {
            return Err(MachineError::RamSize {
                given,
                wanted: config.memory_bytes,
            });
        }
        let kvm = open()?;
        let generation = (config.discovery == Discovery::Acpi)
            .then(GenerationId::new)
            .transpose()?;
        let vm = create_vm(&kvm, ram, generation.as_ref())?;
        let host_cpuid = HostCpuid::read(&kvm, vm.check_extension(Cap::TscDeadlineTimer))?;
        let inbox = Inbox::new().map_err(host)?;
        Ok(Site {
            kvm,
            vm,
            host_cpuid,
            inbox,
            generation,
        })
    }

    fn finish(
        self,
        config: MachineConfig,
        ram: Ram,
        devices: Devices,
        vcpus: Vec<Vcpu>,
        caps: VcpuCaps,
    ) -> Result<Machine, MachineError> {
        let (ports, mmio) = devices.buses()?;
        let handle = self.inbox.handle().clone();
        let shared = Shared {
            ports: Arc::new(ports),
            mmio: Arc::new(mmio),
            guest: ram.guest().clone(),
            generation: self.generation,
            caps: Arc::new(caps),
            on_end: Arc::new(move |reason| handle.end(reason)),
            kvmclock_ctrl: self.vm.check_extension(Cap::KvmclockCtrl),
        };
        Machine::assemble(config, ram, self.vm, devices, vcpus, shared, self.inbox)
    }
}

impl Machine {
    /// Build a machine and load `kernel` into it. Nothing of the guest has run yet: see
    /// [`Machine::start`].
    ///
    /// `ram` is as the kernel shall find it, which is all zeros.
    ///
    /// # Errors
    /// The configuration, the kernel or the host is not usable.
    pub fn boot(
        mut config: MachineConfig,
        ram: Ram,
        kernel: &Image<'_>,
        initrd: Option<&Image<'_>>,
        backends: Backends,
    ) -> Result<Machine, MachineError> {
        let kernel = Kernel::open(kernel)?;
        config.discovery = config.discovery.resolve(kernel.is_linux(), &config.cmdline);
        let site = Site::prepare(&config, &ram)?;
        let devices = Devices::new(&config, &ram, backends, &site.inbox)?;
        devices.connect(&site.vm)?;
        let cmdline = format!("{}{}", config.cmdline, devices.cmdline());
        let hardware = devices.hardware(config.cpus);
        let given = Given {
            initrd,
            cmdline: &cmdline,
            protocol: config.boot_protocol,
            acpi: hardware.as_ref(),
        };
        let entry = boot::load(ram.guest(), ram.layout(), &kernel, given)?;
        config.boot_protocol = entry.protocol;
        let vcpus = boot_vcpus(&site, &config, &entry)?;
        let caps = VcpuCaps::read(&site.kvm, &site.vm)?;
        site.finish(config, ram, devices, vcpus, caps)
    }

    /// Build a machine from a saved state, over the memory that belongs to it. It is paused; see
    /// [`Machine::start`]. Its guest is kept apart; see [`Machine::let_in`].
    ///
    /// If pages of `ram` are still to be placed, whoever places them must be at work already:
    /// devices and KVM may look at guest memory in here.
    ///
    /// # Errors
    /// The state is damaged, incomplete or has parts that nothing here restores; the host lacks
    /// what the VM was told it has; `ram` or `backends` do not fit the saved configuration.
    pub fn restore(state: &[u8], ram: Ram, backends: Backends) -> Result<Machine, MachineError> {
        let saved = Saved::read(state)?;
        let site = Site::prepare(&saved.config, &ram)?;
        for vcpu in &saved.vcpus {
            site.host_cpuid.check_restorable(&vcpu.cpuid)?;
        }
        let caps = VcpuCaps::read(&site.kvm, &site.vm)?;
        let mut vcpus = Vec::new();
        for (id, state) in (0u8..).zip(&saved.vcpus) {
            let fd = site
                .vm
                .create_vcpu(id.into())
                .map_err(kvm_error("KVM_CREATE_VCPU"))?;
            let tsc = state.restore(&fd, id, &caps)?;
            vcpus.push(Vcpu {
                id,
                fd,
                cpuid: state.cpuid.clone(),
                tsc,
            });
        }
        saved.vm.restore(&site.vm)?;
        saved.vm.clock.go_on(&site.vm, &vcpus, &saved.vcpus)?;
        let devices = Devices::restore(&saved.devices, &saved.config, &ram, backends, &site.inbox)?;
        devices.connect(&site.vm)?;
        if let Some(events) = devices.events() {
            events.tell_generation()?;
        }
        site.finish(saved.config, ram, devices, vcpus, caps)
    }

    /// The configuration inside a saved state, for whoever has to bring memory and backends that
    /// fit. The whole state is checked.
    ///
    /// # Errors
    /// The state is damaged, incomplete or has parts that nothing here restores.
    pub fn saved_config(state: &[u8]) -> Result<MachineConfig, MachineError> {
        Ok(Saved::read(state)?.config)
    }
}

/// A saved state, decoded and whole.
struct Saved {
    config: MachineConfig,
    vcpus: Vec<VcpuState>,
    vm: VmState,
    devices: SavedDevices,
}

impl Saved {
    fn read(state: &[u8]) -> Result<Saved, MachineError> {
        let mut reader = Reader::parse(state)?;
        let config: MachineConfig = state::take(&mut reader, CONFIG)?;
        config.validate()?;
        let vcpus = (0..config.cpus)
            .map(|id| state::take(&mut reader, &vcpu_section(id)))
            .collect::<Result<_, _>>()?;
        let vm = state::take(&mut reader, VM)?;
        let devices = SavedDevices::take(&mut reader, &config)?;
        reader.finish()?;
        Ok(Saved {
            config,
            vcpus,
            vm,
            devices,
        })
    }
}

/// The vCPUs of a new machine: the first at the kernel's entry, the others waiting to be started
/// by the guest.
fn boot_vcpus(
    site: &Site,
    config: &MachineConfig,
    entry: &Entry,
) -> Result<Vec<Vcpu>, MachineError> {
    let mut vcpus: Vec<Vcpu> = Vec::new();
    let mut template = None;
    for id in 0..config.cpus {
        let error = |call| {
            move |source| CpuError::Kvm {
                call,
                cpu: id,
                source,
            }
        };
        let fd = site
            .vm
            .create_vcpu(id.into())
            .map_err(error("KVM_CREATE_VCPU"))?;
        let tsc = tsc::host_frequency(&fd, id)?;
        let template = match &template {
            Some(template) => template,
            None => template.insert(site.host_cpuid.template(config.cpu_model, tsc.khz)?),
        };
        let cpuid = for_vcpu(template, id, config.cpus);
        fd.set_cpuid2(&to_kvm(&cpuid)?)
            .map_err(error("KVM_SET_CPUID2"))?;
        msrs::write(&fd, &[MTRR_DEFAULT_TYPE])
            .map_err(|source| CpuError::Msrs { cpu: id, source })?;
        if id == 0 {
            let mut sregs = fd.get_sregs().map_err(error("KVM_GET_SREGS"))?;
            entry.apply(&mut sregs);
            fd.set_sregs(&sregs).map_err(error("KVM_SET_SREGS"))?;
            fd.set_regs(&entry.regs).map_err(error("KVM_SET_REGS"))?;
        }
        vcpus.push(Vcpu { id, fd, cpuid, tsc });
    }
    Ok(vcpus)
}
