//! Standard input and output: owns the terminal's mode. They need not be a terminal: pipes, files and /dev/null do as well.
//!
//! On a terminal the guest gets every key; as in QEMU, Ctrl-A x ends the VM and Ctrl-A Ctrl-A sends one Ctrl-A.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::port::{Policy, Port};
use super::stream::Stream;
use super::{CharBackend, ChardevError};
use crate::event::Ops;

const CTRL_A: u8 = 1;

/// Puts the terminal back when dropped.
struct Terminal {
    fd: OwnedFd,
    before: Termios,
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(&self.fd, OptionalActions::Now, &self.before);
    }
}

pub(super) fn open(policy: Policy, ops: &mut Ops<'_>) -> Result<Arc<dyn CharBackend>, ChardevError> {
    let host = |source: io::Error| ChardevError::Host { what: "stdio".to_owned(), source };
    // Duplicates: closing them at the end leaves 0 and 1 in place for everybody else.
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(host)?;
    let output = io::stdout().as_fd().try_clone_to_owned().map_err(host)?;
    let terminal = raw_mode(&input).map_err(host)?;
    let is_terminal = terminal.is_some();
    let after_ctrl_a = AtomicBool::new(false);
    let filter = move |data: &[u8]| escape(data, &after_ctrl_a);
    let port = Port::new(ops.handle(), policy);
    let stream = Stream::standard(
        input,
        output,
        if is_terminal { Some(Box::new(filter)) } else { None },
        terminal.map(|t| Box::new(t) as Box<dyn Send + Sync>),
    );
    port.connect(stream, ops);
    Ok(port)
}

/// Lets every key through to the guest, if `fd` is a terminal and this process is in its foreground.
fn raw_mode(fd: &OwnedFd) -> io::Result<Option<Terminal>> {
    let Ok(before) = tcgetattr(fd) else { return Ok(None) };
    let foreground = rustix::termios::tcgetpgrp(fd).is_ok_and(|group| group == rustix::process::getpgrp());
    if !foreground {
        return Ok(None);
    }
    let mut raw = before.clone();
    raw.make_raw();
    // Our own log lines go to the same terminal and end in a bare newline.
    raw.output_modes = before.output_modes;
    tcsetattr(fd, OptionalActions::Now, &raw)?;
    Ok(Some(Terminal { fd: fd.try_clone()?, before }))
}

/// What of `data` is for the guest.
fn escape(data: &[u8], after_ctrl_a: &AtomicBool) -> Vec<u8> {
    let mut rest = Vec::with_capacity(data.len());
    for &byte in data {
        if after_ctrl_a.swap(false, Ordering::Relaxed) {
            match byte {
                // The same way out as for whoever sends the signal: one meaning, one path.
                b'x' => _ = rustix::process::kill_process(rustix::process::getpid(), Signal::TERM),
                CTRL_A => rest.push(CTRL_A),
                // Never two bytes for one: the front end has said how much room it has.
                other => rest.push(other),
            }
        } else if byte == CTRL_A {
            after_ctrl_a.store(true, Ordering::Relaxed);
        } else {
            rest.push(byte);
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_doubled_to_be_sent() {
        let state = AtomicBool::new(false);
        assert_eq!(escape(b"ab\x01", &state), b"ab");
        assert_eq!(escape(b"\x01c", &state), b"\x01c");
        assert_eq!(escape(b"\x01d", &state), b"d");
    }
}
