//! A small static file server: overlays, and nothing but regular files below one directory, for
//! `cloudlet serve`, demos and tests. GET and HEAD with single ranges over HTTP/1.1, TLS if wanted,
//! and a rate that is shared fairly between the connections, so that a link can be shaped.
//! Clients are not trusted: requests, connections and waits all have limits.

mod connection;
mod request;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::fetch::{Bucket, Rate, server_config};
use crate::files;

pub use request::{RangeSpec, Request, RequestError};

/// Pause of the accepting thread when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Send buffer of a connection of a shaped server, in bytes: what lies in it counts as sent, so
/// it must be little.
const SHAPED_SEND_BUFFER: usize = 32 * 1024;

/// How to serve.
#[derive(Clone)]
pub struct ServeOptions {
    /// PEM files of the certificate chain (leaf first) and its key: speak TLS.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Rate of all bodies together.
    pub rate: Option<Rate>,
    /// Most connections at once; one more is answered with 503.
    pub connections_max: usize,
    /// Longest time for a whole request head to arrive, idle time before it included.
    pub head_timeout: Duration,
    /// Longest time that a client may leave a response unread.
    pub write_timeout: Duration,
    /// Is asked before each chunk of a body.
    pub shape: Option<Arc<dyn Shape>>,
}

impl Default for ServeOptions {
    /// Plain HTTP at full speed, 64 connections, 60 s for a head, 60 s for a client that does
    /// not read.
    fn default() -> Self {
        ServeOptions {
            tls: None,
            rate: None,
            connections_max: 64,
            head_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            shape: None,
        }
    }
}

impl std::fmt::Debug for ServeOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServeOptions")
            .field("tls", &self.tls)
            .field("rate", &self.rate)
            .field("connections_max", &self.connections_max)
            .finish_non_exhaustive()
    }
}

/// What becomes of a chunk of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is sent.
    Send,
    /// It is sent after a wait.
    Delay(Duration),
    /// The connection is closed instead.
    Cut,
}

