//! The names a policy may use: every x86-64 system call, and the constants that argument
//! conditions compare with. Nothing here knows about policies or filters.
//!
//! Compiled into the build script, which turns names into numbers, and into the tests of the
//! crate, which check the sizes in the ioctl numbers against the real structures. The program
//! itself gets only the generated table from number to name.

/// Pairs the name of each libc `SYS_` constant with its number.
macro_rules! syscalls {
    ($($name:ident)*) => { vec![$((&stringify!($name)[4..], libc::$name)),*] };
}

/// Pairs the name of each libc constant with its value as the kernel sees it in a register.
macro_rules! constants {
    ($($name:ident)*) => { vec![$((stringify!($name), bits(i128::from(libc::$name)))),*] };
}

/// All system calls of x86-64 up to Linux 6.18 by name: those that libc knows, and by number
/// (from arch/x86/entry/syscalls/syscall_64.tbl) those that it does not know yet.
pub(crate) fn syscalls() -> Vec<(&'static str, i64)> {
    let mut all = syscalls![
        SYS_read SYS_write SYS_open SYS_close SYS_stat SYS_fstat SYS_lstat SYS_poll
        SYS_lseek SYS_mmap SYS_mprotect SYS_munmap SYS_brk SYS_rt_sigaction
        SYS_rt_sigprocmask SYS_rt_sigreturn SYS_ioctl SYS_pread64 SYS_pwrite64 SYS_readv
        SYS_writev SYS_access SYS_pipe SYS_select SYS_sched_yield SYS_mremap SYS_msync
        SYS_mincore SYS_madvise SYS_shmget SYS_shmat SYS_shmctl SYS_dup SYS_dup2 SYS_pause
        SYS_nanosleep SYS_getitimer SYS_alarm SYS_setitimer SYS_getpid SYS_sendfile
        SYS_socket SYS_connect SYS_accept SYS_sendto SYS_recvfrom SYS_sendmsg SYS_recvmsg
        SYS_shutdown SYS_bind SYS_listen SYS_getsockname SYS_getpeername SYS_socketpair
        SYS_setsockopt SYS_getsockopt SYS_clone SYS_fork SYS_vfork SYS_execve SYS_exit
        SYS_wait4 SYS_kill SYS_uname SYS_semget SYS_semop SYS_semctl SYS_shmdt SYS_msgget
        SYS_msgsnd SYS_msgrcv SYS_msgctl SYS_fcntl SYS_flock SYS_fsync SYS_fdatasync
        SYS_truncate SYS_ftruncate SYS_getdents SYS_getcwd SYS_chdir SYS_fchdir SYS_rename
        SYS_mkdir SYS_rmdir SYS_creat SYS_link SYS_unlink SYS_symlink SYS_readlink SYS_chmod
        SYS_fchmod SYS_chown SYS_fchown SYS_lchown SYS_umask SYS_gettimeofday SYS_getrlimit
        SYS_getrusage SYS_sysinfo SYS_times SYS_ptrace SYS_getuid SYS_syslog SYS_getgid
        SYS_setuid SYS_setgid SYS_geteuid SYS_getegid SYS_setpgid SYS_getppid SYS_getpgrp
        SYS_setsid SYS_setreuid SYS_setregid SYS_getgroups SYS_setgroups SYS_setresuid
        SYS_getresuid SYS_setresgid SYS_getresgid SYS_getpgid SYS_setfsuid SYS_setfsgid
        SYS_getsid SYS_capget SYS_capset SYS_rt_sigpending SYS_rt_sigtimedwait
        SYS_rt_sigqueueinfo SYS_rt_sigsuspend SYS_sigaltstack SYS_utime SYS_mknod SYS_uselib
        SYS_personality SYS_ustat SYS_statfs SYS_fstatfs SYS_sysfs SYS_getpriority
        SYS_setpriority SYS_sched_setparam SYS_sched_getparam SYS_sched_setscheduler
        SYS_sched_getscheduler SYS_sched_get_priority_max SYS_sched_get_priority_min
        SYS_sched_rr_get_interval SYS_mlock SYS_munlock SYS_mlockall SYS_munlockall
        SYS_vhangup SYS_modify_ldt SYS_pivot_root SYS__sysctl SYS_prctl SYS_arch_prctl
        SYS_adjtimex SYS_setrlimit SYS_chroot SYS_sync SYS_acct SYS_settimeofday SYS_mount
        SYS_umount2 SYS_swapon SYS_swapoff SYS_reboot SYS_sethostname SYS_setdomainname
        SYS_iopl SYS_ioperm SYS_init_module SYS_delete_module SYS_quotactl SYS_nfsservctl
        SYS_getpmsg SYS_putpmsg SYS_afs_syscall SYS_tuxcall SYS_security SYS_gettid
        SYS_readahead SYS_setxattr SYS_lsetxattr SYS_fsetxattr SYS_getxattr SYS_lgetxattr
        SYS_fgetxattr SYS_listxattr SYS_llistxattr SYS_flistxattr SYS_removexattr
        SYS_lremovexattr SYS_fremovexattr SYS_tkill SYS_time SYS_futex SYS_sched_setaffinity
        SYS_sched_getaffinity SYS_set_thread_area SYS_io_setup SYS_io_destroy
        SYS_io_getevents SYS_io_submit SYS_io_cancel SYS_get_thread_area SYS_lookup_dcookie
        SYS_epoll_create SYS_epoll_ctl_old SYS_epoll_wait_old SYS_remap_file_pages
        SYS_getdents64 SYS_set_tid_address SYS_restart_syscall SYS_semtimedop SYS_fadvise64
        SYS_timer_create SYS_timer_settime SYS_timer_gettime SYS_timer_getoverrun
        SYS_timer_delete SYS_clock_settime SYS_clock_gettime SYS_clock_getres
        SYS_clock_nanosleep SYS_exit_group SYS_epoll_wait SYS_epoll_ctl SYS_tgkill
        SYS_utimes SYS_vserver SYS_mbind SYS_set_mempolicy SYS_get_mempolicy SYS_mq_open
        SYS_mq_unlink SYS_mq_timedsend SYS_mq_timedreceive SYS_mq_notify SYS_mq_getsetattr
        SYS_kexec_load SYS_waitid SYS_add_key SYS_request_key SYS_keyctl SYS_ioprio_set
        SYS_ioprio_get SYS_inotify_init SYS_inotify_add_watch SYS_inotify_rm_watch
        SYS_migrate_pages SYS_openat SYS_mkdirat SYS_mknodat SYS_fchownat SYS_futimesat
        SYS_newfstatat SYS_unlinkat SYS_renameat SYS_linkat SYS_symlinkat SYS_readlinkat
        SYS_fchmodat SYS_faccessat SYS_pselect6 SYS_ppoll SYS_unshare SYS_set_robust_list
        SYS_get_robust_list SYS_splice SYS_tee SYS_sync_file_range SYS_vmsplice
        SYS_move_pages SYS_utimensat SYS_epoll_pwait SYS_signalfd SYS_timerfd_create
        SYS_eventfd SYS_fallocate SYS_timerfd_settime SYS_timerfd_gettime SYS_accept4
        SYS_signalfd4 SYS_eventfd2 SYS_epoll_create1 SYS_dup3 SYS_pipe2 SYS_inotify_init1
        SYS_preadv SYS_pwritev SYS_rt_tgsigqueueinfo SYS_perf_event_open SYS_recvmmsg
        SYS_fanotify_init SYS_fanotify_mark SYS_prlimit64 SYS_name_to_handle_at
        SYS_open_by_handle_at SYS_clock_adjtime SYS_syncfs SYS_sendmmsg SYS_setns SYS_getcpu
        SYS_process_vm_readv SYS_process_vm_writev SYS_kcmp SYS_finit_module
        SYS_sched_setattr SYS_sched_getattr SYS_renameat2 SYS_seccomp SYS_getrandom
        SYS_memfd_create SYS_kexec_file_load SYS_bpf SYS_execveat SYS_userfaultfd
        SYS_membarrier SYS_mlock2 SYS_copy_file_range SYS_preadv2 SYS_pwritev2
        SYS_pkey_mprotect SYS_pkey_alloc SYS_pkey_free SYS_statx SYS_rseq
        SYS_pidfd_send_signal SYS_io_uring_setup SYS_io_uring_enter SYS_io_uring_register
        SYS_open_tree SYS_move_mount SYS_fsopen SYS_fsconfig SYS_fsmount SYS_fspick
        SYS_pidfd_open SYS_clone3 SYS_close_range SYS_openat2 SYS_pidfd_getfd SYS_faccessat2
        SYS_process_madvise SYS_epoll_pwait2 SYS_mount_setattr SYS_quotactl_fd
        SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self
        SYS_memfd_secret SYS_process_mrelease SYS_futex_waitv SYS_set_mempolicy_home_node
        SYS_fchmodat2 SYS_mseal
    ];
    all.extend([
        ("create_module", 174),
        ("get_kernel_syms", 177),
        ("query_module", 178),
        ("io_pgetevents", 333),
        ("uretprobe", 335),
        ("uprobe", 336),
        ("cachestat", 451),
        ("map_shadow_stack", 453),
        ("futex_wake", 454),
        ("futex_wait", 455),
        ("futex_requeue", 456),
        ("statmount", 457),
        ("listmount", 458),
        ("lsm_get_self_attr", 459),
        ("lsm_set_self_attr", 460),
        ("lsm_list_modules", 461),
        ("setxattrat", 463),
        ("getxattrat", 464),
        ("listxattrat", 465),
        ("removexattrat", 466),
        ("open_tree_attr", 467),
        ("file_getattr", 468),
        ("file_setattr", 469),
    ]);
    all
}

