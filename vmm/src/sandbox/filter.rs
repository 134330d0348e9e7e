//! The lists of system calls: who may call what, and why.
//!
//! Anything not here ends the process. Opening files by name is for the main thread, which does so when a client plugs a disk or a NIC;
//! files that are there, for nothing makes or empties one but a snapshot, which makes new ones. Making connections, running programs, changing privileges and mapping memory as code are not here at all.

use libc::c_long;
use seccompiler::{BpfProgram, sock_filter};

use super::{Needs, SandboxError};

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
    // a qcow2 image grows
    libc::SYS_ftruncate,
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
    // what lies under guest memory: a reset, the start of a balloon
    libc::SYS_fstatfs,
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

/// Every thread besides, when a disk or a NIC is there or can come: queues of transfers. What is asked for through one no filter sees, so a VM
/// that moves nothing does without.
const RINGS: &[c_long] = &[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

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
    // a device of the host that comes: which IOMMU group it is in; snapshots
    libc::SYS_readlinkat,
    // Ctrl-A x on a terminal: SIGTERM to this process
    libc::SYS_kill,
];

/// vCPU and I/O threads besides, when other processes serve devices: on sockets that are connected.
const TALKING: &[c_long] = &[libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_shutdown];

/// The main thread besides, when one of them may have to be connected to again.
const CONNECTING: &[c_long] = &[libc::SYS_connect];

/// The main thread besides, when there are names to take away at the end: sockets, the pid file.
const REMOVAL: &[c_long] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// Hot-plug: images, /dev/net/tun. Each with the argument that holds its flags.
const OPENING: &[(c_long, u32)] = &[
    (libc::SYS_openat, 2),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, 1),
];

/// The main thread besides, when a client can ask for a snapshot: a new directory with new files, which takes the place of an old one.
const SAVING: &[c_long] = &[
    libc::SYS_getdents64,
    libc::SYS_flock,
    libc::SYS_mkdirat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
];

/// How a file of a snapshot is made: one that is there is never opened so, nor emptied.
const NEW: u32 = (libc::O_CREAT | libc::O_EXCL).unsigned_abs();

/// What makes a file or takes its contents away (O_TMPFILE without O_DIRECTORY, which it includes).
const MAKING: u32 = (libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY)).unsigned_abs();
/// What the log file is opened with: nothing can be read through it, and nothing written over.
const APPENDING: u32 = (libc::O_WRONLY | libc::O_APPEND).unsigned_abs();

/// Rotation of the log file; any thread may write the line that fills it.
const ROTATION: &[c_long] = &[libc::SYS_rename];

/// `_IOC_TYPE` of KVM's requests. What could make a new VM is out of reach: /dev/kvm itself is closed by now.
const KVM_TYPE: u32 = 0xae00;
/// `_IOC_TYPE` of vhost's requests: a process without vhost devices has no descriptor that knows them.
const VHOST_TYPE: u32 = 0xaf00;
/// `_IOC_TYPE` of VFIO's, likewise.
const VFIO_TYPE: u32 = 0x3b00;
const IOC_TYPE_MASK: u32 = 0xff00;

/// Other requests: non-blocking mode, terminal modes at the end, offloads and header size of taps.
const IOCTLS: &[u32] = &[
    libc::FIONBIO as u32,
    libc::TCGETS as u32,
    libc::TCSETS as u32,
    0x802c_542a, // TCGETS2
    0x402c_542b, // TCSETS2
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54d9, // TUNSETQUEUE
];

/// The main thread's besides, for hot-plug: what an interface and a disk are examined with.
const PLUG_IOCTLS: &[u32] = &[
    0x8933,      // SIOCGIFINDEX
    0x1268,      // BLKSSZGET
    0x4004_54ca, // TUNSETIFF
    0x8004_54d2, // TUNGETIFF
];

/// What a number leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allow,
    /// Allowed when the low half of an argument, masked, has the value.
    Masked {
        argument: u32,
        mask: u32,
        value: u32,
    },
    /// `open`, `openat`: of what is there, and perhaps of a log file, or of a new file.
    Open {
        flags: u32,
        appends: bool,
        saves: bool,
    },
    /// `ioctl`: one of KVM's requests, or one of the lists.
    Ioctl {
        plugs: bool,
    },
}

