//! The command line itself: help, exit codes, and what is said to a user who mistypes.

use super::{Case, Needs};
use crate::ensure;
use crate::failure::Outcome;
use crate::host::Host;

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
