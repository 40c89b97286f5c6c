//! The agent's program: listens, and serves sessions for ever.
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::{self, Write};
use std::process::ExitCode;

use cloudlet_agent::protocol::{PORT, VERSION};
use cloudlet_agent::server::{self, Address};

fn usage() -> String {
    format!(
        "cloudlet-agent: runs commands, copies files and trims disks for the host of a VM\n\n\
         Usage: cloudlet-agent [--listen vsock:PORT | --listen unix:PATH]\n\n\
         \x20 --listen   where to listen [default: vsock:{PORT}]; a Unix socket serves its owner\n\
         \x20 --version  print the version"
    )
}

fn print(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let address = match words.as_slice() {
        [] => Some(Address::Vsock(PORT)),
        ["--listen", address] => Address::parse(address),
        ["--version"] => {
            let version = env!("CARGO_PKG_VERSION");
            return print(&format!("cloudlet-agent {version} (protocol {VERSION})"));
        }
        ["--help"] => {
            return print(&usage());
        }
        _ => None,
    };
    let Some(address) = address else {
        server::tell(&usage());
        return ExitCode::from(2);
    };
    let Err(error) = server::run(&address);
    server::tell(&format!("cloudlet-agent: {}", server::chain(&error)));
    ExitCode::FAILURE
}
