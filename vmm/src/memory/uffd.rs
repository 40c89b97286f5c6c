//! userfaultfd: opening one, registering memory, placing pages, reading faults.
//!
//! A thin layer over `linux/userfaultfd.h` (all structures and numbers here are from it), for the
//! part of the interface that the pager uses: missing pages of private anonymous memory. The file
//! descriptor never blocks; waiting is the pager's business.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

const UFFD_API: u64 = 0xAA;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

const NR_REGISTER: u32 = 0x00;
const NR_UNREGISTER: u32 = 0x01;
const NR_WAKE: u32 = 0x02;
const NR_COPY: u32 = 0x03;
const NR_ZEROPAGE: u32 = 0x04;
const NR_API: u32 = 0x3F;

const IOC_READ: u32 = 2;
const IOC_READ_WRITE: u32 = 3;

/// `_IOC` of `asm-generic/ioctl.h` for the userfaultfd type, 0xAA.
const fn ioc(direction: u32, number: u32, size: u32) -> libc::c_ulong {
    ((direction << 30) | (size << 16) | (0xAA << 8) | number) as libc::c_ulong
}

const USERFAULTFD_IOC_NEW: libc::c_ulong = ioc(0, 0, 0);
const UFFDIO_API: libc::c_ulong = ioc(IOC_READ_WRITE, NR_API, 24);
const UFFDIO_REGISTER: libc::c_ulong = ioc(IOC_READ_WRITE, NR_REGISTER, 32);
const UFFDIO_UNREGISTER: libc::c_ulong = ioc(IOC_READ, NR_UNREGISTER, 16);
const UFFDIO_WAKE: libc::c_ulong = ioc(IOC_READ, NR_WAKE, 16);
const UFFDIO_COPY: libc::c_ulong = ioc(IOC_READ_WRITE, NR_COPY, 40);
const UFFDIO_ZEROPAGE: libc::c_ulong = ioc(IOC_READ_WRITE, NR_ZEROPAGE, 32);

/// Bytes of `struct uffd_msg`.
const MSG_BYTES: usize = 32;
/// Messages that one read takes at the most.
const MSGS_MAX: usize = 32;

