//! The lists of system calls: who may call what, and why.
//!
//! Anything not here ends the process. Opening files by name, making sockets, running programs, changing privileges and mapping
//! memory as code are not here at all.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::SandboxError;

/// Kinds of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// vCPU and I/O threads.
    Worker,
    /// The main thread.
    Main,
}

/// Every thread: the guest, its devices' transfers, memory, other threads.
const COMMON: &[c_long] = &[
    // transfers: disks, taps, consoles, event and timer descriptors
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // descriptors
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    // memory
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // threads and time
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_prlimit64,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // signals: kicks of vCPUs, the stack that Rust gives to handlers, abort after a panic
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
];

/// The main thread besides: clients of sockets, and the end of the process.
const MAIN: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    // Ctrl-A x on a terminal: SIGTERM to this process
    libc::SYS_kill,
];

/// Rotation of the log file; any thread may write the line that fills it.
const ROTATION: &[c_long] = &[libc::SYS_rename];

/// `_IOC_TYPE` of KVM's requests. What could make a new VM is out of reach: /dev/kvm itself is closed by now.
const KVM_TYPE: u64 = 0xae00;
const IOC_TYPE_MASK: u64 = 0xff00;

/// Other requests: non-blocking mode, terminal modes at the end, offloads and header size of taps.
const IOCTLS: &[u64] = &[
    libc::FIONBIO,
    libc::TCGETS,
    libc::TCSETS,
    0x802c_542a, // TCGETS2
    0x402c_542b, // TCSETS2
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
];

/// `PR_SET_NAME`, with which threads get their names.
const PR_SET_NAME: u64 = libc::PR_SET_NAME as u64;

type Error = Box<dyn std::error::Error + Send + Sync>;

pub(super) fn compile(kind: Kind, rotates_log: bool) -> Result<BpfProgram, SandboxError> {
    build(kind, rotates_log).map_err(SandboxError::Filter)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn build(kind: Kind, rotates_log: bool) -> Result<BpfProgram, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = COMMON.iter().map(|n| (*n, vec![])).collect();
    if kind == Kind::Main {
        rules.extend(MAIN.iter().map(|n| (*n, vec![])));
    }
    if rotates_log {
        rules.extend(ROTATION.iter().map(|n| (*n, vec![])));
        // Only to create or append: nothing can be read through it.
        let writes = u64::from(libc::O_WRONLY.unsigned_abs() | libc::O_APPEND.unsigned_abs());
        rules.insert(libc::SYS_openat, vec![condition(2, SeccompCmpOp::MaskedEq(writes), writes)?]);
    }
    let mut ioctls = vec![condition(1, SeccompCmpOp::MaskedEq(IOC_TYPE_MASK), KVM_TYPE)?];
    for request in IOCTLS {
        ioctls.push(condition(1, SeccompCmpOp::Eq, *request)?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    let not_code = || condition(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mmap, vec![not_code()?]);
    rules.insert(libc::SYS_mprotect, vec![not_code()?]);
    rules.insert(libc::SYS_prctl, vec![condition(0, SeccompCmpOp::Eq, PR_SET_NAME)?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}
