//! Extended attributes of files: capabilities, which are kept, and all others, which are counted.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::XattrFlags;
use rustix::io::{Errno, Result};

/// The attribute that holds a file's capabilities (capabilities(7)).
pub const NAME: &str = "security.capability";
/// Lengths of its value: of `struct vfs_cap_data` in its versions, and of `vfs_ns_cap_data`
/// (linux/capability.h).
const LENS: [usize; 3] = [12, 20, 24];
/// Most bytes of a file's list of names (`XATTR_LIST_MAX` of linux/limits.h).
const NAMES_LEN_MAX: usize = 64 << 10;

/// Whether these bytes can be a file's capabilities.
#[must_use]
pub fn is_one(value: &[u8]) -> bool {
    LENS.contains(&value.len())
}

/// The capabilities of an open file, if it has any.
pub(super) fn get(file: impl AsFd) -> Result<Option<Vec<u8>>> {
    let mut value = [0; 64];
    match rustix::fs::fgetxattr(file, NAME, &mut value[..]) {
        Ok(length) if is_one(&value[..length]) => Ok(Some(value[..length].to_vec())),
        // Of a form that no kernel of today writes.
        Ok(_) | Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives an open file capabilities.
pub(super) fn set(file: impl AsFd, value: &[u8]) -> Result<()> {
    rustix::fs::fsetxattr(file, NAME, value, XattrFlags::empty())
}

/// Whether an open file or directory has attributes beside its capabilities. What cannot be asked has
/// none.
pub(super) fn has_others(file: impl AsFd) -> bool {
    names_others(|names| rustix::fs::flistxattr(file, names))
}

/// The same of the file `name` in a directory.
pub(super) fn name_has_others(directory: BorrowedFd<'_>, name: &CStr) -> bool {
    // There is no call that takes both (before Linux 6.13).
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    path.push(OsStr::from_bytes(name.to_bytes()));
    names_others(|names| rustix::fs::llistxattr(&path, names))
}

fn names_others(list: impl FnOnce(&mut [u8]) -> Result<usize>) -> bool {
    let mut names = vec![0; NAMES_LEN_MAX];
    let length = list(&mut names).unwrap_or(0);
    let mut names = names[..length].split(|&byte| byte == 0);
    names.any(|name| !name.is_empty() && name != NAME.as_bytes())
}
