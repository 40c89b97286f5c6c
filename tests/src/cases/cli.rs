//! The command line itself: help, exit codes, and what is said to a user who mistypes.

use std::fs::File;
use std::io;
use std::process::Stdio;

use super::{Case, Needs};
use crate::failure::Outcome;
use crate::host::Host;
use crate::{ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "cli_help_lists_the_commands",
        run: help,
        needs: Needs::NO_GUEST,
    },
    Case {
        name: "cli_unknown_command_is_a_usage_error",
        run: unknown,
        needs: Needs::NO_GUEST,
    },
    Case {
        name: "cli_output_that_nobody_reads_is_borne",
        run: closed_outputs,
        needs: Needs::NO_GUEST,
    },
];

fn help(host: &Host) -> Outcome {
    let text = host.ok(&["--help"])?;
    for command in [
        "demo",
        "run",
        "ps",
        "base",
        "overlay",
        "synthesize",
        "snapshot",
        "restore",
    ] {
        ensure!(
            text.contains(command),
            "--help does not name {command}:\n{text}"
        );
    }
    Ok(())
}

fn unknown(host: &Host) -> Outcome {
    let stderr = host.fails(&["no-such-command"], 2)?;
    ensure!(
        stderr.contains("no-such-command"),
        "the word is not named: {stderr}"
    );
    Ok(())
}

/// Commands that print, with a reader that has left, and with a place that takes nothing.
fn closed_outputs(host: &Host) -> Outcome {
    let closed = || io::pipe().map(|(_, writer)| Stdio::from(writer));
    for args in [&["ps"][..], &["base", "ls"], &["completions", "bash"]] {
        let output = host.command(args).stdout(closed()?).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        let seen = (output.status.code(), said.as_ref());
        ensure_eq!(seen, (Some(141), ""), "{args:?} into a closed pipe");
        let full = File::options().write(true).open("/dev/full")?;
        let output = host.command(args).stdout(full).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure_eq!(output.status.code(), Some(1), "{args:?} > /dev/full");
        ensure!(
            said.starts_with("cloudlet: cannot write to standard output: "),
            "{args:?} > /dev/full: {said}"
        );
    }
    let mut stop = host.command(&["stop", "none"]);
    let status = stop.stdout(closed()?).stderr(closed()?).status()?;
    ensure_eq!(status.code(), Some(1), "an error that nobody reads");
    Ok(())
}
