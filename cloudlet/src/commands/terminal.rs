//! The user's terminal while its keys go to a guest: raw, its size, and as it was before however that
//! ends; and the signals that end it.

use std::fs;
use std::process::ExitCode;

use cloudlet_agent::protocol::Size;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, QueueSelector, SpecialCodeIndex, Termios,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// Signals that are to end a command.
pub(super) const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// Those of [`ENDING`] that whoever started this process did not have it ignore, as nohup does.
pub(super) fn ending_signals() -> Vec<i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = ignored_in(&status);
    let mut signals = ENDING.to_vec();
    signals.retain(|signal| ignored & (1 << (signal - 1)) == 0);
    signals
}

/// The signals that a process ignores, by its status (proc_pid_status(5)): bit 0 is signal 1.
fn ignored_in(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// The exit code of a command that a signal ended, as shells show it.
pub(super) fn code_of_signal(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// As [`code_of_signal`], for a process.
pub(super) fn exit_of_signal(signal: i32) -> ExitCode {
    ExitCode::from(code_of_signal(signal))
}

/// The terminal's size; nothing, if there is no terminal, or it has no size.
pub(super) fn size() -> Option<Size> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout())
        .or_else(|_| rustix::termios::tcgetwinsize(rustix::stdio::stdin()))
        .ok()?;
    let size = Size {
        rows: size.ws_row,
        columns: size.ws_col,
    };
    (size != Size::default()).then_some(size)
}

/// The terminal on standard input, handing over each key as it is typed; as it was before when
/// dropped.
#[derive(Default)]
pub(super) struct RawTerminal(Option<Termios>);

impl RawTerminal {
    /// Does nothing where standard input is not a terminal.
    pub(super) fn enter() -> Self {
        let stdin = rustix::stdio::stdin();
        let Ok(before) = rustix::termios::tcgetattr(stdin) else {
            return Self(None);
        };
        let mut raw = before.clone();
        raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        raw.input_modes -= InputModes::ICRNL | InputModes::IXON;
        // A read waits for a key, so that reading nothing is the terminal's end.
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        let set = rustix::termios::tcsetattr(stdin, OptionalActions::Now, &raw);
        Self(set.is_ok().then_some(before))
    }

    /// Whether standard input is a terminal whose keys are handed over.
    pub(super) fn is_terminal(&self) -> bool {
        self.0.is_some()
    }

    /// Makes the terminal what it was. Without waiting for its output, which may be stopped; keys that
    /// were for the guest are forgotten.
    pub(super) fn restore(&self) {
        if let Some(before) = &self.0 {
            let stdin = rustix::stdio::stdin();
            // The terminal may be gone, and then needs no mode.
            let _ = rustix::termios::tcflush(stdin, QueueSelector::IFlush);
            let _ = rustix::termios::tcsetattr(stdin, OptionalActions::Now, before);
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.restore();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read() {
        // SIGHUP and SIGPIPE: of a process under nohup.
        let status = "Name:\tx\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000001001\n";
        assert_eq!(ignored_in(status), 1 << (SIGHUP - 1) | 1 << 12);
        assert_eq!(ignored_in(""), 0);
        assert_eq!(code_of_signal(SIGHUP), 129);
    }
}
