//! The clients: what each has sent so far, cut into frames. Bytes that come while a request of the
//! same client is being answered wait in `later`; the socket's credit bounds them.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use shared::protocol::{Frame, Incoming, Install};

use crate::app::{Placing, Space};
use crate::vsock::{ConnId, Listener};

/// What a client has ready to be worked on.
pub enum Ready {
    /// A request.
    Frame(Frame),
    /// An installation, all of it in place.
    Installed(Install, Placing),
    /// Something that ends the connection after it was answered.
    Broken(String),
}

enum Mode {
    /// Reading a frame.
    Frame(Incoming),
    /// Reading an image and its data.
    Stream(Install, Placing),
    /// Nothing is read until the request was answered.
    Busy,
    /// Nothing is read any more.
    Ended,
}

struct Peer {
    id: ConnId,
    mode: Mode,
    ready: Option<Ready>,
    later: Vec<u8>,
    /// Bytes that need no more room, not yet told to the socket.
    consumed: usize,
}

/// All clients.
pub struct Peers {
    peers: Vec<Peer>,
    space: Space,
    /// The machine was moved since this was last cleared.
    pub moved: bool,
}

impl Peers {
    /// No clients yet.
    pub fn new(space: Space) -> Peers {
        Peers {
            peers: Vec::new(),
            space,
            moved: false,
        }
    }

    /// A client's next piece of work; clients take turns.
    pub fn take_ready(&mut self) -> Option<(ConnId, Ready)> {
        let at = self.peers.iter().position(|peer| peer.ready.is_some())?;
        let mut peer = self.peers.remove(at);
        let (id, ready) = (peer.id, peer.ready.take());
        self.peers.push(peer);
        ready.map(|ready| (id, ready))
    }

    /// The client's installation may begin: what follows is image and data.
    pub fn stream(&mut self, id: ConnId, install: Install, placing: Placing) {
        self.go_on(id, Mode::Stream(install, placing));
    }

    /// Someone is sending an image.
    pub fn streaming(&self) -> bool {
        self.peers
            .iter()
            .any(|peer| matches!(peer.mode, Mode::Stream(..)))
    }

    /// The client's request was answered; the next may come.
    pub fn answered(&mut self, id: ConnId) {
        self.go_on(id, Mode::Frame(Incoming::default()));
    }

    fn go_on(&mut self, id: ConnId, mode: Mode) {
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) {
            peer.mode = mode;
            let later = core::mem::take(&mut peer.later);
            peer.feed(&later, self.space);
        }
    }

    /// Whether the client is still there.
    pub fn has(&self, id: ConnId) -> bool {
        self.peers.iter().any(|peer| peer.id == id)
    }

    /// Drops a client.
    pub fn remove(&mut self, id: ConnId) {
        self.peers.retain(|peer| peer.id != id);
    }

    /// What has been consumed of each client's bytes since this was last asked.
    pub fn take_consumed(&mut self) -> impl Iterator<Item = (ConnId, usize)> {
        let consumed = |peer: &mut Peer| (peer.id, core::mem::take(&mut peer.consumed));
        self.peers
            .iter_mut()
            .map(consumed)
            .filter(|(_, bytes)| *bytes > 0)
    }
}

impl Peer {
    fn feed(&mut self, mut bytes: &[u8], space: Space) {
        while !bytes.is_empty() {
            let step = match &mut self.mode {
                Mode::Frame(incoming) => match incoming.feed(bytes) {
                    Ok((taken, frame)) => Ok((taken, frame.map(Ready::Frame))),
                    Err(error) => Err(error.to_string()),
                },
                Mode::Stream(_, placing) => fill(placing, bytes, space).map(|taken| (taken, None)),
                Mode::Busy => {
                    self.later.extend_from_slice(bytes);
                    return;
                }
                Mode::Ended => Ok((bytes.len(), None)),
            };
            match step {
                Ok((taken, ready)) => {
                    self.consumed += taken;
                    bytes = &bytes[taken..];
                    if ready.is_some() {
                        (self.mode, self.ready) = (Mode::Busy, ready);
                    }
                }
                Err(text) => {
                    self.ready = Some(Ready::Broken(text));
                    self.mode = Mode::Ended;
                }
            }
            if matches!(&self.mode, Mode::Stream(_, placing) if placing.missing() == 0)
                && let Mode::Stream(install, placing) =
                    core::mem::replace(&mut self.mode, Mode::Busy)
            {
                self.ready = Some(Ready::Installed(install, placing));
            }
        }
    }
}

fn fill(placing: &mut Placing, bytes: &[u8], space: Space) -> Result<usize, String> {
    let room = placing.next(space)?;
    let taken = room.len().min(bytes.len());
    room[..taken].copy_from_slice(&bytes[..taken]);
    placing.advance(taken);
    Ok(taken)
}

impl Listener for Peers {
    fn opened(&mut self, id: ConnId) {
        let mode = Mode::Frame(Incoming::default());
        self.peers.push(Peer {
            id,
            mode,
            ready: None,
            later: Vec::new(),
            consumed: 0,
        });
    }

    fn data(&mut self, id: ConnId, bytes: &[u8]) {
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) {
            peer.feed(bytes, self.space);
        }
    }

    fn closed(&mut self, id: ConnId) {
        self.remove(id);
    }

    fn moved(&mut self) {
        self.moved = true;
    }
}
