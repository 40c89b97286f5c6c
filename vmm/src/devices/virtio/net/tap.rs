//! A TAP interface: the guest's card is a port of the host's network.
//!
//! The interface is made beforehand, by whoever may change the host's network, and given to the
//! user who runs the VM. It is opened with the virtio header before each frame, so that checksums
//! and segmentation can be left to whoever is at the other end of the wire.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::backend::{Backend, Received, Sent};
use super::device::{FRAME_BYTES_MAX, HEADER_BYTES};
use super::frames;
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::buffers::Buffers;

/// Longest name of an interface.
const NAME_LEN_MAX: usize = libc::IFNAMSIZ - 1;
/// Frames thrown away when the driver changes what it takes: more than an interface queues by default
/// (1000).
const STALE_FRAMES_MAX: usize = 4096;

/// Offloads of a TAP.
pub(super) const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

/// Why a TAP interface cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface can be called that.
    #[error("`{0}` is no name of an interface")]
    Name(String),
    /// It is not there.
    #[error("there is no interface {0}; `ip tuntap add {0} mode tap user USER` makes one")]
    Missing(String),
    /// The kernel has no TAP interfaces, or keeps them from this user.
    #[error("cannot open /dev/net/tun")]
    Open(#[source] io::Error),
    /// Another program has it.
    #[error("the interface {0} is in use by another program")]
    Busy(String),
    /// It is another kind of interface, or another user's.
    #[error("the interface {name} cannot be used as a TAP interface of this user")]
    Attach {
        /// The interface.
        name: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// An open TAP interface.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    /// For a frame in more pieces than a call takes.
    copy: Vec<u8>,
}

impl Tap {
    /// Opens the interface `name`, which must be there.
    ///
    /// # Errors
    /// It is not there, is none of this user's, or is in use.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let bad_name = || TapError::Name(name.to_owned());
        if name.is_empty() || name.len() > NAME_LEN_MAX {
            return Err(bad_name());
        }
        let c_name = CString::new(name).map_err(|_| bad_name())?;
        // The kernel would make one that is connected to nothing.
        // SAFETY: a string with an end, which lives across the call.
        if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
            return Err(TapError::Missing(name.to_owned()));
        }
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Open)?;
        let tap = Self {
            file,
            name: name.to_owned(),
            copy: Vec::new(),
        };
        match tap.attach(&c_name) {
            Ok(()) => Ok(tap),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                Err(TapError::Busy(name.to_owned()))
            }
            Err(source) => Err(TapError::Attach {
                name: name.to_owned(),
                source,
            }),
        }
    }

    fn attach(&self, name: &CString) -> io::Result<()> {
        // SAFETY: an ifreq is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
            *slot = byte.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
        // SAFETY: the kernel reads and writes one ifreq, which lives across the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let header_bytes = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
        // SAFETY: the kernel reads one int, which lives across the call.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETVNETHDRSZ,
                &raw const header_bytes,
            )
        })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The offloads that the kernel may leave to a driver with `features`. Segmentation needs checksums
/// (section 5.1.3.1), and the kernel refuses the one without the other.
fn kernel_offloads(features: u64) -> libc::c_uint {
    let has = |bit: u32| features >> bit & 1 == 1;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let tso4 = has(VIRTIO_NET_F_GUEST_TSO4).then_some(libc::TUN_F_TSO4);
    let tso6 = has(VIRTIO_NET_F_GUEST_TSO6).then_some(libc::TUN_F_TSO6);
    libc::TUN_F_CSUM | tso4.unwrap_or(0) | tso6.unwrap_or(0)
}

impl Backend for Tap {
    fn name(&self) -> String {
        format!("tap {}", self.name)
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        OFFLOADS
    }

    fn set_up(&mut self, features: u64) -> io::Result<()> {
        let offloads = kernel_offloads(features);
        // SAFETY: the argument is a number, no pointer.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        })?;
        // Frames that wait in the interface may be too large for this driver.
        let mut stale = [0; 64];
        for _ in 0..STALE_FRAMES_MAX {
            match self.file.read(&mut stale) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive(&mut self, guest: &GuestRam, buffers: &Buffers, overflow: &mut [u8]) -> Received {
        loop {
            return match frames::read(guest, buffers, self.file.as_fd(), overflow) {
                Ok((len, direct)) => Received::Frame { len, direct },
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::WouldBlock => Received::Nothing,
                    // The interface was removed.
                    _ => Received::Gone,
                },
            };
        }
    }

    fn send(&mut self, guest: &GuestRam, buffers: &Buffers) -> Sent {
        self.copy.resize(FRAME_BYTES_MAX, 0);
        loop {
            return match frames::write(guest, buffers, self.file.as_fd(), &mut self.copy) {
                Ok(_) => Sent::Done,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // A header that does not fit its frame, an interface that is down, no memory: a
                // network loses frames. That the interface is gone is seen by reading.
                Err(_) => Sent::Refused,
            };
        }
    }

    fn flush(&mut self) -> Sent {
        Sent::Done
    }
}
