//! The serial console: what the guest writes goes into a bounded buffer on the vCPU's thread, and
//! from there, on the control thread, to the log file and to every attached client; what a client
//! types goes to the guest.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

/// Bytes the guest may be ahead of the control thread; what it writes beyond is dropped and
/// counted.
const BEHIND_LEN_MAX: usize = 1 << 20;
/// Bytes of past output that a client sees when it attaches.
const REPLAY_LEN_MAX: usize = 16 << 10;
/// Bytes the log file may take; output beyond goes to clients alone.
const LOG_LEN_MAX: u64 = 64 << 20;
/// Clients at once.
const CLIENTS_MAX: usize = 16;
/// Bytes read from a client at a time: one receive FIFO of a 16550A.
const INPUT_LEN: usize = 16;

#[derive(Default)]
struct Behind {
    bytes: VecDeque<u8>,
    dropped: u64,
}

/// The guest's end: what the serial port writes into.
#[derive(Clone)]
pub(super) struct ConsoleOut {
    behind: Arc<Mutex<Behind>>,
    wake: Arc<EventFd>,
}

impl ConsoleOut {
    fn lock(&self) -> MutexGuard<'_, Behind> {
        // Bytes in a queue are never half-written, whoever panicked.
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> (Vec<u8>, u64) {
        let mut behind = self.lock();
        let dropped = std::mem::take(&mut behind.dropped);
        (behind.bytes.drain(..).collect(), dropped)
    }
}

impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut behind = self.lock();
        let was_empty = behind.bytes.is_empty();
        let room = BEHIND_LEN_MAX - behind.bytes.len();
        let kept = bytes.len().min(room);
        behind.bytes.extend(&bytes[..kept]);
        behind.dropped += (bytes.len() - kept) as u64;
        drop(behind);
        if was_empty {
            self.wake.write(1)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The host's end, on the control thread.
pub(super) struct Console {
    out: ConsoleOut,
    log: File,
    log_len: u64,
    replay: VecDeque<u8>,
    listener: UnixListener,
    clients: HashMap<RawFd, UnixStream>,
    input: Vec<u8>,
}

impl Console {
    /// A console with its log at `log` and its clients at the socket `socket`.
    pub(super) fn new(log: &Path, socket: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok(Self {
            out: ConsoleOut {
                behind: Arc::default(),
                wake,
            },
            log: File::create(log)?,
            log_len: 0,
            replay: VecDeque::new(),
            listener,
            clients: HashMap::new(),
            input: Vec::new(),
        })
    }

    /// What the serial port is to write into.
    #[must_use]
    pub(super) fn out(&self) -> ConsoleOut {
        self.out.clone()
    }

    /// What clients typed since the last call.
    pub(super) fn take_input(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.input)
    }

    /// Passes on what the guest has written so far.
    pub(super) fn drain(&mut self) {
        let (mut bytes, dropped) = self.out.take();
        if dropped > 0 {
            let note = format!("\n[cloudlet: {dropped} bytes of console output dropped]\n");
            bytes.extend_from_slice(note.as_bytes());
        }
        if bytes.is_empty() {
            return;
        }
        self.write_log(&bytes);
        self.replay.extend(&bytes);
        let excess = self.replay.len().saturating_sub(REPLAY_LEN_MAX);
        self.replay.drain(..excess);
        for client in self.clients.values_mut() {
            if client.write_all(&bytes).is_err() {
                // A client that does not keep up is let go (the guest waits for nobody): its end
                // of file comes round as an event, where it is removed.
                let _ = client.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// The log is a convenience: a full disk must not end a VM, so what cannot be written is left.
    fn write_log(&mut self, bytes: &[u8]) {
        let length = bytes.len() as u64;
        if self.log_len + length <= LOG_LEN_MAX && self.log.write_all(bytes).is_ok() {
            self.log_len += length;
        }
    }

    fn accept(&mut self, ops: &mut EventOps) -> io::Result<()> {
        let (mut client, _) = self.listener.accept()?;
        if self.clients.len() >= CLIENTS_MAX {
            return Ok(());
        }
        client.set_nonblocking(true)?;
        let (front, back) = self.replay.as_slices();
        let shown = client
            .write_all(front)
            .and_then(|()| client.write_all(back));
        if shown.is_err() {
            // It may be gone already, or not keep up. What it typed before counts all the same, and
            // behind that is its end of file.
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
        let fd = client.as_raw_fd();
        if ops.add(Events::new(&client, EventSet::IN)).is_ok() {
            self.clients.insert(fd, client);
        }
        Ok(())
    }

    fn read_client(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        let mut bytes = [0; INPUT_LEN];
        match client.read(&mut bytes) {
            Ok(length) if length > 0 => self.input.extend_from_slice(&bytes[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => {
                if let Some(client) = self.clients.remove(&fd) {
                    ops.remove(Events::empty(&client))
                        .expect("a watched descriptor is known");
                }
            }
        }
    }
}

impl MutEventSubscriber for Console {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.out.wake.as_raw_fd() {
            // A spurious wake-up finds the counter at zero; there is nothing to lose.
            let _ = self.out.wake.read();
            self.drain();
        } else if fd == self.listener.as_raw_fd() {
            // There may be none after all, or no descriptor for it: nobody's loss.
            let _ = self.accept(ops);
        } else {
            self.read_client(fd, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.out.wake.as_raw_fd(), self.listener.as_raw_fd()] {
            ops.add(Events::new_raw(fd, EventSet::IN))
                .expect("a fresh descriptor can be watched");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use event_manager::{EventManager, SubscriberOps};

    use super::*;

    #[test]
    fn a_flood_is_bounded_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut console = Console::new(&log, &dir.path().join("sock")).unwrap();
        let mut out = console.out();
        out.write_all(&vec![b'x'; BEHIND_LEN_MAX]).unwrap();
        out.write_all(b"lost").unwrap();
        console.drain();
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.ends_with("[cloudlet: 4 bytes of console output dropped]\n"));
        assert_eq!(console.replay.len(), REPLAY_LEN_MAX);
    }

    #[test]
    fn what_a_client_typed_before_it_left_is_input() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let mut console = Console::new(&dir.path().join("log"), &socket).unwrap();
        // There must be something to show to the client, which fails.
        console.out().write_all(b"login: ").unwrap();
        console.drain();
        let console = Arc::new(Mutex::new(console));
        let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        manager.add_subscriber(Box::new(Arc::clone(&console)));
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(b"root\n").unwrap();
        drop(client);
        // One turn accepts, one reads, one finds the end.
        for _ in 0..3 {
            manager.run_with_timeout(100).unwrap();
        }
        let mut console = console.lock().unwrap();
        assert_eq!(console.take_input(), b"root\n");
        assert!(console.clients.is_empty());
    }
}
