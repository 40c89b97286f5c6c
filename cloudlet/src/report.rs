//! What a VM that has ended left of its end, in the file `report` of its directory: a line with the end's
//! name and exit code ([`ExitReason::name`]), and words behind it. An empty file is one of a VM that
//! lives, or was killed; a seccomp handler writes its words without the line. The VMM process may have been
//! taken over before it wrote, and the words go to a terminal: so many bytes, and no control characters.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use cloudlet_vmm::exit::ExitReason;
use cloudlet_vmm::seccomp;

use crate::plain;
use crate::registry::VmDir;

/// Most bytes read of what a VMM process left.
const WORDS_LEN_MAX: u64 = 64 << 10;
/// Longest name of an end.
const NAME_LEN_MAX: usize = 32;
/// The end of a process that was killed.
const KILLED: &str = "killed";
/// The end of one that made a forbidden call.
const VIOLATION: &str = "seccomp-violation";

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// A short name for scripts: that of [`ExitReason::name`], `seccomp-violation` or `killed`.
    pub end: String,
    /// The exit code of its process. That of an `exited` VM is its guest's, whatever the number means
    /// otherwise.
    pub code: Option<u8>,
    /// In words; none if somebody wanted it to end.
    pub words: String,
}

/// How a VM ended, for whoever only asks whether it was meant to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It was stopped or powered off.
    InOrder,
    /// It said why.
    Reported(String),
    /// Its process went without a word.
    Killed,
}

impl Report {
    /// What the VM of `dir` left; one that left nothing was killed.
    #[must_use]
    pub fn of(dir: &VmDir) -> Self {
        Self::parse(&read_text(&dir.report()))
    }

    /// What is in a report that was opened while the VM lived: its directory may be gone.
    #[must_use]
    pub fn read(report: &File) -> Self {
        Self::parse(&text_of(report))
    }

    fn parse(text: &str) -> Self {
        let named = text.split_once('\n').and_then(|(line, words)| {
            let (name, code) = line.split_once(' ')?;
            let is_name = |c: char| c.is_ascii_lowercase() || c == '-';
            let good = name.len() <= NAME_LEN_MAX && name.chars().all(is_name);
            Some((name, code.parse().ok().filter(|_| good)?, words))
        });
        match named {
            Some((name, code, words)) => Self {
                end: name.to_owned(),
                code: Some(code),
                words: words.trim().to_owned(),
            },
            None if text.is_empty() => Self {
                end: KILLED.to_owned(),
                code: None,
                words: String::new(),
            },
            None => Self {
                end: VIOLATION.to_owned(),
                code: u8::try_from(seccomp::EXIT_CODE_VIOLATION).ok(),
                words: text.trim().to_owned(),
            },
        }
    }

    /// The code that the guest's process ended with, if that is why the VM did.
    #[must_use]
    pub fn guest_code(&self) -> Option<u8> {
        self.code
            .filter(|_| self.end == ExitReason::Exited { code: 0 }.name())
    }

    fn is_orderly(&self) -> bool {
        let ends = [ExitReason::Shutdown, ExitReason::Stopped];
        self.guest_code().is_some() || ends.iter().any(|end| end.name() == self.end)
    }
}

/// The report in `dir`, in words; none if the VM lives, was killed, or was to end.
#[must_use]
pub fn read_report(dir: &VmDir) -> Option<String> {
    let words = Report::of(dir).words;
    (!words.is_empty()).then_some(words)
}

/// What an ended VM's report says, which was opened while the VM lived: its directory may be gone.
#[must_use]
pub fn end_of(report: &File) -> End {
    match Report::read(report) {
        report if report.is_orderly() => End::InOrder,
        report if report.end == KILLED => End::Killed,
        report => End::Reported(report.words),
    }
}

/// Leaves word of the VM's end.
pub(crate) fn write(mut file: &File, reason: &ExitReason) {
    let words = match reason {
        ExitReason::Shutdown | ExitReason::Stopped => String::new(),
        reason => reason.to_string(),
    };
    let text = format!("{} {}\n{words}", reason.name(), reason.code());
    // A full disk loses the words, not the exit code.
    let _ = file.write_all(text.as_bytes());
}

/// What a VMM process left in the file at `path`, without white space around it; what cannot be read was
/// not said.
pub(crate) fn read_words(path: &Path) -> String {
    read_text(path).trim().to_owned()
}

fn read_text(path: &Path) -> String {
    File::open(path).map_or_else(|_| String::new(), |file| text_of(&file))
}

fn text_of(mut file: &File) -> String {
    let mut bytes = Vec::new();
    // It may have been read before.
    let _ = file.rewind();
    let _ = file.take(WORDS_LEN_MAX).read_to_end(&mut bytes);
    plain::lines(&String::from_utf8_lossy(&bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_cannot_steer_the_terminal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        std::fs::write(&path, b"\x1b[2Jtwo\nlines\xff\x07\n").unwrap();
        assert_eq!(read_words(&path), "?[2Jtwo\nlines\u{fffd}?");
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(read_words(&path).len(), 64 << 10);
        assert_eq!(read_words(&dir.path().join("none")), "");
    }

    fn left(text: &str) -> (Report, End) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        std::fs::write(&path, text).unwrap();
        (
            Report::parse(&read_text(&path)),
            end_of(&File::open(&path).unwrap()),
        )
    }

    fn after(reason: &ExitReason) -> (Report, End) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        write(&File::create(&path).unwrap(), reason);
        left(&std::fs::read_to_string(&path).unwrap())
    }

    #[test]
    fn an_orderly_end_is_told_from_a_killed_process() {
        assert_eq!(left("").1, End::Killed);
        assert_eq!(left("").0.end, "killed");
        for reason in [ExitReason::Shutdown, ExitReason::Stopped] {
            let (report, end) = after(&reason);
            assert_eq!((report.words.as_str(), end), ("", End::InOrder));
            assert_eq!((report.end.as_str(), report.code), (reason.name(), Some(0)));
        }
        let words = "triple fault on vCPU 0";
        let (report, end) = after(&ExitReason::TripleFault { cpu: 0 });
        assert_eq!(end, End::Reported(words.to_owned()));
        assert_eq!(
            (report.end.as_str(), report.code),
            ("triple-fault", Some(11))
        );
        assert_eq!(report.guest_code(), None);
    }

    #[test]
    fn the_agent_writes_to_the_port_that_is_read() {
        let port = u64::from(cloudlet_agent::EXIT_CODE_PORT);
        assert_eq!(port, cloudlet_vmm::machine::EXIT_CODE_PORT);
    }

    #[test]
    fn a_guests_code_is_told_from_the_vms_own() {
        for code in [0, 11, 159] {
            let (report, end) = after(&ExitReason::Exited { code });
            assert_eq!((report.guest_code(), end), (Some(code), End::InOrder));
        }
        let (report, end) = left("seccomp: a call\n");
        assert_eq!(
            (report.end.as_str(), report.code),
            ("seccomp-violation", Some(159))
        );
        assert_eq!(end, End::Reported("seccomp: a call".to_owned()));
        // Whatever is written, the name is one.
        for odd in [
            "A 1\nx",
            "exited 256\nx",
            "exited\nx",
            "exited 1",
            "a/b 1\nx",
        ] {
            assert_eq!(left(odd).0.end, "seccomp-violation", "{odd:?}");
        }
    }
}
