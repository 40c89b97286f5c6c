//! One HTTP/1.1 connection: connect, TLS, one request after the other, bodies by length.
//! Every wait has a limit, every byte of a body goes through the link, and closing the link
//! ends whatever is under way.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use super::Options;
use super::cause::Cause;
use super::head::{HEAD_BYTES_MAX, Head};
use super::link::{Kind, Link, Watch};
use super::location::Url;
use super::tls;
use super::transport::Transport;

/// Interim (1xx) responses accepted before the real one.
const INTERIM_MAX: usize = 4;
/// Shortest time given to one of several addresses.
const CONNECT_SHARE_MIN: Duration = Duration::from_millis(250);
/// A body that brings less than this in one stall time has stalled, in bytes.
const TRICKLE_BYTES: usize = 1024;

/// What all connections of one transfer share.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) options: Options,
    pub(super) link: Arc<Link>,
    tls: Mutex<Option<Arc<ClientConfig>>>,
    addresses: Mutex<BTreeMap<(String, u16), Vec<SocketAddr>>>,
}

impl Context {
    pub(super) fn new(options: Options, link: Arc<Link>) -> Context {
        // The kernel takes a timeout of zero for none.
        let at_least = |time: Duration| time.max(Duration::from_millis(1));
        let options = Options {
            connect_timeout: at_least(options.connect_timeout),
            stall_timeout: at_least(options.stall_timeout),
            ..options
        };
        Context {
            options,
            link,
            tls: Mutex::default(),
            addresses: Mutex::default(),
        }
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, Cause> {
        let mut slot = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = &*slot {
            return Ok(Arc::clone(config));
        }
        let config = tls::client_config(self.options.ca.as_deref())?;
        Ok(Arc::clone(slot.insert(config)))
    }

    /// Looks the host up once; a later connection uses what was found, unless it failed.
    fn addresses(&self, url: &Url) -> Result<Vec<SocketAddr>, Cause> {
        let key = (url.host().to_owned(), url.port());
        let known = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .cloned();
        if let Some(found) = known {
            return Ok(found);
        }
        let found: Vec<_> = (url.host(), url.port())
            .to_socket_addrs()
            .map_err(|source| Cause::Resolve {
                host: url.host().to_owned(),
                source,
            })?
            .collect();
        if found.is_empty() {
            return Err(Cause::NoAddress(url.host().to_owned()));
        }
        let mut known = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        known.insert(key, found.clone());
        Ok(found)
    }

    fn forget_addresses(&self, url: &Url) {
        let key = (url.host().to_owned(), url.port());
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&key);
    }

    fn connect(&self, url: &Url) -> Result<TcpStream, Cause> {
        let addresses = self.addresses(url)?;
        let end = Instant::now() + self.options.connect_timeout;
        let mut failure = Cause::NoAddress(url.host().to_owned());
        let mut left = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        for address in addresses {
            if self.link.is_closed() {
                return Err(Cause::Cancelled);
            }
            let remaining = end.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(&address, (remaining / left).max(CONNECT_SHARE_MIN)) {
                Ok(socket) => return Ok(socket),
                Err(source) => failure = Cause::Connect { address, source },
            }
            left = left.saturating_sub(1).max(1);
        }
        self.forget_addresses(url);
        Err(failure)
    }
}

/// See the module's description.
pub(super) struct Connection {
    transport: Transport<ClientConnection>,
    endpoint: (bool, String, u16),
    /// Bytes that came behind a head, from `ahead_at`.
    ahead: Vec<u8>,
    ahead_at: usize,
    body_left: u64,
    keep_alive: bool,
    round_trip: Duration,
    /// Time spent waiting since the last [`TRICKLE_BYTES`], and what came meanwhile.
    waited: Duration,
    trickled: usize,
    _watch: Watch,
}

impl Connection {
    /// Connects, and shakes hands if the URL is an https one.
    pub(super) fn open(context: &Context, url: &Url) -> Result<Connection, Cause> {
        let start = Instant::now();
        let socket = Arc::new(context.connect(url)?);
        let round_trip = start.elapsed();
        let watch = context.link.watch(&socket)?;
        socket.set_nodelay(true).map_err(Cause::Socket)?;
        let stall = context.options.stall_timeout;
        socket
            .set_write_timeout(Some(stall))
            .map_err(Cause::Socket)?;
        let mut transport = if url.is_tls() {
            let name = ServerName::try_from(url.host().to_owned())
                .map_err(|_| Cause::TlsName(url.host().to_owned()))?;
            let session = ClientConnection::new(context.tls()?, name).map_err(Cause::Tls)?;
            Transport::tls(session, socket)
        } else {
            Transport::plain(socket)
        };
        let limit = context.options.connect_timeout;
        transport
            .shake_hands(Instant::now() + limit)
            .map_err(|error| cancelled(context, Cause::of_read(error, limit)))?;
        Ok(Connection {
            transport,
            endpoint: endpoint(url),
            ahead: Vec::new(),
            ahead_at: 0,
            body_left: 0,
            keep_alive: true,
            round_trip,
            waited: Duration::ZERO,
            trickled: 0,
            _watch: watch,
        })
    }

    /// Whether the next request for `url` can go over this connection. Bytes behind the last body
    /// belong to no request, and nothing that follows them can be trusted to do so.
    pub(super) fn is_free_for(&self, url: &Url) -> bool {
        let clean = self.body_left == 0 && self.ahead_at == self.ahead.len();
        self.keep_alive && clean && self.endpoint == endpoint(url)
    }

