//! Forbidden calls really end the process, with a report; allowed ones pass. Each case runs in a
//! process of its own: this test binary again, told by an environment variable what to do.

mod paging;

use cloudlet_snapshot::{AtomicDir, AtomicFile};
use cloudlet_vmm::seccomp::{
    EXIT_CODE_VIOLATION, SeccompError, ThreadKind, explain, install, parse_report, prepare,
};
use std::env;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::ToSocketAddrs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Output};
use std::sync::mpsc;
use std::thread;

/// `KIND:DEED` for the child process.
const CASE: &str = "SECCOMP_TEST_CASE";

/// What the child ends with when a forbidden call did not end it.
const EXIT_CODE_SURVIVED: i32 = 3;

/// Where the kernel keeps the number of a call made through the x32 ABI
/// (arch/x86/include/uapi/asm/unistd.h).
const X32_SYSCALL_BIT: i64 = 0x4000_0000;

/// In a child: does what [`CASE`] says. In a plain test run: nothing.
#[test]
fn child() {
    let Ok(case) = env::var(CASE) else { return };
    let (kind, deed) = case.split_once(':').expect("KIND:DEED");
    prepare(io::stderr().as_fd().try_clone_to_owned().expect("dup")).expect("prepare");
    if deed == "paging" {
        return paging::child();
    }
    let kind = ThreadKind::ALL
        .into_iter()
        .find(|k| k.name() == kind)
        .expect("a thread kind");
    let name = if kind == ThreadKind::Vcpu {
        "vcpu7"
    } else {
        kind.name()
    };
    let deed = deed.to_owned();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || perform(kind, &deed))
        .expect("spawn")
        .join()
        .expect("join");
}

fn perform(kind: ThreadKind, deed: &str) {
    // Opened before the filter, as a VMM does.
    let zero = File::open("/dev/zero").expect("open");
    install(kind).expect("install");
    match deed {
        "allowed" => return allowed(kind, &zero),
        "abort" => std::process::abort(),
        _ => forbidden(deed, &zero),
    }
    std::process::exit(EXIT_CODE_SURVIVED);
}

/// What every kind of thread does all day.
fn allowed(kind: ThreadKind, mut zero: &File) {
    let (sender, receiver) = mpsc::channel();
    let large = vec![1_u8; 64 << 20];
    sender.send(large).expect("send");
    let mut large = receiver.recv().expect("receive");
    large.resize(96 << 20, 2);
    drop(large);
    let map: std::collections::HashMap<u32, u32> = (0..1000).map(|n| (n, n)).collect();
    assert_eq!(map[&7], 7);
    eprintln!("written");
    if ![ThreadKind::Worker, ThreadKind::Vcpu].contains(&kind) {
        let mut bytes = [1; 8];
        zero.read_exact(&mut bytes).expect("read");
    }
    if kind == ThreadKind::Fetch {
        let found = ("localhost", 80)
            .to_socket_addrs()
            .expect("look up")
            .next()
            .expect("address");
        assert!(found.ip().is_loopback(), "{found}");
    }
    if kind == ThreadKind::Control {
        write_files();
        // A worker that is started late narrows the filter that it inherits.
        thread::Builder::new()
            .name("worker0".to_owned())
            .spawn(|| install(ThreadKind::Worker).expect("install"))
            .expect("spawn")
            .join()
            .expect("join");
    }
}

/// Files and directories that appear whole, and threads without a filter of their own.
fn write_files() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("file");
    let file = AtomicFile::create(&path).expect("create");
    file.file().write_all(b"contents").expect("write");
    file.commit().expect("commit");
    let whole = AtomicDir::create(directory.path().join("directory")).expect("create");
    File::create(whole.path().join("inside"))
        .expect("create")
        .set_len(1 << 20)
        .expect("length");
    whole.commit().expect("commit");
    drop(AtomicDir::create(directory.path().join("dropped")).expect("create"));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| fs::read(&path).expect("read"));
        }
    });
}

