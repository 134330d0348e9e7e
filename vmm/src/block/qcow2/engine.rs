//! The engine of a qcow2 disk: owns how a request of the guest becomes transfers of its files.
//!
//! What is mapped, and may be written in place, goes straight between guest memory and the file, a contiguous run at a time (the caller
//! comes back with the rest), without a copy or an allocation. What needs a place first, or is compressed, is done at once on
//! the I/O thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::stack::{Place, Stack};
use crate::block::engine::{Engine, Mover, Op};

/// Bytes that one slow write may take before others on the thread get their turn.
const SLOW_WRITE: u64 = 4 << 20;

pub(in crate::block) struct QcowEngine {
    mover: Box<dyn Mover>,
    stack: Arc<Mutex<Stack>>,
    /// The top image, for flushes.
    fd: i32,
    failed: VecDeque<(u16, io::Error)>,
    /// Buffers of requests of which only the first part is in flight, by tag.
    lists: Vec<Vec<libc::iovec>>,
    in_flight: usize,
}

// SAFETY: the lists lead into guest RAM, which any thread may touch; who pushes them vouches for them.
unsafe impl Send for QcowEngine {}

impl QcowEngine {
    pub(in crate::block) fn new(mover: Box<dyn Mover>, stack: Arc<Mutex<Stack>>, fd: i32) -> Self {
        Self { mover, stack, fd, failed: VecDeque::new(), lists: Vec::new(), in_flight: 0 }
    }

    /// Hands a run of `len` bytes on; see [`Engine::push`].
    ///
    /// # Safety
    /// As for [`Engine::push`].
    unsafe fn transfer(
        &mut self,
        tag: u16,
        fd: i32,
        at: u64,
        len: u64,
        op: Op<'_>,
    ) -> io::Result<Option<u32>> {
        let (Op::Read(parts) | Op::Write { parts, .. }) = op else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut parts = parts;
        if total(parts) > len {
            let place = usize::from(tag);
            if place >= self.lists.len() {
                self.lists.resize_with(place + 1, Vec::new);
            }
            let list = &mut self.lists[place];
            cut(parts, len, list);
            parts = list;
        }
        let op = match op {
            Op::Write { durable, .. } => Op::Write { parts, durable },
            _ => Op::Read(parts),
        };
        // SAFETY: the caller vouches for the buffers and for its list; ours is not touched while its tag is in flight.
        let done = unsafe { self.mover.push(fd, tag, op, at)? };
        self.in_flight += usize::from(done.is_none());
        Ok(done)
    }