/// Makes the filter. The kernel translates every new filter, and runs it once for every number there is, on the way to the guest's first
/// instruction: what counts is how short it is. Compilers for seccomp emit a chain with a link for each number; this is a tree over
/// runs of numbers with short chains for leaves, a third as long. `ioctl`, which runs the guest, is decided first.
pub(super) fn compile(kind: Kind, needs: Needs) -> Result<BpfProgram, SandboxError> {
    let rotates_log = needs.rotates_log;
    let mut verdicts: Vec<(c_long, Verdict)> = Vec::with_capacity(128);
    let mut allow = |numbers: &[c_long]| verdicts.extend(numbers.iter().map(|n| (*n, Verdict::Allow)));
    allow(COMMON);
    if needs.rings {
        allow(RINGS);
    }
    if kind == Kind::Main {
        allow(MAIN);
        if needs.saves {
            allow(SAVING);
        }
        if needs.removes_names || needs.saves {
            allow(REMOVAL);
        }
        if needs.talks {
            allow(CONNECTING);
        }
    } else if needs.talks {
        allow(TALKING);
    }
    if rotates_log {
        allow(ROTATION);
    }
    if kind == Kind::Main {
        if needs.plugs_cpus {
            // Its thread is born with this filter, and takes the narrower one of a vCPU on.
            let add = libc::SECCOMP_SET_MODE_FILTER;
            verdicts.push((libc::SYS_seccomp, Verdict::Masked { argument: 0, mask: u32::MAX, value: add }));
        }
        let open = |(n, flags): &(c_long, u32)| {
            (*n, Verdict::Open { flags: *flags, appends: rotates_log, saves: needs.saves })
        };
        verdicts.extend(OPENING.iter().map(open));
        // What the C library looks up an interface's name with; it can be connected to nothing.
        let unix = Verdict::Masked { argument: 0, mask: u32::MAX, value: libc::AF_UNIX.unsigned_abs() };
        verdicts.push((libc::SYS_socket, unix));
    } else if rotates_log {
        let append = Verdict::Masked { argument: 2, mask: APPENDING, value: APPENDING };
        verdicts.push((libc::SYS_openat, append));
    }
    let not_code = Verdict::Masked { argument: 2, mask: libc::PROT_EXEC.unsigned_abs(), value: 0 };
    let set_name = Verdict::Masked { argument: 0, mask: u32::MAX, value: libc::PR_SET_NAME.unsigned_abs() };
    verdicts.extend([
        (libc::SYS_mmap, not_code),
        (libc::SYS_mprotect, not_code),
        (libc::SYS_prctl, set_name),
    ]);
    verdicts.sort_unstable_by_key(|(number, _)| *number);

    let mut program = Program::new();
    let mut runs: Vec<Run> = Vec::with_capacity(verdicts.len());
    let mut bodies: Vec<(Verdict, usize)> = Vec::new();
    for (number, verdict) in verdicts {
        let number = u32::try_from(number).map_err(|e| SandboxError::Filter(Box::new(e)))?;
        let target = match bodies.iter().find(|(of, _)| *of == verdict) {
            Some((_, body)) => *body,
            None => {
                let body = program.body(verdict)?;
                bodies.push((verdict, body));
                body
            }
        };
        match runs.last_mut() {
            // Numbers of two lists, rename for one: both say the same.
            Some(last) if last.end > number => {}
            Some(last) if last.end == number && last.target == target => last.end += 1,
            _ => runs.push(Run { start: number, end: number + 1, target }),
        }
    }
    let ioctl = program.body(Verdict::Ioctl { plugs: kind == Kind::Main })?;
    let others = program.tree(&runs, 0)?;
    let number = u32::try_from(libc::SYS_ioctl).map_err(|e| SandboxError::Filter(Box::new(e)))?;
    program.jump(JUMP_EQ, number, ioctl, others)?;
    program.load(NUMBER_OFFSET);
    let native = program.last();
    program.jump(JUMP_EQ, ARCH, native, Program::TRAP)?;
    program.load(ARCH_OFFSET);
    program.0.reverse();
    Ok(program.0)
}