/// The constants that argument conditions may name, with their values.
pub(crate) fn constants() -> Vec<(&'static str, u64)> {
    let mut all = constants![
        AF_UNIX AF_INET AF_INET6 AF_NETLINK
        SOCK_STREAM SOCK_DGRAM SOCK_RAW SOCK_NONBLOCK SOCK_CLOEXEC
        SOL_SOCKET IPPROTO_TCP
        O_ACCMODE O_RDONLY O_WRONLY O_RDWR O_CREAT O_TRUNC O_CLOEXEC
        AT_EMPTY_PATH
        PROT_NONE PROT_READ PROT_WRITE PROT_EXEC
        MAP_SHARED MAP_PRIVATE MAP_ANONYMOUS MAP_FIXED
        CLONE_VM CLONE_FS CLONE_FILES CLONE_SIGHAND CLONE_THREAD
        CLONE_NEWUSER CLONE_NEWNS CLONE_NEWNET CLONE_NEWPID CLONE_NEWIPC CLONE_NEWUTS
        CLONE_NEWCGROUP
        F_GETFD F_SETFD F_GETFL F_SETFL F_DUPFD_CLOEXEC
        F_SETLK F_SETLKW F_OFD_SETLK F_OFD_SETLKW F_OFD_GETLK
        PR_SET_NAME PR_GET_NAME PR_SET_NO_NEW_PRIVS PR_SET_VMA
        SECCOMP_SET_MODE_FILTER
        SIGABRT SIGINT SIGTERM SIGUSR1
        ENOSYS EPERM EACCES
        FIONBIO FIONREAD TCGETS TCSETS TIOCGWINSZ
    ];
    all.extend(
        KVM_IOCTLS
            .iter()
            .chain(UFFD_IOCTLS)
            .chain(BLOCK_IOCTLS)
            .chain(TUN_IOCTLS)
            .map(|&(name, ioctl)| (name, ioctl.number())),
    );
    all
}

