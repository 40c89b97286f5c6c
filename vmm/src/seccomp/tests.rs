//! Bad policies and what is said about them; the tables; the shape of the shipped policies.

use super::policy::{Policy, PolicyError, Problem, Rule, Verdict};
use super::{SYSCALL_NAMES, ThreadKind, report, syscall_name, tables};
use std::mem::size_of;
use std::path::Path;

/// What every policy needs, so that a test can be about one further line.
const FRAME: &str = "write # report\nexit_group # end\n";

fn parse(lines: &str) -> Result<Policy, PolicyError> {
    Policy::parse("t.policy", &format!("{FRAME}{lines}"))
}

fn message(lines: &str) -> String {
    let error = parse(lines).expect_err("a bad policy");
    format!("{error}")
}

fn shipped(kind: ThreadKind) -> Policy {
    let name = format!("{}.policy", kind.name());
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../resources/seccomp")
        .join(&name);
    Policy::parse(&name, &std::fs::read_to_string(path).expect("policy")).expect("valid")
}

#[test]
fn reads_every_form() {
    let policy = parse(
        "# a comment\n\n\
         read # why\n\
         ioctl arg1 == KVM_RUN # why\n\
         ioctl arg1 == 0x5401 # why\n\
         socket arg0 in {AF_INET,AF_INET6} and arg1 & SOCK_STREAM | SOCK_DGRAM == 1 # why\n\
         mmap arg2:64&PROT_EXEC==0 # why\n\
         clone3 => ENOSYS # why\n\
         socket arg0 in {AF_NETLINK, 17} => EACCES # why",
    )
    .expect("valid");
    let of = |name: &str| {
        policy
            .rules
            .iter()
            .filter(|rule| rule.syscall == name)
            .cloned()
            .collect::<Vec<Rule>>()
    };
    assert!(of("read")[0].conditions.is_empty());
    assert_eq!(of("read")[0].line, 5);
    assert_eq!(of("ioctl")[0].conditions[0].value, 0xAE80);
    assert_eq!(of("ioctl")[1].conditions[0].value, 0x5401);
    let socket = of("socket");
    assert_eq!(socket.len(), 4, "one rule a value of the set");
    assert_eq!(socket[3].verdict, Verdict::Fail(13));
    assert_eq!(socket[1].conditions[0].value, 10);
    assert_eq!(socket[1].conditions[1].mask, Some(3));
    assert_eq!(of("clone3")[0].verdict, Verdict::Fail(38));
    let mmap = of("mmap")[0].conditions[0];
    assert!(mmap.wide);
    assert_eq!((mmap.argument, mmap.mask, mmap.value), (2, Some(4), 0));
}

#[test]
fn names_file_line_and_problem() {
    for (lines, expected) in [
        ("raed # why", "t.policy:3: unknown system call `raed`"),
        (
            "\nioctl arg1 == KVM_RNU # why",
            "t.policy:4: unknown constant `KVM_RNU`",
        ),
        (
            "ioctl arg1 == 0xzz # why",
            "t.policy:3: unknown constant `0xzz`",
        ),
        (
            "ioctl arg1 == 99999999999999999999 # why",
            "unknown constant",
        ),
        (
            "read # why\nread # again",
            "t.policy:4: `read` is already settled by line 3",
        ),
        (
            "read # why\nread arg0 == 1 # too",
            "t.policy:4: `read` is already settled by line 3",
        ),
        (
            "read arg0 == 1 # too\nread # why",
            "t.policy:4: `read` is already settled by line 3",
        ),
        (
            "read arg0 == 1 # a\nread arg0 in {0, 1} # b",
            "already settled by line 3",
        ),
        (
            "read arg0 in {1, 2, 1} # b",
            "t.policy:3: `read` is already settled by line 3",
        ),
        ("read", "t.policy:3: no reason given"),
        ("read #  ", "t.policy:3: no reason given"),
        ("ioctl arg6 == 1 # why", "`arg6` is not an argument"),
        ("ioctl arg == 1 # why", "`arg` is not an argument"),
        ("ioctl arg1:32 == 1 # why", "`arg1:32` is not an argument"),
        (
            "ioctl arg1 == 0x100000000 # why",
            "0x100000000 does not fit 32 bits: write arg1:64",
        ),
        (
            "mmap arg2:64 & PROT_EXEC == 2 # why",
            "0x2 has bits outside the mask 0x4",
        ),
        (
            "ioctl arg1 # why",
            "expected `==`, `&` or `in`, found the end of the line",
        ),
        (
            "ioctl arg1 == # why",
            "expected a constant or a number, found the end",
        ),
        (
            "ioctl arg1 = 1 # why",
            "expected a name, a number or a sign, found `= 1`",
        ),
        (
            "ioctl arg1 == 1 or arg2 == 1 # why",
            "expected `and`, `=>` or the end, found `or`",
        ),
        ("ioctl arg1 == 1 and # why", "`` is not an argument"),
        (
            "ioctl arg1 in 1 # why",
            "expected `{` after `in`, found `1`",
        ),
        (
            "ioctl arg1 in {1 # why",
            "expected `,` or `}`, found the end",
        ),
        ("ioctl arg1 in {} # why", "unknown constant `}`"),
        (
            "read # why\nread => EPERM # no",
            "t.policy:4: `read` is already settled by line 3",
        ),
        ("clone3 => 0 # why", "0 is not an error number"),
        ("clone3 => 4096 # why", "4096 is not an error number"),
        ("clone3 => ENOSYS 1 # why", "expected the end, found `1`"),
        (
            "clone3 => # why",
            "expected a constant or a number, found the end",
        ),
        (
            "socket arg0 == 1 and => EPERM # why",
            "`=>` is not an argument",
        ),
        (
            "socket arg0 == 1 # a
socket arg0 == 1 => EPERM # b",
            "already settled by line 3",
        ),
        ("ioctl arg1 & 1 # why", "expected `==` after the mask"),
    ] {
        let error = parse(lines).expect_err(lines);
        let text = format!("{error}");
        assert!(
            text.contains(expected),
            "{lines:?}: {text} does not say {expected}"
        );
    }
    assert_eq!(
        message("raed # why"),
        "t.policy:3: unknown system call `raed`"
    );
}

