//! The thread of a vCPU: a small state machine that its owner moves by commands.
//!
//! ```text
//!            Resume                 the guest ends
//!   paused ---------> running ---------------------> ended
//!      ^                 |                              |
//!      +------ Pause ----+          (Pause is answered, |
//!      |                             nothing else)      |
//!      +--- Stop ---> thread ends <----------- Stop ----+
//! ```
//!
//! Every command but Resume and Stop is answered, and answers carry the number of their command: whoever gave up on one
//! does not take it for the answer to the next. A thread that says "paused" has left the guest and has finished
//! the I/O that the guest was in the middle of, so its state can be saved; saving happens on this
//! thread too.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::Killable;

use super::CpuError;
use super::kick::{KickFlag, install_handler, kick_signal};
use super::run::{Step, Surroundings, step};
use super::state::{VcpuCaps, VcpuState};
use super::tsc::Frequency;
use crate::bus::Bus;
use crate::exit::ExitReason;
use crate::machine::GenerationId;
use crate::memory::GuestRam;
use crate::threads::{ThreadHook, ThreadKind};

/// How long an answer is waited for. A vCPU leaves the guest within microseconds; it takes longer
/// only where it waits for a page of memory that has yet to arrive.
pub const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How often a vCPU may be entered to finish one instruction's I/O. The longest honest case is a
/// string instruction over a page; a guest that goes on beyond this is ended.
const FINISH_ENTRIES_MAX: u32 = 8192;

/// Tells the machine that a vCPU is at its end.
pub type OnEnd = Arc<dyn Fn(ExitReason) + Send + Sync>;

enum Command {
    Pause,
    Resume,
    Save,
    Stop,
}

enum Answer {
    Started,
    StartFailed(CpuError),
    Paused,
    Ended,
    Saved(Box<Result<VcpuState, CpuError>>),
}

/// A vCPU that has no thread yet.
pub struct Vcpu {
    /// Its number, which is its APIC id too.
    pub id: u8,
    /// KVM's side of it.
    pub fd: VcpuFd,
    /// What the guest was told.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// How fast its time stamp counter runs.
    pub tsc: Frequency,
}

/// What all vCPUs of a machine share.
#[derive(Clone)]
pub struct Shared {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Guest memory, kept mapped by every vCPU thread.
    pub guest: Arc<GuestRam>,
    /// Memory beside guest RAM, kept mapped likewise.
    pub generation: Option<GenerationId>,
    /// What saving needs to know of KVM.
    pub caps: Arc<VcpuCaps>,
    /// Called on the vCPU's thread when the guest ends.
    pub on_end: OnEnd,
    /// The guest has (or may have) kvmclock, so KVM is told of pauses.
    pub kvmclock_ctrl: bool,
}

