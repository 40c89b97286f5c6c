//! One connection of the server: requests in, heads and pieces of files out, until it ends.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustls::ServerConnection;

use super::request::{HEAD_BYTES_MAX, Request, RequestError, lists_tag};
use super::{Fate, Shared};
use crate::fetch::Transport;

/// Largest piece read and sent at once, in bytes.
const CHUNK_BYTES: usize = 256 * 1024;
/// The methods that there are.
const ALLOW: &str = "Allow: GET, HEAD\r\n";
/// Shortest answer timeout that a socket takes.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// Tells a client that there are too many already. It may not be listening; that is its loss.
pub(super) fn refuse(mut socket: &TcpStream) {
    let text =
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let _ = socket
        .set_write_timeout(Some(TIMEOUT_MIN))
        .and_then(|()| socket.write_all(text));
}

/// Serves a connection to its end. An error ends it, and concerns nobody but the client.
pub(super) fn run(shared: &Shared, number: u64, socket: Arc<TcpStream>) {
    let Ok(mut session) = Session::new(shared, number, socket) else {
        return;
    };
    while let Ok(true) = session.turn() {}
    // Politeness towards a client that may be gone.
    let _ = session.transport.finish();
}

struct Session<'a> {
    shared: &'a Shared,
    number: u64,
    transport: Transport<ServerConnection>,
    received: Vec<u8>,
    chunk: Vec<u8>,
}

impl<'a> Session<'a> {
    fn new(shared: &'a Shared, number: u64, socket: Arc<TcpStream>) -> io::Result<Session<'a>> {
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(shared.options.write_timeout.max(TIMEOUT_MIN)))?;
        let mut transport = match &shared.tls {
            Some(config) => {
                let tls = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
                Transport::tls(tls, socket)
            }
            None => Transport::plain(socket),
        };
        transport.shake_hands(Instant::now() + shared.options.head_timeout)?;
        Ok(Session {
            shared,
            number,
            transport,
            received: Vec::new(),
            chunk: Vec::new(),
        })
    }

    /// One request and its response. False ends the connection in good order.
    fn turn(&mut self) -> io::Result<bool> {
        let request = match self.read_request()? {
            None => return Ok(false),
            Some(Ok(request)) => request,
            Some(Err(RequestError(status))) => {
                // RFC 9110, 15.5.6.
                let extra = if status == 405 { ALLOW } else { "" };
                self.answer_empty(status, false, extra)?;
                return Ok(false);
            }
        };
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        self.answer(&request)?;
        Ok(request.keep_alive)
    }