/// Numbers from `start` to before `end`, and where what decides them begins.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u32,
    end: u32,
    target: usize,
}

// linux/bpf_common.h
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const JUMP_EQ: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const JUMP_GE: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const TRAP: u32 = libc::SECCOMP_RET_TRAP;

/// Runs that a leaf of the tree goes through one by one.
const LEAF: usize = 4;

// Offsets in struct seccomp_data (linux/seccomp.h); arguments are 64 bits wide and little-endian.
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

// linux/audit.h
#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;

fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// A filter in reverse: what runs first is added last, so that every jump knows how far its target is. Instructions are known by their
/// place, and each verdict stands there once.
struct Program(BpfProgram);

impl Program {
    /// Where the system call is refused.
    const TRAP: usize = 0;
    /// Where it is allowed.
    const ALLOW: usize = 1;

    fn new() -> Self {
        let mut code = Vec::with_capacity(192);
        code.extend([op(RETURN, TRAP), op(RETURN, ALLOW)]);
        Self(code)
    }

    /// The instruction added last.
    fn last(&self) -> usize {
        self.0.len() - 1
    }

    fn load(&mut self, offset: u32) {
        self.0.push(op(LOAD, offset));
    }

    /// Goes to `yes` or `no`, which are there already. A jump reaches 255 instructions; no filter is that long.
    fn jump(&mut self, code: u16, k: u32, yes: usize, no: usize) -> Result<usize, SandboxError> {
        let next = self.0.len();
        let over =
            |target: usize| u8::try_from(next - 1 - target).map_err(|e| SandboxError::Filter(Box::new(e)));
        let (jt, jf) = (over(yes)?, over(no)?);
        self.0.push(sock_filter { code, jt, jf, k });
        Ok(next)
    }

    /// Loads the low half of an argument, masks it, and allows the call if that is the value.
    fn masked(&mut self, argument: u32, mask: u32, value: u32, otherwise: usize) -> Result<(), SandboxError> {
        self.jump(JUMP_EQ, value, Self::ALLOW, otherwise)?;
        if mask != u32::MAX {
            self.0.push(op(AND, mask));
        }
        self.load(ARGUMENTS_OFFSET + 8 * argument);
        Ok(())
    }

    /// Adds what decides one kind of call; returns where it begins.
    fn body(&mut self, verdict: Verdict) -> Result<usize, SandboxError> {
        match verdict {
            Verdict::Allow => return Ok(Self::ALLOW),
            Verdict::Masked { argument, mask, value } => self.masked(argument, mask, value, Self::TRAP)?,
            Verdict::Open { flags, appends, saves } => {
                let mut otherwise = Self::TRAP;
                if saves {
                    self.masked(flags, MAKING | NEW, NEW, otherwise)?;
                    otherwise = self.last();
                }
                if appends {
                    self.masked(flags, APPENDING, APPENDING, otherwise)?;
                    otherwise = self.last();
                }
                self.masked(flags, MAKING, 0, otherwise)?;
            }
            Verdict::Ioctl { plugs } => {
                self.jump(JUMP_EQ, VFIO_TYPE, Self::ALLOW, Self::TRAP)?;
                let vfio = self.last();
                self.jump(JUMP_EQ, VHOST_TYPE, Self::ALLOW, vfio)?;
                let vhost = self.last();
                self.jump(JUMP_EQ, KVM_TYPE, Self::ALLOW, vhost)?;
                self.0.push(op(AND, IOC_TYPE_MASK));
                for request in IOCTLS.iter().chain(PLUG_IOCTLS.iter().filter(|_| plugs)) {
                    let otherwise = self.last();
                    self.jump(JUMP_EQ, *request, Self::ALLOW, otherwise)?;
                }
                self.load(ARGUMENTS_OFFSET + 8);
            }
        }
        Ok(self.last())
    }

