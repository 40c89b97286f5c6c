//! The serial console: what the guest writes goes into a bounded buffer on the vCPU's thread, and
//! from there, on the control thread, to the log file and to every attached client at its own pace
//! (`tail.rs`); what a client types goes to the guest. The guest waits for nobody, and a client is let
//! go only when it leaves.

mod tail;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::sockets;
use tail::{Client, Fed, Tail, Typed};

/// Bytes the guest may be ahead of the control thread; what it writes beyond is dropped and
/// counted.
const BEHIND_LEN_MAX: usize = 1 << 20;
/// Bytes the log file may take; output beyond goes to clients alone.
const LOG_LEN_MAX: u64 = 64 << 20;
/// What stands at the end of a log that takes no more.
const LOG_FULL: &[u8] = b"\n[cloudlet: this log takes no more]\n";
/// Clients at once.
const CLIENTS_MAX: usize = 16;

#[derive(Default)]
struct Behind {
    bytes: Vec<u8>,
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
        let Behind { bytes, dropped } = std::mem::take(&mut *behind);
        (bytes, dropped)
    }
}

impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut behind = self.lock();
        let was_empty = behind.bytes.is_empty();
        let room = BEHIND_LEN_MAX - behind.bytes.len();
        let kept = bytes.len().min(room);
        behind.bytes.extend_from_slice(&bytes[..kept]);
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
    log_is_full: bool,
    tail: Tail,
    listener: UnixListener,
    clients: HashMap<RawFd, Client>,
    /// Whether somebody is to come who sees everything: the command that started the VM.
    awaited: bool,
    input: Vec<u8>,
}

