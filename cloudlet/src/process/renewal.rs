//! A restored guest is another one than its clones before anybody meets it: the control thread has the
//! guest's agent renew the random numbers, and lets the world in only then (`vmm/src/machine/apart.rs`).
//! A guest that clearly has no agent is let in as it is, and `status` says so.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cloudlet_agent::connection::{self, Incoming};
use cloudlet_agent::protocol::{self, PORT, Reply, Request};
use cloudlet_vmm::machine::Machine;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use serde_json::{Value, json};

use super::Failure;
use crate::agent;

/// How long an agent that could not renew is left alone before it is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// Longest line by which a connection is accepted.
const LINE_MAX: usize = 32;

/// Who renewed the guest's random numbers, or why nobody did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Its agent.
    Agent,
    /// No agent listens. Left are the kernel, where it has a driver for the generation id, and programs
    /// that draw from the host.
    NoAgent,
    /// The guest has no vsock driver at work, so no agent that could be reached.
    NoDriver,
    /// Its agent is of the version before agents could.
    OldAgent(u32),
}

/// Where the renewal is.
enum State {
    /// The agent is to be called from then on.
    Due(Instant),
    /// It was called, and the event loop watches for its answer.
    Called(Call, SubscriberId),
    /// The guest may be met.
    Over(Outcome),
}

/// The renewal of a restored guest.
pub(super) struct Renewal {
    state: State,
    /// When the guest ran first.
    since: Option<Instant>,
    took: Option<Duration>,
    /// Why the last call came to nothing.
    trouble: Option<String>,
}

impl Renewal {
    /// For a machine that was restored; `None` for one that boots.
    pub(super) fn of(machine: &Machine) -> Option<Self> {
        machine.is_apart().then(|| Self {
            state: State::Due(Instant::now()),
            since: None,
            took: None,
            trouble: None,
        })
    }

    /// Goes on as far as the guest has. To be called after each turn of the machine, and before the
    /// first one in which the guest runs.
    pub(super) fn turn(&mut self, machine: &mut Machine) -> Result<(), Failure> {
        if matches!(self.state, State::Over(_)) {
            return Ok(());
        }
        if self.since.is_none() && machine.is_running() {
            self.since = Some(Instant::now());
        }
        match &mut self.state {
            State::Due(at) if *at <= Instant::now() => {
                if machine.has_vsock_driver() {
                    let mut call = Call::new(machine.call(PORT)?)?;
                    let watch = Box::new(Watch(call.stream().as_raw_fd()));
                    let watch = machine.event_manager().add_subscriber(watch);
                    self.state = State::Called(call, watch);
                } else {
                    self.end(machine, Outcome::NoDriver);
                }
            }
            State::Called(call, watch) => {
                let Some(answer) = call.answer() else {
                    return Ok(());
                };
                machine.event_manager().remove_subscriber(*watch)?;
                match answer {
                    Answer::Done => self.end(machine, Outcome::Agent),
                    Answer::Version(version) => self.end(machine, Outcome::OldAgent(version)),
                    Answer::Refused if machine.has_vsock_driver() => {
                        self.end(machine, Outcome::NoAgent);
                    }
                    Answer::Refused => self.end(machine, Outcome::NoDriver),
                    Answer::Failed(why) => {
                        self.trouble = Some(why);
                        self.state = State::Due(Instant::now() + RETRY_PAUSE);
                    }
                }
            }
            State::Due(_) | State::Over(_) => {}
        }
        Ok(())
    }

    fn end(&mut self, machine: &Machine, outcome: Outcome) {
        machine.let_in();
        self.state = State::Over(outcome);
        self.took = self.since.map(|since| since.elapsed());
    }

    /// How long a turn may wait for something to happen, if not for ever.
    pub(super) fn patience(&self) -> Option<Duration> {
        match &self.state {
            State::Due(at) => Some(at.saturating_duration_since(Instant::now())),
            State::Called(..) | State::Over(_) => None,
        }
    }

    /// For `status`.
    pub(super) fn describe(&self) -> Value {
        let ms = self.took.map(|took| took.as_secs_f64() * 1e3);
        let ms = ms.map(|ms| (ms * 10.0).round() / 10.0);
        match &self.state {
            State::Over(Outcome::Agent) => json!({ "state": "renewed", "ms": ms }),
            State::Over(Outcome::NoAgent) => json!({ "state": "no agent" }),
            State::Over(Outcome::NoDriver) => json!({ "state": "no vsock driver" }),
            State::Over(Outcome::OldAgent(version)) => {
                json!({ "state": "agent too old", "agent_version": version })
            }
            State::Due(_) | State::Called(..) => {
                json!({ "state": "waiting", "trouble": self.trouble })
            }
        }
    }
}