/// A signed or unsigned C constant as the 64 bits that arrive in the kernel.
fn bits(value: i128) -> u64 {
    // Two's complement: only the low 64 bits of a negative constant reach a register.
    u64::try_from(value & i128::from(u64::MAX)).expect("masked to 64 bits")
}

/// One ioctl: direction, type, number and size of what its argument points to, as in
/// include/uapi/asm-generic/ioctl.h.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ioctl {
    direction: u32,
    kind: u8,
    number: u8,
    /// Bytes of the structure that the argument points to.
    pub(crate) size: u16,
}

impl Ioctl {
    /// The request number that arrives as the second argument of `ioctl`.
    pub(crate) fn number(self) -> u64 {
        u64::from(
            self.direction << 30
                | u32::from(self.size) << 16
                | u32::from(self.kind) << 8
                | u32::from(self.number),
        )
    }
}

const fn io(kind: u8, number: u8) -> Ioctl {
    Ioctl {
        direction: 0,
        kind,
        number,
        size: 0,
    }
}

const fn iow(kind: u8, number: u8, size: u16) -> Ioctl {
    Ioctl {
        direction: 1,
        kind,
        number,
        size,
    }
}

const fn ior(kind: u8, number: u8, size: u16) -> Ioctl {
    Ioctl {
        direction: 2,
        kind,
        number,
        size,
    }
}

