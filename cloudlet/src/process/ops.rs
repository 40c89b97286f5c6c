//! The control thread's main loop: turns of the machine, and between them what clients ask for.
//! A request that needs all of an overlay waits until it has arrived.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cloudlet_vmm::devices::disk::Disk;
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::footprint;
use cloudlet_vmm::machine::Machine;
use cloudlet_vmm::memory::PAGE_BYTES;
use serde_json::{Value, json};

use super::build::{About, Incoming as Overlay, MemoryFile};
use super::console::Console;
use super::faults::Faults;
use super::renewal::Renewal;
use super::server::{ClientId, ControlServer, Incoming};
use super::watch::{Ending, Watch};
use super::{Failure, balloon, lock, nets, save, say};
use crate::control::{Reply, Request};
use crate::launch::Event;
use crate::synthesis::chain;

/// How long clients of the console may take to read the guest's last words.
const LAST_WORDS_MAX: Duration = Duration::from_secs(5);
/// How often those who wait for an overlay hear of its progress.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

/// The control thread's state beside the machine.
pub(super) struct Ops {
    about: About,
    console: Arc<Mutex<Console>>,
    server: Arc<Mutex<ControlServer>>,
    watch: Arc<Mutex<Watch>>,
    overlay: Option<Overlay>,
    /// That of a guest which was restored.
    renewal: Option<Renewal>,
    started: Instant,
    /// Whether somebody has asked for a pause.
    paused: bool,
    leases: HashSet<ClientId>,
    waiting: Vec<(ClientId, Request)>,
    /// Who is to hear of a pause.
    watching: Vec<ClientId>,
    faults: Faults,
    stop: bool,
}

impl Ops {
    pub(super) fn new(
        about: About,
        console: Arc<Mutex<Console>>,
        server: Arc<Mutex<ControlServer>>,
        watch: Arc<Mutex<Watch>>,
        overlay: Option<Overlay>,
        renewal: Option<Renewal>,
    ) -> Self {
        let (leases, waiting, watching) = (HashSet::new(), Vec::new(), Vec::new());
        let (started, paused, stop) = (Instant::now(), false, false);
        Self {
            about,
            console,
            server,
            watch,
            overlay,
            renewal,
            started,
            paused,
            leases,
            waiting,
            watching,
            faults: Faults::default(),
            stop,
        }
    }

    /// Lets the VM run (unless it is to begin `paused`) and serves it until its end.
    pub(super) fn serve(
        &mut self,
        machine: &mut Machine,
        paused: bool,
    ) -> Result<ExitReason, Failure> {
        let is_whole_first = self
            .overlay
            .as_ref()
            .is_some_and(|overlay| !overlay.early_start);
        if is_whole_first && let Some(reason) = self.await_overlay(machine)? {
            return Ok(reason);
        }
        self.paused = paused;
        self.renew(machine)?;
        if !paused {
            machine.resume()?;
        }
        lock(&self.watch).set_ready();
        say(&Event::Ready);
        footprint::release_start_code();
        loop {
            if let Some(reason) = self.turn(machine)? {
                return Ok(reason);
            }
        }
    }

    /// Turns until the overlay has arrived; a reason if the VM ended before.
    fn await_overlay(&mut self, machine: &mut Machine) -> Result<Option<ExitReason>, Failure> {
        while !self.is_complete() {
            if let Some(reason) = self.turn_for(machine, Some(PROGRESS_PERIOD))? {
                if let ExitReason::HostError { message } = &reason {
                    say(&Event::Failed {
                        message: message.clone(),
                    });
                }
                return Ok(Some(reason));
            }
            let (done, total) = self.progress();
            say(&Event::Progress {
                step: "overlay".into(),
                done,
                total,
            });
        }
        Ok(None)
    }

    fn turn(&mut self, machine: &mut Machine) -> Result<Option<ExitReason>, Failure> {
        let progress = (!self.waiting.is_empty()).then_some(PROGRESS_PERIOD);
        let retry = self.renewal.as_ref().and_then(Renewal::patience);
        let exit = self.turn_for(machine, progress.into_iter().chain(retry).min())?;
        if exit.is_none() {
            self.renew(machine)?;
        }
        Ok(exit)
    }

