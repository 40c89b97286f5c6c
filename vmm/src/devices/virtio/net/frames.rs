//! One frame, one vectored call: a frame has to be read or written as a whole, together with host
//! memory before or behind it, which the calls of [`Buffers`] know nothing of.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;

use crate::devices::virtio::GuestRam;
use crate::devices::virtio::buffers::{Buffers, slice};

/// Vectors in one call. Linux' driver needs 43 for the longest frame.
const VECTORS_MAX: usize = 64;

/// The vectors of one call.
struct Vectors {
    list: [libc::iovec; VECTORS_MAX],
    count: usize,
    /// Bytes of guest memory in them.
    guest_bytes: usize,
}

impl Vectors {
    fn new() -> Self {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            list: [empty; VECTORS_MAX],
            count: 0,
            guest_bytes: 0,
        }
    }

    fn add(&mut self, base: *mut libc::c_void, len: usize) {
        if let Some(vector) = self.list.get_mut(self.count) {
            vector.iov_base = base;
            vector.iov_len = len;
            self.count += 1;
        }
    }

    /// Adds what `buffers` have from `offset` on, until `spare` vectors are left.
    fn add_guest(
        &mut self,
        guest: &GuestRam,
        buffers: &Buffers,
        offset: usize,
        spare: usize,
    ) -> io::Result<()> {
        let places = VECTORS_MAX - spare - self.count;
        for piece in buffers.range(offset, buffers.len()).take(places) {
            let slice = slice(guest, piece).map_err(|_| io::ErrorKind::InvalidInput)?;
            self.add(slice.ptr_guard_mut().as_ptr().cast(), slice.len());
            self.guest_bytes += slice.len();
        }
        Ok(())
    }

    fn count(&self) -> libc::c_int {
        // At most VECTORS_MAX.
        libc::c_int::try_from(self.count).unwrap_or(0)
    }
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads once into `buffers` and then `overflow`. Returns the bytes read, and how many of them are
/// in `buffers`.
///
/// # Errors
/// The system call's.
pub(super) fn read(
    guest: &GuestRam,
    buffers: &Buffers,
    fd: BorrowedFd<'_>,
    overflow: &mut [u8],
) -> io::Result<(usize, usize)> {
    let mut vectors = Vectors::new();
    vectors.add_guest(guest, buffers, 0, 1)?;
    vectors.add(overflow.as_mut_ptr().cast(), overflow.len());
    // SAFETY: each vector but the last was taken from a slice of guest RAM that `slice` checked to
    // lie in one mapped region, and the borrow of `guest` keeps it mapped; no Rust reference into
    // guest RAM exists, and the kernel may write to it as the guest itself may. The last is
    // `overflow`, borrowed for the call. The fd is borrowed, so it is open.
    let result = unsafe { libc::readv(fd.as_raw_fd(), vectors.list.as_ptr(), vectors.count()) };
    let len = length(result)?;
    let direct = len.min(vectors.guest_bytes);
    for piece in buffers.range(0, direct) {
        let slice = slice(guest, piece).map_err(|_| io::ErrorKind::InvalidInput)?;
        slice.bitmap().mark_dirty(0, slice.len());
    }
    Ok((len, direct))
}

/// Writes `buffers` at once. What has more pieces than a call takes goes through `copy`, which has
/// room for it.
///
/// # Errors
/// The system call's.
pub(super) fn write(
    guest: &GuestRam,
    buffers: &Buffers,
    fd: BorrowedFd<'_>,
    copy: &mut [u8],
) -> io::Result<usize> {
    let mut vectors = Vectors::new();
    if buffers.pieces() <= VECTORS_MAX {
        vectors.add_guest(guest, buffers, 0, 0)?;
    } else {
        let len = buffers.read_at(guest, 0, copy);
        vectors.add(copy.as_mut_ptr().cast(), len);
    }
    // SAFETY: as in `read`; the kernel only reads here. The copy is borrowed for the call.
    let result = unsafe { libc::writev(fd.as_raw_fd(), vectors.list.as_ptr(), vectors.count()) };
    length(result)
}

/// Sends `head` and then what `buffers` have from `offset` on, as much as the socket takes.
///
/// # Errors
/// The system call's.
pub(super) fn send(
    guest: &GuestRam,
    head: &[u8],
    buffers: &Buffers,
    offset: usize,
    fd: BorrowedFd<'_>,
) -> io::Result<usize> {
    let mut vectors = Vectors::new();
    vectors.add(head.as_ptr().cast_mut().cast(), head.len());
    vectors.add_guest(guest, buffers, offset, 0)?;
    // SAFETY: as in `read`; the kernel only reads here, also from `head`, which is borrowed for the
    // call. A zeroed msghdr is one without name and control data.
    let result = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = vectors.list.as_mut_ptr();
        message.msg_iovlen = vectors.count;
        // A peer that is gone is an error to handle here, not a signal.
        libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
    };
    length(result)
}
