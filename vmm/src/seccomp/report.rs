//! The line that a violation leaves, and how the parent reads it. The line comes from a process
//! that just did what it must not do, so it is parsed as hostile: bounded, of known shape, and
//! the name of the call is looked up again from its number.

use super::{EXIT_CODE_VIOLATION, syscall_name};
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Longest thread name with its final zero: TASK_COMM_LEN of include/linux/sched.h.
pub(super) const THREAD_BYTES_MAX: usize = 16;

/// Longest report line: four words, a thread name, the longest call name and three arguments.
/// Below PIPE_BUF, so that a pipe takes it whole.
pub(super) const LINE_BYTES_MAX: usize = 256;

/// A call that a filter refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Name of the thread, such as `vcpu0`.
    pub thread: String,
    /// Number of the call.
    pub syscall: i32,
    /// Its first three arguments: a call can be allowed with some and refused with others.
    pub arguments: [u64; 3],
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = syscall_name(self.syscall).unwrap_or("an unknown system call");
        let [a, b, c] = self.arguments;
        write!(
            f,
            "seccomp: thread {} called {name} ({}): not in its policy [{a:#x} {b:#x} {c:#x}]",
            self.thread, self.syscall
        )
    }
}

/// Finds the violation in what a VMM process wrote to its report descriptor.
#[must_use]
pub fn parse_report(report: &str) -> Option<Violation> {
    report.lines().find_map(parse_line)
}

/// Says why a VMM process ended, where the answer is seccomp: `report` is all that it wrote to
/// its report descriptor.
#[must_use]
pub fn explain(status: ExitStatus, report: &str) -> Option<String> {
    if status.signal() == Some(libc::SIGSYS) {
        return Some("seccomp: killed for a system call of a foreign architecture".to_owned());
    }
    if status.code() != Some(EXIT_CODE_VIOLATION) {
        return None;
    }
    Some(parse_report(report).map_or_else(
        || "seccomp: ended for a forbidden system call, without a report".to_owned(),
        |violation| violation.to_string(),
    ))
}

fn parse_line(line: &str) -> Option<Violation> {
    if line.len() > LINE_BYTES_MAX {
        return None;
    }
    let rest = line.strip_prefix("seccomp: thread ")?;
    let (thread, rest) = rest.split_once(" called ")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if thread.is_empty() || thread.len() >= THREAD_BYTES_MAX || !thread.chars().all(plain) {
        return None;
    }
    let (_, rest) = rest.split_once(" (")?;
    let (syscall, rest) = rest.split_once("): not in its policy [")?;
    let syscall = syscall.parse().ok()?;
    let mut words = rest.strip_suffix(']')?.split(' ');
    let mut arguments = [0; 3];
    for argument in &mut arguments {
        *argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    }
    words.next().is_none().then(|| Violation {
        thread: thread.to_owned(),
        syscall,
        arguments,
    })
}

/// Writes the line of a violation and returns its length. Safe in a signal handler: no memory is
/// allocated, no lock taken.
pub(super) fn format_line(
    line: &mut [u8; LINE_BYTES_MAX],
    label: &[u8; THREAD_BYTES_MAX],
    syscall: i32,
    arguments: [u64; 3],
) -> usize {
    let mut to = Cursor { line, length: 0 };
    to.text(b"seccomp: thread ");
    to.label(label);
    to.text(b" called ");
    to.text(
        syscall_name(syscall)
            .unwrap_or("an unknown system call")
            .as_bytes(),
    );
    to.text(b" (");
    if syscall < 0 {
        to.text(b"-");
    }
    to.number(u64::from(syscall.unsigned_abs()), 10);
    to.text(b"): not in its policy [");
    for (index, argument) in arguments.into_iter().enumerate() {
        to.text(if index == 0 { b"0x" } else { b" 0x" });
        to.number(argument, 16);
    }
    to.text(b"]\n");
    to.length
}

/// The same for a SIGSYS that no filter sent.
pub(super) fn format_signal(
    line: &mut [u8; LINE_BYTES_MAX],
    label: &[u8; THREAD_BYTES_MAX],
) -> usize {
    let mut to = Cursor { line, length: 0 };
    to.text(b"seccomp: SIGSYS from another process reached thread ");
    to.label(label);
    to.text(b"\n");
    to.length
}

/// Appends to a fixed line and drops what does not fit.
struct Cursor<'a> {
    line: &'a mut [u8; LINE_BYTES_MAX],
    length: usize,
}

impl Cursor<'_> {
    fn text(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if let Some(to) = self.line.get_mut(self.length) {
                *to = byte;
                self.length += 1;
            }
        }
    }

    fn label(&mut self, label: &[u8; THREAD_BYTES_MAX]) {
        let end = label
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(label.len());
        self.text(&label[..end]);
    }

    fn number(&mut self, mut number: u64, base: u64) {
        // 20 decimal digits hold a u64.
        let mut digits = [0; 20];
        let mut first = digits.len();
        while first > 0 {
            first -= 1;
            digits[first] = usize::try_from(number % base)
                .ok()
                .and_then(|digit| b"0123456789abcdef".get(digit).copied())
                .unwrap_or(b'?');
            number /= base;
            if number == 0 {
                break;
            }
        }
        self.text(&digits[first..]);
    }
}