/// The owner's end of a vCPU thread.
pub struct VcpuThread {
    id: u8,
    commands: Sender<(u64, Command)>,
    answers: Receiver<(u64, Answer)>,
    /// Number of the last command.
    last: Cell<u64>,
    /// It has said that it is paused and was not asked to run since.
    is_paused: Cell<bool>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Start the thread, paused. `hook` has run on it when this returns.
    ///
    /// # Errors
    /// The thread cannot be started, or its hook failed.
    pub fn spawn(vcpu: Vcpu, shared: Shared, hook: &ThreadHook) -> Result<VcpuThread, CpuError> {
        install_handler().map_err(CpuError::Signal)?;
        let (commands, from_owner) = channel();
        let (to_owner, answers) = channel();
        let id = vcpu.id;
        let hook = hook.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                if let Err(source) = hook(ThreadKind::Vcpu) {
                    let failed = CpuError::Hook { cpu: id, source };
                    // The owner is gone if this is not received; so is the need for the thread.
                    let _ = to_owner.send((0, Answer::StartFailed(failed)));
                    return;
                }
                Runner::run(vcpu, shared, &from_owner, &to_owner);
            })
            .map_err(|source| CpuError::Spawn { cpu: id, source })?;
        let mut this = VcpuThread {
            id,
            commands,
            answers,
            last: Cell::new(0),
            is_paused: Cell::new(true),
            thread: Some(thread),
        };
        match this.answer(ANSWER_MAX)? {
            Answer::Started => Ok(this),
            Answer::StartFailed(error) => {
                this.join();
                Err(error)
            }
            _ => Err(CpuError::Gone(id)),
        }
    }

    /// Ask the vCPU to pause; [`VcpuThread::paused`] waits for it. Two steps, so that all vCPUs
    /// are asked before the first is waited for.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn ask_pause(&self) -> Result<(), CpuError> {
        self.is_paused.set(false);
        self.send(Command::Pause)
    }

    /// Wait until the vCPU has paused. A vCPU at its end counts as paused.
    ///
    /// # Errors
    /// It does not answer within `patience`, or is gone.
    pub fn paused(&self, patience: Duration) -> Result<(), CpuError> {
        if self.is_paused.get() {
            return Ok(());
        }
        match self.answer(patience)? {
            Answer::Paused | Answer::Ended => {
                self.is_paused.set(true);
                Ok(())
            }
            _ => Err(CpuError::Gone(self.id)),
        }
    }

    /// Let a paused vCPU run, or one that has been asked to pause and has not yet done so. This
    /// does not wait. One at its end stays there: why it ended has been told to
    /// [`Shared::on_end`].
    ///
    /// # Errors
    /// The thread is gone.
    pub fn resume(&self) -> Result<(), CpuError> {
        self.is_paused.set(false);
        self.send(Command::Resume)
    }

    /// Ask a paused vCPU for its state; [`VcpuThread::saved`] waits for it.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn ask_save(&self) -> Result<(), CpuError> {
        self.send(Command::Save)
    }

    /// The state that was asked for.
    ///
    /// # Errors
    /// KVM refuses it, or the vCPU is at its end.
    pub fn saved(&self) -> Result<VcpuState, CpuError> {
        match self.answer(ANSWER_MAX)? {
            Answer::Saved(state) => *state,
            _ => Err(CpuError::Gone(self.id)),
        }
    }

    /// End the thread and wait for it, at most `patience`. Returns whether it ended: one that
    /// waits in the kernel for a page of memory that will never come does not, and is left behind
    /// with its own hold on guest memory.
    pub fn stop(&mut self, patience: Duration) -> bool {
        // An error means that the thread has ended already.
        let _ = self.send(Command::Stop);
        loop {
            match self.answers.recv_timeout(patience) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
        self.join();
        true
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed by it; there is nothing to add here.
            let _ = thread.join();
        }
    }

    fn send(&self, command: Command) -> Result<(), CpuError> {
        let number = self.last.get() + 1;
        self.last.set(number);
        self.commands
            .send((number, command))
            .map_err(|_| CpuError::Gone(self.id))?;
        if let Some(thread) = &self.thread {
            // The handle is not joined, so the thread's id is still its own. Only a thread that
            // has just ended cannot be signalled, and that one answers nothing either.
            let _ = thread.kill(kick_signal());
        }
        Ok(())
    }

    /// The answer to the last command.
    fn answer(&self, patience: Duration) -> Result<Answer, CpuError> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left) {
                Ok((number, answer)) if number == self.last.get() => return Ok(answer),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(CpuError::Unresponsive {
                        cpu: self.id,
                        waited: patience,
                    });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(CpuError::Gone(self.id)),
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Paused,
    Running,
    Ended,
}

/// The thread's own side.
struct Runner<'a> {
    // Dropped before `vcpu`, as the order of fields has it.
    kick: KickFlag,
    vcpu: Box<Vcpu>,
    around: Surroundings,
    shared: Shared,
    answers: &'a Sender<(u64, Answer)>,
    state: State,
}

