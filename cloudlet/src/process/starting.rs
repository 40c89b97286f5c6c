//! The time before there is a VM. Files are opened and read then, and a file server that does not
//! answer holds the thread that does so for as long as it likes. So another thread serves the control
//! socket from the process' first instant, says what is waited for, watches whether the VM is still
//! wanted, and ends the process when it is not. What else is asked waits until the VM runs.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use cloudlet_vmm::threads::{ThreadHook, ThreadKind, take_signals};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use super::server::{ControlServer, Incoming};
use super::watch::{Ending, SIGNALS, Watch};
use super::{Failure, lock};
use crate::control::{Reply, Request};
use crate::launch::{Event, Spec};
use crate::registry::{VmDir, VmLock};

/// Requests that may wait for the VM.
const HELD_MAX: usize = 256;
/// The thread's name, which a report of its filter begins with.
const THREAD: &str = "control-start";

/// What the start is at, in words that follow "waiting for".
#[derive(Debug, Clone, Default)]
pub(super) struct Step(Arc<Mutex<String>>);

impl Step {
    /// The start is about to do something that may take its time.
    pub(super) fn set(&self, what: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = what.into();
    }

    fn get(&self) -> String {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// The thread that looks after the start.
pub(super) struct Starting {
    thread: JoinHandle<Result<(), Failure>>,
    over: Arc<Over>,
    server: Arc<Mutex<ControlServer>>,
    watch: Arc<Mutex<Watch>>,
    step: Step,
}

/// What the thread hands over when the VM is there.
pub(super) type Handover = (Arc<Mutex<ControlServer>>, Arc<Mutex<Watch>>);

impl Starting {
    /// Begins to serve the control socket in `dir`, under the control thread's policy.
    pub(super) fn begin(
        spec: &Spec,
        dir: &VmDir,
        name_lock: &Arc<VmLock>,
        hook: &ThreadHook,
    ) -> Result<Self, Failure> {
        let server = Arc::new(Mutex::new(ControlServer::new(&dir.control_socket())?));
        let watch = Watch::new(Arc::clone(name_lock), spec.attached)?;
        let watch = Arc::new(Mutex::new(watch));
        let over = Arc::new(Over::new()?);
        let step = Step::default();
        step.set("its console and log");
        let caretaker = Caretaker {
            about: json!({
                "name": spec.name,
                "state": "starting",
                "pid": std::process::id(),
                "vsock": spec.vsock,
            }),
            began: Instant::now(),
            name_lock: Arc::clone(name_lock),
            server: Arc::clone(&server),
            watch: Arc::clone(&watch),
            over: Arc::clone(&over),
            step: step.clone(),
            held: VecDeque::new(),
        };
        let hook = Arc::clone(hook);
        // This thread may come to wait where no signal wakes it.
        take_signals(&SIGNALS, false)?;
        let thread = std::thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || {
                take_signals(&SIGNALS, true)?;
                let events = caretaker.watch_all()?;
                hook(ThreadKind::Control)?;
                caretaker.serve(events)
            })?;
        Ok(Self {
            thread,
            over,
            server,
            watch,
            step,
        })
    }

    /// What the start is at, for status.
    pub(super) fn step(&self) -> Step {
        self.step.clone()
    }

    /// Ends the thread, and returns what it looked after.
    pub(super) fn finish(self) -> Result<Handover, Failure> {
        self.over.set()?;
        match self.thread.join() {
            Ok(served) => served?,
            Err(_) => return Err("the thread that serves the start has panicked".into()),
        }
        take_signals(&SIGNALS, true)?;
        Ok((self.server, self.watch))
    }
}

/// The word that the start is over.
struct Over {
    event: EventFd,
    is_over: AtomicBool,
}

impl Over {
    fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let is_over = AtomicBool::new(false);
        Ok(Self { event, is_over })
    }

    fn set(&self) -> io::Result<()> {
        self.is_over.store(true, Ordering::Release);
        self.event.write(1)
    }
}

/// Wakes the thread when the start is over.
struct Waker(Arc<Over>);

impl MutEventSubscriber for Waker {
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.0.event, EventSet::IN))
            .expect("a fresh descriptor can be watched");
    }
}

type Loop = EventManager<Box<dyn MutEventSubscriber>>;

/// The thread's own.
struct Caretaker {
    about: Value,
    began: Instant,
    name_lock: Arc<VmLock>,
    server: Arc<Mutex<ControlServer>>,
    watch: Arc<Mutex<Watch>>,
    over: Arc<Over>,
    step: Step,
    held: VecDeque<Incoming>,
}

impl Caretaker {
    fn watch_all(&self) -> Result<Loop, Failure> {
        let mut events = Loop::new()?;
        events.add_subscriber(Box::new(Arc::clone(&self.server)));
        events.add_subscriber(Box::new(Arc::clone(&self.watch)));
        events.add_subscriber(Box::new(Waker(Arc::clone(&self.over))));
        Ok(events)
    }

    fn serve(mut self, mut events: Loop) -> Result<(), Failure> {
        while !self.over.is_over.load(Ordering::Acquire) {
            events.run()?;
            self.answer();
            let ending = lock(&self.watch).ending();
            if let Some(ending) = ending {
                self.end(match ending {
                    Ending::ParentGone => "the command that started it is gone",
                    Ending::Signal => "a signal ended it",
                    Ending::DirGone => "its directory is gone",
                });
            }
        }
        lock(&self.server).put_back(self.held);
        Ok(())
    }

    fn answer(&mut self) {
        loop {
            let incoming = lock(&self.server).take();
            match incoming {
                None => return,
                Some(Incoming::Request(client, Request::Status)) => {
                    let result = self.status();
                    lock(&self.server).reply(client, &Reply::Done { result });
                }
                Some(Incoming::Request(client, Request::Stop)) => {
                    let result = self.status();
                    lock(&self.server).reply(client, &Reply::Done { result });
                    self.end("it was stopped");
                }
                Some(Incoming::Request(client, _)) if self.held.len() >= HELD_MAX => {
                    let message = format!("the VM still waits for {}", self.step.get());
                    lock(&self.server).reply(client, &Reply::Failed { message });
                }
                Some(later) => self.held.push_back(later),
            }
        }
    }

    fn status(&self) -> Value {
        let mut status = self.about.clone();
        status["waits_for"] = json!(self.step.get());
        let elapsed = self.began.elapsed().as_millis();
        status["uptime_ms"] = json!(u64::try_from(elapsed).unwrap_or(u64::MAX));
        status
    }

    /// Ends the process, whatever its other threads wait for.
    fn end(&self, why: &str) -> ! {
        let step = self.step.get();
        say_if_heard(&Event::Failed {
            message: format!("{why} before the VM ran; it waited for {step}"),
        });
        // What cannot be removed is cleared by the next VM of the name.
        let _ = self.name_lock.leave_nothing();
        let _ = self.name_lock.release();
        std::process::exit(1)
    }
}

/// Tells the parent what fits into its pipe. The thread that starts the VM may be waiting to say
/// something, so the standard library's lock is left alone.
fn say_if_heard(event: &Event) {
    let mut line = serde_json::to_vec(event).expect("an event has string keys only");
    line.push(b'\n');
    let stdout = rustix::stdio::stdout();
    if rustix::fs::fcntl_setfl(stdout, rustix::fs::OFlags::NONBLOCK).is_ok() {
        // A parent that is gone needs to know nothing.
        let _ = rustix::io::write(stdout, &line);
    }
}
