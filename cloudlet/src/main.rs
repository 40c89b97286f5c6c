//! The program: reads the command line, does it, says what went wrong.
#![forbid(unsafe_code)]
// What commands print goes through `commands/output.rs`, which bears a closed pipe.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod cli;
mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let code = match commands::run(&cli) {
        Ok(code) => code,
        Err(error) => {
            // The chain's links name their own part only; `:#` joins them.
            commands::tell(&format!("cloudlet: {error:#}"));
            ExitCode::FAILURE
        }
    };
    commands::exit_code(code)
}