#[test]
fn a_policy_must_let_the_handler_report() {
    for (text, missing) in [
        ("", "write"),
        ("write # w", "exit_group"),
        ("exit_group # e\nwrite arg0 == 2 # w", "write"),
        ("exit_group # e\nwrite => EPERM # w", "write"),
    ] {
        let problem = Policy::parse("t.policy", text).expect_err("mute").problem;
        assert_eq!(problem, Problem::CannotReport(missing));
    }
}

#[test]
fn shipped_policies_never_allow_executable_memory_or_programs() {
    let dangerous = [
        "execve",
        "execveat",
        "fork",
        "vfork",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "bpf",
        "mount",
        "setns",
        "unshare",
        "io_uring_setup",
        "io_uring_enter",
        "kexec_load",
        "init_module",
        "finit_module",
        "open_by_handle_at",
        "pidfd_getfd",
        "kill",
        "tkill",
        "memfd_create",
        "userfaultfd",
        "open",
        "openat2",
        "personality",
        "pkey_mprotect",
    ];
    for kind in ThreadKind::ALL {
        for rule in shipped(kind).rules {
            assert!(
                !dangerous.contains(&rule.syscall.as_str()),
                "{}: {rule:?}",
                kind.name()
            );
            if ["mmap", "mprotect"].contains(&rule.syscall.as_str()) {
                let no_exec = |c: &super::policy::Condition| {
                    c.argument == 2 && c.wide && c.mask == Some(4) && c.value == 0
                };
                assert!(
                    rule.conditions.iter().any(no_exec),
                    "{}: {rule:?}",
                    kind.name()
                );
            }
            // Its flags are behind a pointer, where no filter can look.
            assert!(
                rule.syscall != "clone3" || rule.verdict != Verdict::Allow,
                "{rule:?}"
            );
            if ["ioctl", "socket", "prctl", "tgkill", "clone"].contains(&rule.syscall.as_str()) {
                assert!(!rule.conditions.is_empty(), "{}: {rule:?}", kind.name());
            }
        }
    }
}

/// Workers are started by the control thread when it is filtered already.
#[test]
fn control_may_do_all_that_a_worker_may() {
    let control = shipped(ThreadKind::Control);
    for rule in shipped(ThreadKind::Worker).rules {
        let covers = |other: &&Rule| {
            other.number == rule.number
                && other.verdict == rule.verdict
                && other
                    .conditions
                    .iter()
                    .all(|condition| rule.conditions.contains(condition))
        };
        assert!(
            control.rules.iter().any(|other| covers(&other)),
            "control lacks {rule:?}"
        );
    }
}

#[test]
fn the_name_table_has_no_gaps() {
    assert_eq!(syscall_name(0), Some("read"));
    assert_eq!(syscall_name(41), Some("socket"));
    assert_eq!(syscall_name(462), Some("mseal"));
    assert_eq!(syscall_name(-1), None);
    assert_eq!(syscall_name(i32::MAX), None);
    // 337 to 423 were never given out on x86-64.
    let holes: Vec<usize> = (0..SYSCALL_NAMES.len())
        .filter(|n| SYSCALL_NAMES[*n].is_empty())
        .collect();
    assert_eq!(holes, (337..=423).collect::<Vec<_>>());
}

