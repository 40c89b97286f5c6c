//! Namespaces for one case: of mounts, so that it can hide devices or bring small file systems, and of
//! the network. Cases run in processes of their own, so nothing of it is seen elsewhere; it needs root.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::ensure;
use crate::failure::Outcome;

/// Gives this thread, and every process that it starts from now on, mounts of its own.
pub fn private_mounts() -> Outcome {
    // SAFETY: unshare takes one integer and touches no memory of ours.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    mount(
        "none",
        Path::new("/"),
        "",
        libc::MS_REC | libc::MS_PRIVATE,
        "",
    )
}

/// Gives this thread, and every process that it starts from now on, a network of its own, in which
/// there is only the loopback interface.
pub fn private_network() -> Outcome {
    // SAFETY: unshare takes one integer and touches no memory of ours.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    ensure!(up.success(), "ip link set lo up: {up}");
    Ok(())
}

/// Mounts an empty tmpfs of `bytes` at `at`, seen by this case only.
pub fn mount_tmpfs(at: &Path, bytes: u64) -> Outcome {
    mount("tmpfs", at, "tmpfs", 0, &format!("size={bytes},mode=0700"))
}

/// Mounts the files of this thread's network over `/sys`, seen by this case only.
pub fn mount_sysfs() -> Outcome {
    mount("sysfs", Path::new("/sys"), "sysfs", 0, "")
}

/// Lays the file `over` over the existing file `at`.
pub fn bind(over: &Path, at: &Path) -> Outcome {
    mount(over, at, "", libc::MS_BIND, "")
}

/// Makes a device node at `to` for the same device as `from`, with `mode`.
pub fn copy_node(from: &Path, to: &Path, mode: u32) -> Outcome {
    let device = std::fs::metadata(from)?.rdev();
    let path = CString::new(to.as_os_str().as_bytes())?;
    // SAFETY: the pointer is to a string with an end, which lives until after the call.
    check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | mode, device) })?;
    // Whatever the umask took away.
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// A `/dev` with nothing in it but the nodes named, each as it is in the real one.
pub fn bare_dev(nodes: &[&str]) -> Outcome {
    let real = tempfile::tempdir()?;
    mount("/dev", real.path(), "", libc::MS_BIND | libc::MS_REC, "")?;
    mount("tmpfs", Path::new("/dev"), "tmpfs", 0, "mode=0755")?;
    for node in nodes {
        let path = Path::new("/dev").join(node);
        std::fs::write(&path, "")?;
        bind(&real.path().join(node), &path)?;
    }
    // The mount over it stays with the namespace; the directory itself must not be removed then.
    let _ = real.keep();
    Ok(())
}

/// Mounts `source` at `target`: mount(2).
pub(crate) fn mount(
    source: impl AsRef<Path>,
    target: &Path,
    kind: &str,
    flags: libc::c_ulong,
    data: &str,
) -> Outcome {
    let source = CString::new(source.as_ref().as_os_str().as_bytes())?;
    let target = CString::new(target.as_os_str().as_bytes())?;
    let kind = CString::new(kind)?;
    let data = CString::new(data)?;
    // SAFETY: the four pointers are to strings with an end, which live until after the call.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    })?;
    Ok(())
}

/// Takes the mount at `at` away, whoever uses it.
pub(crate) fn unmount_by_force(at: &Path) -> Outcome {
    let path = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: the pointer is to a string with an end, which lives until after the call.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) })?;
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
