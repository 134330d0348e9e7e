//! Termination signals: owns their way into the event loop.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::ProcessError;
use crate::event::{EventFlags, Ops};

/// From now on SIGTERM, SIGINT and SIGHUP are told to `told` on the loop's thread, by number. Call before threads start: they inherit
/// the mask, so that no thread of the process is ever interrupted by them.
pub fn watch(ops: &mut Ops<'_>, mut told: impl FnMut(i32) + Send + 'static) -> Result<(), ProcessError> {
    let host = |e: nix::Error| ProcessError::Signals(e.into());
    let set = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    set.thread_block().map_err(host)?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(host)?;
    let fd = std::os::fd::AsFd::as_fd(&signals).try_clone_to_owned().map_err(ProcessError::Signals)?;
    ops.add(fd, EventFlags::IN, move |_: EventFlags, _: &mut Ops<'_>| {
        while let Ok(Some(info)) = signals.read_signal() {
            told(i32::try_from(info.ssi_signo).unwrap_or(0));
        }
    })
    .map(|_| ())
    .map_err(|e: io::Error| ProcessError::Signals(e))
}