    /// The next request; `None` if the client has none.
    fn read_request(&mut self) -> io::Result<Option<Result<Request, RequestError>>> {
        let end = Instant::now() + self.shared.options.head_timeout;
        loop {
            match Request::parse(&self.received) {
                Ok(Some((request, length))) => {
                    self.received.drain(..length);
                    return Ok(Some(Ok(request)));
                }
                Ok(None) => {}
                Err(error) => return Ok(Some(Err(error))),
            }
            let start = self.received.len();
            self.received.resize(HEAD_BYTES_MAX.max(start), 0);
            let result = self.transport.read(&mut self.received[start..], end);
            self.received
                .truncate(start + *result.as_ref().unwrap_or(&0));
            match result {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn answer(&mut self, request: &Request) -> io::Result<()> {
        let Ok((file, len, etag)) = self.open(&request.path) else {
            return self.answer_empty(404, request.keep_alive, "");
        };
        // In the order of RFC 9110, 13.2.2.
        if let Some(list) = &request.if_match
            && !lists_tag(list, &etag, false)
        {
            return self.answer_empty(412, request.keep_alive, "");
        }
        if let Some(list) = &request.if_none_match
            && lists_tag(list, &etag, true)
        {
            return self.answer_not_modified(&etag, request.keep_alive);
        }
        let range = request
            .range
            .filter(|_| request.if_range.as_ref().is_none_or(|tag| *tag == etag));
        let (status, offset, count, extra) = match range.map(|range| range.within(len)) {
            None => (200, 0, len, String::new()),
            Some(None) => {
                let extra = format!("Content-Range: bytes */{len}\r\n");
                return self.answer_empty(416, request.keep_alive, &extra);
            }
            Some(Some((offset, count))) => {
                let last = offset + count - 1;
                (
                    206,
                    offset,
                    count,
                    format!("Content-Range: bytes {offset}-{last}/{len}\r\n"),
                )
            }
        };
        let head = format!(
            "{}Content-Type: application/octet-stream\r\nAccept-Ranges: bytes\r\nETag: {etag}\r\n\
             Content-Length: {count}\r\n{extra}\r\n",
            start_of_head(status, request.keep_alive),
        );
        self.transport.write_all(head.as_bytes())?;
        if !request.head_only {
            self.send_file(&request.path, &file, offset, count)?;
        }
        Ok(())
    }

    fn answer_empty(&mut self, status: u16, keep_alive: bool, extra: &str) -> io::Result<()> {
        let start = start_of_head(status, keep_alive);
        let head = format!("{start}Content-Length: 0\r\n{extra}\r\n");
        self.transport.write_all(head.as_bytes())
    }

    /// What the client has is what there is. A length would be the file's (RFC 9110, 8.6).
    fn answer_not_modified(&mut self, etag: &str, keep_alive: bool) -> io::Result<()> {
        let head = format!("{}ETag: {etag}\r\n\r\n", start_of_head(304, keep_alive));
        self.transport.write_all(head.as_bytes())
    }

    /// Opens a regular file below the directory. The kernel refuses every way out of it, by `..`,
    /// symbolic links or races with them (openat2(2), RESOLVE_BENEATH).
    fn open(&self, path: &str) -> io::Result<(File, u64, String)> {
        let file: File = rustix::fs::openat2(
            &self.shared.root,
            path,
            // Without NONBLOCK, opening a FIFO would wait for its writer.
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        )?
        .into();
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let etag = format!(
            "\"{:x}-{:x}.{:x}-{:x}\"",
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ino()
        );
        Ok((file, metadata.len(), etag))
    }

    fn send_file(&mut self, path: &str, file: &File, offset: u64, count: u64) -> io::Result<()> {
        self.chunk.resize(CHUNK_BYTES, 0);
        let (mut at, end) = (offset, offset + count);
        while at < end {
            let want = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(CHUNK_BYTES);
            let granted = self.shared.shaper.take(want);
            let chunk = &mut self.chunk[..granted];
            // A file that became shorter cannot keep what the head said: the connection ends.
            file.read_exact_at(chunk, at)?;
            if let Some(shape) = &self.shared.options.shape {
                match shape.next_chunk(self.number, path, at, chunk) {
                    Fate::Send => {}
                    Fate::Delay(time) if self.shared.pause(time) => {}
                    Fate::Delay(_) | Fate::Cut => {
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    }
                }
            }
            let granted = u64::try_from(granted).unwrap_or(0);
            // Before they are written, so that no client has bytes that are not counted yet.
            self.shared.sent.fetch_add(granted, Ordering::Relaxed);
            self.transport.write_all(chunk)?;
            at += granted;
        }
        Ok(())
    }
}

fn start_of_head(status: u16, keep_alive: bool) -> String {
    let reason = match status {
        200 => "OK",
        206 => "Partial Content",
        304 => "Not Modified",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        412 => "Precondition Failed",
        416 => "Range Not Satisfiable",
        431 => "Request Header Fields Too Large",
        _ => "Error",
    };
    let connection = if keep_alive {
        ""
    } else {
        "Connection: close\r\n"
    };
    format!("HTTP/1.1 {status} {reason}\r\nServer: cloudlet\r\n{connection}")
}