/// What a call came to.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// The guest has other random numbers than its clones.
    Done,
    /// Nobody listens.
    Refused,
    /// The agent is of this version.
    Version(u32),
    /// The agent could not, or went away.
    Failed(String),
}

/// A call to the agent.
struct Call {
    incoming: Incoming<UnixStream>,
    accepted: bool,
    line: Vec<u8>,
}

impl Call {
    /// Asks the agent at the other end of `stream`, once the guest has accepted the connection.
    fn new(mut stream: UnixStream) -> Result<Self, Failure> {
        let mut bytes = Vec::new();
        Request::Hello(agent::entropy()?).encode(&mut bytes)?;
        Request::Renew.encode(&mut bytes)?;
        // A fresh socket has room for it.
        stream.write_all(&bytes)?;
        Ok(Self {
            incoming: Incoming::new(stream),
            accepted: false,
            line: Vec::new(),
        })
    }

    fn stream(&mut self) -> &mut UnixStream {
        self.incoming.source()
    }

    /// What the agent has answered, if it has.
    fn answer(&mut self) -> Option<Answer> {
        match self.listen() {
            Ok(()) => Some(Answer::Done),
            Err(connection::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(_) if !self.accepted => Some(Answer::Refused),
            Err(connection::Error::Protocol(protocol::Error::Version(version))) => {
                Some(Answer::Version(version))
            }
            Err(error) => Some(Answer::Failed(crate::synthesis::chain(&error))),
        }
    }

    /// Reads on, up to the word that the guest has renewed.
    fn listen(&mut self) -> Result<(), connection::Error> {
        while !self.accepted {
            let mut byte = [0];
            if self.stream().read(&mut byte)? == 0 || self.line.len() == LINE_MAX {
                return Err(connection::Error::Ended);
            }
            self.line.extend(byte);
            self.accepted = byte == *b"\n";
        }
        loop {
            match self.incoming.reply()? {
                Reply::Hello => {}
                Reply::Done => return Ok(()),
                Reply::Error(why) => {
                    return Err(io::Error::other(agent::words(why)).into());
                }
                _ => return Err(io::Error::other("the agent answered out of turn").into()),
            }
        }
    }
}

/// Has the machine's turn end when the agent has said something. Who reads it is [`Call::answer`].
struct Watch(RawFd);

impl MutEventSubscriber for Watch {
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new_raw(self.0, EventSet::IN))
            .expect("a fresh descriptor can be watched");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a call makes of `said`, and of the end of the stream if that follows.
    fn heard(said: &[&[u8]], ends: bool) -> Option<Answer> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut call = Call::new(ours).unwrap();
        theirs.write_all(&said.concat()).unwrap();
        if ends {
            // What the call has said is read, so that the end is one and not a reset.
            let mut request = [0; 1024];
            assert!(theirs.read(&mut request).unwrap() > 32);
            drop(theirs);
        }
        call.answer()
    }

    #[test]
    fn only_the_agents_word_is_a_renewal() {
        let frame = |reply: Reply<'_>| {
            let mut bytes = Vec::new();
            reply.encode(&mut bytes).unwrap();
            bytes
        };
        let (hello, done) = (frame(Reply::Hello), frame(Reply::Done));
        let busy = frame(Reply::Error("busy\x1b"));
        let taken = frame(Reply::Taken(1));
        let ok = &b"OK 1024\n"[..];
        let old = &b"\x01\0\0\0\x0c\0\0\0CLDAGENT\x01\0\0\0"[..];
        assert_eq!(heard(&[ok, &hello, &done], false), Some(Answer::Done));
        // Not yet.
        for said in [
            &[][..],
            &[&ok[..3]],
            &[ok],
            &[ok, &hello],
            &[ok, &hello, &done[..7]],
        ] {
            assert_eq!(heard(said, false), None);
        }
        // Nobody there.
        assert_eq!(heard(&[], true), Some(Answer::Refused));
        assert_eq!(heard(&[&[b'x'; 64]], false), Some(Answer::Refused));
        assert_eq!(heard(&[ok, old], false), Some(Answer::Version(1)));
        // One that is there and has not done it.
        for (said, ends, why) in [
            (&[ok, &hello, &busy][..], false, "busy"),
            (&[ok, &hello, &taken], false, "out of turn"),
            (&[ok, b"\0\0\0\0\0\0\0\0"], false, "unknown kind"),
            (&[ok, &hello], true, "ended"),
        ] {
            let answer = heard(said, ends);
            assert!(
                matches!(&answer, Some(Answer::Failed(words)) if words.contains(why)),
                "{answer:?}"
            );
        }
    }
}
