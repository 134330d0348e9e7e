//! The io_uring engine: owns one ring. Requests go straight between guest memory and the image.
//!
//! The ring's own descriptor is watched for completions (it polls readable while there are any), so no eventfd has to be made,
//! signalled or read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::engine::{Mover, Op};

/// Times to try again when the kernel is out of memory for requests, one millisecond apart.
const SUBMIT_TRIES: u32 = 1000;

pub(super) struct Uring {
    ring: IoUring,
    flags: squeue::Flags,
}

impl Uring {
    /// A ring for `depth` requests. `threads`: every request goes to the kernel's pool of threads
    /// at once, and none is tried on ours.
    pub(super) fn new(depth: u16, threads: bool) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(u32::from(depth))?;
        // Before 5.5 the kernel might read the list of buffers after `submit`; none that old is supported, but be sure.
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let flags = if threads { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        Ok(Self { ring, flags })
    }
}

impl Mover for Uring {
    unsafe fn push(&mut self, fd: i32, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>> {
        let fd = Fd(fd);
        let entry = match op {
            Op::Read(parts) => {
                opcode::Readv::new(fd, parts.as_ptr(), parts.len() as u32).offset(offset).build()
            }
            Op::Write { parts, durable } => opcode::Writev::new(fd, parts.as_ptr(), parts.len() as u32)
                .offset(offset)
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Op::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Op::Discard { .. } | Op::Zero { .. } => {
                let (mode, len) = op.allocation().ok_or(io::ErrorKind::InvalidInput)?;
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
        }
        .user_data(u64::from(tag))
        .flags(self.flags);
        // SAFETY: the caller vouches for the buffers.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)?;
        }
        Ok(None)
    }

    fn submit(&mut self) -> io::Result<()> {
        let mut tries = 0;
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let busy = matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM));
                    if !busy || tries >= SUBMIT_TRIES {
                        return Err(e);
                    }
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        Ok(())
    }

    fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        let entry = self.ring.completion().next()?;
        let result = u32::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        Some((entry.user_data() as u16, result))
    }

    fn ready(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's descriptor is open as long as `self`.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}