const fn iowr(kind: u8, number: u8, size: u16) -> Ioctl {
    Ioctl {
        direction: 3,
        kind,
        number,
        size,
    }
}

/// KVMIO of include/uapi/linux/kvm.h.
const KVM: u8 = 0xAE;

/// The ioctls of include/uapi/linux/kvm.h that a VMM uses on `/dev/kvm`, a VM or a vCPU.
pub(crate) const KVM_IOCTLS: &[(&str, Ioctl)] = &[
    ("KVM_GET_API_VERSION", io(KVM, 0x00)),
    ("KVM_CREATE_VM", io(KVM, 0x01)),
    ("KVM_GET_MSR_INDEX_LIST", iowr(KVM, 0x02, 4)),
    ("KVM_CHECK_EXTENSION", io(KVM, 0x03)),
    ("KVM_GET_VCPU_MMAP_SIZE", io(KVM, 0x04)),
    ("KVM_GET_SUPPORTED_CPUID", iowr(KVM, 0x05, 8)),
    ("KVM_CREATE_VCPU", io(KVM, 0x41)),
    ("KVM_GET_DIRTY_LOG", iow(KVM, 0x42, 16)),
    ("KVM_SET_USER_MEMORY_REGION", iow(KVM, 0x46, 32)),
    ("KVM_SET_TSS_ADDR", io(KVM, 0x47)),
    ("KVM_SET_IDENTITY_MAP_ADDR", iow(KVM, 0x48, 8)),
    ("KVM_CREATE_IRQCHIP", io(KVM, 0x60)),
    ("KVM_IRQ_LINE", iow(KVM, 0x61, 8)),
    ("KVM_GET_IRQCHIP", iowr(KVM, 0x62, 520)),
    ("KVM_SET_IRQCHIP", ior(KVM, 0x63, 520)),
    ("KVM_SET_GSI_ROUTING", iow(KVM, 0x6a, 8)),
    ("KVM_IRQFD", iow(KVM, 0x76, 32)),
    ("KVM_CREATE_PIT2", iow(KVM, 0x77, 64)),
    ("KVM_IOEVENTFD", iow(KVM, 0x79, 64)),
    ("KVM_SET_CLOCK", iow(KVM, 0x7b, 48)),
    ("KVM_GET_CLOCK", ior(KVM, 0x7c, 48)),
    ("KVM_RUN", io(KVM, 0x80)),
    ("KVM_GET_REGS", ior(KVM, 0x81, 144)),
    ("KVM_SET_REGS", iow(KVM, 0x82, 144)),
    ("KVM_GET_SREGS", ior(KVM, 0x83, 312)),
    ("KVM_SET_SREGS", iow(KVM, 0x84, 312)),
    ("KVM_TRANSLATE", iowr(KVM, 0x85, 24)),
    ("KVM_INTERRUPT", iow(KVM, 0x86, 4)),
    ("KVM_GET_MSRS", iowr(KVM, 0x88, 8)),
    ("KVM_SET_MSRS", iow(KVM, 0x89, 8)),
    ("KVM_SET_SIGNAL_MASK", iow(KVM, 0x8b, 4)),
    ("KVM_GET_FPU", ior(KVM, 0x8c, 416)),
    ("KVM_SET_FPU", iow(KVM, 0x8d, 416)),
    ("KVM_GET_LAPIC", ior(KVM, 0x8e, 1024)),
    ("KVM_SET_LAPIC", iow(KVM, 0x8f, 1024)),
    ("KVM_SET_CPUID2", iow(KVM, 0x90, 8)),
    ("KVM_GET_CPUID2", iowr(KVM, 0x91, 8)),
    ("KVM_GET_MP_STATE", ior(KVM, 0x98, 4)),
    ("KVM_SET_MP_STATE", iow(KVM, 0x99, 4)),
    ("KVM_NMI", io(KVM, 0x9a)),
    ("KVM_GET_PIT2", ior(KVM, 0x9f, 112)),
    ("KVM_SET_PIT2", iow(KVM, 0xa0, 112)),
    ("KVM_GET_VCPU_EVENTS", ior(KVM, 0x9f, 64)),
    ("KVM_SET_VCPU_EVENTS", iow(KVM, 0xa0, 64)),
    ("KVM_GET_DEBUGREGS", ior(KVM, 0xa1, 128)),
    ("KVM_SET_DEBUGREGS", iow(KVM, 0xa2, 128)),
    ("KVM_ENABLE_CAP", iow(KVM, 0xa3, 104)),
    ("KVM_SET_TSC_KHZ", io(KVM, 0xa2)),
    ("KVM_GET_TSC_KHZ", io(KVM, 0xa3)),
    ("KVM_GET_XSAVE", ior(KVM, 0xa4, 4096)),
    ("KVM_SET_XSAVE", iow(KVM, 0xa5, 4096)),
    ("KVM_SIGNAL_MSI", iow(KVM, 0xa5, 32)),
    ("KVM_GET_XCRS", ior(KVM, 0xa6, 392)),
    ("KVM_SET_XCRS", iow(KVM, 0xa7, 392)),
    ("KVM_KVMCLOCK_CTRL", io(KVM, 0xad)),
    ("KVM_CLEAR_DIRTY_LOG", iowr(KVM, 0xc0, 24)),
    ("KVM_GET_SREGS2", ior(KVM, 0xcc, 320)),
    ("KVM_SET_SREGS2", iow(KVM, 0xcd, 320)),
    ("KVM_GET_XSAVE2", ior(KVM, 0xcf, 4096)),
    ("KVM_SET_DEVICE_ATTR", iow(KVM, 0xe1, 24)),
    ("KVM_GET_DEVICE_ATTR", iow(KVM, 0xe2, 24)),
    ("KVM_HAS_DEVICE_ATTR", iow(KVM, 0xe3, 24)),
];

