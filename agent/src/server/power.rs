//! Shutting the guest down, as the init that runs it does it: services end, file systems are clean.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Error;
use crate::connection::Outgoing;
use crate::protocol::Reply;
use crate::sys;

/// The directory by which programs tell that systemd is the init (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";
/// systemd starts poweroff.target at SIGRTMIN+4 (systemd(1)). The kernel's SIGRTMIN is 32, and the C
/// library keeps two of those signals.
const SYSTEMD_SIGNAL: i32 = 34 + 4;
/// What others have for it, in the order of their directories.
const PROGRAMS: [&str; 3] = ["/usr/sbin/poweroff", "/sbin/poweroff", "/usr/bin/poweroff"];

/// How the guest is shut down.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// Its first program does it on this signal.
    Signal(i32),
    /// This program has it done.
    Program(&'static str),
}

/// The way for a guest whose first program is `init`.
fn way(init: &str, is_systemd: bool, exists: impl Fn(&str) -> bool) -> Result<Way, Error> {
    // Ours (resources/linux/init) is a script that busybox runs, and heeds the signal that busybox's own
    // init does.
    let is_busybox = Path::new(init).file_name() == Some("busybox".as_ref());
    match PROGRAMS.into_iter().find(|program| exists(program)) {
        _ if is_systemd => Ok(Way::Signal(SYSTEMD_SIGNAL)),
        _ if is_busybox => Ok(Way::Signal(libc::SIGUSR2)),
        Some(program) => Ok(Way::Program(program)),
        None => Err(Error::Init(init.to_owned())),
    }
}

/// Shuts the guest down; the answer is sent before, as the agent ends with the guest.
pub(super) fn off(outgoing: &mut Outgoing<impl Write>) -> Result<(), Error> {
    let init = std::fs::read_link("/proc/1/exe")
        .map_err(|error| Error::System("tell what the guest's init is", error))?;
    let exists = |path: &str| Path::new(path).exists();
    match way(&init.to_string_lossy(), exists(SYSTEMD), exists)? {
        Way::Signal(signal) => {
            outgoing.reply(&Reply::Done)?;
            sys::signal_init(signal)
                .map_err(|error| Error::System("tell the guest's init", error))?;
        }
        Way::Program(program) => {
            let mut command = Command::new(program);
            command.stdin(Stdio::null());
            let mut child = command
                .spawn()
                .map_err(|error| Error::System("start the poweroff program", error))?;
            outgoing.reply(&Reply::Done)?;
            // It may end the agent first; what it says of itself is on the agent's output.
            let _ = child.wait();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_init_is_told_in_its_own_way() {
        let nothing = |_: &str| false;
        let sbin = |path: &str| path == "/sbin/poweroff";
        let ours = way("/run/cloudlet/busybox", false, sbin);
        assert_eq!(ours.unwrap(), Way::Signal(libc::SIGUSR2));
        let systemd = way("/usr/lib/systemd/systemd", true, nothing);
        assert_eq!(systemd.unwrap(), Way::Signal(libc::SIGRTMIN() + 4));
        let other = way("/sbin/openrc-init", false, sbin);
        assert_eq!(other.unwrap(), Way::Program("/sbin/poweroff"));
        let none = way("/app", false, nothing).unwrap_err();
        assert!(none.to_string().contains("/app"), "{none}");
    }
}