    fn renew(&mut self, machine: &mut Machine) -> Result<(), Failure> {
        match &mut self.renewal {
            Some(renewal) => renewal.turn(machine),
            None => Ok(()),
        }
    }

    fn turn_for(
        &mut self,
        machine: &mut Machine,
        timeout: Option<Duration>,
    ) -> Result<Option<ExitReason>, Failure> {
        let exit = machine.turn(timeout)?;
        self.faults.look(machine, &self.about.disks);
        let input = lock(&self.console).take_input();
        if !input.is_empty() {
            // What the guest's receiver has no room for is lost, as on a real line.
            machine.serial().input(&input);
        }
        loop {
            let incoming = lock(&self.server).take();
            match incoming {
                Some(Incoming::Request(client, request)) => self.answer(machine, client, request),
                Some(Incoming::Gone(client)) => self.forget(machine, client)?,
                None => break,
            }
        }
        self.serve_waiting(machine);
        if self.stop {
            return Ok(Some(ExitReason::Stopped));
        }
        let ending = lock(&self.watch).ending();
        Ok(ending.map(Watch::reason).or(exit))
    }

    /// Whether the parent that the VM was to live with is gone; nobody else looks after what it
    /// leaves.
    pub(super) fn is_orphan(&self) -> bool {
        lock(&self.watch).ending() == Some(Ending::ParentGone)
    }

    fn is_complete(&self) -> bool {
        self.overlay
            .as_ref()
            .is_none_or(|overlay| overlay.arrival.stats().complete)
    }

    fn progress(&self) -> (u64, u64) {
        let stats = self.overlay.as_ref().map(|overlay| overlay.arrival.stats());
        stats.map_or((0, 0), |stats| {
            (stats.stream_bytes + stats.demand_bytes, stats.total_bytes)
        })
    }

    /// A client is gone: what it had on lease ends.
    fn forget(&mut self, machine: &mut Machine, client: ClientId) -> Result<(), Failure> {
        self.waiting.retain(|(waiting, _)| *waiting != client);
        self.watching.retain(|watching| *watching != client);
        if self.leases.remove(&client) && self.leases.is_empty() && !self.paused {
            machine.resume()?;
        }
        Ok(())
    }

    fn serve_waiting(&mut self, machine: &mut Machine) {
        if self.is_complete() {
            for (client, request) in std::mem::take(&mut self.waiting) {
                self.answer(machine, client, request);
            }
            return;
        }
        let (done, total) = self.progress();
        for (client, _) in &self.waiting {
            let progress = Reply::Progress {
                step: "overlay".into(),
                done,
                total,
            };
            lock(&self.server).reply(*client, &progress);
        }
    }

    fn answer(&mut self, machine: &mut Machine, client: ClientId, request: Request) {
        let needs_all = matches!(
            request,
            Request::Snapshot { .. } | Request::Overlay { .. } | Request::WaitComplete
        );
        if needs_all && !self.is_complete() {
            self.waiting.push((client, request));
            return;
        }
        if request == Request::AwaitPause && !self.paused {
            self.watching.push(client);
            return;
        }
        let reply = match self.carry_out(machine, client, request) {
            Ok(result) => Reply::Done { result },
            Err(error) => Reply::Failed {
                message: chain(error.as_ref()),
            },
        };
        lock(&self.server).reply(client, &reply);
    }