/// What can go wrong with a userfaultfd.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Neither the system call nor the device gives one.
    #[error(
        "userfaultfd is not permitted: run as root or with CAP_SYS_PTRACE, or give this user \
         /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1"
    )]
    Denied(#[source] io::Error),
    /// The kernel has none.
    #[error("this kernel has no userfaultfd: it must be built with CONFIG_USERFAULTFD")]
    Missing(#[source] io::Error),
    /// Creating one failed for another reason.
    #[error("cannot create a userfaultfd")]
    Create(#[source] io::Error),
    /// The kernel speaks another version of the interface.
    #[error("the kernel does not speak version {UFFD_API:#x} of the userfaultfd interface")]
    Api(#[source] io::Error),
    /// The kernel cannot copy, fill with zeros and wake in a range.
    #[error("the kernel offers userfaultfd operations {offered:#x} only, {needed:#x} are needed")]
    Operations {
        /// Bit mask of what it offers.
        offered: u64,
        /// Bit mask of what is needed.
        needed: u64,
    },
    /// Memory could not be registered.
    #[error("cannot register {len} bytes with userfaultfd")]
    Register {
        /// Length in bytes.
        len: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Memory could not be taken out again.
    #[error("cannot unregister {len} bytes from userfaultfd")]
    Unregister {
        /// Length in bytes.
        len: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Pages could not be placed.
    #[error("cannot place {len} bytes of guest memory")]
    Place {
        /// Length in bytes.
        len: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Waiting threads could not be woken.
    #[error("cannot wake the threads that wait for a page")]
    Wake(#[source] io::Error),
    /// Faults could not be read.
    #[error("cannot read from the userfaultfd")]
    Read(#[source] io::Error),
    /// A message is none that was asked for.
    #[error("userfaultfd sent an event {event:#x} that was not asked for")]
    Event {
        /// Its number.
        event: u8,
    },
}

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    zeropage: i64,
}

/// How far an attempt to place pages came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes from the start are there now, and whoever waited for them is awake.
    Bytes(u64),
    /// The first page was there already.
    Exists,
    /// The address space is changing under the call: try again.
    Again,
    /// The range is not, or no longer, registered.
    Unregistered,
}

/// Messages read in one go.
#[derive(Debug)]
pub(super) struct Messages {
    bytes: [u8; MSG_BYTES * MSGS_MAX],
    len: usize,
}

impl Messages {
    pub(super) fn new() -> Self {
        Self {
            bytes: [0; MSG_BYTES * MSGS_MAX],
            len: 0,
        }
    }

    /// The addresses of the faults, in the order in which they came.
    pub(super) fn faults(&self) -> impl Iterator<Item = Result<u64, UffdError>> + '_ {
        self.bytes[..self.len]
            .chunks_exact(MSG_BYTES)
            .map(|message| {
                // struct uffd_msg: event in byte 0; for a page fault flags at 8 and address at 16.
                let mut address = [0; 8];
                address.copy_from_slice(&message[16..24]);
                match message[0] {
                    UFFD_EVENT_PAGEFAULT => Ok(u64::from_ne_bytes(address)),
                    event => Err(UffdError::Event { event }),
                }
            })
    }
}

/// An open userfaultfd.
#[derive(Debug)]
pub(super) struct Uffd {
    file: File,
}

impl Uffd {
    /// Opens one that sees faults from user space and from the kernel (KVM takes them there).
    pub(super) fn open() -> Result<Self, UffdError> {
        let file = match from_syscall() {
            Ok(file) => file,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                from_device().map_err(|_| UffdError::Denied(error))?
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                return Err(UffdError::Missing(error));
            }
            Err(error) => return Err(UffdError::Create(error)),
        };
        let uffd = Self { file };
        let mut api = Api {
            api: UFFD_API,
            features: 0,
            ioctls: 0,
        };
        uffd.ioctl(UFFDIO_API, &mut api).map_err(UffdError::Api)?;
        let needed = 1 << NR_REGISTER | 1 << NR_UNREGISTER;
        require(api.ioctls, needed)?;
        Ok(uffd)
    }

    /// Makes first touches of the range wait until its pages are placed.
    ///
    /// # Safety
    /// `[start, start + len)` must be page-aligned private anonymous memory which only volatile
    /// accessors and the kernel touch, because from now on [`Uffd::copy`] writes into it.
    pub(super) unsafe fn register(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut register = Register {
            range: Range { start, len },
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)
            .map_err(|source| UffdError::Register { len, source })?;
        require(
            register.ioctls,
            1 << NR_COPY | 1 << NR_ZEROPAGE | 1 << NR_WAKE,
        )
    }

    /// Takes a range out again; whoever waits in it is woken.
    pub(super) fn unregister(&self, start: u64, len: u64) -> Result<(), UffdError> {
        self.ioctl(UFFDIO_UNREGISTER, &mut Range { start, len })
            .map_err(|source| UffdError::Unregister { len, source })
    }

    /// Wakes whoever waits in a range.
    pub(super) fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        self.ioctl(UFFDIO_WAKE, &mut Range { start, len })
            .map_err(UffdError::Wake)
    }

    /// Places `bytes` at `start`: a whole number of pages, all or a first part of it.
    pub(super) fn copy(&self, start: u64, bytes: &[u8]) -> Result<Filled, UffdError> {
        let len = super::layout::to_u64(bytes.len());
        let src = super::layout::to_u64(bytes.as_ptr().addr());
        let mut copy = Copy {
            dst: start,
            src,
            len,
            mode: 0,
            copy: 0,
        };
        let done = self.ioctl(UFFDIO_COPY, &mut copy);
        filled(done, copy.copy, len)
    }

    /// Places zero pages, all or a first part of the range.
    pub(super) fn zero(&self, start: u64, len: u64) -> Result<Filled, UffdError> {
        let mut zero = Zero {
            range: Range { start, len },
            mode: 0,
            zeropage: 0,
        };
        let done = self.ioctl(UFFDIO_ZEROPAGE, &mut zero);
        filled(done, zero.zeropage, len)
    }

    /// Reads what faults there are; false if there are none.
    pub(super) fn read(&self, messages: &mut Messages) -> Result<bool, UffdError> {
        messages.len = 0;
        match (&self.file).read(&mut messages.bytes) {
            Ok(len) => {
                messages.len = len;
                Ok(len > 0)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(UffdError::Read(error)),
        }
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: every caller in this file pairs a request with the structure the kernel's
        // header names for it, alive for the call. Where the kernel writes to addresses inside
        // the structure, it does so only in registered ranges, for which whoever called
        // `register` has vouched; what it reads (`copy.src`) is a borrowed slice.
        let done =
            unsafe { libc::ioctl(self.file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn require(offered: u64, needed: u64) -> Result<(), UffdError> {
    if offered & needed == needed {
        return Ok(());
    }
    Err(UffdError::Operations { offered, needed })
}

/// Makes sense of UFFDIO_COPY and UFFDIO_ZEROPAGE: with an error the kernel still says how many
/// bytes it placed before (a negative number of bytes repeats the error).
fn filled(done: io::Result<()>, bytes: i64, len: u64) -> Result<Filled, UffdError> {
    let Err(source) = done else {
        return Ok(Filled::Bytes(len));
    };
    match (u64::try_from(bytes), source.raw_os_error()) {
        (Ok(bytes), _) if bytes > 0 && bytes <= len => Ok(Filled::Bytes(bytes)),
        (_, Some(libc::EEXIST)) => Ok(Filled::Exists),
        (_, Some(libc::EAGAIN)) => Ok(Filled::Again),
        (_, Some(libc::ENOENT)) => Ok(Filled::Unregistered),
        _ => Err(UffdError::Place { len, source }),
    }
}

fn from_syscall() -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    own(fd)
}

fn from_device() -> io::Result<File> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags only and gives a new file descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    own(libc::c_long::from(fd))
}

fn own(fd: libc::c_long) -> io::Result<File> {
    match RawFd::try_from(fd) {
        // SAFETY: the kernel just gave this file descriptor to us, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_header() {
        assert_eq!(USERFAULTFD_IOC_NEW, 0xaa00);
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(UFFDIO_WAKE, 0x8010_aa02);
        assert_eq!(UFFDIO_COPY, 0xc028_aa03);
        assert_eq!(UFFDIO_ZEROPAGE, 0xc020_aa04);
        assert_eq!(size_of::<Api>(), 24);
        assert_eq!(size_of::<Register>(), 32);
        assert_eq!(size_of::<Range>(), 16);
        assert_eq!(size_of::<Copy>(), 40);
        assert_eq!(size_of::<Zero>(), 32);
    }

    #[test]
    fn partial_placements_are_told_from_failures() {
        let error = |code| Err(io::Error::from_raw_os_error(code));
        assert_eq!(filled(Ok(()), 0, 8192).unwrap(), Filled::Bytes(8192));
        assert_eq!(
            filled(error(libc::EAGAIN), 4096, 8192).unwrap(),
            Filled::Bytes(4096)
        );
        assert_eq!(filled(error(libc::EAGAIN), 0, 8192).unwrap(), Filled::Again);
        let exists = i64::from(-libc::EEXIST);
        assert_eq!(
            filled(error(libc::EEXIST), exists, 8192).unwrap(),
            Filled::Exists
        );
        assert_eq!(
            filled(error(libc::ENOENT), 0, 8192).unwrap(),
            Filled::Unregistered
        );
        assert!(filled(error(libc::EFAULT), 0, 8192).is_err());
    }

    #[test]
    fn events_nobody_asked_for_are_errors() {
        let mut messages = Messages::new();
        messages.bytes[0] = UFFD_EVENT_PAGEFAULT;
        messages.bytes[16..24].copy_from_slice(&0x1234_5000u64.to_ne_bytes());
        messages.bytes[MSG_BYTES] = 0x15;
        messages.len = 2 * MSG_BYTES;
        let mut faults = messages.faults();
        assert_eq!(faults.next().unwrap().unwrap(), 0x1234_5000);
        assert!(matches!(
            faults.next().unwrap(),
            Err(UffdError::Event { event: 0x15 })
        ));
        assert!(faults.next().is_none());
    }
}
