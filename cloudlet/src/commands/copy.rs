//! `cp`: files to a Linux guest and from it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use cloudlet::agent;
use cloudlet::registry::VmName;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Host;
use super::output::{megabytes, tell};
use super::terminal::exit_of_signal;
use crate::cli::Cp;

/// What stands on either side of the copy.
#[derive(Debug, PartialEq, Eq)]
enum End<'a> {
    Host(&'a Path),
    Guest { vm: &'a str, path: &'a OsStr },
}

/// Reads `VM:PATH` or `PATH`: what comes before a colon is a VM if it can be one's name.
fn parse(text: &OsStr) -> End<'_> {
    let bytes = text.as_bytes();
    let colon = bytes.iter().position(|&byte| byte == b':');
    let guest = colon.and_then(|colon| {
        let vm = std::str::from_utf8(&bytes[..colon]).ok()?;
        VmName::new(vm).ok()?;
        let path = OsStr::from_bytes(&bytes[colon + 1..]);
        Some(End::Guest { vm, path })
    });
    guest.unwrap_or(End::Host(Path::new(text)))
}

pub(super) fn copy(host: &Host, args: &Cp) -> Result<ExitCode> {
    let (source, destination) = (parse(&args.source), parse(&args.destination));
    let vm = match (&source, &destination) {
        (End::Guest { vm, .. }, End::Host(_)) | (End::Host(_), End::Guest { vm, .. }) => *vm,
        (End::Host(_), End::Host(_)) => {
            bail!("neither of the two is in a VM: write VM:PATH for one of them")
        }
        _ => bail!("both are in VMs: copy to the host first"),
    };
    let stream = host.agent_of(vm, args.patience.limit())?;
    let interrupted = watch_interrupts(&stream).context("cannot watch for signals")?;
    let progress = host.output.progress();
    let mut show = |done, total| progress.show("copy", done, total);
    let copied = match (source, destination) {
        (End::Host(from), End::Guest { path, .. }) => {
            agent::put(stream, from, or_root(path), &mut show)
        }
        (End::Guest { path, .. }, End::Host(to)) => {
            agent::get(stream, or_root(path), to, &mut show)
        }
        _ => return Ok(ExitCode::FAILURE),
    };
    progress.finish();
    let signal = interrupted.load(Ordering::Relaxed);
    if copied.is_err() && signal != 0 {
        return Ok(exit_of_signal(signal));
    }
    let show = |text: &OsString| text.to_string_lossy().into_owned();
    let what = || format!("cannot copy {}", show(&args.source));
    let extent = copied.with_context(what)?;
    if extent.skipped > 0 {
        tell(&format!(
            "cloudlet: {} left out that are neither files, directories nor links",
            extent.skipped
        ));
    }
    if extent.stripped > 0 {
        tell(&format!(
            "cloudlet: extended attributes of {} left out: capabilities of files go into a guest, and none out of it",
            extent.stripped
        ));
    }
    let value = json!({
        "source": show(&args.source),
        "destination": show(&args.destination),
        "bytes": extent.bytes,
        "entries": extent.entries,
        "skipped": extent.skipped,
        "stripped": extent.stripped,
    });
    host.output.result(&value, || match extent.entries {
        1 => format!("copied {}", megabytes(extent.bytes)),
        entries => format!("copied {entries} entries, {}", megabytes(extent.bytes)),
    });
    Ok(ExitCode::SUCCESS)
}

/// A path in the guest; the root directory if there is none.
fn or_root(path: &OsStr) -> &OsStr {
    if path.is_empty() {
        OsStr::new("/.")
    } else {
        path
    }
}

/// Ends the connection at a signal, so that a file which is not whole is removed before this process
/// ends. The returned number is the signal's.
fn watch_interrupts(stream: &UnixStream) -> io::Result<Arc<AtomicI32>> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let stream = stream.try_clone()?;
    let seen = Arc::new(AtomicI32::new(0));
    let of_thread = Arc::clone(&seen);
    thread::spawn(move || {
        for signal in signals.forever() {
            of_thread.store(signal, Ordering::Relaxed);
            // One that is closed already is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    });
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_what_can_be_ones_name() {
        let guest = |vm, path| End::Guest {
            vm,
            path: OsStr::new(path),
        };
        assert_eq!(parse(OsStr::new("web:/etc/a:b")), guest("web", "/etc/a:b"));
        assert_eq!(parse(OsStr::new("web:")), guest("web", ""));
        for local in ["a", "./web:x", "/a:b", ":x", "-a:b", "a b:c"] {
            assert_eq!(parse(OsStr::new(local)), End::Host(Path::new(local)));
        }
    }
}
