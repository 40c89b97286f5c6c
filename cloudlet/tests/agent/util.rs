//! An agent of the test's own, and streams to give to commands.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cloudlet::agent::{self, Control, Error, Streams};
use cloudlet_agent::protocol::{End, Exec};
use cloudlet_resources::AGENT_ELF;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(20);

/// A running agent, ended when dropped.
pub(crate) struct Agent {
    dir: TempDir,
    child: Child,
}

impl Agent {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("cloudlet-agent");
        // Written by another process: were it open for writing here while another test forks, it
        // could not be run.
        let mut copy = Command::new("cp")
            .args(["/dev/stdin"])
            .arg(&program)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        copy.stdin.take().unwrap().write_all(AGENT_ELF).unwrap();
        assert!(copy.wait().unwrap().success());
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        // As a start script's shell may start it: with signals ignored, which commands must not be.
        let child = Command::new("sh")
            .args(["-c", "trap '' HUP INT QUIT TERM; exec \"$@\"", "sh"])
            .arg(&program)
            .arg("--listen")
            .arg(format!("unix:{}", dir.path().join("socket").display()))
            .spawn()
            .unwrap();
        let agent = Self { dir, child };
        wait_for("the agent", || agent.try_connect().ok());
        agent
    }

    fn try_connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.dir.path().join("socket"))
    }

    pub(crate) fn connect(&self) -> UnixStream {
        self.try_connect().unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs `command` with `input`.
    pub(crate) fn run(&self, command: &Exec<'_>, input: &[u8]) -> Outcome {
        let (streams, _control, output, error) = streams(io::Cursor::new(input.to_vec()));
        let result = agent::exec(self.connect(), command, streams);
        Outcome {
            result,
            output: output.take(),
            error: error.take(),
        }
    }

    pub(crate) fn shell(&self, script: &str, input: &[u8]) -> Outcome {
        self.run(&shell(script), input)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// `sh -c SCRIPT`.
pub(crate) fn shell(script: &str) -> Exec<'_> {
    Exec {
        arguments: vec![b"sh", b"-c", script.as_bytes()],
        ..Exec::default()
    }
}

pub(crate) struct Outcome {
    pub(crate) result: Result<(End, String), Error>,
    pub(crate) output: Vec<u8>,
    pub(crate) error: Vec<u8>,
}

impl Outcome {
    #[track_caller]
    pub(crate) fn end(&self) -> End {
        self.result.as_ref().unwrap().0
    }

    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        assert_eq!(
            self.end(),
            End::Code(0),
            "{}",
            String::from_utf8_lossy(&self.error)
        );
        std::str::from_utf8(&self.output).unwrap()
    }
}

/// Keeps what is written.
#[derive(Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    pub(crate) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn streams(input: impl Read + Send + 'static) -> (Streams, Sender<Control>, Kept, Kept) {
    let (sender, control) = mpsc::channel();
    let (output, error) = (Kept::default(), Kept::default());
    let streams = Streams {
        input: Box::new(input),
        output: Box::new(output.clone()),
        error: Box::new(error.clone()),
        control,
    };
    (streams, sender, output, error)
}

#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that look random, the same each time.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut reader = blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof();
    reader.fill(&mut bytes);
    bytes
}

/// Everything below `dir` but itself, as words: kind, mode, time, contents.
pub(crate) fn listing(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    list(dir, &PathBuf::new(), &mut found);
    found.sort();
    found
}

fn list(dir: &Path, below: &Path, found: &mut Vec<String>) {
    use std::os::unix::fs::MetadataExt;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = below.join(path.file_name().unwrap());
        let meta = fs::symlink_metadata(&path).unwrap();
        let contents = if meta.is_dir() {
            list(&path, &name, found);
            String::from("directory")
        } else if meta.is_symlink() {
            format!("-> {:?}", fs::read_link(&path).unwrap())
        } else {
            blake3::hash(&fs::read(&path).unwrap()).to_string()
        };
        let (mode, time) = (meta.mode(), (meta.mtime(), meta.mtime_nsec()));
        found.push(format!("{name:?} {mode:o} {time:?} {contents}"));
    }
}
