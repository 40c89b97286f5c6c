//! The VMM process: one VM, its control socket, its console. It is told on standard input what to
//! be (`launch.rs`), owns everything of its VM, and depends on nobody afterwards.
//!
//! | file | what |
//! | --- | --- |
//! | `build.rs` | from a specification to a machine |
//! | `disks.rs` | the files behind disks |
//! | `faults.rs` | what went wrong in devices |
//! | `formats.rs` | disk images that are not read here |
//! | `image.rs` | disk images of other formats, read in a process of their own |
//! | `starting.rs` | the time before there is a VM |
//! | `watch.rs` | what ends a VM from outside |
//! | `server.rs` | the control socket |
//! | `console.rs` | the serial console |
//! | `nets.rs` | network cards: what is behind them |
//! | `ops.rs` | what is done about requests |
//! | `balloon.rs` | the memory balloon, and pauses without the guest's free pages |
//! | `renewal.rs` | a restored guest differs from its clones before anybody meets it |
//! | `save.rs` | images and overlays of the paused VM |
//! | `supervise.rs` | what other threads tell the control thread |

mod balloon;
mod build;
mod console;
mod disks;
mod faults;
mod formats;
pub mod image;
mod nets;
mod ops;
mod renewal;
mod save;
mod server;
mod starting;
mod supervise;
mod watch;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloudlet_vmm::crash;
use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::machine::Machine;
use cloudlet_vmm::seccomp;
use cloudlet_vmm::threads::{ThreadHook, ThreadKind, no_hook};
use event_manager::SubscriberOps;

use crate::launch::{Event, Spec};
use crate::registry::{VmDir, VmLock, VmName};
use crate::report;
use crate::synthesis::chain;
use build::Built;
use ops::Ops;
use renewal::Renewal;
use starting::Starting;

/// Longest specification read, in bytes.
const SPEC_LEN_MAX: u64 = 1 << 20;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs the process to its end; the exit code is that of the VM's end (`vmm/src/exit.rs`).
pub fn main() -> ! {
    match start() {
        Ok(process) => process.run(),
        Err(error) => {
            say(&Event::Failed {
                message: chain(error.as_ref()),
            });
            std::process::exit(1)
        }
    }
}

/// Tells the parent. One that is gone needs to know nothing.
fn say(event: &Event) {
    let mut line = serde_json::to_vec(event).expect("an event has string keys only");
    line.push(b'\n');
    let _ = io::stdout()
        .write_all(&line)
        .and_then(|()| io::stdout().flush());
}

fn read_spec() -> Result<Spec, Failure> {
    let mut line = String::new();
    // Not a buffered reader: what follows the line is the lifeline's.
    io::Read::take(io::stdin().lock(), SPEC_LEN_MAX).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Lets tools that list processes show `vm-NAME`, of which the kernel keeps 15 bytes.
fn name_process(vm: &str) {
    if let Ok(name) = CString::new(format!("vm-{vm}")) {
        // Without it the process goes by the name of the program's file.
        let _ = rustix::thread::set_name(&name);
    }
}

/// A process whose VM is built and does not run yet.
struct Process {
    spec: Spec,
    lock: Arc<VmLock>,
    report: File,
    machine: Machine,
    ops: Ops,
}

fn start() -> Result<Process, Failure> {
    let spec = read_spec()?;
    let dir = VmDir::new(&spec.vms, VmName::new(&spec.name)?);
    name_process(&spec.name);
    let lock = Arc::new(dir.claim()?);
    let report = File::create(dir.report())?;
    crash::prepare(report.try_clone()?.into())?;
    let hook = if spec.seccomp {
        confine(&report)?
    } else {
        no_hook()
    };
    let starting = Starting::begin(&spec, &dir, &lock, &hook)?;
    let Built {
        mut machine,
        console,
        arrival,
        about,
    } = build::build(&spec, &dir, &report, &hook, starting.step())?;
    let console = Arc::new(Mutex::new(console));
    machine.start(&hook)?;
    let (server, watch) = starting.finish()?;
    let events = machine.event_manager();
    events.add_subscriber(Box::new(Arc::clone(&console)));
    events.add_subscriber(Box::new(Arc::clone(&server)));
    events.add_subscriber(Box::new(Arc::clone(&watch)));
    hook(ThreadKind::Control)?;
    let renewal = Renewal::of(&machine);
    let ops = Ops::new(about, console, server, watch, arrival, renewal);
    Ok(Process {
        spec,
        lock,
        report,
        machine,
        ops,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // One thread at a time serves what is in them, and it does not outlive a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What installs the seccomp filters, with violations told to `report`.
fn confine(report: &File) -> Result<ThreadHook, Failure> {
    seccomp::prepare(report.try_clone()?.into())?;
    Ok(Arc::new(|kind| Ok(seccomp::install(kind)?)))
}

impl Process {
    fn run(mut self) -> ! {
        let reason = match self.ops.serve(&mut self.machine, self.spec.paused) {
            Ok(reason) => reason,
            Err(error) => ExitReason::host_error(error.as_ref()),
        };
        let reason = self.ops.end(&mut self.machine, reason);
        let forgotten = matches!(reason, ExitReason::Stopped | ExitReason::Shutdown);
        report::write(&self.report, &reason);
        self.ops.take_leave();
        if self.ops.is_orphan() || (forgotten && !self.spec.attached) {
            // What cannot be removed is cleared by the next VM of the name.
            let _ = self.lock.leave_nothing();
        }
        // Threads that wait for a page that will not come are not waited for.
        std::process::exit(i32::from(reason.code()));
    }
}
