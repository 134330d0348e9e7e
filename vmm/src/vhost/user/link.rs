//! The socket to a back end: owns sending with descriptors and receiving with a deadline. The other side is not trusted: it may be slow,
//! silent, or gone.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

use super::message::REGIONS_MAX;

/// A connected socket; non-blocking.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

/// Connects to the socket at `path`. Never waits: a server whose queue is full is an error.
pub(super) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let addr = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &addr)?;
    Ok(socket)
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not answer in time")
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it has closed the connection")
}

impl Link {
    /// Takes a connected, non-blocking socket.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends all of `bytes`, the descriptors with the first of them.
    pub(super) fn send(&self, mut bytes: &[u8], fds: &[BorrowedFd<'_>], deadline: Instant) -> io::Result<()> {
        let mut fds = fds;
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::other("too many descriptors for one message"));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(n) => {
                    bytes = bytes.get(n..).unwrap_or_default();
                    fds = &[];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(gone()),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Fills `to`. Descriptors that come along are closed by the kernel: nobody asked for any.
    pub(super) fn receive(&self, to: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match rustix::net::recv(&self.0, rest, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Err(gone()),
                Ok((n, _)) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Whether the other side is there, and keeps quiet, as it must unless it is asked.
    pub(super) fn is_quiet(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        matches!(rustix::net::recv(&self.0, &mut [0u8; 1][..], flags), Err(Errno::AGAIN | Errno::INTR))
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> io::Result<()> {
        let left =
            deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()).ok_or_else(late)?;
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::from_borrowed_fd(self.0.as_fd(), what)], Some(&left)) {
            Ok(0) => Err(late()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    #[test]
    fn silence_and_full_buffers_have_an_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let link = Link::new(ours.into());
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(link.is_quiet());
        assert_eq!(link.receive(&mut [0; 4], soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        theirs.write_all(b"abc").unwrap();
        assert!(!link.is_quiet());
        assert_eq!(link.receive(&mut [0; 4], soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let much = vec![0; 64 << 20];
        assert_eq!(link.send(&much, &[], soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(theirs);
        assert!(!link.is_quiet());
        assert_eq!(link.receive(&mut [0; 4], soon()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(link.send(b"x", &[], soon()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
