//! `fluid` for Linux: the same liquid in a process, which answers over a Unix socket. No timer
//! advances it, so that the same requests have the same answers.
//!
//!     fluid serve SOCKET [PARAMETERS...]    fills the tanks, then answers for ever
//!     fluid ask SOCKET REQUEST...           one request; the answer's words, and its picture's hash
#![allow(dead_code, reason = "the modules are the embedded guest's, which uses more of them")]

extern crate alloc;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;

#[path = "../../src/hash.rs"]
mod hash;
#[path = "../shared/lanes.rs"]
mod lanes;
#[path = "../shared/math.rs"]
mod math;
mod render;
mod sim;
mod tanks;
#[path = "../shared/words.rs"]
mod words;

use tanks::{Settings, Tanks};

/// Longest request.
const REQUEST_LEN_MAX: u64 = 4096;
/// Longest answer: the largest picture and words.
const ANSWER_LEN_MAX: u64 = 64 << 20;
const USAGE: &str = "usage: fluid serve SOCKET [PARAMETERS...] | fluid ask SOCKET REQUEST...";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.as_slice() {
        [command, socket, rest @ ..] if command == "serve" => serve(socket, &rest.join(" ")),
        [command, socket, rest @ ..] if command == "ask" && !rest.is_empty() => {
            ask(socket, &rest.join(" "))
        }
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fluid: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(socket: &str, parameters: &str) -> Result<(), String> {
    let mut tanks = Tanks::new(Settings::parse(parameters)?)?;
    tanks.warm_up();
    let listener = UnixListener::bind(socket).map_err(|e| format!("{socket}: {e}"))?;
    for client in listener.incoming() {
        // A client that is gone has asked for nothing.
        if let Ok(client) = client {
            let _ = answer(&mut tanks, client);
        }
    }
    Ok(())
}

/// An answer is `ok` or `no`, a space, words, the end of the line, and the picture's bytes.
fn answer(tanks: &mut Tanks, mut client: UnixStream) -> std::io::Result<()> {
    let mut request = String::new();
    (&client).take(REQUEST_LEN_MAX).read_to_string(&mut request)?;
    let (mark, text, picture) = match request.as_str() {
        "verify" => match tanks.verify() {
            Ok(text) => ("ok", text, Vec::new()),
            Err(text) => ("no", text, Vec::new()),
        },
        request => match tanks.request(request) {
            Ok((text, picture)) => ("ok", text, picture),
            Err(text) => ("no", text, Vec::new()),
        },
    };
    writeln!(client, "{mark} {text}")?;
    client.write_all(&picture)
}

fn ask(socket: &str, request: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{socket}: {error}");
    let mut server = UnixStream::connect(socket).map_err(failed)?;
    server.write_all(request.as_bytes()).map_err(failed)?;
    server.shutdown(Shutdown::Write).map_err(failed)?;
    let mut bytes = Vec::new();
    server
        .take(ANSWER_LEN_MAX)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let end = bytes.iter().position(|&byte| byte == b'\n');
    let (line, picture) = bytes.split_at(end.ok_or("the answer was cut")?);
    let line = String::from_utf8_lossy(line);
    let picture = &picture[1..];
    match line.split_once(' ') {
        Some(("ok", text)) => {
            println!("{text}");
            if !picture.is_empty() {
                println!("{} bytes, {:016x}", picture.len(), hash::hash(picture));
            }
            Ok(())
        }
        Some((_, text)) => Err(text.to_owned()),
        None => Err("the answer is none".to_owned()),
    }
}
