//! Engines: what moves data between guest memory and an image. Owns the interface and the synchronous engine.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use super::raw;

/// One thing to do, at an offset given beside it.
#[derive(Clone, Copy)]
pub(crate) enum Op<'a> {
    /// Read into these buffers.
    Read(&'a [libc::iovec]),
    /// Write from these buffers; `durable`: not done before it is on the medium.
    Write {
        /// The buffers.
        parts: &'a [libc::iovec],
        /// As O_DSYNC.
        durable: bool,
    },
    /// Make everything written so far durable.
    Flush,
    /// `fallocate` with this mode and length.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// Bytes.
        len: u64,
    },
}

/// Moves data. Used by one thread at a time.
pub(crate) trait Engine: Send {
    /// Queues `op`; it is done when [`reap`](Self::reap) gives its tag back.
    ///
    /// # Safety
    /// The buffers, and the list of them, must stay valid until then.
    unsafe fn push(&mut self, tag: u16, op: Op<'_>, offset: u64) -> io::Result<()>;
    /// Starts all that is queued.
    fn submit(&mut self) -> io::Result<()>;
    /// Something that is done: its tag, and bytes moved or the error.
    fn reap(&mut self) -> Option<(u16, io::Result<u32>)>;
    /// Becomes readable when there may be something to reap; `None` if things are done at once.
    fn ready(&self) -> Option<BorrowedFd<'_>>;
}

/// Plain calls on the caller's thread.
pub(super) struct Sync {
    fd: i32,
    done: VecDeque<(u16, io::Result<u32>)>,
}

impl Sync {
    pub(super) fn new(file: &File) -> Self {
        Self { fd: raw(file), done: VecDeque::new() }
    }

    fn run(&self, op: Op<'_>, offset: u64) -> io::Result<u32> {
        let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            // SAFETY: the caller of `push` vouches for the buffers; the owner of the engine keeps the file open.
            let n = unsafe {
                match op {
                    Op::Read(parts) => libc::preadv(self.fd, parts.as_ptr(), parts.len() as i32, at),
                    Op::Write { parts, durable: false } => {
                        libc::pwritev(self.fd, parts.as_ptr(), parts.len() as i32, at)
                    }
                    Op::Write { parts, durable: true } => {
                        libc::pwritev2(self.fd, parts.as_ptr(), parts.len() as i32, at, libc::RWF_DSYNC)
                    }
                    Op::Flush => libc::fdatasync(self.fd) as isize,
                    Op::Allocate { mode, len } => {
                        let len = i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
                        libc::fallocate(self.fd, mode, at, len) as isize
                    }
                }
            };
            if n >= 0 {
                // The kernel moves at most 2 GiB at once.
                return Ok(n as u32);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl Engine for Sync {
    unsafe fn push(&mut self, tag: u16, op: Op<'_>, offset: u64) -> io::Result<()> {
        let result = self.run(op, offset);
        self.done.push_back((tag, result));
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        self.done.pop_front()
    }

    fn ready(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
