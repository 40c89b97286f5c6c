//! The process's side of a violation: the SIGSYS handler, and the labels by which it knows the
//! thread. Only what is safe in a signal handler, and allowed by every policy, happens there: one
//! `write` to a descriptor opened before, and `exit_group`.

use super::report::{LINE_BYTES_MAX, THREAD_BYTES_MAX, format_line, format_signal};
use super::{EXIT_CODE_VIOLATION, SeccompError, ThreadKind};
use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// `si_code` of a SIGSYS from a filter (include/uapi/asm-generic/siginfo.h); libc lacks it.
const SYS_SECCOMP: i32 = 1;

/// A thread's name with zeros behind it, as the kernel keeps it (TASK_COMM_LEN).
type Label = [u8; THREAD_BYTES_MAX];

/// No report descriptor yet.
const NO_FD: i32 = -1;

static CLAIMED: AtomicBool = AtomicBool::new(false);
static REPORT_FD: AtomicI32 = AtomicI32::new(NO_FD);

thread_local! {
    // Constant and without a destructor, so that reading it in a signal handler is a plain load.
    static LABEL: Cell<Label> = const { Cell::new(*b"unlabelled\0\0\0\0\0\0") };
}

/// Sets where violations are reported, and the handler that reports them. Call it once in a
/// process, before the first [`super::install`]. The descriptor stays open as long as the process
/// lives: a pipe or file whose other end the parent reads.
///
/// # Errors
/// When called twice, or when the kernel refuses the handler.
pub fn prepare(report: OwnedFd) -> Result<(), SeccompError> {
    if CLAIMED.swap(true, Ordering::SeqCst) {
        return Err(SeccompError::AlreadyPrepared);
    }
    set_handler().map_err(SeccompError::Handler)?;
    keep_to_one_arena()?;
    REPORT_FD.store(report.into_raw_fd(), Ordering::SeqCst);
    Ok(())
}

/// Has glibc's malloc serve all threads from its main arena. Before it shrinks any other, it opens
/// `/proc/sys/vm/overcommit_memory` on whatever thread happens to free (malloc/arena.c,
/// `check_may_shrink_heap`), and the policies let no thread open a file for that.
fn keep_to_one_arena() -> Result<(), SeccompError> {
    // SAFETY: mallopt takes two numbers and no pointers; it is thread-safe (mallopt(3)).
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        1 => Ok(()),
        _ => Err(SeccompError::Arena),
    }
}

fn set_handler() -> io::Result<()> {
    // SAFETY: sigaction is a plain C structure for which all zeros is a value.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigsys;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the set is inside `action`, which lives on this stack.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    // SAFETY: `action` is complete, and its handler has the signature that SA_SIGINFO asks for
    // and calls only async-signal-safe functions.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the calling thread the name under which it is reported, and lets SIGSYS through: the
/// kernel kills without a report where it is blocked.
pub(super) fn label_thread(kind: ThreadKind) -> Result<(), SeccompError> {
    if REPORT_FD.load(Ordering::SeqCst) == NO_FD {
        return Err(SeccompError::NotPrepared);
    }
    let own = std::thread::current();
    let name = own
        .name()
        .filter(|name| name.starts_with(kind.name()))
        .unwrap_or(kind.name());
    let mut label = Label::default();
    // One byte less: the kernel keeps a final zero, and so does the label.
    for (to, from) in label
        .iter_mut()
        .take(THREAD_BYTES_MAX - 1)
        .zip(name.bytes())
    {
        *to = from;
    }
    LABEL.set(label);

    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: sigset_t is a bit set for which zeros are a value; both calls change only `set`,
    // and pthread_sigmask only reads it.
    let result = unsafe {
        libc::sigaddset(set.as_mut_ptr(), libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        error => Err(SeccompError::Unblock(io::Error::from_raw_os_error(error))),
    }
}

/// What the kernel puts into siginfo for SIGSYS: `_sigsys` of
/// include/uapi/asm-generic/siginfo.h, behind the three common fields and their padding.
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    call_address: u64,
    syscall: i32,
    architecture: u32,
}

/// Writes one line about the call that a filter refused and ends the process.
extern "C" fn on_sigsys(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut line = [0; LINE_BYTES_MAX];
    let label = LABEL.get();
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t of 128 bytes, of which SigsysInfo is
    // the beginning; all its fields are integers, so that every content is a value.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    let length = if info.code == SYS_SECCOMP {
        // SAFETY: with SA_SIGINFO the third argument is the ucontext_t of the interrupted thread.
        let context = unsafe { &*context.cast::<libc::ucontext_t>() };
        format_line(&mut line, &label, info.syscall, arguments(context))
    } else {
        format_signal(&mut line, &label)
    };
    // SAFETY: `line` is at least `length` bytes long; both calls are async-signal-safe and in
    // every policy. A report that cannot be written is lost, the exit code remains.
    unsafe {
        libc::write(
            REPORT_FD.load(Ordering::SeqCst),
            line.as_ptr().cast(),
            length,
        );
        libc::_exit(EXIT_CODE_VIOLATION)
    }
}

/// The first three arguments of the refused call, in the registers of the x86-64 call ABI.
fn arguments(context: &libc::ucontext_t) -> [u64; 3] {
    let registers = &context.uc_mcontext.gregs;
    [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(|register| {
        usize::try_from(register)
            .ok()
            .and_then(|index| registers.get(index))
            .map_or(0, |value| value.cast_unsigned())
    })
}