    /// How long the TCP handshake took.
    pub(super) fn round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Bytes of the current body that are still to be read.
    pub(super) fn body_left(&self) -> u64 {
        self.body_left
    }

    /// Asks the kernel for a receive buffer that holds `bytes`, and returns how much it holds.
    pub(super) fn set_window(&self, bytes: usize) -> Result<usize, Cause> {
        let socket = self.transport.socket();
        // socket(7): the kernel doubles the value to have room for its bookkeeping.
        rustix::net::sockopt::set_socket_recv_buffer_size(socket, bytes)
            .and_then(|()| rustix::net::sockopt::socket_recv_buffer_size(socket))
            .map(|doubled| doubled / 2)
            .map_err(|errno| Cause::Socket(errno.into()))
    }

    /// Sends a request and reads the head of its response; the body is next.
    pub(super) fn exchange(
        &mut self,
        context: &Context,
        kind: Kind,
        request: &str,
    ) -> Result<Head, Cause> {
        let result = self
            .transport
            .write_all(request.as_bytes())
            .map_err(Cause::Send)
            .and_then(|()| self.read_head(context, kind));
        match result {
            Ok(head) => {
                self.keep_alive = head.keep_alive;
                self.body_left = head.content_length.unwrap_or(0);
                Ok(head)
            }
            Err(cause) => {
                self.keep_alive = false;
                Err(cancelled(context, cause))
            }
        }
    }

    /// Reads a part of the body, waiting for the link's leave. Zero means its end.
    pub(super) fn read(
        &mut self,
        context: &Context,
        kind: Kind,
        buf: &mut [u8],
    ) -> Result<usize, Cause> {
        let left = usize::try_from(self.body_left).unwrap_or(usize::MAX);
        let want = buf.len().min(left);
        if want == 0 {
            return Ok(0);
        }
        let granted = context.link.take(kind, want)?;
        let result = self.receive(&mut buf[..granted], context.options.stall_timeout);
        context
            .link
            .settle(kind, granted, *result.as_ref().unwrap_or(&0));
        match result {
            Ok(count) => {
                self.body_left -= u64::try_from(count).unwrap_or(self.body_left);
                Ok(count)
            }
            Err(cause) => {
                self.keep_alive = false;
                Err(cancelled(context, cause))
            }
        }
    }

    /// At least one byte into `buf`, which is not empty, or an error.
    fn receive(&mut self, buf: &mut [u8], stall: Duration) -> Result<usize, Cause> {
        let ahead = &self.ahead[self.ahead_at..];
        if !ahead.is_empty() {
            let count = ahead.len().min(buf.len());
            buf[..count].copy_from_slice(&ahead[..count]);
            self.ahead_at += count;
            return Ok(count);
        }
        let start = Instant::now();
        let end = start + stall.saturating_sub(self.waited);
        match self.transport.read(buf, end) {
            Ok(0) => Err(Cause::Cut),
            Ok(count) => {
                self.waited += start.elapsed();
                self.trickled += count;
                if self.trickled >= TRICKLE_BYTES {
                    (self.waited, self.trickled) = (Duration::ZERO, 0);
                }
                Ok(count)
            }
            Err(error) => Err(Cause::of_read(error, stall)),
        }
    }

    fn read_head(&mut self, context: &Context, kind: Kind) -> Result<Head, Cause> {
        let stall = context.options.stall_timeout;
        let end = Instant::now() + stall;
        (self.waited, self.trickled) = (Duration::ZERO, 0);
        let mut bytes = self.ahead.split_off(self.ahead_at);
        let mut interim = 0;
        let head = loop {
            match Head::parse(&bytes).map_err(Cause::Head)? {
                Some((head, length)) => {
                    context.link.charge(kind, length);
                    bytes.drain(..length);
                    if !(100..200).contains(&head.status) {
                        break head;
                    }
                    interim += 1;
                    if head.status == 101 || interim > INTERIM_MAX {
                        return Err(Cause::Status(head.status));
                    }
                }
                None => self.read_more_head(&mut bytes, end, stall)?,
            }
        };
        self.transport
            .socket()
            .set_read_timeout(Some(stall))
            .map_err(Cause::Socket)?;
        (self.ahead, self.ahead_at) = (bytes, 0);
        Ok(head)
    }

    /// Appends what the server sent to `bytes`, at least up to a line end: a head that comes byte
    /// by byte is not parsed for each of them.
    fn read_more_head(
        &mut self,
        bytes: &mut Vec<u8>,
        end: Instant,
        stall: Duration,
    ) -> Result<(), Cause> {
        loop {
            let start = bytes.len();
            bytes.resize(HEAD_BYTES_MAX.max(start), 0);
            let result = self.transport.read(&mut bytes[start..], end);
            bytes.truncate(start + *result.as_ref().unwrap_or(&0));
            match result {
                Ok(0) => return Err(Cause::Cut),
                Ok(_) if bytes[start..].contains(&b'\n') => return Ok(()),
                Ok(_) if bytes.len() >= HEAD_BYTES_MAX => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(Cause::of_read(error, stall)),
            }
        }
    }
}

/// After a cancelled transfer the socket's own error is of no interest.
fn cancelled(context: &Context, cause: Cause) -> Cause {
    if context.link.is_closed() {
        Cause::Cancelled
    } else {
        cause
    }
}

fn endpoint(url: &Url) -> (bool, String, u16) {
    (url.is_tls(), url.host().to_owned(), url.port())
}