/// Looks at, delays, alters or refuses what is sent, chunk by chunk: a link with properties.
pub trait Shape: Send + Sync {
    /// `bytes`, which start at `offset` of the file at `path`, are about to be sent over the
    /// connection of this number (they count from 0).
    fn next_chunk(&self, connection: u64, path: &str, offset: u64, bytes: &mut [u8]) -> Fate;
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The directory is not there or not readable.
    #[error("could not open the directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("could not listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Certificate or key is not there, or no file.
    #[error(transparent)]
    File(#[from] files::Error),
    /// Certificate or key cannot be read.
    #[error("could not read {}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Certificate and key cannot be used.
    #[error("the certificate and key cannot be used")]
    Tls(#[source] rustls::Error),
    /// No thread.
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
}

/// A running server. It stops when it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    listener: TcpListener,
    root: File,
    tls: Option<Arc<ServerConfig>>,
    options: ServeOptions,
    shaper: Shaper,
    state: Mutex<State>,
    finished: Condvar,
    sent: AtomicU64,
    requests: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    stopped: bool,
    accepted: u64,
    sockets: BTreeMap<u64, Arc<TcpStream>>,
}

impl Server {
    /// Serves the regular files below `directory` on `address` (port 0 picks one) until stopped.
    ///
    /// # Errors
    /// Directory, address, or certificate are unusable.
    pub fn bind(
        directory: &Path,
        address: &str,
        options: ServeOptions,
    ) -> Result<Server, ServeError> {
        let cannot_open = |source| ServeError::Directory {
            path: directory.to_owned(),
            source,
        };
        let root = File::open(directory).map_err(cannot_open)?;
        if !root.metadata().map_err(cannot_open)?.is_dir() {
            return Err(cannot_open(io::ErrorKind::NotADirectory.into()));
        }
        let tls = match &options.tls {
            Some((certificates, key)) => Some(load_tls(certificates, key)?),
            None => None,
        };
        let cannot_listen = |source| ServeError::Listen {
            address: address.to_owned(),
            source,
        };
        let addresses: Vec<_> = address.to_socket_addrs().map_err(cannot_listen)?.collect();
        let listener = TcpListener::bind(&*addresses).map_err(cannot_listen)?;
        let local = listener.local_addr().map_err(cannot_listen)?;
        let shared = Arc::new(Shared {
            listener,
            root,
            tls,
            shaper: Shaper::new(options.rate),
            options,
            state: Mutex::default(),
            finished: Condvar::new(),
            sent: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        let accepting = std::thread::Builder::new()
            .name("serve".into())
            .spawn(move || accept(&accepting))
            .map_err(ServeError::Thread)?;
        Ok(Server {
            address: local,
            shared,
            accepting: Some(accepting),
        })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// URL of the file at `path` (relative to the directory, as it stands in the URL). An
    /// address that means every interface is named as this host's own.
    pub fn url(&self, path: &str) -> String {
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let scheme = if self.shared.tls.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{address}/{}", path.trim_start_matches('/'))
    }

    /// Bytes of bodies sent so far, those being written included.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Requests answered so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Waits for the server's end, which [`Server::stop`] from elsewhere or a failing listener
    /// brings.
    pub fn wait(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            // A panic there has already been reported by its own thread.
            let _ = accepting.join();
        }
    }

    /// Closes the port and all connections and waits for their threads.
    pub fn stop(&mut self) {
        let mut state = self.shared.lock();
        state.stopped = true;
        for socket in state.sockets.values() {
            // A connection that is already gone needs no shutting down.
            let _ = socket.shutdown(Shutdown::Both);
        }
        drop(state);
        // tcp(7): this wakes the thread in accept. A listener that failed is shut down already.
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
        self.shared.finished.notify_all();
        self.wait();
        let mut state = self.shared.lock();
        while !state.sockets.is_empty() {
            state = self
                .shared
                .finished
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, or learns that the server was stopped.
    fn pause(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        let mut state = self.lock();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if state.stopped || left.is_zero() {
                return !state.stopped;
            }
            let waited = self.finished.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Hands out the rate in turns: whoever asked first gets the next piece, so that each of several
/// connections gets the same share.
#[derive(Debug)]
struct Shaper {
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Debug)]
struct Queue {
    bucket: Bucket,
    next_ticket: u64,
    serving: u64,
}

impl Shaper {
    fn new(rate: Option<Rate>) -> Shaper {
        let queue = Queue {
            bucket: Bucket::new(rate),
            next_ticket: 0,
            serving: 0,
        };
        Shaper {
            queue: Mutex::new(queue),
            moved: Condvar::new(),
        }
    }

    /// Waits for a turn, and returns how many of `want` bytes may be sent now.
    fn take(&self, want: usize) -> usize {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        while queue.serving != ticket {
            queue = self
                .moved
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        // Nobody else can get past this ticket, so the lock need not be held while it waits.
        while let Some(wait) = queue.bucket.wait(Instant::now()) {
            drop(queue);
            std::thread::sleep(wait);
            queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        }
        let granted = want.min(queue.bucket.quantum());
        queue.bucket.take(granted, Instant::now());
        queue.serving += 1;
        drop(queue);
        self.moved.notify_all();
        granted
    }
}

fn load_tls(certificates: &Path, key: &Path) -> Result<Arc<ServerConfig>, ServeError> {
    let bad = |path: &Path| {
        let path = path.to_owned();
        move |source| ServeError::Pem { path, source }
    };
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_reader_iter(files::open(certificates)?).collect();
    let chain = chain.map_err(bad(certificates))?;
    let key = PrivateKeyDer::from_pem_reader(files::open(key)?).map_err(bad(key))?;
    server_config(chain, key).map_err(ServeError::Tls)
}

fn accept(shared: &Arc<Shared>) {
    loop {
        let accepted = shared.listener.accept();
        if shared.lock().stopped {
            return;
        }
        match accepted {
            Ok((socket, _)) => welcome(shared, socket),
            // Out of descriptors, or a client that was gone before it was accepted.
            Err(_) => {
                if !shared.pause(ACCEPT_PAUSE) {
                    return;
                }
            }
        }
    }
}

/// Starts a connection's thread. A socket that cannot even be set up is dropped, which closes it.
fn welcome(shared: &Arc<Shared>, socket: TcpStream) {
    if shared.options.rate.is_some()
        && rustix::net::sockopt::set_socket_send_buffer_size(&socket, SHAPED_SEND_BUFFER).is_err()
    {
        return;
    }
    let mut state = shared.lock();
    let is_full = state.sockets.len() >= shared.options.connections_max;
    let number = state.accepted;
    if is_full || state.stopped {
        drop(state);
        connection::refuse(&socket);
        return;
    }
    state.accepted += 1;
    let socket = Arc::new(socket);
    state.sockets.insert(number, Arc::clone(&socket));
    drop(state);
    let registered = Registered {
        shared: Arc::clone(shared),
        number,
    };
    // Without a thread the closure is dropped, and with it the registration and the socket.
    let _ = std::thread::Builder::new()
        .name(format!("serve{number}"))
        .spawn(move || {
            connection::run(&registered.shared, number, socket);
            drop(registered);
        });
}

/// A connection's entry among the open ones; dropping it takes it out.
struct Registered {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.lock().sockets.remove(&self.number);
        self.shared.finished.notify_all();
    }
}
