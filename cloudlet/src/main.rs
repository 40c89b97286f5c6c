//! The program: reads the command line, does it, says what went wrong.
#![forbid(unsafe_code)]

mod cli;
mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match commands::run(&cli) {
        Ok(code) => code,
        Err(error) => {
            // The chain's links name their own part only; `:#` joins them.
            eprintln!("cloudlet: {error:#}");
            ExitCode::FAILURE
        }
    }
}
