//! The agent's program: listens, and serves sessions for ever.
#![forbid(unsafe_code)]

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

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let address = match words.as_slice() {
        [] => Some(Address::Vsock(PORT)),
        ["--listen", address] => Address::parse(address),
        ["--version"] => {
            println!(
                "cloudlet-agent {} (protocol {VERSION})",
                env!("CARGO_PKG_VERSION")
            );
            return ExitCode::SUCCESS;
        }
        ["--help"] => {
            println!("{}", usage());
            return ExitCode::SUCCESS;
        }
        _ => None,
    };
    let Some(address) = address else {
        eprintln!("{}", usage());
        return ExitCode::from(2);
    };
    let Err(error) = server::run(&address);
    eprintln!("cloudlet-agent: {}", server::chain(&error));
    ExitCode::FAILURE
}
