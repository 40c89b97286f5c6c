//! Guest buffers: the pieces of RAM that one half of a descriptor chain names, and vectored I/O
//! straight into and out of them.
//!
//! A [`Buffers`] is only filled by the gate in [`super::queue`], so each piece lies within one
//! region of guest RAM. The kernel reads and writes guest memory by itself here; whatever it wrote
//! is marked in vm-memory's bitmap afterwards, as every device write must be.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestRam;
use super::queue::QueueError;

/// Pieces handed to the kernel in one call.
const PIECES_A_CALL_MAX: usize = 64;

/// A piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts.
    pub address: GuestAddress,
    /// Bytes in it, never 0.
    pub len: u32,
}

/// One half of a chain: all that the device may read, or all that it may write.
#[derive(Debug, Default)]
pub struct Buffers {
    pieces: Vec<Piece>,
    /// Sum of the lengths; at most `u32::MAX`, see [`Buffers::push`].
    len: u32,
}

/// A file offset, or the stream position of a socket.
#[derive(Debug, Clone, Copy)]
enum At {
    Offset(u64),
    Stream,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    IntoGuest,
    FromGuest,
}

impl Buffers {
    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        // u32 fits usize on the one architecture there is.
        usize::try_from(self.len).unwrap_or(usize::MAX)
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of pieces.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Forgets all pieces, keeps their room.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    /// Adds the piece a descriptor names. A piece without bytes names nothing and is dropped.
    ///
    /// # Errors
    /// When it does not lie in one region of RAM, or the sum leaves 32 bits.
    pub fn push(&mut self, guest: &GuestRam, piece: Piece) -> Result<(), QueueError> {
        if piece.len == 0 {
            return Ok(());
        }
        slice(guest, piece)?;
        self.len = self.len.checked_add(piece.len).ok_or(QueueError::TooLong)?;
        self.pieces.push(piece);
        Ok(())
    }

    /// Adds the pieces of `other` behind those that are here.
    ///
    /// # Errors
    /// As [`Buffers::push`].
    pub fn append(&mut self, guest: &GuestRam, other: &Buffers) -> Result<(), QueueError> {
        other
            .pieces
            .iter()
            .try_for_each(|piece| self.push(guest, *piece))
    }

    /// Copies the bytes at `offset` into `out`; returns how many there were.
    pub fn read_at(&self, guest: &GuestRam, offset: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.range(offset, out.len()) {
            let end = done + usize::try_from(piece.len).unwrap_or(usize::MAX);
            let Some(part) = out.get_mut(done..end) else {
                break;
            };
            if guest.read_slice(part, piece.address).is_err() {
                break;
            }
            done = end;
        }
        done
    }

    /// Copies `bytes` to `offset`; returns how many there was room for.
    pub fn write_at(&self, guest: &GuestRam, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.range(offset, bytes.len()) {
            let end = done + usize::try_from(piece.len).unwrap_or(usize::MAX);
            let Some(part) = bytes.get(done..end) else {
                break;
            };
            if guest.write_slice(part, piece.address).is_err() {
                break;
            }
            done = end;
        }
        done
    }

    /// Sets `len` bytes at `offset` to zero; returns how many there were.
    pub fn zero_at(&self, guest: &GuestRam, offset: usize, len: usize) -> usize {
        static ZEROS: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < len {
            let part = ZEROS.get(..(len - done).min(ZEROS.len())).unwrap_or(&ZEROS);
            let written = self.write_at(guest, offset + done, part);
            done += written;
            if written < part.len() {
                break;
            }
        }
        done
    }

