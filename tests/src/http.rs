//! A small HTTP/1.1 file server on the loopback address that can be told to misbehave: cut the
//! connection, stall, flip a byte, change the file's ETag, or refuse ranges.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::failure::Outcome;

/// Longest request head that is read.
const HEAD_LEN_MAX: u64 = 16 << 10;
/// How long a stalled connection is kept open at most.
const STALL_MAX: Duration = Duration::from_secs(120);

/// What the server does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Closes the connection once, in the middle of the body that covers this file offset.
    CutOnceAt(u64),
    /// Closes every connection whose body has this file offset in it, there.
    CutAt(u64),
    /// Sends nothing from this file offset on where a body has it in it, and keeps the connection
    /// open.
    StallAt(u64),
    /// Flips the bits of the byte at this file offset, every time.
    FlipAt(u64),
    /// Closes the first connection at this file offset and gives every later answer another ETag, as
    /// several servers behind one name may.
    RetagAt(u64),
    /// The same, and other bytes: the file has been replaced in between.
    ReplaceAt(u64),
    /// Gives whole files only, also when a range is asked for.
    NoRanges,
}

struct Shared {
    dir: PathBuf,
    fault: Mutex<Fault>,
    cut_done: AtomicBool,
    stopping: AtomicBool,
    answers: AtomicU64,
    body_bytes: AtomicU64,
    ranges: Mutex<Vec<(u64, u64)>>,
}

/// The server. It stops when it is dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Server {
    /// Serves the files of `dir`.
    pub fn start(dir: PathBuf) -> Outcome<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            dir,
            fault: Mutex::new(Fault::None),
            cut_done: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            body_bytes: AtomicU64::new(0),
            ranges: Mutex::new(Vec::new()),
        });
        let for_thread = shared.clone();
        thread::spawn(move || accept(&listener, &for_thread));
        Ok(Self { address, shared })
    }

    /// The address of one file.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }

    /// From now on, do this wrong.
    pub fn set_fault(&self, fault: Fault) {
        self.shared.cut_done.store(false, Ordering::SeqCst);
        *self
            .shared
            .fault
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// Answers given so far.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.shared.answers.load(Ordering::SeqCst)
    }

    /// Body bytes sent so far.
    #[must_use]
    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::SeqCst)
    }

    /// The ranges that were asked for, as first offset and length, in order.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.shared
            .ranges
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the thread in accept; if that fails there is no one to wake.
        let _ = TcpStream::connect(self.address);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let shared = shared.clone();
        // A client that goes away in the middle is its own affair.
        thread::spawn(move || serve(stream, &shared).ok());
    }
}

/// Answers requests on one connection until it ends.
fn serve(stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    while let Some(request) = read_request(&mut reader)? {
        if !answer(&request, &mut stream, shared)? {
            return Ok(());
        }
    }
    Ok(())
}

struct Request {
    head_only: bool,
    name: String,
    /// First and last byte, as in the header.
    range: Option<(u64, Option<u64>)>,
}

fn read_request(reader: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
    let mut head = reader.take(HEAD_LEN_MAX);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_ascii_whitespace();
    let head_only = words.next() == Some("HEAD");
    let name = words
        .next()
        .unwrap_or_default()
        .trim_start_matches('/')
        .to_owned();
    let mut range = None;
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(Some(Request {
                head_only,
                name,
                range,
            }));
        }
        let Some((field, value)) = line.split_once(':') else {
            continue;
        };
        if field.eq_ignore_ascii_case("range") {
            range = value.trim().strip_prefix("bytes=").and_then(|value| {
                let (first, last) = value.split_once('-')?;
                Some((first.parse().ok()?, last.parse().ok()))
            });
        }
    }
}

