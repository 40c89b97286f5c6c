//! SIGBUS and SIGSEGV, in words. Guest memory can be a file's, mapped privately, and a file that is
//! cut while it is mapped gives whoever touches what is gone a SIGBUS. The standard library's handler
//! of these signals would ask the kernel for what no thread's policy allows, and the report would speak
//! of that. As with a violation (`seccomp/handler.rs`), only what is safe in a signal handler and
//! allowed by every policy happens: one `write` to a descriptor opened before, and `exit_group`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::memory::Slot;

/// The exit code of [`crate::exit::ExitReason::HostError`].
const EXIT_CODE: i32 = 15;
/// What a report of such an end begins with: its name and its code (`cloudlet/src/report.rs`).
const LINE: &str = "host-error 15\n";
/// No report descriptor yet.
const NO_FD: i32 = -1;

static REPORT_FD: AtomicI32 = AtomicI32::new(NO_FD);
static MEMORY: OnceLock<Memory> = OnceLock::new();

/// Guest memory that is a file's, and what is said when the file fails it.
struct Memory {
    /// Address ranges: beginning and length.
    ranges: Vec<(u64, u64)>,
    words: String,
}

/// From now on SIGBUS and SIGSEGV are told to `report`, and end the process with the code of an error
/// on the host. The descriptor stays open as long as the process lives.
///
/// # Errors
/// The kernel refuses the handler.
pub fn prepare(report: OwnedFd) -> io::Result<()> {
    REPORT_FD.store(report.into_raw_fd(), Ordering::SeqCst);
    [libc::SIGBUS, libc::SIGSEGV]
        .into_iter()
        .try_for_each(set_handler)
}

/// Says which file the guest memory in `slots` is mapped from. A process has one VM: the first call
/// counts.
pub fn set_memory_file(slots: &[Slot], file: &Path) {
    let ranges = slots.iter().map(|slot| (slot.host, slot.len)).collect();
    let words = format!("{LINE}{}", cut_words(file));
    let _ = MEMORY.set(Memory { ranges, words });
}

/// What is said of a memory file that is shorter than the RAM that is mapped from it.
#[must_use]
pub fn cut_words(file: &Path) -> String {
    format!(
        "the memory file {} was cut short, or can no longer be read, while the VM ran from it",
        file.display()
    )
}

fn set_handler(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: sigaction is a plain C structure for which all zeros is a value.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
    action.sa_sigaction = handler as libc::sighandler_t;
    // The thread may have no stack left: the standard library gives each of its own another.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the set is inside `action`, which lives on this stack.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    // SAFETY: `action` is complete, and its handler has the signature that SA_SIGINFO asks for and
    // calls only async-signal-safe functions.
    match unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes why the process ends and ends it.
extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a whole siginfo_t, and for these two signals its
    // address field is filled.
    let address = unsafe { (*info).si_addr() } as u64;
    let words = words(signal, address, MEMORY.get());
    // SAFETY: the words live as long as the process; both calls are async-signal-safe and in every
    // policy. A report that cannot be written is lost, the exit code remains.
    unsafe {
        libc::write(
            REPORT_FD.load(Ordering::SeqCst),
            words.as_ptr().cast(),
            words.len(),
        );
        libc::_exit(EXIT_CODE)
    }
}

/// What is said of a fault. Safe in a signal handler: nothing is allocated.
fn words(signal: i32, address: u64, memory: Option<&'static Memory>) -> &'static [u8] {
    let is_in = |memory: &&Memory| {
        let covers = |&(begin, len): &(u64, u64)| {
            address
                .checked_sub(begin)
                .is_some_and(|offset| offset < len)
        };
        memory.ranges.iter().any(covers)
    };
    match memory.filter(is_in) {
        Some(memory) if signal == libc::SIGBUS => memory.words.as_bytes(),
        _ if signal == libc::SIGBUS => {
            b"host-error 15\na file that is mapped into the VM's process was cut short, or can no \
              longer be read"
        }
        _ => {
            b"host-error 15\na thread of the VM's process used memory that it does not have, or all of its stack: \
              a fault of cloudlet itself"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_named_for_an_address_in_guest_memory_alone() {
        let memory: &Memory = Box::leak(Box::new(Memory {
            ranges: vec![(0x1000, 0x1000), (0x8000, 0x1000)],
            words: format!("{LINE}{}", cut_words(Path::new("/images/memory"))),
        }));
        let said = |signal, address| {
            String::from_utf8_lossy(words(signal, address, Some(memory))).into_owned()
        };
        for inside in [0x1000, 0x1fff, 0x8000] {
            assert!(said(libc::SIGBUS, inside).contains("/images/memory"));
        }
        for outside in [0, 0xfff, 0x2000, 0x9000, u64::MAX] {
            assert!(said(libc::SIGBUS, outside).contains("a file that is mapped"));
        }
        assert!(said(libc::SIGSEGV, 0x1000).contains("a fault of cloudlet"));
        assert!(!words(libc::SIGBUS, 0x1000, None).is_empty());
        let reason = crate::exit::ExitReason::HostError {
            message: String::new(),
        };
        assert_eq!(LINE, format!("{} {}\n", reason.name(), reason.code()));
        assert_eq!(EXIT_CODE, i32::from(reason.code()));
        for signal in [libc::SIGBUS, libc::SIGSEGV] {
            for address in [0, 0x1000] {
                assert!(said(signal, address).starts_with(LINE));
            }
        }
    }
}