impl Runner<'_> {
    fn run(
        vcpu: Vcpu,
        shared: Shared,
        commands: &Receiver<(u64, Command)>,
        answers: &Sender<(u64, Answer)>,
    ) {
        let mut vcpu = Box::new(vcpu);
        // SAFETY: the flag and the vCPU go into the same `Runner`, which stays on this thread and
        // drops the flag first.
        let kick = unsafe { KickFlag::install(&mut vcpu.fd) };
        let around = Surroundings {
            ports: shared.ports.clone(),
            mmio: shared.mmio.clone(),
            guest: shared.guest.clone(),
        };
        let mut runner = Runner {
            kick,
            vcpu,
            around,
            shared,
            answers,
            state: State::Paused,
        };
        runner.say(0, Answer::Started);
        loop {
            if runner.state != State::Running {
                match commands.recv() {
                    Ok((number, command)) if runner.obey(number, &command) => {}
                    _ => return,
                }
                continue;
            }
            runner.kick.clear();
            match commands.try_recv() {
                Ok((number, command)) if runner.obey(number, &command) => {}
                Ok(_) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {
                    if let Step::End(reason) = runner.step() {
                        runner.end(reason);
                    }
                }
            }
        }
    }

    fn step(&mut self) -> Step {
        step(&mut self.vcpu.fd, self.vcpu.id, &self.around)
    }

    /// Returns whether the thread goes on.
    fn obey(&mut self, number: u64, command: &Command) -> bool {
        match command {
            Command::Stop => return false,
            Command::Pause => {
                if self.state == State::Running {
                    self.finish_io();
                }
                let ended = self.state == State::Ended;
                let answer = if ended { Answer::Ended } else { Answer::Paused };
                self.say(number, answer);
            }
            Command::Resume => {
                if self.state == State::Paused {
                    self.state = State::Running;
                }
            }
            Command::Save => {
                let saved = self.save();
                self.say(number, Answer::Saved(Box::new(saved)));
            }
        }
        true
    }

    /// Leave the running state with no instruction half done: KVM finishes the I/O that the last
    /// exit was for when it is entered again, and `immediate_exit` makes it return right after.
    fn finish_io(&mut self) {
        for _ in 0..FINISH_ENTRIES_MAX {
            self.kick.set();
            match self.step() {
                Step::Interrupted => {
                    self.state = State::Paused;
                    return self.tell_kvmclock();
                }
                Step::Continue => {}
                Step::End(reason) => return self.end(reason),
            }
        }
        self.end(ExitReason::HostError {
            message: format!(
                "vCPU {} did not finish its I/O within {FINISH_ENTRIES_MAX} entries",
                self.vcpu.id
            ),
        });
    }

    /// Tell the guest's kvmclock that it was paused, so that its watchdogs do not bark.
    fn tell_kvmclock(&mut self) {
        if !self.shared.kvmclock_ctrl {
            return;
        }
        match self.vcpu.fd.kvmclock_ctrl() {
            Ok(()) => {}
            // Documented: the guest has not enabled kvmclock.
            Err(error) if error.errno() == libc::EINVAL => {}
            Err(error) => self.end(ExitReason::HostError {
                message: format!(
                    "KVM_KVMCLOCK_CTRL failed for vCPU {}: {error}",
                    self.vcpu.id
                ),
            }),
        }
    }

    fn save(&self) -> Result<VcpuState, CpuError> {
        let cpu = self.vcpu.id;
        match self.state {
            State::Paused => VcpuState::save(
                &self.vcpu.fd,
                cpu,
                &self.shared.caps,
                &self.vcpu.cpuid,
                self.vcpu.tsc,
            ),
            State::Running => Err(CpuError::WrongState {
                cpu,
                state: "running",
                wanted: "saved",
            }),
            State::Ended => Err(CpuError::WrongState {
                cpu,
                state: "at its end",
                wanted: "saved",
            }),
        }
    }

    fn end(&mut self, reason: ExitReason) {
        self.state = State::Ended;
        (self.shared.on_end)(reason);
    }

    fn say(&self, number: u64, answer: Answer) {
        // Nobody listens only once the owner is gone, and then the thread ends with its next
        // look at its channel.
        let _ = self.answers.send((number, answer));
    }
}