    /// Does it, or starts it; see [`Engine::push`].
    ///
    /// # Safety
    /// As for [`Engine::push`].
    unsafe fn begin(&mut self, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>> {
        let shared = Arc::clone(&self.stack);
        let mut stack = lock(&shared);
        match op {
            Op::Read(parts) => {
                let (place, len) = stack.locate(offset, total(parts))?;
                match place {
                    Place::File(fd, at) => {
                        drop(stack);
                        // SAFETY: passed on.
                        return unsafe { self.transfer(tag, fd, at, len, op) };
                    }
                    // SAFETY: the caller vouches for the buffers.
                    Place::Zeroes => unsafe { zero_fill(parts, len) },
                    Place::Compressed(layer, entry) => {
                        let bytes = stack.unpack(layer, entry, offset)?;
                        let bytes = bytes.get(..len as usize).ok_or(io::ErrorKind::InvalidData)?;
                        // SAFETY: as above.
                        unsafe { copy_to(parts, bytes) };
                    }
                }
                Ok(Some(len as u32))
            }
            Op::Write { parts, durable } => match stack.locate_own(offset, total(parts))? {
                Ok((fd, at, len)) => {
                    drop(stack);
                    // SAFETY: passed on.
                    unsafe { self.transfer(tag, fd, at, len, op) }
                }
                Err(len) => {
                    let len = len.min(SLOW_WRITE);
                    let mut from = 0;
                    stack.write(offset, len, |bytes| {
                        // SAFETY: as above.
                        unsafe { copy_from(parts, from, bytes) };
                        from += bytes.len() as u64;
                    })?;
                    if durable {
                        stack.flush(self.in_flight == 0)?;
                    }
                    Ok(Some(len as u32))
                }
            },
            Op::Flush if stack.is_dirty() => stack.flush(self.in_flight == 0).map(|()| Some(0)),
            Op::Flush => {
                drop(stack);
                // SAFETY: no buffers.
                let done = unsafe { self.mover.push(self.fd, tag, op, offset)? };
                self.in_flight += usize::from(done.is_none());
                Ok(done)
            }
            Op::Discard { len } => stack.discard(offset, len).map(|()| Some(0)),
            Op::Zero { len, unmap } => stack.zero(offset, len, unmap).map(|()| Some(0)),
        }
    }
}

impl Engine for QcowEngine {
    unsafe fn push(&mut self, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>> {
        // SAFETY: passed on.
        match unsafe { self.begin(tag, op, offset) } {
            Ok(done) => Ok(done),
            Err(error) => {
                self.failed.push_back((tag, error));
                Ok(None)
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.mover.submit()
    }

    fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        if let Some((tag, error)) = self.failed.pop_front() {
            return Some((tag, Err(error)));
        }
        let done = self.mover.reap()?;
        self.in_flight -= 1;
        Some(done)
    }

    fn ready(&self) -> Option<BorrowedFd<'_>> {
        self.mover.ready()
    }
}

/// The stack, whoever held it before: a panic ends the process.
pub(in crate::block) fn lock(stack: &Mutex<Stack>) -> MutexGuard<'_, Stack> {
    stack.lock().unwrap_or_else(PoisonError::into_inner)
}

fn total(parts: &[libc::iovec]) -> u64 {
    parts.iter().map(|p| p.iov_len as u64).sum()
}

/// Puts the first `len` bytes of `parts` into `list`.
fn cut(parts: &[libc::iovec], len: u64, list: &mut Vec<libc::iovec>) {
    list.clear();
    let mut left = len;
    for part in parts {
        let n = (part.iov_len as u64).min(left);
        if n == 0 {
            break;
        }
        list.push(libc::iovec { iov_base: part.iov_base, iov_len: n as usize });
        left -= n;
    }
}

/// # Safety
/// The buffers must be good.
unsafe fn zero_fill(parts: &[libc::iovec], len: u64) {
    let mut left = len as usize;
    for part in parts {
        let n = part.iov_len.min(left);
        // SAFETY: the caller vouches for the buffer.
        unsafe { part.iov_base.cast::<u8>().write_bytes(0, n) };
        left -= n;
    }
}

/// # Safety
/// The buffers must be good, and apart from `bytes`.
unsafe fn copy_to(parts: &[libc::iovec], mut bytes: &[u8]) {
    for part in parts {
        let (now, later) = bytes.split_at(part.iov_len.min(bytes.len()));
        // SAFETY: the caller vouches for the buffer.
        unsafe { part.iov_base.cast::<u8>().copy_from_nonoverlapping(now.as_ptr(), now.len()) };
        bytes = later;
    }
}

/// Copies what the buffers have from byte `from` on.
///
/// # Safety
/// The buffers must be good, and apart from `bytes`.
unsafe fn copy_from(parts: &[libc::iovec], from: u64, bytes: &mut [u8]) {
    let (mut skip, mut done) = (from as usize, 0);
    for part in parts {
        if skip >= part.iov_len {
            skip -= part.iov_len;
            continue;
        }
        let n = (part.iov_len - skip).min(bytes.len() - done);
        // SAFETY: the caller vouches for the buffer; the range is inside it.
        unsafe {
            let base = part.iov_base.cast::<u8>().add(skip);
            bytes.as_mut_ptr().add(done).copy_from_nonoverlapping(base, n);
        }
        (skip, done) = (0, done + n);
    }
}
