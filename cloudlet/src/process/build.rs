//! From a specification to a machine that does not run yet: files opened, RAM mapped, devices
//! built, threads made. Everything here happens before the control thread is confined.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cloudlet_overlay::{BaseId, Space};
use cloudlet_vmm::boot::Image as Kernel;
use cloudlet_vmm::config::MachineConfig;
use cloudlet_vmm::crash;
use cloudlet_vmm::devices::disk::{BlockNumber, Disk, PendingBlocks};
use cloudlet_vmm::devices::rate::Limits;
use cloudlet_vmm::devices::virtio::vsock::HostSocket;
use cloudlet_vmm::machine::{Backends, Machine, MachineHandle};
use cloudlet_vmm::memory::{Pager, PagerHooks, Placer, Ram, RamLayout};
use cloudlet_vmm::threads::{ThreadHook, ThreadKind};
use serde_json::{Value, json};

use super::console::Console;
use super::disks;
use super::nets;
use super::starting::Step;
use super::supervise;
use super::{Failure, say};
use crate::fetch::{self, Link, Location, Rate, Remote};
use crate::files;
use crate::hold::Hold;
use crate::image::{Description, FORMAT, Image, file};
use crate::launch::{BootSource, Event, OverlaySource, Source, Spec};
use crate::pages::ImagePages;
use crate::registry::VmDir;
use crate::store::{Base, Store};
use crate::synthesis::{
    Arrival, ArrivalThreads, DeltaSource, Head, Opened, Target, chain, check_sizes,
};

/// The guest's context id on its vsock: there is one guest behind each socket, so all may have the
/// same (virtio 1.2, 5.10.4: 0 to 2 are reserved).
const GUEST_CID: u64 = 3;

/// What the VM is, for status and for saving it.
pub(super) struct About {
    pub(super) name: String,
    pub(super) image: Description,
    pub(super) disks: Vec<Disk>,
    pub(super) origin: Option<Origin>,
    pub(super) vsock: PathBuf,
    _image: Option<Hold>,
    /// What RAM is mapped from.
    pub(super) memory: Option<MemoryFile>,
}

/// The file that RAM, or a part of it, is mapped from.
pub(super) struct MemoryFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl MemoryFile {
    fn of(image: &Image) -> Result<Self, Failure> {
        let file = image.memory()?;
        let len = file.metadata()?.len();
        let path = image.dir().join(file::MEMORY);
        Ok(Self { path, file, len })
    }

    /// What is wrong with it, if it is not as long as it was.
    pub(super) fn fault(&self) -> Option<String> {
        let len = self.file.metadata().ok()?.len();
        (len < self.len).then(|| crash::cut_words(&self.path))
    }
}

/// The base VM that overlays of this VM are made against.
pub(super) struct Origin {
    pub(super) base: Base,
    /// Whether RAM and disks lie on the base's own files.
    pub(super) is_mapped: bool,
    _hold: Hold,
}

/// An overlay on its way into the VM.
pub(super) struct Incoming {
    pub(super) arrival: Arc<Arrival>,
    pub(super) early_start: bool,
    id: String,
    pager: Option<Pager>,
    placer: Option<Placer>,
    _threads: ArrivalThreads,
}

impl Incoming {
    pub(super) fn status(&self) -> Value {
        let mut status = json!(self.arrival.stats());
        status["overlay"] = json!(self.id);
        status["early_start"] = json!(self.early_start);
        if let Some(pager) = &self.pager {
            let stats = pager.stats();
            status["faults"] = json!(stats.faults);
        }
        if let Some(placer) = &self.placer {
            let stats = placer.stats();
            status["placed_pages"] = json!(stats.placed);
            status["zero_pages"] = json!(stats.zero);
            status["base_pages"] = json!(stats.base);
            status["redundant_pages"] = json!(stats.redundant);
        }
        status
    }
}

/// A process's parts.
pub(super) struct Built {
    pub(super) machine: Machine,
    pub(super) console: Console,
    pub(super) arrival: Option<Incoming>,
    pub(super) about: About,
}

/// Builds what `spec` says in the directory `dir`.
pub(super) fn build(
    spec: &Spec,
    dir: &VmDir,
    report: &File,
    hook: &ThreadHook,
    step: Step,
) -> Result<Built, Failure> {
    let console = Console::new(&dir.console_log(), &dir.console_socket(), spec.attached)?;
    let out = console.out();
    let parts = Parts {
        spec,
        report,
        hook,
        out,
        step,
    };
    let Vm {
        machine,
        image,
        disks,
        origin,
        held,
        arrival,
        memory,
    } = match &spec.source {
        Source::Boot(source) => parts.boot(source)?,
        Source::Image { dir, base } => parts.restore(dir, base.as_deref())?,
        Source::Overlay(source) => parts.synthesise(source)?,
    };
    let (name, vsock) = (spec.name.clone(), spec.vsock.clone());
    let about = About {
        name,
        image,
        disks,
        origin,
        vsock,
        _image: held,
        memory,
    };
    Ok(Built {
        machine,
        console,
        arrival,
        about,
    })
}

