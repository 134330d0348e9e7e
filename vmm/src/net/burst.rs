//! Many packets in one system call: owns an io_uring for the packets that leave or come by a tap.
//!
//! A tap moves one packet per call, and the way into the kernel and back is a quarter of what that costs. No packet is under way between
//! two calls. io_uring would wait for a descriptor that does not block, so each packet says for itself that it does not (RWF_NOWAIT);
//! taps of old kernels do not know that, and answer EOPNOTSUPP.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use io_uring::types::Fd;
use io_uring::{IoUring, opcode, squeue};

use super::Tap;

/// Whether a tap has said that it cannot do bursts.
pub(crate) fn is_unknown(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// Times to try again when the kernel is out of memory for requests, one millisecond apart.
const TRIES: u32 = 1000;

/// For one ring of a NIC.
pub(crate) struct Burst {
    ring: IoUring,
}

impl Burst {
    /// Packets that one call moves at most.
    pub(crate) const MOST: usize = 32;

    /// Costs some system calls and a few pages: for rings that are busy. An error: the host has no io_uring, or not for us.
    pub(crate) fn new() -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(Self::MOST as u32)?;
        // The lists of parts are read before `submit` returns, and no answer is lost.
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring })
    }

    /// Sends `packets` (lists of parts, headers first) in their order; [`MOST`](Self::MOST) at most. `refused` is told the error of each that
    /// the kernel does not take. An error of the whole: the kernel may still read the packets, now and later.
    ///
    /// # Safety
    /// Each part must be good for reading until this returns.
    pub(crate) unsafe fn send<'a>(
        &mut self,
        tap: &Tap,
        packets: impl Iterator<Item = &'a [libc::iovec]>,
        mut refused: impl FnMut(&io::Error),
    ) -> io::Result<()> {
        let fd = Fd(tap.as_fd().as_raw_fd());
        let entries = packets.map(|parts| match parts {
            // A part that is too long for this is refused by the kernel, and so is the packet.
            [one] => {
                let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
                opcode::Write::new(fd, one.iov_base.cast_const().cast(), len)
                    .rw_flags(libc::RWF_NOWAIT)
                    .build()
            }
            _ => {
                opcode::Writev::new(fd, parts.as_ptr(), parts.len() as u32).rw_flags(libc::RWF_NOWAIT).build()
            }
        });
        // SAFETY: the caller vouches for the parts.
        unsafe {
            self.run(entries, |_, result| {
                if let Err(error) = result {
                    refused(&error);
                }
            })
        }
    }

    /// Reads one packet, header first, into each of `places` (lists of parts), [`MOST`](Self::MOST) at most, as [`Tap::read`] does. `came` is
    /// told the number of each place and what came there. An error of the whole: the kernel may still write to the places, now and later.
    ///
    /// # Safety
    /// Each part must be good for writing until this returns.
    pub(crate) unsafe fn receive<'a>(
        &mut self,
        tap: &Tap,
        places: impl Iterator<Item = &'a [libc::iovec]>,
        came: impl FnMut(usize, io::Result<usize>),
    ) -> io::Result<()> {
        let fd = Fd(tap.as_fd().as_raw_fd());
        let entries = places.map(|parts| {
            opcode::Readv::new(fd, parts.as_ptr(), parts.len() as u32).rw_flags(libc::RWF_NOWAIT).build()
        });
        // SAFETY: the caller vouches for the parts.
        unsafe { self.run(entries, came) }
    }

    /// # Safety
    /// What the entries refer to must be good until this returns.
    unsafe fn run(
        &mut self,
        entries: impl Iterator<Item = squeue::Entry>,
        mut done: impl FnMut(usize, io::Result<usize>),
    ) -> io::Result<()> {
        let mut left = 0;
        for (number, entry) in entries.enumerate() {
            let entry = entry.user_data(number as u64);
            // SAFETY: the caller vouches for it; the lists are read before this returns.
            unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
            left += 1;
        }
        let mut tries = 0;
        while left > 0 {
            // The tap moves each packet at once, or says no.
            match self.ring.submit_and_wait(left) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let busy = matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM));
                    if !busy || tries >= TRIES {
                        return Err(e);
                    }
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            for answer in self.ring.completion() {
                left = left.saturating_sub(1);
                let result = usize::try_from(answer.result());
                let result = result.map_err(|_| io::Error::from_raw_os_error(-answer.result()));
                done(answer.user_data() as usize, result);
            }
        }
        Ok(())
    }
}
