//! The bare userfaultfd probe that the pager is held against: the least a program can do to place
//! pages. One thread reads faults, without waiting for anything else, and answers each with one
//! UFFDIO_COPY. Numbers and structures are those of `linux/userfaultfd.h`; nothing of the product
//! is in here.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use crate::failure::{Failure, Outcome};

const PAGE: usize = 4096;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;

/// Anonymous memory whose missing pages a userfaultfd reports.
pub(super) struct Region {
    start: usize,
    bytes: usize,
    uffd: File,
}

impl Region {
    /// Maps and registers `bytes`, a whole number of pages.
    pub(super) fn new(bytes: usize) -> Outcome<Self> {
        // SAFETY: userfaultfd takes flags only, and the descriptor it gives is nobody else's.
        let uffd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
            File::from_raw_fd(
                RawFd::try_from(fd)
                    .ok()
                    .filter(|fd| *fd >= 0)
                    .ok_or_else(last)?,
            )
        };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(last());
        }
        let region = Self {
            start: start.expose_provenance(),
            bytes,
            uffd,
        };
        // struct uffdio_api: api, features, ioctls.
        region.ioctl(UFFDIO_API, &mut [0xaa, 0, 0])?;
        // struct uffdio_register: start, len, mode (1: missing), ioctls.
        region.ioctl(
            UFFDIO_REGISTER,
            &mut [word(region.start), word(bytes), 1, 0],
        )?;
        Ok(region)
    }

    /// The address of the first page.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// Places `bytes` at `offset` with one call.
    pub(super) fn copy(&self, offset: usize, bytes: &[u8]) -> Outcome {
        let (dst, src) = (
            word(self.start + offset),
            word(bytes.as_ptr().expose_provenance()),
        );
        // struct uffdio_copy: dst, src, len, mode, copy.
        self.ioctl(UFFDIO_COPY, &mut [dst, src, word(bytes.len()), 0, 0])
    }

    /// Answers `faults` faults with `page`, one read and one copy each.
    pub(super) fn answer(&self, faults: usize, page: &[u8; PAGE]) -> Outcome {
        let mut message = [0; 32];
        for _ in 0..faults {
            (&self.uffd).read_exact(&mut message)?;
            // struct uffd_msg: the address of a page fault is at offset 16.
            let mut address = [0; 8];
            address.copy_from_slice(&message[16..24]);
            let address = usize::try_from(u64::from_ne_bytes(address))?;
            self.copy((address - self.start) / PAGE * PAGE, page)?;
        }
        Ok(())
    }

    fn ioctl<const N: usize>(&self, request: libc::c_ulong, words: &mut [u64; N]) -> Outcome {
        // SAFETY: every caller above gives the words of the structure that the request takes; the
        // kernel writes into them and into this region, which is only looked at by volatile reads.
        let done = unsafe { libc::ioctl(self.uffd.as_raw_fd(), request, words.as_mut_ptr()) };
        if done == 0 { Ok(()) } else { Err(last()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody uses it after its region.
        unsafe {
            libc::munmap(
                std::ptr::with_exposed_provenance_mut(self.start),
                self.bytes,
            )
        };
    }
}

/// Reads one byte of each page from `start` on, in order, and returns what each read took, in us.
///
/// # Safety
/// The pages must be mapped and stay so for the call.
pub(super) unsafe fn touch_each(start: usize, pages: usize) -> Vec<f64> {
    let mut times_us = Vec::with_capacity(pages);
    for page in 0..pages {
        let address = std::ptr::with_exposed_provenance::<u8>(start + page * PAGE);
        let begin = std::time::Instant::now();
        // SAFETY: the caller vouches for the address.
        std::hint::black_box(unsafe { address.read_volatile() });
        times_us.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    times_us
}

fn word(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

#[track_caller]
fn last() -> Failure {
    io::Error::last_os_error().into()
}