fn forbidden(deed: &str, zero: &File) {
    let call = |number: i64, arguments: [i64; 3]| {
        let [a, b, c] = arguments;
        // SAFETY: none of the calls below is given a pointer that it could write through, and
        // the process ends here if the filter works.
        let result = unsafe { libc::syscall(number, a, b, c) };
        eprintln!(
            "call {number} returned {result}: {}",
            io::Error::last_os_error()
        );
    };
    let path: &CStr = c"/dev/null";
    let path = path.as_ptr().addr().cast_signed() as i64;
    match deed {
        "socket-inet" => call(libc::SYS_socket, [2, 1, 0]),
        "socket-netlink" => call(libc::SYS_socket, [16, 3, 0]),
        "socket-packet" => call(libc::SYS_socket, [17, 3, 0]),
        "execve" => call(libc::SYS_execve, [path, 0, 0]),
        "fork" => call(libc::SYS_fork, [0; 3]),
        "ptrace" => call(libc::SYS_ptrace, [0; 3]),
        "bpf" => call(libc::SYS_bpf, [0; 3]),
        "io-uring" => call(libc::SYS_io_uring_setup, [1, 0, 0]),
        "kill" => call(libc::SYS_kill, [i64::from(std::process::id()), 0, 0]),
        "clone-process" => call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0]),
        "clone-namespace" => {
            let thread = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
            call(
                libc::SYS_clone,
                [i64::from(thread | libc::CLONE_NEWNET), 0, 0],
            );
        }
        "unshare" => call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0]),
        "open-read" => call(libc::SYS_openat, [-100, path, 0]),
        "open-write" => call(libc::SYS_openat, [-100, path, 1]),
        "open-create" => call(libc::SYS_openat, [-100, path, 0o100]),
        "create-vm" => call(libc::SYS_ioctl, [i64::from(zero.as_raw_fd()), 0xAE01, 0]),
        "tiocsti" => call(libc::SYS_ioctl, [0, 0x5412, 0]),
        "mmap-exec" => call(libc::SYS_mmap, [0, 4096, i64::from(libc::PROT_EXEC)]),
        "mprotect-exec" => call(libc::SYS_mprotect, [0, 0, i64::from(libc::PROT_EXEC)]),
        "unknown" => call(4000, [0; 3]),
        "x32" => call(X32_SYSCALL_BIT | libc::SYS_getpid, [0; 3]),
        "i386" => {
            // SAFETY: getpid by the i386 table: touches nothing but eax.
            unsafe { std::arch::asm!("int 0x80", inout("eax") 20 => _) }
        }
        other => panic!("no such deed: {other}"),
    }
}

fn run(kind: ThreadKind, deed: &str) -> Output {
    Command::new(env::current_exe().expect("own path"))
        .args(["--exact", "child", "--nocapture"])
        .env(CASE, format!("{}:{deed}", kind.name()))
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("child")
}

#[track_caller]
fn assert_dies(kind: ThreadKind, deed: &str, syscall: &str) {
    let output = run(kind, deed);
    let report = String::from_utf8(output.stderr).expect("text");
    let context = format!("{} {deed}: {:?}\n{report}", kind.name(), output.status);
    assert_eq!(output.status.code(), Some(EXIT_CODE_VIOLATION), "{context}");
    let thread = if kind == ThreadKind::Vcpu {
        "vcpu7"
    } else {
        kind.name()
    };
    let expected = format!("seccomp: thread {thread} called {syscall}: not in its policy");
    let violation = parse_report(&report).unwrap_or_else(|| panic!("no report: {context}"));
    assert_eq!(violation.thread, thread, "{context}");
    assert!(
        violation.to_string().starts_with(&expected),
        "{violation} is not {expected}"
    );
    assert_eq!(explain(output.status, &report), Some(violation.to_string()));
}

/// What no thread of a VMM may do.
const FORBIDDEN_EVERYWHERE: [(&str, &str); 14] = [
    ("clone-namespace", "clone (56)"),
    ("socket-packet", "socket (41)"),
    ("execve", "execve (59)"),
    ("fork", "fork (57)"),
    ("ptrace", "ptrace (101)"),
    ("bpf", "bpf (321)"),
    ("io-uring", "io_uring_setup (425)"),
    ("kill", "kill (62)"),
    ("clone-process", "clone (56)"),
    ("unshare", "unshare (272)"),
    ("create-vm", "ioctl (16)"),
    ("tiocsti", "ioctl (16)"),
    ("mmap-exec", "mmap (9)"),
    ("unknown", "an unknown system call (4000)"),
];