/// UFFDIO of include/uapi/linux/userfaultfd.h.
const UFFD: u8 = 0xAA;

/// The ioctls of include/uapi/linux/userfaultfd.h.
pub(crate) const UFFD_IOCTLS: &[(&str, Ioctl)] = &[
    ("UFFDIO_REGISTER", iowr(UFFD, 0x00, 32)),
    ("UFFDIO_UNREGISTER", ior(UFFD, 0x01, 16)),
    ("UFFDIO_WAKE", ior(UFFD, 0x02, 16)),
    ("UFFDIO_COPY", iowr(UFFD, 0x03, 40)),
    ("UFFDIO_ZEROPAGE", iowr(UFFD, 0x04, 32)),
    ("UFFDIO_API", iowr(UFFD, 0x3f, 24)),
    ("USERFAULTFD_IOC_NEW", io(UFFD, 0x00)),
];

/// The ioctls of include/uapi/linux/fs.h for block devices that are of use once one is open.
pub(crate) const BLOCK_IOCTLS: &[(&str, Ioctl)] = &[("BLKGETSIZE64", ior(0x12, 114, 8))];

/// 'T' of include/uapi/linux/if_tun.h.
const TUN: u8 = b'T';

/// The ioctls of include/uapi/linux/if_tun.h that are of use once an interface is open.
pub(crate) const TUN_IOCTLS: &[(&str, Ioctl)] = &[("TUNSETOFFLOAD", iow(TUN, 208, 4))];