    fn carry_out(
        &mut self,
        machine: &mut Machine,
        client: ClientId,
        request: Request,
    ) -> Result<Value, Failure> {
        let server = Arc::clone(&self.server);
        let mut progress = |step: &str, done, total| {
            lock(&server).reply(
                client,
                &Reply::Progress {
                    step: step.to_owned(),
                    done,
                    total,
                },
            );
        };
        match request {
            Request::Status => return Ok(self.status(machine)),
            Request::Pause { lease: true } => {
                balloon::pause(machine)?;
                self.leases.insert(client);
            }
            Request::Pause { lease: false } => {
                machine.pause()?;
                self.paused = true;
                for watching in std::mem::take(&mut self.watching) {
                    let result = json!({ "name": self.about.name });
                    lock(&self.server).reply(watching, &Reply::Done { result });
                }
            }
            Request::Resume => {
                self.paused = false;
                self.leases.clear();
                machine.resume()?;
            }
            Request::PowerButton => {
                if !machine.is_running() {
                    return Err("the VM is paused: its guest cannot shut down".into());
                }
                machine.press_power_button()?;
            }
            Request::Stop => self.stop = true,
            Request::Snapshot { dir } => {
                let about = &self.about;
                return balloon::held(machine, |machine| {
                    save::image(machine, about, &dir, &mut progress)
                });
            }
            Request::Overlay { out, early, level } => {
                let about = &self.about;
                return balloon::held(machine, |machine| {
                    save::overlay(machine, about, &out, &early, level, &mut progress)
                });
            }
            Request::FirstTouch => {
                let touched = self
                    .overlay
                    .as_ref()
                    .and_then(|overlay| overlay.arrival.touched());
                return match touched {
                    Some(pages) => Ok(json!({ "pages": pages })),
                    None => Err("this VM does not record the order of touch".into()),
                };
            }
            Request::Balloon { target_mib } => return balloon::serve(machine, target_mib),
            Request::WaitComplete | Request::AwaitPause => {}
        }
        Ok(json!({ "name": self.about.name }))
    }

    fn status(&self, machine: &Machine) -> Value {
        let about = &self.about;
        let mut status = json!({
            "name": about.name,
            "state": machine.phase_name(),
            "pid": std::process::id(),
            "cpus": about.image.cpus,
            "memory_mib": about.image.memory_bytes >> 20,
            "cpu_model": about.image.cpu_model,
            "boot": machine.config().boot_protocol.name(),
            "discovery": machine.config().discovery.name(),
            "disks": about.image.disks.len(),
            "base": about.image.base,
            "vsock": about.vsock,
            "vsock_driver": machine.has_vsock_driver(),
            "uptime_ms": u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        if !machine.is_running() {
            // Who lets it run again.
            status["paused_by"] = json!(match (self.paused, self.leases.is_empty()) {
                (true, _) => "request",
                (false, false) => "lease",
                (false, true) => "transfer",
            });
        }
        if let Some(handle) = machine.balloon() {
            let pages = about.image.memory_bytes / PAGE_BYTES;
            status["balloon"] = balloon::describe(handle, pages);
        }
        self.faults.add_to(&mut status, &about.disks);
        for (card, said) in nets::status(machine) {
            status[card] = said;
        }
        if let Some(renewal) = &self.renewal {
            status["renewal"] = renewal.describe();
        }
        if let Some(overlay) = &self.overlay {
            status["synthesis"] = overlay.status();
        }
        status
    }

    /// A reason that follows from a memory file that was cut names the file.
    fn explain(&self, reason: ExitReason) -> ExitReason {
        let memory = self.about.memory.as_ref();
        match memory.and_then(MemoryFile::fault) {
            Some(message) if reason.code() != 0 => ExitReason::HostError {
                message: format!("{message}: {reason}"),
            },
            _ => reason,
        }
    }

    /// The VM's last words and the end of its threads. Disks that outlast the VM are flushed; one
    /// that cannot be is a reason of its own.
    pub(super) fn end(&mut self, machine: &mut Machine, reason: ExitReason) -> ExitReason {
        if let Some(overlay) = &self.overlay {
            overlay.arrival.cancel();
        }
        // The guest stands still before its last words are passed on; one that cannot any more
        // has none.
        machine.handle().end(reason.clone());
        let _ = machine.turn(Some(Duration::ZERO));
        lock(&self.console).finish(Duration::ZERO);
        let finished: Vec<_> = self.about.disks.iter().map(Disk::finish).collect();
        let reason = match finished.into_iter().collect::<Result<(), _>>() {
            Err(error) if reason.is_orderly() => ExitReason::host_error(&error),
            _ => self.explain(reason),
        };
        for (client, _) in std::mem::take(&mut self.waiting) {
            let message = format!("the VM has ended: {reason}");
            lock(&self.server).reply(client, &Reply::Failed { message });
        }
        reason
    }

    /// Has the clients of the console read what the guest said before its end, for some time at the
    /// most.
    pub(super) fn take_leave(&mut self) {
        lock(&self.console).finish(LAST_WORDS_MAX);
    }
}
