//! The agent's program: listens, and serves sessions for ever. It also starts the process of an imported
//! image, and tells the VM what that ended with, for `resources/linux/init`.
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use cloudlet_agent::entry;
use cloudlet_agent::protocol::{PORT, VERSION};
use cloudlet_agent::server::{self, Address};

fn usage() -> String {
    format!(
        "cloudlet-agent: runs commands, copies files and trims disks for the host of a VM\n\n\
         Usage: cloudlet-agent [--listen vsock:PORT | --listen unix:PATH]\n\
         \x20      cloudlet-agent --run-entry FILE | --tell-exit-code CODE\n\n\
         \x20 --listen          where to listen [default: vsock:{PORT}]; a Unix socket serves its owner\n\
         \x20 --run-entry       become the process of an imported image\n\
         \x20 --tell-exit-code  tell the VM what that process has ended with\n\
         \x20 --version         print the version"
    )
}

fn print(text: &str) -> ExitCode {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn tell(code: &str) -> ExitCode {
    match code.parse().map(cloudlet_agent::tell_exit_code) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            server::tell(&format!("cloudlet-agent: cannot tell the VM: {error}"));
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::from(2),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let address = match words.as_slice() {
        [] => Some(Address::Vsock(PORT)),
        ["--listen", address] => Address::parse(address),
        ["--run-entry", file] => {
            let error = entry::run(Path::new(file));
            server::tell(&format!("cloudlet-agent: {}", server::chain(&error)));
            return ExitCode::from(error.exit_code());
        }
        ["--tell-exit-code", code] => return tell(code),
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
