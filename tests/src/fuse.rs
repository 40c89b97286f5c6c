//! A file server that never answers: FUSE spoken raw over `/dev/fuse` (include/uapi/linux/fuse.h,
//! fuse(4)). It says that every name is a regular file, which everybody may look at, and keeps silent
//! when one of them is to be opened: whoever does waits in the kernel. Needs root, and mounts of
//! the case's own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::failure::Outcome;
use crate::namespace;

/// Requests of fuse.h that are answered, those that have no answer, and the one that is counted.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;

/// `struct fuse_in_header`, and the largest request: what a write of 128 KiB takes.
const IN_HEADER_LEN: usize = 40;
const REQUEST_LEN_MAX: usize = (128 << 10) + 4096;
/// Protocol version of the answers.
const VERSION: [u32; 2] = [7, 31];
const FILE_BYTES: u64 = 1 << 20;

/// A mounted server, which is gone when this is dropped: whoever waits for it gets an error then.
pub struct SilentServer {
    device: Option<Arc<File>>,
    opens: Arc<AtomicU32>,
    at: std::path::PathBuf,
}

impl SilentServer {
    /// Mounts one at the directory `at`.
    pub fn mount(at: &Path) -> Outcome<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        namespace::mount("silent", at, "fuse", 0, &options)?;
        let device = Arc::new(device);
        let opens = Arc::<AtomicU32>::default();
        let (requests, counter) = (Arc::clone(&device), Arc::clone(&opens));
        // It ends with the mount: reading gives an error then.
        std::thread::spawn(move || serve(&requests, &counter));
        Ok(Self {
            device: Some(device),
            opens,
            at: at.to_owned(),
        })
    }

    /// How many wait for one of its files to open.
    #[must_use]
    pub fn opens(&self) -> u32 {
        self.opens.load(Ordering::Acquire)
    }
}

impl Drop for SilentServer {
    fn drop(&mut self) {
        // Ends the connection, and with it every wait.
        let _ = namespace::unmount_by_force(&self.at);
        self.device = None;
    }
}

fn serve(mut device: &File, opens: &AtomicU32) {
    let mut request = vec![0; REQUEST_LEN_MAX];
    while let Ok(length) = device.read(&mut request) {
        let Some(request) = request
            .get(..length)
            .filter(|got| got.len() >= IN_HEADER_LEN)
        else {
            return;
        };
        let word = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("8 bytes"));
        let kind = u32::from_le_bytes(request[4..8].try_into().expect("4 bytes"));
        let (unique, node) = (word(8), word(16));
        let mut error = 0;
        let body = match kind {
            INIT => init(),
            // Everything below the root, which is node 1, is one file.
            LOOKUP => [&entry()[..], &attributes(2)].concat(),
            GETATTR => [&[0; 16][..], &attributes(node)].concat(),
            OPEN => {
                opens.fetch_add(1, Ordering::Release);
                continue;
            }
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            _ => {
                error = -libc::ENOSYS;
                Vec::new()
            }
        };
        let length = u32::try_from(16 + body.len()).expect("answers are short");
        let mut answer = Vec::new();
        answer.extend(length.to_le_bytes());
        answer.extend(error.to_le_bytes());
        answer.extend(unique.to_le_bytes());
        answer.extend(body);
        // Nobody waits for the answer any more if it cannot be given.
        let _ = device.write_all(&answer);
    }
}

/// `struct fuse_init_out`.
fn init() -> Vec<u8> {
    let mut out: Vec<u8> = VERSION.iter().flat_map(|word| word.to_le_bytes()).collect();
    // Read-ahead, flags, queue lengths: none. The longest write follows.
    out.extend([0; 12]);
    out.extend((128_u32 << 10).to_le_bytes());
    out.resize(64, 0);
    out
}

/// `struct fuse_entry_out` up to its attributes: node 2, which is not remembered.
fn entry() -> [u8; 40] {
    let mut out = [0; 40];
    out[0] = 2;
    out
}

/// `struct fuse_attr` of the root directory or of the file.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size): (u32, u64) = if node == 1 {
        (libc::S_IFDIR | 0o755, 0)
    } else {
        (libc::S_IFREG | 0o644, FILE_BYTES)
    };
    let mut out = Vec::new();
    for word in [node, size, size / 512] {
        out.extend(word.to_le_bytes());
    }
    // Times and their nanoseconds.
    out.extend([0; 36]);
    for word in [mode, 1, 0, 0, 0, 4096, 0] {
        out.extend(word.to_le_bytes());
    }
    out
}