#[test]
fn forbidden_everywhere() {
    for kind in ThreadKind::ALL {
        for (deed, syscall) in FORBIDDEN_EVERYWHERE {
            assert_dies(kind, deed, syscall);
        }
        assert_dies(kind, "mprotect-exec", "mprotect (10)");
    }
}

#[test]
fn no_network_but_for_fetch() {
    for kind in [
        ThreadKind::Control,
        ThreadKind::Vcpu,
        ThreadKind::Pager,
        ThreadKind::Worker,
        ThreadKind::Image,
    ] {
        assert_dies(kind, "socket-inet", "socket (41)");
    }
    assert_eq!(
        run(ThreadKind::Fetch, "socket-inet").status.code(),
        Some(EXIT_CODE_SURVIVED)
    );
}

/// The resolver opens one of its own accord: it is refused, and the thread lives.
#[test]
fn no_netlink_for_anybody() {
    let output = run(ThreadKind::Fetch, "socket-netlink");
    assert_eq!(output.status.code(), Some(EXIT_CODE_SURVIVED));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("call 41 returned -1: Permission denied"),
        "{text}"
    );
    assert_dies(ThreadKind::Control, "socket-netlink", "socket (41)");
}

#[test]
fn no_files_but_for_control_and_read_only_for_fetch() {
    for kind in [
        ThreadKind::Vcpu,
        ThreadKind::Pager,
        ThreadKind::Worker,
        ThreadKind::Image,
    ] {
        for deed in ["open-read", "open-write", "open-create"] {
            assert_dies(kind, deed, "openat (257)");
        }
    }
    assert_eq!(
        run(ThreadKind::Fetch, "open-read").status.code(),
        Some(EXIT_CODE_SURVIVED)
    );
    assert_dies(ThreadKind::Fetch, "open-write", "openat (257)");
    assert_dies(ThreadKind::Fetch, "open-create", "openat (257)");
    assert_eq!(
        run(ThreadKind::Control, "open-write").status.code(),
        Some(EXIT_CODE_SURVIVED)
    );
}

#[test]
fn allowed_calls_pass() {
    for kind in ThreadKind::ALL {
        let output = run(kind, "allowed");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "{}: {:?}\n{text}",
            kind.name(),
            output.status
        );
        assert!(text.contains("written"), "{text}");
        assert_eq!(explain(output.status, &text), None);
    }
}

/// The real pager and a worker that places what the pager asks for, each under its filter.
#[test]
fn paging_passes_the_filters() {
    let output = run(ThreadKind::Pager, "paging");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{:?}\n{text}", output.status);
    assert!(text.contains("all pages are right"), "{text}");
}

/// A panic ends as one (the release profile aborts), not as a violation.
#[test]
fn abort_is_allowed() {
    for kind in ThreadKind::ALL {
        let output = run(kind, "abort");
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGABRT),
            "{}: {output:?}",
            kind.name()
        );
    }
}

#[test]
fn foreign_abis_kill_at_once() {
    for kind in ThreadKind::ALL {
        let output = run(kind, "x32");
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGSYS),
            "{}: {:?}",
            kind.name(),
            output
        );
        let why = explain(output.status, "").expect("explained");
        assert!(why.contains("foreign architecture"), "{why}");

        // A kernel without IA32 emulation has no such gate and answers with a fault.
        let signal = run(kind, "i386").status.signal();
        assert!(
            matches!(signal, Some(libc::SIGSYS | libc::SIGSEGV)),
            "{signal:?}"
        );
    }
}

#[test]
fn no_filter_without_a_handler() {
    // Only children call `prepare`, so this process has no handler.
    let result = thread::spawn(|| install(ThreadKind::Worker))
        .join()
        .expect("join");
    assert!(
        matches!(result, Err(SeccompError::NotPrepared)),
        "{result:?}"
    );
}

#[test]
fn other_ends_are_not_explained() {
    assert_eq!(explain(ExitStatus::from_raw(1 << 8), ""), None);
    assert_eq!(explain(ExitStatus::from_raw(libc::SIGKILL), ""), None);
    let why = explain(ExitStatus::from_raw(EXIT_CODE_VIOLATION << 8), "").expect("explained");
    assert!(why.contains("without a report"), "{why}");
}