    /// Adds what finds the run of the number in the accumulator, which is `low` at least; returns where it begins. x32 numbers are
    /// beyond the last run.
    fn tree(&mut self, runs: &[Run], low: u32) -> Result<usize, SandboxError> {
        if runs.len() > LEAF {
            let (left, right) = runs.split_at(runs.len() / 2);
            let start = right.first().map_or(low, |run| run.start);
            let right = self.tree(right, start)?;
            let left = self.tree(left, low)?;
            return self.jump(JUMP_GE, start, right, left);
        }
        let mut otherwise = Self::TRAP;
        for run in runs.iter().rev() {
            otherwise = if run.end - run.start == 1 {
                self.jump(JUMP_EQ, run.start, run.target, otherwise)?
            } else {
                let below_end = self.jump(JUMP_GE, run.end, otherwise, run.target)?;
                if run.start == low {
                    below_end
                } else {
                    // The runs before this one have been asked.
                    self.jump(JUMP_GE, run.start, below_end, Self::TRAP)?
                }
            };
        }
        Ok(otherwise)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would.
    fn allows(program: &BpfProgram, number: u32, arguments: [u32; 6]) -> bool {
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let i = &program[at];
            at += 1;
            match i.code {
                LOAD => {
                    a = match i.k {
                        NUMBER_OFFSET => number,
                        ARCH_OFFSET => ARCH,
                        offset => arguments[(offset - ARGUMENTS_OFFSET) as usize / 8],
                    }
                }
                AND => a &= i.k,
                JUMP_EQ => at += usize::from(if a == i.k { i.jt } else { i.jf }),
                JUMP_GE => at += usize::from(if a >= i.k { i.jt } else { i.jf }),
                RETURN => return i.k == ALLOW,
                code => panic!("{code:#x}"),
            }
        }
    }

