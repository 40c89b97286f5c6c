//! The calls that need `unsafe`: vsock addresses, trimming, random numbers, a terminal for a child, what
//! signals do, and the port for exit codes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::ioctl::{NoArg, Opcode, Setter, Updater, opcode};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType};

use crate::protocol::ENTROPY_LEN;

/// `VMADDR_CID_ANY` and `VMADDR_CID_HOST` of linux/vm_sockets.h.
const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;

/// `struct sockaddr_vm` of linux/vm_sockets.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

/// Its length, which every caller of the kernel names.
const ADDRESS_LEN: SocketAddrLen = 16;
const _: () = assert!(size_of::<VsockAddress>() == 16);

// SAFETY: the closure gets a pointer to a whole `sockaddr_vm` that lives across the call, with its
// length, which is the size of the type.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f((&raw const *self).cast(), ADDRESS_LEN)
    }
}

/// Listens on vsock `port` for connections from anywhere.
pub(crate) fn listen(port: u32, backlog: i32) -> io::Result<OwnedFd> {
    let family = AddressFamily::VSOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let address = VsockAddress {
        family: family.as_raw(),
        reserved: 0,
        port,
        cid: CID_ANY,
        zero: [0; 4],
    };
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}

/// Takes a connection; `None` if it is not the host's: programs in the guest can connect too, and
/// may have fewer rights than the agent.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let (socket, address) = rustix::net::acceptfrom_with(listener, SocketFlags::CLOEXEC)?;
    let from_host = address.is_some_and(|address| is_host(&address));
    Ok(from_host.then_some(socket))
}

fn is_host(address: &SocketAddrAny) -> bool {
    cid_of(address) == Some(CID_HOST)
}

fn cid_of(address: &SocketAddrAny) -> Option<u32> {
    if address.address_family() != AddressFamily::VSOCK || address.addr_len() < ADDRESS_LEN {
        return None;
    }
    // SAFETY: the address holds at least as many bytes as the type has, which was just checked, and
    // any bytes are one. The storage need not be aligned for it.
    let address = unsafe { address.as_ptr().cast::<VsockAddress>().read_unaligned() };
    Some(address.cid)
}

/// `struct fstrim_range` of linux/fs.h.
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    least: u64,
}

/// `FITRIM` of linux/fs.h.
const FITRIM: Opcode = opcode::read_write::<TrimRange>(b'X', 121);

/// Discards what is free in the file system of `file`; the number of bytes.
pub(crate) fn trim(file: impl AsFd) -> io::Result<u64> {
    let mut range = TrimRange {
        start: 0,
        length: u64::MAX,
        least: 0,
    };
    // SAFETY: FITRIM reads and writes one `fstrim_range`, which `TrimRange` is laid out as, and which
    // lives across the call.
    unsafe { rustix::ioctl::ioctl(file, Updater::<FITRIM, TrimRange>::new(&mut range)) }?;
    Ok(range.length)
}

/// `struct rand_pool_info` of linux/random.h with the bytes behind it.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    bytes: i32,
    buffer: [u8; ENTROPY_LEN],
}

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of linux/random.h.
const ADD_ENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
const RESEED: Opcode = opcode::none(b'R', 0x07);

/// Mixes `entropy`, every bit of which counts, into the kernel's random numbers, and has the generators
/// of all processors begin anew.
pub(crate) fn reseed(entropy: &[u8; ENTROPY_LEN]) -> io::Result<()> {
    let device = File::open("/dev/urandom")?;
    let bytes = i32::try_from(ENTROPY_LEN).unwrap_or(0);
    let info = PoolInfo {
        entropy_bits: bytes * 8,
        bytes,
        buffer: *entropy,
    };
    // SAFETY: RNDADDENTROPY reads a `rand_pool_info`, which `PoolInfo` is laid out as, and as many bytes
    // behind it as it says, which it has.
    unsafe { rustix::ioctl::ioctl(&device, Setter::<ADD_ENTROPY, PoolInfo>::new(info)) }?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    unsafe { rustix::ioctl::ioctl(&device, NoArg::<RESEED>::new()) }?;
    Ok(())
}

/// Sends `signal`, which may be a real-time one, to the guest's first program.
pub(crate) fn signal_init(signal: i32) -> io::Result<()> {
    // SAFETY: the call takes no memory.
    match unsafe { libc::kill(1, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has every signal do what it does by default, for the sake of the commands: a shell that starts the
/// agent in the background has it ignore the terminal's signals, and children inherit that. Those of
/// the standard library stay: it sees to its children.
pub(crate) fn reset_signals() {
    for signal in 1..32 {
        if ![libc::SIGPIPE, libc::SIGSEGV, libc::SIGBUS].contains(&signal) {
            // SAFETY: the call takes no memory, and nobody in this program relies on a handler of these
            // signals. Where one cannot be changed, nothing happens.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

/// Has the child that `command` makes lead a session of its own, with the terminal that its standard
/// input is.
pub(crate) fn lead_session_on_terminal(command: &mut Command) {
    let prepare = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, and makes two system calls and nothing else: no
    // allocation, no lock.
    unsafe { command.pre_exec(prepare) };
}

/// The I/O port of a VM that takes the exit code of the guest's process (`vmm/src/machine/power.rs`).
pub const EXIT_CODE_PORT: u16 = 0x608;

/// Tells the VM what its process has ended with, for when it powers off next.
///
/// # Errors
/// The kernel does not let this process have the port.
pub fn tell_exit_code(code: u8) -> io::Result<()> {
    // SAFETY: the call takes three integers, and changes only what this thread may do.
    if unsafe { libc::ioperm(EXIT_CODE_PORT.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this thread may use the port, which the call before has just said. Nothing listens there
    // but the VM's register; memory and stack stay as they are.
    unsafe {
        std::arch::asm!("out dx, al", in("dx") EXIT_CODE_PORT, in("al") code, options(nomem, nostack));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hosts_context_id_is_the_host() {
        let from = |cid| VsockAddress {
            family: AddressFamily::VSOCK.as_raw(),
            reserved: 0,
            port: 2,
            cid,
            zero: [0; 4],
        };
        assert!(is_host(&from(CID_HOST).as_any()));
        // Nobody (a hypervisor of old), the guest itself by its loopback, a guest, anybody.
        for cid in [0, 1, 3, CID_ANY] {
            assert!(!is_host(&from(cid).as_any()), "{cid}");
        }
        let internet: std::net::SocketAddr = ([2, 0, 0, 2], 2).into();
        assert!(!is_host(&internet.as_any()));
    }
}
