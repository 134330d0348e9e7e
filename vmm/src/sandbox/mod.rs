//! The sandbox: owns what this process may still do once the VM is set up. No capability, no new privilege by exec, and only the
//! system calls that running a VM needs.
//!
//! ```text
//! main thread:    confine() ──▶ vCPU threads start ──▶ enter_main() ──▶ event loop
//! vCPU threads:                        enter_worker() ──▶ guest
//! I/O threads:                         started by vCPU threads, and born with their filter
//! ```
//!
//! A vCPU is confined before it enters the guest for the first time. A system call that is not allowed ends the process at once and
//! says which it was: a VMM that was taken over must not go on, and a list that is too short must be noticed.
//!
//! *No landlock.* It would say which files may be opened, and nobody knows that at the start: the one client that is trusted names images
//! later, in any directory, to be read and written. What is left for it to forbid (making, removing, renaming, linking and running
//! files) the filters forbid already, without the four system calls at each start, and without a list of directories for sockets, pid file
//! and log that has to stay true while the VM runs. Which files exist for a VM at all is decided from outside, where it is
//! known: the systemd unit gives each VM a user of its own and a file system that is read-only, and images come in as descriptors.
//!
//! *Root gives up its right to other users' files too* (CAP_DAC_OVERRIDE), and hot-plug happens after that: an image must then be one
//! that the user of this process may open, by its mode or an access list, even if that user is root.

mod filter;

use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::BpfProgram;

use filter::Kind;

/// Exit status after a forbidden system call: 128 and the number of SIGSYS, as a shell would report it.
const EXIT_CODE: i32 = 128 + libc::SIGSYS;

/// What a particular VM must still be able to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Needs {
    /// Filter system calls (off with `-disable-seccomp`).
    pub seccomp: bool,
    /// Rename and reopen the log file.
    pub rotates_log: bool,
    /// Remove sockets or the pid file at the end.
    pub removes_names: bool,
    /// Speak to the processes that serve devices (vhost-user), and connect to them again.
    pub talks: bool,
    /// Start vCPUs when a client asks for more.
    pub plugs_cpus: bool,
    /// Make a snapshot when a client asks for one.
    pub saves: bool,
    /// Move data through io_uring: a disk or a NIC is there, or a client can bring one.
    pub rings: bool,
    /// Remove sockets or the pid file from a directory of another user, as root: keeps CAP_DAC_OVERRIDE.
    pub foreign_directory: bool,
}

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// no_new_privs or the capabilities.
    #[error("cannot give up privileges: {0}")]
    Privileges(#[source] rustix::io::Errno),
    /// The filter could not be made or installed.
    #[error("cannot restrict system calls ({0}); -disable-seccomp leaves that out")]
    Filter(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The handler of SIGSYS.
    #[error("cannot catch SIGSYS: {0}")]
    Handler(#[source] std::io::Error),
}

/// The filter of vCPU and I/O threads; empty while nothing is to be filtered.
static WORKER: OnceLock<BpfProgram> = OnceLock::new();

/// Where the handler says what happened, besides standard error.
static REPORT: AtomicI32 = AtomicI32::new(-1);

/// CAP_DAC_OVERRIDE was there and is gone.
static GAVE_UP_OVERRIDE: AtomicBool = AtomicBool::new(false);

/// Whether this process had the right to open files of any user, and has given it up.
pub fn gave_up_override() -> bool {
    GAVE_UP_OVERRIDE.load(Ordering::Relaxed)
}

/// A log file that a violation is reported to.
pub fn report_to(fd: RawFd) {
    REPORT.store(fd, Ordering::Relaxed);
}

/// Gives up all privileges, and prepares the filters. Call on the main thread, once, before other threads start: they inherit it.
pub fn confine(needs: Needs) -> Result<(), SandboxError> {
    set_no_new_privs(true).map_err(SandboxError::Privileges)?;
    let keep = if needs.foreign_directory { CapabilitySet::DAC_OVERRIDE } else { CapabilitySet::empty() };
    let now = rustix::thread::capabilities(None).map_err(SandboxError::Privileges)?;
    let keep = keep & now.permitted;
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(SandboxError::Privileges)?;
    let gone = now.permitted - keep;
    GAVE_UP_OVERRIDE.store(gone.contains(CapabilitySet::DAC_OVERRIDE), Ordering::Relaxed);
    if needs.seccomp {
        catch_violations()?;
        let program = filter::compile(Kind::Worker, needs)?;
        // The first call counts; a second VM in one process does not exist.
        let _ = WORKER.set(program);
    }
    Ok(())
}

/// Confines a vCPU thread, and every thread it starts.
pub fn enter_worker() -> Result<(), SandboxError> {
    match WORKER.get() {
        Some(program) => apply(program),
        None => Ok(()),
    }
}

/// Confines the main thread. Call after the vCPU threads were started.
pub fn enter_main(needs: Needs) -> Result<(), SandboxError> {
    if !needs.seccomp {
        return Ok(());
    }
    apply(&filter::compile(Kind::Main, needs)?)
}

/// The thread has no way to new privileges already: one that the main thread has started after it was confined could not ask for that.
fn apply(program: &BpfProgram) -> Result<(), SandboxError> {
    let failed = |e: std::io::Error| SandboxError::Filter(Box::new(e));
    let len = u16::try_from(program.len()).map_err(|e| failed(std::io::Error::other(e)))?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the program lives until the call is over, which reads as many instructions as it says; `sock_filter` is the kernel's.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, std::ptr::from_ref(&program))
    };
    if result == 0 { Ok(()) } else { Err(failed(std::io::Error::last_os_error())) }
}

fn catch_violations() -> Result<(), SandboxError> {
    // SAFETY: an all-zero sigaction is a valid value of the type.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction =
        violation as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler only makes async-signal-safe calls.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(SandboxError::Handler(std::io::Error::last_os_error())),
    }
}

/// Says which system call it was and ends the process. Nothing here allocates or locks.
extern "C" fn violation(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// The fields of siginfo_t that the kernel fills for SIGSYS; libc has no accessor for them.
    #[repr(C)]
    struct SysInfo {
        signo: libc::c_int,
        errno: libc::c_int,
        code: libc::c_int,
        address: *mut libc::c_void,
        number: libc::c_int,
    }
    // SAFETY: the kernel passes a siginfo_t, which is larger than this prefix of it and as aligned.
    let number = unsafe { (*info.cast::<SysInfo>()).number };
    let mut line =
        *b"flotilla-vmm: killed: system call 000 is not allowed by the sandbox (see -disable-seccomp)\n";
    let mut rest = number.unsigned_abs();
    for digit in line.iter_mut().skip(34).take(3).rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    for fd in [libc::STDERR_FILENO, REPORT.load(Ordering::Relaxed)] {
        // SAFETY: writes a buffer of this frame; -1 and closed descriptors are refused by the kernel.
        unsafe { libc::write(fd, line.as_ptr().cast(), line.len()) };
    }
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(EXIT_CODE) }
}

#[cfg(test)]
mod tests;
