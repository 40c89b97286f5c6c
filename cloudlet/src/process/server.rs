//! The control socket's server, on the control thread. It reads request lines and hands them to
//! the main loop, which carries them out one after the other and answers through it.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::control::{REQUEST_LEN_MAX, Reply, Request};
use crate::sockets;

/// Clients at once: 64 sessions with an agent have one each, to hear of a pause.
const CLIENTS_MAX: usize = 128;
/// Bytes read from a client at a time.
const READ_LEN: usize = 64 << 10;
/// How long a client may take to make room for an answer before it is let go.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bounds a read of a socket that epoll called readable and that no longer is.
const READ_TIMEOUT: Duration = Duration::from_millis(10);

/// One client's connection; never used twice within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ClientId(u64);

struct Client {
    id: ClientId,
    stream: UnixStream,
    partial: Vec<u8>,
}

/// What happened on the control socket.
#[derive(Debug)]
pub(super) enum Incoming {
    /// A client asks for something.
    Request(ClientId, Request),
    /// A client's connection is closed.
    Gone(ClientId),
}

/// The server.
pub(super) struct ControlServer {
    listener: UnixListener,
    clients: HashMap<RawFd, Client>,
    next_id: u64,
    incoming: VecDeque<Incoming>,
}

impl ControlServer {
    /// Listens at `socket`, which only the VM's owner can connect to.
    pub(super) fn new(socket: &Path) -> io::Result<Self> {
        let listener = sockets::listen(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self {
            listener,
            clients: HashMap::new(),
            next_id: 0,
            incoming: VecDeque::new(),
        })
    }

    /// The next thing that happened.
    pub(super) fn take(&mut self) -> Option<Incoming> {
        self.incoming.pop_front()
    }

    /// Gives back what happened and was taken before its time, in its order.
    pub(super) fn put_back(&mut self, mut earlier: VecDeque<Incoming>) {
        earlier.append(&mut self.incoming);
        self.incoming = earlier;
    }

    /// Says `reply` to a client. One that is gone or stuck is not waited for: its end comes round
    /// as [`Incoming::Gone`].
    pub(super) fn reply(&mut self, id: ClientId, reply: &Reply) {
        let Some(client) = self.clients.values_mut().find(|client| client.id == id) else {
            return;
        };
        let mut line = serde_json::to_vec(reply).expect("a reply has string keys only");
        line.push(b'\n');
        if client.stream.write_all(&line).is_err() {
            // The shut socket reads as its end, which removes the client.
            let _ = client.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn accept(&mut self, ops: &mut EventOps) -> io::Result<()> {
        let (stream, _) = self.listener.accept()?;
        if self.clients.len() >= CLIENTS_MAX {
            return Ok(());
        }
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        stream.set_read_timeout(Some(READ_TIMEOUT))?;
        if ops.add(Events::new(&stream, EventSet::IN)).is_ok() {
            let id = ClientId(self.next_id);
            self.next_id += 1;
            let client = Client {
                id,
                stream,
                partial: Vec::new(),
            };
            self.clients.insert(client.stream.as_raw_fd(), client);
        }
        Ok(())
    }

    fn read_client(&mut self, fd: RawFd, ops: &mut EventOps) {
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        if client.read_some().is_ok() {
            for line in client.take_lines() {
                match serde_json::from_slice(&line) {
                    Ok(request) => self
                        .incoming
                        .push_back(Incoming::Request(client.id, request)),
                    Err(error) => {
                        let id = client.id;
                        let message = format!("this request cannot be understood: {error}");
                        self.reply(id, &Reply::Failed { message });
                        return;
                    }
                }
            }
        } else if let Some(client) = self.clients.remove(&fd) {
            ops.remove(Events::empty(&client.stream))
                .expect("a watched descriptor is known");
            self.incoming.push_back(Incoming::Gone(client.id));
        }
    }
}

impl Client {
    /// Reads what is there. An error means that the client is to be let go.
    fn read_some(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; READ_LEN];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => self.partial.extend_from_slice(&bytes[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        let is_endless = self.partial.len() > REQUEST_LEN_MAX && !self.partial.contains(&b'\n');
        if is_endless {
            Err(io::ErrorKind::InvalidData.into())
        } else {
            Ok(())
        }
    }

    fn take_lines(&mut self) -> Vec<Vec<u8>> {
        let Some(last) = self.partial.iter().rposition(|&byte| byte == b'\n') else {
            return Vec::new();
        };
        let rest = self.partial.split_off(last + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        whole
            .split(|&byte| byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(Vec::from)
            .collect()
    }
}

impl MutEventSubscriber for ControlServer {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.listener.as_raw_fd() {
            // A client that vanished before it was accepted is nobody's loss.
            let _ = self.accept(ops);
        } else {
            self.read_client(events.fd(), ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // There are clients already when the server changes hands.
        let clients = self
            .clients
            .values()
            .map(|client| client.stream.as_raw_fd());
        for fd in clients.chain([self.listener.as_raw_fd()]) {
            ops.add(Events::new_raw(fd, EventSet::IN))
                .expect("a socket can be watched");
        }
    }
}
