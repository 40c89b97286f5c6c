//! What makes a snapshot of the guest small: everything is written out, free blocks of every file
//! system are discarded, and caches are dropped.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::Error;
use crate::connection::Outgoing;
use crate::protocol::{PATH_MAX, Reply, Trimmed};
use crate::sys;

/// Page cache, and directory entries and inodes (proc_sys_vm(5)).
const DROP_ALL: &[u8] = b"3\n";

/// A file system on a disk.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    source: String,
    path: PathBuf,
}

/// Writes out, trims, drops caches, and says what came of it.
pub(super) fn sync(outgoing: &mut Outgoing<impl Write>) -> Result<(), Error> {
    // What was deleted a moment ago is free only once the journal says so.
    rustix::fs::sync();
    let mounts = fs::read("/proc/self/mountinfo")
        .map_err(|error| Error::System("read the list of mounts (is /proc mounted?)", error))?;
    for mount in mounts_of(&String::from_utf8_lossy(&mounts)) {
        let trimmed = File::open(&mount.path).and_then(sys::trim);
        let error = trimmed.as_ref().err().map(io::Error::to_string);
        let path = mount.path.as_os_str().as_bytes();
        outgoing.reply(&Reply::Trimmed(Trimmed {
            path: &path[..path.len().min(PATH_MAX)],
            bytes: trimmed.unwrap_or(0),
            error: error.as_deref().unwrap_or(""),
        }))?;
    }
    fs::write("/proc/sys/vm/drop_caches", DROP_ALL)
        .map_err(|error| Error::System("drop the caches", error))?;
    Ok(outgoing.reply(&Reply::Done)?)
}

/// The file systems on devices that can be written to, each once, of proc_pid_mountinfo(5):
///
/// `36 35 98:0 /root /mount/point rw,noatime master:1 - ext4 /dev/vda rw,errors=continue`
fn mounts_of(table: &str) -> Vec<Mount> {
    let mut seen = BTreeSet::new();
    let mut mounts: Vec<Mount> = table.lines().filter_map(mount_of).collect();
    mounts.retain(|mount| seen.insert(mount.source.clone()));
    mounts
}

fn mount_of(line: &str) -> Option<Mount> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(4);
    let (path, options) = (mount.next()?, mount.next()?);
    let mut file_system = file_system.split(' ').skip(1);
    let (source, super_options) = (file_system.next()?, file_system.next()?);
    let read_only = |options: &str| options.split(',').any(|option| option == "ro");
    let wanted = source.starts_with("/dev/") && !read_only(options) && !read_only(super_options);
    wanted.then(|| Mount {
        source: source.to_owned(),
        path: unescaped(path),
    })
}

/// A path in which space, tab, newline and backslash stand as `\ooo`.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = |digits: &[u8; 3]| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        };
        let escaped = after.first_chunk().and_then(octal);
        match (byte, escaped) {
            (b'\\', Some(escaped)) => {
                bytes.push(escaped);
                rest = &after[3..];
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writable_file_systems_on_devices_are_found_once() {
        let table = "\
21 1 0:19 / /sys rw,nosuid shared:7 - sysfs sysfs rw
24 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
25 24 254:0 /home /srv/a\\040b rw,relatime shared:1 - ext4 /dev/vda rw
26 24 254:16 / /mnt/a\\040b\\134 rw,relatime - ext4 /dev/vdb rw
27 24 254:32 / /ro ro,relatime - ext4 /dev/vdc rw
28 24 254:48 / /ro2 rw,relatime - squashfs /dev/vdd ro
nonsense
";
        let mount = |source: &str, path: &str| Mount {
            source: source.into(),
            path: path.into(),
        };
        assert_eq!(
            mounts_of(table),
            [mount("/dev/vda", "/"), mount("/dev/vdb", "/mnt/a b\\")]
        );
    }
}
