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
    /// Give these blocks back; they read as zeroes then, or as before.
    Discard {
        /// Bytes.
        len: u64,
    },
    /// Make these blocks read as zeroes.
    Zero {
        /// Bytes.
        len: u64,
        /// They may be given back.
        unmap: bool,
    },
}

impl Op<'_> {
    /// What `fallocate` is to do: mode and length.
    pub(super) fn allocation(&self) -> Option<(i32, u64)> {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        match self {
            Op::Discard { len } | Op::Zero { len, unmap: true } => Some((PUNCH, *len)),
            Op::Zero { len, unmap: false } => Some((ZERO, *len)),
            _ => None,
        }
    }
}

/// What engines are made of: moves data between memory and files. Used by one thread at a time.
pub(crate) trait Mover: Send {
    /// As [`Engine::push`], on the file of descriptor `fd`.
    ///
    /// # Safety
    /// As there; and the descriptor must stay open.
    unsafe fn push(&mut self, fd: i32, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>>;
    /// As [`Engine::submit`].
    fn submit(&mut self) -> io::Result<()>;
    /// As [`Engine::reap`].
    fn reap(&mut self) -> Option<(u16, io::Result<u32>)>;
    /// As [`Engine::ready`].
    fn ready(&self) -> Option<BorrowedFd<'_>>;
}

/// The engine of a raw image: one file, as it is.
pub(super) struct Raw {
    mover: Box<dyn Mover>,
    fd: i32,
}

impl Raw {
    /// The file must outlive it.
    pub(super) fn new(mover: Box<dyn Mover>, file: &File) -> Self {
        Self { mover, fd: raw(file) }
    }
}

impl Engine for Raw {
    unsafe fn push(&mut self, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>> {
        // SAFETY: the caller vouches for the buffers, the owner of the engine for the file.
        unsafe { self.mover.push(self.fd, tag, op, offset) }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.mover.submit()
    }

    fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        self.mover.reap()
    }

    fn ready(&self) -> Option<BorrowedFd<'_>> {
        self.mover.ready()
    }
}

/// Moves data. Used by one thread at a time.
pub(crate) trait Engine: Send {
    /// Does `op` at once, if that is quick, and says how many bytes it has moved. Else (`None`) queues it: it is done when
    /// [`reap`](Self::reap) gives its tag back, and so is what has failed at once.
    ///
    /// # Safety
    /// The buffers, and the list of them, must stay valid until it is done.
    unsafe fn push(&mut self, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>>;
    /// Starts all that is queued.
    fn submit(&mut self) -> io::Result<()>;
    /// Something that is done: its tag, and bytes moved or the error.
    fn reap(&mut self) -> Option<(u16, io::Result<u32>)>;
    /// Becomes readable when there may be something to reap; `None` if things are done at once.
    fn ready(&self) -> Option<BorrowedFd<'_>>;
}

/// Plain calls on the caller's thread.
#[derive(Default)]
pub(super) struct Sync {
    failed: VecDeque<(u16, io::Error)>,
}

impl Sync {
    fn run(fd: i32, op: Op<'_>, offset: u64) -> io::Result<u32> {
        let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            // SAFETY: the caller of `push` vouches for the buffers; the owner of the engine keeps the file open.
            let n = unsafe {
                match op {
                    Op::Read(parts) => libc::preadv(fd, parts.as_ptr(), parts.len() as i32, at),
                    Op::Write { parts, durable: false } => {
                        libc::pwritev(fd, parts.as_ptr(), parts.len() as i32, at)
                    }
                    Op::Write { parts, durable: true } => {
                        libc::pwritev2(fd, parts.as_ptr(), parts.len() as i32, at, libc::RWF_DSYNC)
                    }
                    Op::Flush => libc::fdatasync(fd) as isize,
                    Op::Discard { .. } | Op::Zero { .. } => {
                        let (mode, len) = op.allocation().ok_or(io::ErrorKind::InvalidInput)?;
                        let len = i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
                        libc::fallocate(fd, mode, at, len) as isize
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

impl Mover for Sync {
    unsafe fn push(&mut self, fd: i32, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>> {
        match Self::run(fd, op, offset) {
            Ok(n) => Ok(Some(n)),
            Err(error) => {
                self.failed.push_back((tag, error));
                Ok(None)
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        self.failed.pop_front().map(|(tag, error)| (tag, Err(error)))
    }

    fn ready(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
