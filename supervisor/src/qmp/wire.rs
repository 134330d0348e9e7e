//! Bytes and descriptors in and out of a non-blocking unix socket. QMP passes descriptors beside the text (`getfd`): the
//! kernel gives them to the reader with the first byte of the write they came with.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Most descriptors that one write may carry.
pub(crate) const MAX_DESCRIPTORS: usize = 16;

/// Reads what is there. `Ok(0)`: the other side will send no more.
///
/// # Errors
/// `WouldBlock` when there is nothing; `InvalidData` when more descriptors came than fit (the kernel closed the rest).
pub(crate) fn receive(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    stream.try_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(buffer)];
        let got = rustix::net::recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more than 16 descriptors in one message",
            ));
        }
        Ok(got.bytes)
    })
}

/// Writes as much as the socket takes; `descriptors` go with the first byte.
///
/// # Errors
/// `WouldBlock` when it takes nothing.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    stream.try_io(Interest::WRITABLE, || {
        let borrowed: Vec<BorrowedFd<'_>> =
            descriptors.iter().take(MAX_DESCRIPTORS).map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
        }
        // A peer that is gone is an error here, not a SIGPIPE.
        Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
    })
}
