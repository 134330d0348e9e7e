//! All threads of a VMM under a tracer, from its exec to its guest's first byte: counts their system calls, or shows
//! their stops to who wants them.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};

use crate::Result;
use crate::process::Vm;
use crate::subject::{Command, Setting, Subject};

const DEADLINE: Duration = Duration::from_secs(60);
/// What a system call's stop carries, so that it is not taken for a signal (PTRACE_O_TRACESYSGOOD).
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

fn request(kind: libc::c_uint, pid: i32, data: i32) -> io::Result<()> {
    // SAFETY: the requests used here take a number or nothing as data, and no address of ours.
    let answer = unsafe { libc::ptrace(kind, pid, 0, libc::c_long::from(data)) };
    if answer == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A VM under the tracer. Its other threads have to be reaped here when it is killed: the wait for the process waits for them.
struct Traced {
    vm: Vm,
    leader: i32,
    known: HashSet<i32>,
}

impl Drop for Traced {
    fn drop(&mut self) {
        // SAFETY: the process is our child and not reaped yet.
        unsafe { libc::kill(self.leader, libc::SIGKILL) };
        for thread in self.known.iter().filter(|t| **t != self.leader) {
            let mut status = 0;
            // SAFETY: writes one number. Ends: each of them has been killed, or is gone already, which is an error.
            while unsafe { libc::waitpid(*thread, &raw mut status, libc::__WALL) } > 0
                && libc::WIFSTOPPED(status)
            {}
        }
    }
}

/// Runs `subject` once and counts its system calls.
pub(crate) fn count(subject: &Subject, setting: &Setting) -> Result<u64> {
    let (mut calls, mut inside) = (0, HashSet::new());
    trace(subject, setting, libc::PTRACE_SYSCALL, |pid, signal| {
        if signal != SYSCALL_STOP {
            return false;
        }
        // Stops come in pairs, at entry and at exit, for each thread.
        if inside.insert(pid) {
            calls += 1;
        } else {
            inside.remove(&pid);
        }
        true
    })?;
    Ok(calls)
}

/// Runs `subject` once, each thread from stop to stop of this kind, until its guest's first byte. `stopped` is given the thread and
/// the signal of each stop, first of all that of the exec, and says whether it was its own; other signals are passed on.
pub(crate) fn trace(
    subject: &Subject,
    setting: &Setting,
    kind: libc::c_uint,
    mut stopped: impl FnMut(i32, i32) -> bool,
) -> Result<()> {
    let vm = Vm::start(subject, setting, 0, Command::Hold, true)?;
    let leader = i32::try_from(vm.pid())?;
    let mut traced = Traced { vm, leader, known: HashSet::new() };
    let end = Instant::now() + DEADLINE;
    loop {
        let mut status = 0;
        // SAFETY: writes one number. __WALL: threads of the child too; WNOHANG: the deadline is ours.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if pid == 0 {
            if Instant::now() > end {
                return Err(format!("{}: no byte from its guest under the tracer", subject.name).into());
            }
            // Nothing stopped: wait for output or a moment. The tracer's own wait has no deadline, so this is a short sleep.
            let moment = Timespec::try_from(Duration::from_micros(200))?;
            if poll(&mut [traced.vm.console()?], Some(&moment))? > 0 && traced.vm.saw_first_byte()? {
                return Ok(());
            }
            continue;
        }
        if pid < 0 {
            return Err(io::Error::last_os_error().into());
        }
        if !libc::WIFSTOPPED(status) {
            if pid == leader {
                return Err(format!("{}: ended under the tracer", subject.name).into());
            }
            continue;
        }
        let mut signal = 0;
        let own = stopped(pid, libc::WSTOPSIG(status));
        if pid == leader && traced.known.insert(pid) {
            let follow = libc::PTRACE_O_TRACESYSGOOD
                | libc::PTRACE_O_TRACECLONE
                | libc::PTRACE_O_TRACEFORK
                | libc::PTRACE_O_TRACEVFORK
                | libc::PTRACE_O_EXITKILL;
            request(libc::PTRACE_SETOPTIONS, pid, follow)?;
        } else if !own
            && !traced.known.insert(pid)
            && status >> 16 == 0
            && libc::WSTOPSIG(status) != libc::SIGSTOP
        {
            // A real signal: passed on. The first stop of a new thread and the tracer's own events are not.
            signal = libc::WSTOPSIG(status);
        }
        // A thread may have been killed meanwhile.
        let _ = request(kind, pid, signal);
        let now = Timespec::try_from(Duration::ZERO)?;
        if poll(&mut [traced.vm.console()?], Some(&now))? > 0 && traced.vm.saw_first_byte()? {
            return Ok(());
        }
    }
}