    #[test]
    fn exactly_the_listed_numbers_pass() {
        for (kind, rotates_log, removes_names, saves, rings) in [
            (Kind::Worker, false, true, true, true),
            (Kind::Worker, false, false, false, false),
            (Kind::Main, false, false, false, false),
            (Kind::Main, true, true, false, false),
            (Kind::Main, true, false, true, true),
        ] {
            let needs = Needs { rotates_log, removes_names, saves, rings, ..Needs::default() };
            let program = compile(kind, needs).unwrap();
            assert!(program.len() < 160, "{}", program.len());
            for number in (0..1000).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                let n = c_long::from(number);
                let listed = COMMON.contains(&n)
                    || (rings && RINGS.contains(&n))
                    || (kind == Kind::Main
                        && (MAIN.contains(&n)
                            || OPENING.iter().any(|(open, _)| *open == n)
                            || (saves && SAVING.contains(&n))
                            || ((removes_names || saves) && REMOVAL.contains(&n))))
                    || (rotates_log && ROTATION.contains(&n))
                    || [libc::SYS_mmap, libc::SYS_mprotect].contains(&n);
                // Depends on an argument, which is 0 here.
                let listed = listed && n != libc::SYS_socket;
                assert_eq!(allows(&program, number, [0; 6]), listed, "{number}");
            }
        }
    }

    #[test]
    fn only_the_main_thread_plugs() {
        let program = compile(Kind::Worker, Needs { rotates_log: true, ..Needs::default() }).unwrap();
        for (number, arguments, want) in [
            (libc::SYS_openat, [0, 0, 0, 0, 0, 0], false),
            (libc::SYS_openat, [0, 0, 0o2001, 0, 0, 0], true),
            (libc::SYS_ioctl, [0, 0x4004_54ca, 0, 0, 0, 0], false),
            (libc::SYS_ioctl, [0, 0x4004_54d0, 0, 0, 0, 0], true),
            // KVM_SET_USER_MEMORY_REGION: virtio-mem hands memory out from its I/O thread.
            (libc::SYS_ioctl, [0, 0x4020_ae46, 0, 0, 0, 0], true),
            (libc::SYS_socket, [1, 2, 0, 0, 0, 0], false),
        ] {
            assert_eq!(
                allows(&program, u32::try_from(number).unwrap(), arguments),
                want,
                "{number} {arguments:?}"
            );
        }
    }

    #[test]
    fn threads_talk_where_others_serve_devices_and_only_the_main_thread_connects() {
        for (kind, talks, send, connect) in [
            (Kind::Worker, false, false, false),
            (Kind::Worker, true, true, false),
            (Kind::Main, false, true, false),
            (Kind::Main, true, true, true),
        ] {
            let program = compile(kind, Needs { talks, ..Needs::default() }).unwrap();
            let allows = |n: c_long| allows(&program, u32::try_from(n).unwrap(), [0; 6]);
            assert!(TALKING.iter().all(|n| allows(*n) == send), "{kind:?} {talks}");
            assert_eq!(allows(libc::SYS_connect), connect, "{kind:?} {talks}");
        }
    }

    #[test]
    fn nothing_is_made_or_emptied_but_the_log() {
        let flags = |flags: i32| flags.unsigned_abs();
        let (append, make) = (flags(libc::O_WRONLY | libc::O_APPEND), flags(libc::O_CREAT));
        for (flags, plain, with_log) in [
            (flags(libc::O_RDONLY | libc::O_CLOEXEC), true, true),
            (flags(libc::O_RDWR | libc::O_DIRECT | libc::O_EXCL | libc::O_CLOEXEC), true, true),
            (flags(libc::O_RDONLY | libc::O_DIRECTORY), true, true),
            (append, true, true),
            (append | make, false, true),
            (flags(libc::O_RDWR) | make, false, false),
            (flags(libc::O_WRONLY | libc::O_TRUNC), false, false),
            (flags(libc::O_RDWR | libc::O_TMPFILE), false, false),
        ] {
            for (rotates_log, want) in [(false, plain), (true, with_log)] {
                let program = compile(Kind::Main, Needs { rotates_log, ..Needs::default() }).unwrap();
                for (number, at) in OPENING {
                    let mut arguments = [0; 6];
                    arguments[*at as usize] = flags;
                    let number = u32::try_from(*number).unwrap();
                    assert_eq!(
                        allows(&program, number, arguments),
                        want,
                        "{number} {flags:#o} {rotates_log}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_snapshot_makes_new_files_only() {
        let flags = |flags: i32| flags.unsigned_abs();
        let program = compile(Kind::Main, Needs { saves: true, ..Needs::default() }).unwrap();
        for (flags, want) in [
            (flags(libc::O_RDONLY | libc::O_CLOEXEC), true),
            (NEW | flags(libc::O_WRONLY | libc::O_CLOEXEC), true),
            (flags(libc::O_CREAT | libc::O_WRONLY), false),
            (NEW | flags(libc::O_TRUNC), false),
            (NEW | flags(libc::O_TMPFILE), false),
            (flags(libc::O_WRONLY | libc::O_TRUNC), false),
        ] {
            for (number, at) in OPENING {
                let mut arguments = [0; 6];
                arguments[*at as usize] = flags;
                let number = u32::try_from(*number).unwrap();
                assert_eq!(allows(&program, number, arguments), want, "{number} {flags:#o}");
            }
        }
    }

    #[test]
    fn arguments_decide_where_they_must() {
        let program = compile(Kind::Main, Needs { rotates_log: true, ..Needs::default() }).unwrap();
        for (number, arguments, want) in [
            (libc::SYS_ioctl, [0, 0xae80, 0, 0, 0, 0], true),
            (libc::SYS_ioctl, [0, 0x4004_54d0, 0, 0, 0, 0], true),
            (libc::SYS_ioctl, [0, 0x4008_af30, 0, 0, 0, 0], true),
            (libc::SYS_ioctl, [0, 0xb000, 0, 0, 0, 0], false),
            (libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0], false),
            (libc::SYS_mmap, [0, 0, 3, 0, 0, 0], true),
            (libc::SYS_mmap, [0, 0, 7, 0, 0, 0], false),
            (libc::SYS_mprotect, [0, 0, 5, 0, 0, 0], false),
            (libc::SYS_prctl, [15, 0, 0, 0, 0, 0], true),
            (libc::SYS_prctl, [38, 0, 0, 0, 0, 0], false),
            (libc::SYS_openat, [0, 0, 0, 0, 0, 0], true),
            (libc::SYS_ioctl, [0, 0x4004_54ca, 0, 0, 0, 0], true),
            (libc::SYS_socket, [1, 2, 0, 0, 0, 0], true),
            (libc::SYS_socket, [2, 1, 0, 0, 0, 0], false),
        ] {
            assert_eq!(
                allows(&program, u32::try_from(number).unwrap(), arguments),
                want,
                "{number} {arguments:?}"
            );
        }
    }
}
