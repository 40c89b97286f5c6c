//! Files, servers and threads that the tests share.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use cloudlet::fetch::{Location, Options, Stream};
use cloudlet::serve::{ServeOptions, Server};

/// A temporary directory with a `file.bin` of noise in it.
pub(crate) struct Folder {
    _directory: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
}

impl Folder {
    pub(crate) fn new(len: usize) -> Folder {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().to_owned();
        let bytes = noise(1, len);
        std::fs::write(path.join("file.bin"), &bytes).expect("writes");
        Folder {
            _directory: directory,
            path,
            bytes,
        }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.path.join("file.bin")
    }

    /// As a publisher does it: a new file under the old name.
    pub(crate) fn replace(&self, bytes: &[u8]) {
        let new = self.path.join("new");
        std::fs::write(&new, bytes).expect("writes");
        std::fs::rename(new, self.file()).expect("renames");
    }
}

/// Bytes that repeat nowhere near (xorshift64).
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub(crate) fn serve(folder: &Folder, options: ServeOptions) -> Server {
    Server::bind(&folder.path, "127.0.0.1:0", options).expect("a server")
}

pub(crate) fn http(server: &Server) -> Location {
    server.url("file.bin").parse().expect("a URL")
}

/// Options that give up soon.
pub(crate) fn impatient() -> Options {
    Options {
        stall_timeout: Duration::from_millis(300),
        retries: 1,
        ..Options::default()
    }
}

pub(crate) fn read_all(stream: &mut Stream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("reads");
    bytes
}

/// A server that does whatever a function says with each request, numbered from 0 over all
/// connections. The function writes the response; returning false closes the connection.
pub(crate) struct Scripted {
    pub(crate) address: SocketAddr,
    stopped: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Scripted {
    pub(crate) fn new(
        script: impl Fn(usize, &str, &mut TcpStream) -> bool + Send + Sync + 'static,
    ) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        let script = Arc::new((script, AtomicUsize::new(0)));
        let accepting = std::thread::spawn(move || {
            while let Ok((mut socket, _)) = listener.accept() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let script = Arc::clone(&script);
                std::thread::spawn(move || {
                    while let Some(request) = read_head(&mut socket) {
                        let number = script.1.fetch_add(1, Ordering::Relaxed);
                        if !(script.0)(number, &request, &mut socket) {
                            return;
                        }
                    }
                });
            }
        });
        Scripted {
            address,
            stopped,
            accepting: Some(accepting),
        }
    }

    /// Answers every request with these bytes and closes the connection.
    pub(crate) fn saying(response: impl Into<Vec<u8>>) -> Scripted {
        let response = response.into();
        Scripted::new(move |_, _, socket| {
            // The client may have seen enough.
            let _ = socket.write_all(&response);
            false
        })
    }

    pub(crate) fn location(&self) -> Location {
        format!("http://{}/x", self.address).parse().expect("a URL")
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn read_head(socket: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        match socket.read(&mut byte) {
            Ok(1) => bytes.push(byte[0]),
            _ => return None,
        }
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The first offset of the request's range.
pub(crate) fn asked_from(request: &str) -> usize {
    asked_range(request).expect("a range").0
}

/// First and last offset of the request's range, if there is one.
pub(crate) fn asked_range(request: &str) -> Option<(usize, Option<usize>)> {
    let spec = request
        .lines()
        .find_map(|line| line.strip_prefix("Range: bytes="))?;
    let (first, last) = spec.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()))
}
