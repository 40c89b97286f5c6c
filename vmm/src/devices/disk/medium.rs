//! What a disk's base lies on: a file, or a block device of the host, whose size and sectors are not in
//! its metadata.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use super::{BLOCK, SECTOR};

/// A base as a disk sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Medium {
    /// Size in bytes.
    pub bytes: u64,
    /// Bytes of a sector, a power of two from 512 to 4096: what partition tables count in. A file's
    /// are [`SECTOR`].
    pub sector_bytes: u32,
}

/// Bytes of a sector where nothing else is said.
pub(super) const SECTOR_BYTES: u32 = 512;
const _: () = assert!(SECTOR_BYTES as u64 == SECTOR);

impl Medium {
    /// Looks at `file`, a regular file or a block device. Moves a block device's offset.
    ///
    /// # Errors
    /// The system's.
    pub fn of(file: &File) -> io::Result<Self> {
        let is_device = file.metadata()?.file_type().is_block_device();
        Ok(Self {
            bytes: bytes_of(file)?,
            sector_bytes: if is_device {
                sector_bytes(file)?
            } else {
                SECTOR_BYTES
            },
        })
    }
}

/// The size of a regular file or a block device, in bytes. Moves a block device's offset.
///
/// # Errors
/// The system's.
pub(super) fn bytes_of(mut file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        file.seek(SeekFrom::End(0))
    } else {
        Ok(metadata.len())
    }
}

/// BLKSSZGET (linux/fs.h): the size of a logical sector. One that no guest of ours could use, larger
/// than a block here, is a sector of the usual size to it.
fn sector_bytes(file: &File) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes one int to the address, which is that of one that lives through the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let usable = u32::try_from(bytes).ok().filter(|bytes| {
        let in_range = (SECTOR..=BLOCK as u64).contains(&u64::from(*bytes));
        in_range && bytes.is_power_of_two()
    });
    Ok(usable.unwrap_or(SECTOR_BYTES))
}