#[test]
fn ioctl_numbers_match_the_structures() {
    use kvm_bindings::*;
    let sizes = [
        ("KVM_GET_REGS", size_of::<kvm_regs>()),
        ("KVM_GET_SREGS", size_of::<kvm_sregs>()),
        ("KVM_GET_SREGS2", size_of::<kvm_sregs2>()),
        ("KVM_TRANSLATE", size_of::<kvm_translation>()),
        ("KVM_GET_MSRS", size_of::<kvm_msrs>()),
        ("KVM_GET_FPU", size_of::<kvm_fpu>()),
        ("KVM_GET_LAPIC", size_of::<kvm_lapic_state>()),
        ("KVM_SET_CPUID2", size_of::<kvm_cpuid2>()),
        ("KVM_GET_MP_STATE", size_of::<kvm_mp_state>()),
        ("KVM_GET_VCPU_EVENTS", size_of::<kvm_vcpu_events>()),
        ("KVM_GET_DEBUGREGS", size_of::<kvm_debugregs>()),
        ("KVM_GET_XCRS", size_of::<kvm_xcrs>()),
        ("KVM_GET_DIRTY_LOG", size_of::<kvm_dirty_log>()),
        ("KVM_CLEAR_DIRTY_LOG", size_of::<kvm_clear_dirty_log>()),
        (
            "KVM_SET_USER_MEMORY_REGION",
            size_of::<kvm_userspace_memory_region>(),
        ),
        ("KVM_IRQ_LINE", size_of::<kvm_irq_level>()),
        ("KVM_GET_IRQCHIP", size_of::<kvm_irqchip>()),
        ("KVM_SET_GSI_ROUTING", size_of::<kvm_irq_routing>()),
        ("KVM_IRQFD", size_of::<kvm_irqfd>()),
        ("KVM_IOEVENTFD", size_of::<kvm_ioeventfd>()),
        ("KVM_GET_PIT2", size_of::<kvm_pit_state2>()),
        ("KVM_CREATE_PIT2", size_of::<kvm_pit_config>()),
        ("KVM_GET_CLOCK", size_of::<kvm_clock_data>()),
        ("KVM_SIGNAL_MSI", size_of::<kvm_msi>()),
        ("KVM_ENABLE_CAP", size_of::<kvm_enable_cap>()),
        ("KVM_SET_DEVICE_ATTR", size_of::<kvm_device_attr>()),
    ];
    for (name, size) in sizes {
        let (_, ioctl) = tables::KVM_IOCTLS
            .iter()
            .find(|(n, _)| *n == name)
            .expect(name);
        assert_eq!(usize::from(ioctl.size), size, "{name}");
    }
}

#[test]
fn report_lines_survive_the_way_through_text() {
    let label = *b"vcpu0\0\0\0\0\0\0\0\0\0\0\0";
    for (syscall, arguments) in [(41, [2, 1, 0]), (-1, [u64::MAX; 3]), (i32::MIN, [0; 3])] {
        let mut line = [0; report::LINE_BYTES_MAX];
        let length = report::format_line(&mut line, &label, syscall, arguments);
        let text = std::str::from_utf8(&line[..length]).expect("text");
        let violation = report::parse_report(&format!("before\n{text}after")).expect("found");
        assert_eq!(violation.thread, "vcpu0");
        assert_eq!(
            (violation.syscall, violation.arguments),
            (syscall, arguments)
        );
        assert_eq!(format!("{violation}\n"), text, "both sides say the same");
    }
}

#[test]
fn forged_reports_are_not_believed() {
    let long = "a".repeat(300);
    for line in [
        "",
        "seccomp: thread ",
        "seccomp: thread vcpu0 called socket (41): not in its policy",
        "seccomp: thread vcpu0 called socket (x): not in its policy [0x0 0x0 0x0]",
        "seccomp: thread vcpu0 called socket (41): not in its policy [0x0 0x0]",
        "seccomp: thread vcpu0 called socket (41): not in its policy [0x0 0x0 0x0 0x0]",
        "seccomp: thread  called socket (41): not in its policy [0x0 0x0 0x0]",
        "seccomp: thread \x1b[2J called socket (41): not in its policy [0x0 0x0 0x0]",
        "seccomp: thread a234567890123456 called socket (41): not in its policy [0x0 0x0 0x0]",
        &format!("seccomp: thread a called {long} (41): not in its policy [0x0 0x0 0x0]"),
    ] {
        assert_eq!(report::parse_report(line), None, "{line}");
    }
    let forged = "seccomp: thread a called \x1b[2J (41): not in its policy [0x0 0x0 0x0]";
    let violation = report::parse_report(forged).expect("shape is right");
    assert!(
        violation.to_string().contains("called socket (41)"),
        "the name is looked up again"
    );
}