    /// The pieces of `len` bytes from `offset`, clipped to what is there.
    pub fn range(&self, offset: usize, len: usize) -> impl Iterator<Item = Piece> + '_ {
        let mut skip = u64::try_from(offset).unwrap_or(u64::MAX);
        let mut left = u64::try_from(len).unwrap_or(u64::MAX);
        self.pieces.iter().filter_map(move |piece| {
            let piece_len = u64::from(piece.len);
            if skip >= piece_len {
                skip -= piece_len;
                return None;
            }
            let take = (piece_len - skip).min(left);
            let address = GuestAddress(piece.address.0 + skip);
            skip = 0;
            left -= take;
            (take > 0).then(|| Piece {
                address,
                len: u32::try_from(take).unwrap_or(u32::MAX),
            })
        })
    }

    /// Reads from a socket or pipe into `offset..offset + len` with as few calls as it takes one
    /// call to give; returns the bytes read, 0 at the end of the stream.
    ///
    /// # Errors
    /// The system call's.
    pub fn read_stream(
        &self,
        guest: &GuestRam,
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        self.transfer(guest, fd, offset, len, At::Stream, Way::IntoGuest)
    }

    /// Writes `offset..offset + len` to a socket or pipe, in one call; returns the bytes written.
    ///
    /// # Errors
    /// The system call's.
    pub fn write_stream(
        &self,
        guest: &GuestRam,
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
    ) -> io::Result<usize> {
        self.transfer(guest, fd, offset, len, At::Stream, Way::FromGuest)
    }

    /// Reads all of `offset..offset + len` from a file at `at`.
    ///
    /// # Errors
    /// The system call's; `UnexpectedEof` where the file ends early.
    pub fn read_file(
        &self,
        guest: &GuestRam,
        fd: BorrowedFd<'_>,
        at: u64,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        self.transfer_all(guest, fd, at, offset, len, Way::IntoGuest)
    }

    /// Writes all of `offset..offset + len` to a file at `at`.
    ///
    /// # Errors
    /// The system call's.
    pub fn write_file(
        &self,
        guest: &GuestRam,
        fd: BorrowedFd<'_>,
        at: u64,
        offset: usize,
        len: usize,
    ) -> io::Result<()> {
        self.transfer_all(guest, fd, at, offset, len, Way::FromGuest)
    }

    fn transfer_all(
        &self,
        guest: &GuestRam,
        fd: BorrowedFd<'_>,
        at: u64,
        offset: usize,
        len: usize,
        way: Way,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let position = u64::try_from(done)
                .ok()
                .and_then(|done| at.checked_add(done))
                .ok_or(io::ErrorKind::InvalidInput)?;
            let position = At::Offset(position);
            match self.transfer(guest, fd, offset + done, len - done, position, way) {
                Ok(0) if way == Way::IntoGuest => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One vectored call over the first pieces of the range.
    fn transfer(
        &self,
        guest: &GuestRam,
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
        at: At,
        way: Way,
    ) -> io::Result<usize> {
        let mut vectors = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; PIECES_A_CALL_MAX];
        let mut count = 0;
        for (vector, piece) in vectors.iter_mut().zip(self.range(offset, len)) {
            let slice = slice(guest, piece).map_err(|_| io::ErrorKind::InvalidInput)?;
            vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = slice.len();
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        let vectors = vectors.get(..count).unwrap_or(&[]);
        let done = call(fd, vectors, at, way)?;
        if way == Way::IntoGuest {
            for piece in self.range(offset, done) {
                let slice = slice(guest, piece).map_err(|_| io::ErrorKind::InvalidInput)?;
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        Ok(done)
    }
}

/// The memory of a piece: the one gate between guest addresses and host memory.
pub(super) fn slice(
    guest: &GuestRam,
    piece: Piece,
) -> Result<VolatileSlice<'_, impl vm_memory::bitmap::BitmapSlice + '_>, QueueError> {
    let outside = QueueError::OutsideRam {
        address: piece.address.0,
        len: piece.len,
    };
    let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
    guest.get_slice(piece.address, len).map_err(|_| outside)
}

/// The system call itself.
fn call(fd: BorrowedFd<'_>, vectors: &[libc::iovec], at: At, way: Way) -> io::Result<usize> {
    let fd = fd.as_raw_fd();
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let first = vectors.as_ptr();
    let offset = match at {
        At::Offset(offset) => {
            Some(libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?)
        }
        At::Stream => None,
    };
    // SAFETY: `transfer` is the only caller. It took each vector from a slice of guest RAM that
    // `get_slice` checked to lie in one mapped region, and it holds a borrow of the guest memory
    // across this call, so the ranges stay mapped. Guest RAM is shared with the guest, no Rust
    // reference into it exists, and the kernel may write to it as the guest itself may. The fd is
    // borrowed, so it is open. A zeroed msghdr is one without name and control data.
    let result = unsafe {
        match (way, offset) {
            (Way::IntoGuest, Some(offset)) => libc::preadv(fd, first, count, offset),
            (Way::FromGuest, Some(offset)) => libc::pwritev(fd, first, count, offset),
            (Way::IntoGuest, None) => libc::readv(fd, first, count),
            (Way::FromGuest, None) => {
                let mut message: libc::msghdr = std::mem::zeroed();
                message.msg_iov = first.cast_mut();
                message.msg_iovlen = vectors.len();
                // A peer that is gone is an error to handle here, not a signal.
                libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL)
            }
        }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
