//! Reading an image of another format, in a process of its own: a child that gets the image, an
//! empty file and a pipe, gives up the right to open anything else before it looks at the image,
//! and fills the file. The VMM process only ever sees the raw file.
//!
//! The child says a line for each step: `progress DONE TOTAL`; anything else is why it failed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use cloudlet_vmm::devices::disk::qcow2;
use cloudlet_vmm::seccomp::{self, ThreadKind};
use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};

use super::Failure;
use crate::plain;
use crate::synthesis::chain;

/// The hidden command that the child runs.
pub const IMAGE_COMMAND: &str = "image-process";

/// Address space of the child: the tables of an image take 350 MiB at the most.
const ADDRESS_SPACE_MAX: u64 = 1 << 30;
/// Bytes between two words of progress.
const PROGRESS_STEP: u64 = 16 << 20;
/// Longest line that is taken of the child, and the part of one that is shown.
const LINE_LEN_MAX: u64 = 4096;
const WORDS_LEN_MAX: usize = 400;

/// A raw file without a name, in `scratch`, with what the guest is to see of the qcow2 image.
pub(super) fn raw(
    image: File,
    scratch: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<File, Failure> {
    let out = tempfile::tempfile_in(scratch)?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("cloudlet")
        .arg(IMAGE_COMMAND)
        .stdin(image)
        .stdout(out.try_clone()?)
        .stderr(Stdio::piped())
        .spawn()?;
    let pipe = child.stderr.take().ok_or("the child has no pipe")?;
    let words = listen(pipe, progress);
    let status = child.wait()?;
    if status.success() {
        return Ok(out);
    }
    let words = words.unwrap_or_else(|error| error.to_string());
    Err(match seccomp::explain(status, &words) {
        Some(violation) => violation.into(),
        None if words.is_empty() => format!("the process that read it ended ({status})").into(),
        None => words.into(),
    })
}

/// Passes progress on; returns the last line that is none. The child may have been taken over by the
/// image that it reads.
fn listen(pipe: impl Read, progress: &mut dyn FnMut(u64, u64)) -> io::Result<String> {
    let mut lines = BufReader::new(pipe);
    let mut words = String::new();
    loop {
        let mut line = Vec::new();
        if lines
            .by_ref()
            .take(LINE_LEN_MAX)
            .read_until(b'\n', &mut line)?
            == 0
        {
            return Ok(words);
        }
        let line = String::from_utf8_lossy(&line);
        let line = line.trim();
        match parse_progress(line) {
            Some((done, total)) => progress(done, total),
            None if line.is_empty() => {}
            None => {
                words = plain::line(line).chars().take(WORDS_LEN_MAX).collect();
            }
        }
    }
}

fn parse_progress(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.strip_prefix("progress ")?.split_once(' ')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// The child.
pub fn main() -> ! {
    match convert() {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            // A parent that is gone needs to know nothing.
            let _ = writeln!(io::stderr(), "{}", chain(error.as_ref()));
            std::process::exit(1)
        }
    }
}

fn convert() -> Result<(), Failure> {
    let image = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let stat = rustix::fs::fstatvfs(&out)?;
    let room = stat.f_bavail.saturating_mul(stat.f_frsize);
    let limit = |maximum| Rlimit {
        current: Some(maximum),
        maximum: Some(maximum),
    };
    // Nothing of the VMM process outlives it. One that is gone already shows at the first words that
    // its pipe does not take.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    setrlimit(Resource::As, limit(ADDRESS_SPACE_MAX))?;
    setrlimit(Resource::Core, limit(0))?;
    seccomp::prepare(io::stderr().as_fd().try_clone_to_owned()?)?;
    seccomp::install(ThreadKind::Image)?;
    let mut told = 0;
    qcow2::copy(image, &out, room, &mut |done, total| {
        if done == 0 || done == total || done - told >= PROGRESS_STEP {
            told = done;
            writeln!(io::stderr(), "progress {done} {total}")?;
        }
        Ok(())
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_was_taken_over_says_little() {
        let mut told = Vec::new();
        let said =
            b"progress 1 2\nprogress x y\n\x1b[2Jone\n\nprogress 18446744073709551616 1\nlast\x07";
        let words = listen(&said[..], &mut |done, total| told.push((done, total))).unwrap();
        assert_eq!(words, "last?");
        assert_eq!(told, [(1, 2)]);
        let endless = vec![b'x'; 1 << 20];
        let words = listen(&endless[..], &mut |_, _| {}).unwrap();
        assert_eq!(words.len(), WORDS_LEN_MAX);
    }
}
