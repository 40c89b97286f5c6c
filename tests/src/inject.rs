//! Makes a thread of a running process enter a system call that it did not mean: the nearest thing
//! to a VMM that a guest has taken over. Uses ptrace(2) at the stop before the kernel looks at the
//! seccomp filter (seccomp(2): filters run after the tracer's syscall-entry stop).

use std::io;
use std::ptr;

use crate::failure::{Failure, Outcome};

/// Replaces the next system call of the thread `tid` with number `syscall`, and lets it go.
pub fn replace_next_syscall(tid: u32, syscall: libc::c_long) -> Outcome {
    let tid = libc::pid_t::try_from(tid)?;
    // TRACESYSGOOD tells syscall stops from signals.
    let good = usize::try_from(libc::PTRACE_O_TRACESYSGOOD)?;
    request(libc::PTRACE_SEIZE, tid, good)?;
    request(libc::PTRACE_INTERRUPT, tid, 0)?;
    wait_for_stop(tid)?;
    for _ in 0..64 {
        request(libc::PTRACE_SYSCALL, tid, 0)?;
        if wait_for_stop(tid)? == libc::SIGTRAP | 0x80 && at_entry(tid)? {
            let mut registers = registers(tid)?;
            registers.orig_rax = u64::try_from(syscall)?;
            set_registers(tid, &registers)?;
            return request(libc::PTRACE_DETACH, tid, 0);
        }
    }
    Err(Failure::new(format!("thread {tid} enters no system call")))
}

/// Whether a syscall stop is before the call: the result register holds -ENOSYS then.
fn at_entry(tid: libc::pid_t) -> Outcome<bool> {
    Ok(registers(tid)?.rax == 0_u64.wrapping_sub(u64::try_from(libc::ENOSYS)?))
}

fn registers(tid: libc::pid_t) -> Outcome<libc::user_regs_struct> {
    let mut registers = std::mem::MaybeUninit::<libc::user_regs_struct>::uninit();
    // SAFETY: the kernel writes one user_regs_struct to the pointer, which has room for it.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_GETREGS,
            tid,
            ptr::null_mut::<()>(),
            registers.as_mut_ptr(),
        )
    };
    check(result)?;
    // SAFETY: the call succeeded, so the structure is filled.
    Ok(unsafe { registers.assume_init() })
}

fn set_registers(tid: libc::pid_t, registers: &libc::user_regs_struct) -> Outcome {
    // SAFETY: the kernel reads one user_regs_struct from the pointer, which is to a whole one.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_SETREGS,
            tid,
            ptr::null_mut::<()>(),
            ptr::from_ref(registers).cast_mut(),
        )
    };
    check(result)
}

/// A request whose last argument is a number.
fn request(kind: libc::c_uint, tid: libc::pid_t, data: usize) -> Outcome {
    // SAFETY: the requests made here (SEIZE, INTERRUPT, SYSCALL, DETACH) take no pointers.
    check(unsafe { libc::ptrace(kind, tid, ptr::null_mut::<()>(), data) })
}

/// The signal of the thread's next stop.
fn wait_for_stop(tid: libc::pid_t) -> Outcome<libc::c_int> {
    let mut status = 0;
    // SAFETY: the kernel writes one integer to the pointer.
    let waited = unsafe { libc::waitpid(tid, &mut status, libc::__WALL) };
    if waited != tid {
        return Err(io::Error::last_os_error().into());
    }
    if !libc::WIFSTOPPED(status) {
        return Err(Failure::new(format!(
            "thread {tid} ended instead of stopping"
        )));
    }
    Ok(libc::WSTOPSIG(status))
}

fn check(result: libc::c_long) -> Outcome {
    if result == -1 {
        Err(io::Error::last_os_error().into())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_replaced_call_is_carried_out_instead() {
        // `cat` waits in read(2) on its pipe; made to call exit_group, it ends with the value of
        // the first argument register, the descriptor 0.
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        replace_next_syscall(child.id(), libc::SYS_exit_group).unwrap();
        // Its standard input is still open: only the replaced call can have ended it.
        let stdin = child.stdin.take();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        drop(stdin);
    }
}