/// A machine and what is known of it.
struct Vm {
    machine: Machine,
    image: Description,
    disks: Vec<Disk>,
    origin: Option<Origin>,
    /// The directory of the image that RAM and disks lie on.
    held: Option<Hold>,
    arrival: Option<Incoming>,
    memory: Option<MemoryFile>,
}

struct Parts<'a> {
    spec: &'a Spec,
    report: &'a File,
    hook: &'a ThreadHook,
    out: super::console::ConsoleOut,
    step: Step,
}

impl Parts<'_> {
    fn backends(&self, disks: &[Disk]) -> Result<Backends, Failure> {
        self.step.set("its sockets and network cards");
        Ok(Backends {
            serial_out: Box::new(self.out.clone()),
            disks: disks.to_vec(),
            disk_limits: self.disk_limits(disks.len())?,
            vsock: Some(HostSocket::bind(&self.spec.vsock)?),
            nets: nets::open(&self.spec.nets, &self.spec.scratch)?,
        })
    }

    fn disk_limits(&self, disks: usize) -> Result<Vec<Limits>, Failure> {
        let limits = &self.spec.disk_limits;
        if let Some(last) = limits.len().checked_sub(1).filter(|last| *last >= disks) {
            return Err(format!("there is no disk number {last} to limit: {disks} in all").into());
        }
        Ok(limits.clone())
    }

    fn boot(&self, source: &BootSource) -> Result<Vm, Failure> {
        let disks = source
            .disks
            .iter()
            .map(|disk| {
                self.step.set(disks::what(disk));
                disks::open(disk, &self.spec.scratch, &mut |done, total| {
                    say(&Event::Progress {
                        step: "disk image".into(),
                        done,
                        total,
                    });
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let memory_bytes = source
            .memory_mib
            .checked_mul(1 << 20)
            .ok_or("--memory is too large")?;
        let config = MachineConfig {
            cpus: source.cpus,
            memory_bytes,
            cpu_model: source.cpu_model.parse()?,
            discovery: source.discovery.parse()?,
            cmdline: source.cmdline.clone(),
            disks: source.disks.iter().map(disks::config).collect(),
            vsock_cid: Some(GUEST_CID),
            balloon: source.balloon,
            nets: nets::configs(&self.spec.nets)?,
            ..MachineConfig::default()
        };
        config.validate()?;
        let ram = Ram::anonymous(&RamLayout::new(memory_bytes)?)?;
        if let Some(path) = &source.initrd {
            self.step
                .set(format!("the initial RAM disk {}", path.display()));
        }
        let initrd = source.initrd.as_deref().map(files::open).transpose()?;
        let initrd = initrd.as_ref().map(Kernel::File);
        let machine = match &source.kernel {
            Some(path) => {
                self.step.set(format!("the kernel {}", path.display()));
                let kernel = files::open(path)?;
                let kernel = Kernel::File(&kernel);
                Machine::boot(
                    config,
                    ram,
                    &kernel,
                    initrd.as_ref(),
                    self.backends(&disks)?,
                )
                .map_err(|error| format!("cannot boot {}: {}", path.display(), chain(&error)))?
            }
            None => {
                let kernel = Kernel::Bytes(cloudlet_resources::GUEST_ELF);
                Machine::boot(
                    config,
                    ram,
                    &kernel,
                    initrd.as_ref(),
                    self.backends(&disks)?,
                )?
            }
        };
        let image = Description {
            format: FORMAT,
            memory_bytes,
            disks: disks.iter().map(disks::describe).collect(),
            cpus: source.cpus,
            cpu_model: source.cpu_model.clone(),
            base: None,
        };
        Ok(Vm {
            machine,
            image,
            disks,
            origin: None,
            held: None,
            arrival: None,
            memory: None,
        })
    }

    fn restore(&self, dir: &Path, base: Option<&str>) -> Result<Vm, Failure> {
        self.step.set(format!("the image {}", dir.display()));
        let held = Some(Hold::shared(dir)?);
        let image = Image::open(dir)?;
        let layout = RamLayout::new(image.description.memory_bytes)?;
        let memory = MemoryFile::of(&image)?;
        let ram = Ram::from_image(&layout, &memory.file)?;
        crash::set_memory_file(ram.slots(), &memory.path);
        let disks = self.disks_over(image.disks()?, &image.description)?;
        let state = image.state()?;
        nets::check_saved(&self.spec.nets, &state)?;
        let machine = Machine::restore(&state, ram, self.backends(&disks)?)?;
        let mut description = image.description.clone();
        let origin = match (base, &image.description.base) {
            (Some(id), _) => Some(self.origin(id.parse()?, true)?),
            // A base VM that is gone from the store is missed when an overlay is asked for.
            (None, Some(id)) => self.origin(id.parse()?, false).ok(),
            (None, None) => None,
        };
        if let Some(id) = base {
            description.base = Some(id.to_owned());
        }
        Ok(Vm {
            machine,
            image: description,
            disks,
            origin,
            held,
            arrival: None,
            memory: Some(memory),
        })
    }

    /// The base VM with this id, held for as long as this process lives.
    fn origin(&self, id: BaseId, is_mapped: bool) -> Result<Origin, Failure> {
        let base = Store::open(self.spec.store.clone()).get(id)?;
        Ok(Origin {
            _hold: Hold::shared(&base.dir)?,
            base,
            is_mapped,
        })
    }

    fn disks_over(&self, files: Vec<File>, described: &Description) -> Result<Vec<Disk>, Failure> {
        files
            .into_iter()
            .zip(&described.disks)
            .map(|(file, disk)| {
                if disk.read_only {
                    Ok(Disk::read_only(file)?)
                } else {
                    disks::temporary(Some(file), disk.bytes, &self.spec.scratch)
                }
            })
            .collect()
    }

    fn synthesise(&self, source: &OverlaySource) -> Result<Vm, Failure> {
        // Threads of the transfer report to a machine that is built only when its head is here.
        let handle: Arc<OnceLock<MachineHandle>> = Arc::default();
        let location: Location = source.location.parse()?;
        self.step.set(format!("the overlay {location}"));
        let remote = open_remote(source, &location, &handle)?;
        let Opened {
            head,
            stream,
            demand,
        } = Head::read(&remote, source.expect.as_deref())
            .map_err(|error| remote.explain(chain(&error)))?;
        nets::check_saved(&self.spec.nets, &head.state)?;
        let origin = self.origin(head.prefix.base(), true).map_err(|error| {
            format!(
                "the overlay needs a base VM that is not here: {}",
                chain(error.as_ref())
            )
        })?;
        self.step.set("the files of the base VM");
        let base_image = origin.base.image()?;
        check_sizes(&head.index, &base_image.spaces())?;
        let layout = RamLayout::new(head.meta.image.memory_bytes)?;
        let (delta, zero) = head.memory_runs();
        let memory = MemoryFile::of(&base_image)?;
        let (ram, placer) = Ram::with_delta(&layout, Some(&memory.file), &delta, &zero)?;
        crash::set_memory_file(ram.slots(), &memory.path);
        let disks = self.disks_over(base_image.disks()?, &head.meta.image)?;
        let target = Target {
            index: head.index,
            placer: Some(placer.clone()),
            disks: disks.clone(),
            base: ImagePages::open(&base_image)?,
            disks_only: source.record,
        };
        let notify = supervise::notify(Arc::clone(&handle), self.report.try_clone()?);
        let total_len = head.prefix.total_bytes();
        let arrival = Arrival::new(target, remote, total_len, source.record, notify);
        set_pending(&arrival);
        arrival.target().apply_derived_blocks()?;
        let direct = source.rate_mbit.is_none() && matches!(location, Location::File(_));
        let pager = self.pager(&arrival, &placer, direct)?;
        let threads = arrival.start(stream, demand, self.hook)?;
        let machine = Machine::restore(&head.state, ram, self.backends(&disks)?)?;
        let _ = handle.set(machine.handle());
        let incoming = Incoming {
            arrival,
            early_start: source.early_start,
            id: head.prefix.id().to_string(),
            pager: Some(pager),
            placer: Some(placer),
            _threads: threads,
        };
        let mut description = head.meta.image;
        description.base = Some(origin.base.id.to_string());
        Ok(Vm {
            machine,
            image: description,
            disks,
            origin: Some(origin),
            held: None,
            arrival: Some(incoming),
            memory: Some(memory),
        })
    }

    fn pager(
        &self,
        arrival: &Arc<Arrival>,
        placer: &Placer,
        direct: bool,
    ) -> Result<Pager, Failure> {
        let source = Arc::new(DeltaSource::new(Arc::clone(arrival), direct));
        let (hook, failed) = (Arc::clone(self.hook), Arc::clone(arrival));
        let hooks = PagerHooks {
            on_start: Box::new(move || hook(ThreadKind::Pager)),
            on_error: Box::new(move |error| failed.fail(chain(&error))),
            record: arrival.is_recording(),
        };
        Ok(Pager::spawn(placer.clone(), source, hooks)?)
    }
}

/// Where the overlay's bytes are.
fn open_remote(
    source: &OverlaySource,
    location: &Location,
    handle: &Arc<OnceLock<MachineHandle>>,
) -> Result<Remote, Failure> {
    let rate = source.rate_mbit.map(Rate::from_mbit).transpose()?;
    let options = fetch::Options {
        ca: source.ca.clone(),
        stall_timeout: Duration::from_secs_f64(source.stall_secs),
        on_trouble: Some(supervise::on_trouble(Arc::clone(handle))),
        ..fetch::Options::default()
    };
    Ok(Remote::open(location, options, &Link::new(rate))?)
}

/// Tells each disk which of its blocks are still on their way.
fn set_pending(arrival: &Arc<Arrival>) {
    for (number, disk) in (0..).zip(&arrival.target().disks) {
        let runs = arrival.target().index.runs_in(Space::Disk(number)).iter();
        let runs: Vec<_> = runs.map(|run| (run.first.page, run.pages)).collect();
        let demand = Arc::clone(arrival);
        let demand = move |block: BlockNumber| demand.demand_block(number, block.0);
        disk.set_pending(PendingBlocks::new(disk.blocks(), runs, Box::new(demand)));
    }
}