impl Console {
    /// A console with its log at `log` and its clients at the socket `socket`. The first client of an
    /// `attached` VM sees everything that is kept.
    pub(super) fn new(log: &Path, socket: &Path, attached: bool) -> io::Result<Self> {
        let listener = sockets::listen(socket)?;
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok(Self {
            out: ConsoleOut {
                behind: Arc::default(),
                wake,
            },
            log: File::create(log)?,
            log_len: 0,
            log_is_full: false,
            tail: Tail::default(),
            listener,
            clients: HashMap::new(),
            awaited: attached,
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

    /// Takes what the guest has written so far, for the log and the clients.
    fn collect(&mut self) {
        let (mut bytes, dropped) = self.out.take();
        if dropped > 0 {
            let note = format!("\n[cloudlet: {dropped} bytes of console output dropped]\n");
            bytes.extend_from_slice(note.as_bytes());
        }
        self.write_log(&bytes);
        self.tail.push(&bytes);
    }

    /// The log is a convenience: a full disk must not end a VM, so what cannot be written is left, and
    /// with it all that follows.
    fn write_log(&mut self, bytes: &[u8]) {
        if self.log_is_full {
            return;
        }
        let room = LOG_LEN_MAX - self.log_len;
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let fits = bytes.len() <= room;
        let bytes = &bytes[..bytes.len().min(room)];
        let mut written = self.log.write_all(bytes);
        if !fits {
            written = written.and_then(|()| self.log.write_all(LOG_FULL));
        }
        self.log_len += bytes.len() as u64;
        self.log_is_full = !fits || written.is_err();
    }

    /// Forgets what no client needs any more.
    fn release(&mut self) {
        let needed = self.clients.values().filter_map(Client::needs).min();
        if !self.awaited {
            self.tail.release(needed.unwrap_or(u64::MAX));
        }
    }

    /// Takes a client that waits to be let in; none if there is none, or no place for it.
    fn accept(&mut self) -> io::Result<Option<RawFd>> {
        let (stream, _) = self.listener.accept()?;
        if self.clients.len() >= CLIENTS_MAX {
            return Ok(None);
        }
        stream.set_nonblocking(true)?;
        let first = std::mem::take(&mut self.awaited);
        let at = match first {
            true => 0,
            false => self.tail.replay_begin(),
        };
        let fd = stream.as_raw_fd();
        self.clients.insert(fd, Client::new(stream, at));
        Ok(Some(fd))
    }

    fn greet(&mut self, ops: &mut EventOps) {
        // There may be none after all, or no descriptor for it: nobody's loss.
        let Ok(Some(fd)) = self.accept() else {
            return;
        };
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        if ops.add(Events::new(&client.stream, EventSet::IN)).is_err() {
            self.clients.remove(&fd);
            return;
        }
        client.serve(&self.tail, ops);
        self.release();
    }

    fn serve_all(&mut self, ops: &mut EventOps) {
        for client in self.clients.values_mut() {
            client.serve(&self.tail, ops);
        }
        self.release();
    }

    fn serve_one(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        let has = |set| events.event_set().intersects(set);
        let left = EventSet::HANG_UP | EventSet::ERROR;
        let typed = match has(EventSet::IN) {
            true => client.read(&mut self.input),
            false => Typed::Nothing,
        };
        // Of one that has left, everything it typed is read before it is forgotten.
        if typed != Typed::Something && has(left) {
            ops.remove(Events::empty(&client.stream))
                .expect("a watched descriptor is known");
            self.clients.remove(&fd);
        } else {
            client.serve(&self.tail, ops);
        }
        self.release();
    }

    /// The guest's last words, for the log at once and for clients as they take them, for `limit` at
    /// the most. Those who wait to be let in are clients, too.
    pub(super) fn finish(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.collect();
        while self.accept().is_ok() {}
        loop {
            let tail = &self.tail;
            let behind = self.clients.values_mut().filter_map(|client| {
                let fed = client.feed(tail);
                (fed == Fed::Behind).then_some(&client.stream)
            });
            let mut behind: Vec<_> = behind
                .map(|stream| PollFd::new(stream, PollFlags::OUT))
                .collect();
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(left) = Timespec::try_from(left) else {
                return;
            };
            // An error of poll would come again, and there is nothing else to be done.
            if behind.is_empty() || matches!(poll(&mut behind, Some(&left)), Ok(0) | Err(_)) {
                return;
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
            self.collect();
            self.serve_all(ops);
        } else if fd == self.listener.as_raw_fd() {
            self.greet(ops);
        } else {
            self.serve_one(events, ops);
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
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;

    use event_manager::{EventManager, SubscriberOps};

    use super::tail::REPLAY_LEN_MAX;
    use super::*;

    type Manager = EventManager<Box<dyn MutEventSubscriber>>;

    /// A console in an event loop, its log, and its socket.
    struct Bench {
        dir: tempfile::TempDir,
        console: Arc<Mutex<Console>>,
        manager: Manager,
    }

    impl Bench {
        fn new(attached: bool) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let (log, socket) = (dir.path().join("log"), dir.path().join("sock"));
            let console = Console::new(&log, &socket, attached).unwrap();
            let console = Arc::new(Mutex::new(console));
            let mut manager = Manager::new().unwrap();
            manager.add_subscriber(Box::new(Arc::clone(&console)));
            Self {
                dir,
                console,
                manager,
            }
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(self.dir.path().join("sock")).unwrap()
        }

        fn log(&self) -> String {
            std::fs::read_to_string(self.dir.path().join("log")).unwrap()
        }

        fn write(&self, bytes: &[u8]) {
            self.console().out().write_all(bytes).unwrap();
        }

        fn console(&self) -> MutexGuard<'_, Console> {
            self.console.lock().unwrap()
        }

        /// Turns until nothing happens any more.
        fn turn(&mut self) {
            while self.manager.run_with_timeout(20).unwrap() > 0 {}
        }
    }

    #[test]
    fn a_flood_is_bounded_and_said() {
        let mut bench = Bench::new(false);
        bench.write(&vec![b'x'; BEHIND_LEN_MAX]);
        bench.write(b"lost");
        bench.turn();
        let said = "[cloudlet: 4 bytes of console output dropped]\n";
        assert!(bench.log().ends_with(said));
        let tail = &bench.console().tail;
        assert_eq!(tail.end() - tail.replay_begin(), REPLAY_LEN_MAX as u64);
    }

    #[test]
    fn a_full_log_says_so_and_has_no_gap() {
        let mut bench = Bench::new(false);
        bench.console().log_len = LOG_LEN_MAX - 4;
        bench.write(b"12345678");
        bench.turn();
        bench.write(b"9");
        bench.turn();
        assert_eq!(
            bench.log(),
            format!("1234{}", String::from_utf8_lossy(LOG_FULL))
        );
    }

    #[test]
    fn what_a_client_typed_before_it_left_is_input() {
        let mut bench = Bench::new(false);
        // There must be something to show to the client, which fails.
        bench.write(b"login: ");
        bench.turn();
        let mut client = bench.connect();
        client.write_all(b"root's long name\n").unwrap();
        drop(client);
        bench.turn();
        assert_eq!(bench.console().take_input(), b"root's long name\n");
        assert!(bench.console().clients.is_empty());
    }

    #[test]
    fn a_client_with_nothing_more_to_type_reads_on() {
        let mut bench = Bench::new(false);
        let mut client = bench.connect();
        client.write_all(b"last").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        bench.turn();
        assert_eq!(bench.console().take_input(), b"last");
        bench.write(b"words");
        bench.turn();
        let mut words = [0; 5];
        client.read_exact(&mut words).unwrap();
        assert_eq!(&words, b"words");
        drop(client);
        bench.turn();
        assert!(bench.console().clients.is_empty());
    }

    #[test]
    fn a_client_that_does_not_read_is_kept_and_costs_the_others_nothing() {
        let mut bench = Bench::new(false);
        let (mut slow, mut quick) = (bench.connect(), bench.connect());
        bench.turn();
        quick.set_nonblocking(true).unwrap();
        let piece = vec![b'x'; 256 << 10];
        let mut got = Vec::new();
        for _ in 0..4 {
            bench.write(&piece);
            for _ in 0..8 {
                bench.turn();
                let error = quick.read_to_end(&mut got).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            }
        }
        assert_eq!(got.len(), 4 * piece.len());
        // It reads at last: nothing is lost, nobody was let go.
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![0; 4 * (256 << 10)];
            slow.read_exact(&mut bytes).map(|()| (slow, bytes.len()))
        });
        while !reader.is_finished() {
            bench.turn();
        }
        let (_slow, length) = reader.join().unwrap().unwrap();
        assert_eq!(length, 4 * piece.len());
        assert_eq!(bench.console().clients.len(), 2);
    }

    #[test]
    fn who_started_the_vm_sees_all_of_it_even_at_its_end() {
        let mut bench = Bench::new(true);
        let all = vec![b'x'; 512 << 10];
        bench.write(&all);
        bench.turn();
        let starter = bench.connect();
        let other = bench.connect();
        let read = |mut stream: UnixStream| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).map(|_| bytes)
            })
        };
        let (starter, other) = (read(starter), read(other));
        bench.write(b"last words");
        bench.console().finish(Duration::from_secs(60));
        drop(bench);
        let starter = starter.join().unwrap().unwrap();
        assert_eq!(starter.len(), all.len() + 10);
        assert!(starter.ends_with(b"last words"));
        assert_eq!(other.join().unwrap().unwrap().len(), REPLAY_LEN_MAX);
    }

    #[test]
    fn a_reader_that_has_stopped_does_not_keep_the_vm() {
        let mut bench = Bench::new(true);
        bench.write(&vec![b'x'; 1 << 20]);
        let stopped = bench.connect();
        bench.turn();
        let begin = Instant::now();
        bench.console().finish(Duration::from_millis(50));
        assert!(begin.elapsed() >= Duration::from_millis(50));
        drop(stopped);
        // One that has left is not waited for.
        bench.console().finish(Duration::from_secs(3600));
    }
}
