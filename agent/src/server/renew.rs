//! What a guest does that goes on in another machine than before, as each clone of a snapshot does.
//!
//! Clones begin with the same state of the kernel's random number generator. So every session's first
//! frame brings bytes that the host has drawn for it alone, and they are in the generator before the
//! session's request is looked at, whoever was first to reach the guest. `renew` is what the host asks for
//! before it lets anybody else reach a restored guest.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Error, tell};
use crate::connection::Outgoing;
use crate::protocol::{Entropy, Reply};
use crate::sys;

/// Makes the kernel's random numbers depend on `entropy`, from now on.
pub(super) fn add_entropy(entropy: &Entropy) -> Result<(), Error> {
    sys::reseed(&entropy.0).map_err(|error| Error::System("renew the random numbers", error))
}

/// The guest runs in another machine now. Until `Done` the host holds the network cards: what is to be
/// done before anybody is heard comes before it, and what takes the network comes after it. The random
/// numbers are new already.
pub(super) fn renew(outgoing: &mut Outgoing<impl Write>) -> Result<(), Error> {
    outgoing.reply(&Reply::Done)?;
    if let Some(here) = std::env::current_exe()
        .ok()
        .as_deref()
        .and_then(Path::parent)
    {
        ask_for_addresses(here);
    }
    Ok(())
}

/// Has the DHCP clients of `resources/linux/network`, which lies beside the agent where there is one,
/// begin anew: the cards may be in another network now.
fn ask_for_addresses(here: &Path) {
    let (shell, script) = (here.join("busybox"), here.join("network"));
    if !script.exists() {
        return;
    }
    let mut command = Command::new(shell);
    command
        .arg("sh")
        .arg(script)
        .arg("again")
        .stdin(Stdio::null());
    if let Err(error) = command.status() {
        tell(&format!(
            "cloudlet-agent: cannot ask for addresses anew: {error}"
        ));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_network_begins_anew_where_there_is_a_script_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name);
        std::fs::write(path("busybox"), "#!/bin/sh\nexec \"$@\"\n").unwrap();
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(path("busybox"), mode).unwrap();
        ask_for_addresses(dir.path());
        assert!(!path("said").exists());
        let script = format!("echo \"$1\" >{}", path("said").display());
        std::fs::write(path("network"), script).unwrap();
        ask_for_addresses(dir.path());
        assert_eq!(std::fs::read_to_string(path("said")).unwrap(), "again\n");
    }
}
