//! One connection of a character device: owns its descriptors, and how bytes go through them without blocking.
//!
//! `port` is the only user; the rooms that make connections (`socket`, `stdio`) say of which kind one is.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::FrontEnd;

/// What a terminal or pipe that polls as writable takes without blocking (tty: WAKEUP_CHARS; pipe: PIPE_BUF, which is more).
const SAFE_WRITE: usize = 256;
/// What is thrown away of a client's last bytes: a client that sends without end must not hold up the VM's.
const DISCARD_MAX: usize = 64 << 10;
/// The most that the kernel passes with one message (SCM_MAX_FD).
const DESCRIPTORS_MAX: usize = 253;

/// What happens when input ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AtEof {
    /// Output goes on: standard streams.
    KeepOutput,
    /// Output goes on until the peer is wholly gone: unix sockets tell a half-closed peer from a closed one.
    AwaitHangUp,
    /// The peer is gone: TCP cannot tell.
    Disconnect,
}

/// Turns what was typed into what the front end gets: never more bytes.
pub(super) type Filter = Box<dyn Fn(&[u8]) -> Vec<u8> + Send + Sync>;

/// One connection: descriptors for both directions.
pub(super) struct Stream {
    pub(super) input: Option<OwnedFd>,
    pub(super) output: OwnedFd,
    /// The descriptors are shared with other processes, so O_NONBLOCK must not be set on them: poll before each transfer.
    shared: bool,
    pub(super) at_eof: AtEof,
    /// Looks at input first.
    pub(super) filter: Option<Filter>,
    /// Dropped with the stream: what keeps it alive or puts things back.
    _guard: Option<Box<dyn Send + Sync>>,
}

impl Stream {
    pub(super) fn standard(
        input: OwnedFd,
        output: OwnedFd,
        filter: Option<Filter>,
        guard: Option<Box<dyn Send + Sync>>,
    ) -> Self {
        Self { input: Some(input), output, shared: true, at_eof: AtEof::KeepOutput, filter, _guard: guard }
    }

    pub(super) fn output_only(output: OwnedFd) -> Self {
        Self { input: None, output, shared: false, at_eof: AtEof::KeepOutput, filter: None, _guard: None }
    }

    pub(super) fn pty(master: OwnedFd, other: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            input: Some(master.try_clone()?),
            output: master,
            shared: false,
            at_eof: AtEof::KeepOutput,
            filter: None,
            _guard: Some(Box::new(other)),
        })
    }

    /// `tells_half_close`: see [`AtEof`].
    pub(super) fn socket(socket: OwnedFd, tells_half_close: bool) -> io::Result<Self> {
        let at_eof = if tells_half_close { AtEof::AwaitHangUp } else { AtEof::Disconnect };
        Ok(Self {
            input: Some(socket.try_clone()?),
            output: socket,
            shared: false,
            at_eof,
            filter: None,
            _guard: None,
        })
    }

    /// Whether a transfer would not block.
    pub(super) fn ready(&self, fd: &OwnedFd, flags: PollFlags) -> bool {
        let mut fds = [PollFd::new(fd, flags)];
        !self.shared || poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0)
    }

    /// Writes what goes without blocking; fewer bytes than given means that the host is slow.
    pub(super) fn send(&self, data: &[u8]) -> Result<usize, Errno> {
        let mut sent = 0;
        while sent < data.len() && self.ready(&self.output, PollFlags::OUT) {
            let rest = data.get(sent..).unwrap_or_default();
            let rest = if self.shared { rest.get(..SAFE_WRITE).unwrap_or(rest) } else { rest };
            match rustix::io::write(&self.output, rest) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(sent)
    }

    /// Throws away what the peer of a socket has sent, up to [`DISCARD_MAX`], as nobody will read it. A unix socket that is closed with bytes
    /// unread is a reset to its peer (unix(7)), whose program may then end in failure although it was answered.
    pub(super) fn discard_input(&self) {
        let Some(input) = self.input.as_ref().filter(|_| self.at_eof != AtEof::KeepOutput) else { return };
        let mut space = [0; 4096];
        for _ in 0..DISCARD_MAX / space.len() {
            match rustix::io::read(input, &mut space) {
                Ok(0) => return,
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Reads what is there. On a unix socket, descriptors that come with the bytes go to `takes_descriptors` first, if that is somebody.
    pub(super) fn read(
        &self,
        fd: &OwnedFd,
        space: &mut [u8],
        takes_descriptors: Option<&dyn FrontEnd>,
    ) -> Result<usize, Errno> {
        match takes_descriptors.filter(|_| self.at_eof == AtEof::AwaitHangUp) {
            Some(front_end) => receive(fd, space, front_end),
            None => rustix::io::read(fd, space),
        }
    }
}

/// Reads from a unix socket; descriptors that come with the bytes go to the front end first.
fn receive(fd: &OwnedFd, space: &mut [u8], front_end: &dyn FrontEnd) -> Result<usize, Errno> {
    let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut control);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = rustix::net::recvmsg(fd, &mut [IoSliceMut::new(space)], &mut control, flags)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(list) = part {
            fds.extend(list);
        }
    }
    if !fds.is_empty() {
        front_end.descriptors(fds);
    }
    Ok(message.bytes)
}