/// Sends one answer; whether the connection may be used again.
fn answer(request: &Request, stream: &mut TcpStream, shared: &Shared) -> io::Result<bool> {
    let count = shared.answers.fetch_add(1, Ordering::SeqCst);
    let fault = *shared.fault.lock().unwrap_or_else(PoisonError::into_inner);
    let file = match File::open(shared.dir.join(&request.name)) {
        Ok(file) if !request.name.contains("..") => file,
        _ => {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            return Ok(true);
        }
    };
    let len = file.metadata()?.len();
    let replaced = matches!(fault, Fault::RetagAt(_) | Fault::ReplaceAt(_))
        && shared.cut_done.load(Ordering::SeqCst);
    let etag = if replaced { count } else { 0 };
    let (first, end, ranged) = match request.range {
        Some((first, last)) if fault != Fault::NoRanges => (
            first,
            last.map_or(len, |last| last.saturating_add(1).min(len)),
            true,
        ),
        _ => (0, len, false),
    };
    if first > end || (ranged && first >= len) {
        let head = "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(head.as_bytes())?;
        return Ok(true);
    }
    let status = if ranged {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    let accepts = if fault == Fault::NoRanges {
        "none"
    } else {
        "bytes"
    };
    let mut head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nAccept-Ranges: {accepts}\r\nETag: \"{etag}\"\r\n",
        end - first
    );
    if ranged {
        head.push_str(&format!(
            "Content-Range: bytes {first}-{}/{len}\r\n",
            end - 1
        ));
        let mut ranges = shared.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.push((first, end - first));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    if request.head_only {
        return Ok(true);
    }
    send_body(file, first, end, fault, stream, shared)
}

fn send_body(
    mut file: File,
    first: u64,
    end: u64,
    fault: Fault,
    stream: &mut TcpStream,
    shared: &Shared,
) -> io::Result<bool> {
    file.seek(SeekFrom::Start(first))?;
    let stop_at = match fault {
        Fault::CutAt(at) | Fault::StallAt(at) if (first..end).contains(&at) => at,
        Fault::CutOnceAt(at) | Fault::RetagAt(at) | Fault::ReplaceAt(at)
            if (first..end).contains(&at) && !shared.cut_done.swap(true, Ordering::SeqCst) =>
        {
            at
        }
        _ => u64::MAX,
    };
    // What goes on behind the cut is of the other file.
    let is_another =
        matches!(fault, Fault::ReplaceAt(at) if (first..end).contains(&at)) && stop_at == u64::MAX;
    let mut piece = vec![0; 64 << 10];
    let mut at = first;
    while at < end {
        if at >= stop_at {
            if matches!(fault, Fault::StallAt(_)) {
                stall(shared);
            }
            return Ok(false);
        }
        let left = usize::try_from(end.min(stop_at) - at).unwrap_or(usize::MAX);
        let room = piece.len().min(left);
        let got = file.read(&mut piece[..room])?;
        if got == 0 {
            return Ok(false);
        }
        let got_len = u64::try_from(got).map_err(io::Error::other)?;
        if let Fault::FlipAt(flip) = fault
            && (at..at + got_len).contains(&flip)
        {
            let index = usize::try_from(flip - at).map_err(io::Error::other)?;
            piece[index] = !piece[index];
        }
        if is_another {
            piece.iter_mut().for_each(|byte| *byte = !*byte);
        }
        stream.write_all(&piece[..got])?;
        shared.body_bytes.fetch_add(got_len, Ordering::SeqCst);
        at += got_len;
    }
    Ok(true)
}

/// Keeps the connection as it is until the server stops.
fn stall(shared: &Shared) {
    let pause = Duration::from_millis(20);
    let mut left = STALL_MAX;
    while !left.is_zero() && !shared.stopping.load(Ordering::SeqCst) {
        thread::sleep(pause);
        left = left.saturating_sub(pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One request on a connection of its own: head and body as received.
    fn get(server: &Server, range: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let head = format!("GET /file HTTP/1.1\r\nHost: h\r\n{range}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        let split = all
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .unwrap()
            + 4;
        (
            String::from_utf8(all[..split].to_vec()).unwrap(),
            all[split..].to_vec(),
        )
    }

    #[test]
    fn serves_ranges_and_misbehaves_as_told() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        std::fs::write(dir.path().join("file"), &content).unwrap();
        let server = Server::start(dir.path().to_owned()).unwrap();

        let (head, body) = get(&server, "");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(body, content);
        let (head, body) = get(&server, "Range: bytes=10-19\r\n");
        assert!(head.contains("Content-Range: bytes 10-19/100000"), "{head}");
        assert_eq!(body, &content[10..20]);
        assert_eq!(server.ranges(), [(10, 10)]);

        server.set_fault(Fault::CutOnceAt(500));
        assert_eq!(get(&server, "").1.len(), 500);
        assert_eq!(get(&server, "").1.len(), content.len());
        server.set_fault(Fault::CutAt(500));
        assert_eq!(get(&server, "").1.len(), 500);
        assert_eq!(get(&server, "Range: bytes=400-\r\n").1.len(), 100);
        let behind = get(&server, "Range: bytes=600-\r\n").1;
        assert_eq!(behind.len(), content.len() - 600);
        server.set_fault(Fault::FlipAt(70_000));
        let (_, flipped) = get(&server, "Range: bytes=1000-\r\n");
        assert_eq!(flipped[69_000], !content[70_000]);
        assert_eq!(flipped[..69_000], content[1000..70_000]);
        for fault in [Fault::RetagAt(500), Fault::ReplaceAt(500)] {
            server.set_fault(fault);
            assert_eq!(get(&server, "").1, content[..500]);
            assert_ne!(get(&server, "").0, get(&server, "").0);
            let same = get(&server, "").1 == content;
            assert_eq!(same, fault == Fault::RetagAt(500));
        }
        server.set_fault(Fault::NoRanges);
        assert_eq!(
            get(&server, "Range: bytes=10-19\r\n").1.len(),
            content.len()
        );
    }
}
