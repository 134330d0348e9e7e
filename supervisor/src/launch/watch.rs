//! Processes that are not our children: their identity, their end, and a signal to them, all without a race on reused numbers.

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor for the process `pid`, if it is the one that started at `start_time`.
pub(super) fn open(pid: u32, start_time: u64) -> io::Result<OwnedFd> {
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
    let descriptor = pidfd_open(number, PidfdFlags::NONBLOCK)?;
    // Read after the open: now the number cannot pass to another process without the descriptor telling.
    if self::start_time(pid)? == start_time { Ok(descriptor) } else { Err(gone()) }
}

/// When the process started, clock ticks since boot: field 22 of `/proc/PID/stat`, counted after the command's closing bracket because
/// the command may hold spaces and brackets of its own (proc_pid_stat(5)). An error for a zombie: that one has ended.
pub(super) fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    if matches!(fields.first(), Some(&"Z" | &"X")) {
        return Err(io::ErrorKind::NotFound.into());
    }
    fields
        .get(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/PID/stat"))
}

/// Returns when the process behind `descriptor` has ended.
pub(super) async fn ended(descriptor: OwnedFd) -> io::Result<()> {
    // SAFETY: an OwnedFd is open, always the same number, and owned by the AsyncFd until that is dropped.
    let watched = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
    watched.readable().await.map(drop)
}

/// Kills the process; fine when it has ended.
pub(super) fn kill(descriptor: &OwnedFd) -> io::Result<()> {
    match pidfd_send_signal(descriptor, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_is_known_by_number_and_start() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let started = start_time(child.id()).unwrap();
        assert!(open(child.id(), started + 1).is_err());
        assert!(open(0, 0).is_err());
        let descriptor = open(child.id(), started).unwrap();
        kill(&descriptor).unwrap();
        ended(descriptor).await.unwrap();
        assert!(start_time(child.id()).is_err(), "a zombie has ended");
        child.wait().unwrap();
        assert!(open(child.id(), started).is_err());
    }
}
