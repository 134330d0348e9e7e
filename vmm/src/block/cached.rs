//! What the page cache can do at once is done at once, on the I/O thread; the rest goes to io_uring. Owns the guess which is which.
//!
//! For an image that is open through the page cache, a copy costs less than what any queue adds to it: a write that io_uring hands to a
//! thread of the kernel costs ten times as much. Reads ask the kernel not to wait (RWF_NOWAIT). Few file systems take that for
//! writes, so these are simply done, as long as they turn out quick:
//!
//! ```text
//!            slow: the kernel makes writers wait for the medium
//!   at once ────────────────────────────────────────────────────▶ queued, for a while that doubles each time
//!     ▲                                                             │
//!     └──────────────────────────── over ───────────────────────────┘   quick ones in between make the next while short again
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::engine::{Mover, Op};

/// A write that took this long has waited. Longer than the thread's turn when others compute on its processor.
const SLOW: Duration = Duration::from_millis(8);
/// How long writes are queued after a slow one: first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Quick writes in a row after which a slow one counts as the first.
const CALM: u32 = 4096;
/// Writes of whole pages only: a part of one that is not in the cache would have to be read first.
const PAGE: u64 = 4096;
/// Larger writes are worth a queue.
const LARGEST_WRITE: u64 = 256 << 10;
/// Reads that are queued unseen, at most, after some that had to wait.
const MOST_MISSES: u32 = 64;

/// Whether reads are tried at once.
#[derive(Debug, Default)]
struct Reads {
    /// Those to queue before the next try.
    skip: u32,
    misses: u32,
}

impl Reads {
    fn tries(&mut self) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        true
    }

    fn hit(&mut self) {
        self.misses = 0;
    }

    fn miss(&mut self) {
        self.misses = (self.misses * 2 + 1).min(MOST_MISSES);
        self.skip = self.misses;
    }
}

/// Whether writes are done at once. Times are since any fixed moment.
#[derive(Debug, Default)]
struct Writes {
    paused_until: Duration,
    pause: Duration,
    calm: u32,
}

impl Writes {
    fn tries(&self, now: Duration) -> bool {
        now >= self.paused_until
    }

    fn took(&mut self, now: Duration, time: Duration) {
        if time < SLOW {
            self.calm = self.calm.saturating_add(1);
            return;
        }
        self.pause = if self.calm >= CALM { FIRST_PAUSE } else { self.pause * 2 };
        self.pause = self.pause.clamp(FIRST_PAUSE, LONGEST_PAUSE);
        (self.calm, self.paused_until) = (0, now + self.pause);
    }
}

/// Moves data by plain calls where that is quick, else through `queue`.
pub(super) struct Cached<Q> {
    queue: Q,
    reads: Reads,
    writes: Writes,
    since: Instant,
}

impl<Q: Mover> Cached<Q> {
    pub(super) fn new(queue: Q) -> Self {
        let (reads, writes) = Default::default();
        Self { queue, reads, writes, since: Instant::now() }
    }

    /// Bytes moved, if any were.
    ///
    /// # Safety
    /// As for [`Mover::push`].
    unsafe fn at_once(&mut self, fd: i32, op: Op<'_>, offset: u64) -> Option<u32> {
        let at = i64::try_from(offset).ok()?;
        let moved = match op {
            Op::Read(parts) if self.reads.tries() => {
                // SAFETY: passed on.
                let n =
                    unsafe { libc::preadv2(fd, parts.as_ptr(), parts.len() as i32, at, libc::RWF_NOWAIT) };
                if n > 0 {
                    self.reads.hit();
                } else {
                    self.reads.miss();
                }
                n
            }
            Op::Write { parts, durable: false } if is_plain(parts, offset) => {
                let begin = self.since.elapsed();
                if !self.writes.tries(begin) {
                    return None;
                }
                // SAFETY: passed on.
                let n = unsafe { libc::pwritev(fd, parts.as_ptr(), parts.len() as i32, at) };
                let end = self.since.elapsed();
                self.writes.took(end, end.saturating_sub(begin));
                n
            }
            _ => return None,
        };
        // Errors and the end of the file show again in the queue, which reports them.
        u32::try_from(moved).ok().filter(|n| *n > 0)
    }
}

/// Whole pages, and not very many.
fn is_plain(parts: &[libc::iovec], offset: u64) -> bool {
    let len = parts.iter().map(|p| p.iov_len as u64).sum::<u64>();
    (offset | len).is_multiple_of(PAGE) && len <= LARGEST_WRITE
}

impl<Q: Mover> Mover for Cached<Q> {
    unsafe fn push(&mut self, fd: i32, tag: u16, op: Op<'_>, offset: u64) -> io::Result<Option<u32>> {
        // SAFETY: passed on.
        match unsafe { self.at_once(fd, op, offset) } {
            // SAFETY: passed on.
            None => unsafe { self.queue.push(fd, tag, op, offset) },
            done => Ok(done),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.queue.submit()
    }

    fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        self.queue.reap()
    }

    fn ready(&self) -> Option<BorrowedFd<'_>> {
        self.queue.ready()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsRawFd;

    /// Keeps what it is given.
    #[derive(Default)]
    struct Kept(Vec<(u16, u64)>);

    impl Mover for Kept {
        unsafe fn push(&mut self, _: i32, tag: u16, _: Op<'_>, offset: u64) -> io::Result<Option<u32>> {
            self.0.push((tag, offset));
            Ok(None)
        }
        fn submit(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
            None
        }
        fn ready(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }

    #[test]
    fn what_the_cache_has_is_moved_at_once_and_the_rest_is_queued() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let mut mover = Cached::new(Kept::default());
        let mut buffer = vec![1u8; 16384];
        let whole = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 4096 }];
        let odd = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 512 }];
        let many = vec![whole[0]; 65];
        let mut done = Vec::new();
        // SAFETY: the buffers outlive the mover's use of them: what it queues is only noted.
        let mut push = |tag, op, offset| {
            // SAFETY: the buffers outlive the mover's use of them: what it queues is only noted.
            let n = unsafe { mover.push(file.as_raw_fd(), tag, op, offset).unwrap() };
            done.extend(n.map(|n| (tag, n)));
        };
        push(1, Op::Write { parts: &whole, durable: false }, 4096);
        push(2, Op::Write { parts: &whole, durable: true }, 0);
        push(3, Op::Write { parts: &odd, durable: false }, 0);
        push(4, Op::Write { parts: &whole, durable: false }, 512);
        push(5, Op::Write { parts: &many, durable: false }, 0);
        push(6, Op::Flush, 0);
        // Beyond the end: the queue says so.
        push(7, Op::Read(&whole), 1 << 20);
        assert_eq!(done, [(1, 4096)]);
        assert_eq!(mover.queue.0.iter().map(|q| q.0).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7]);
        let mut all = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut all).unwrap();
        assert_eq!((all.len(), all[4095], all[4096], all[8191]), (8192, 7, 1, 1));
    }

    #[test]
    fn reads_that_miss_are_tried_less_and_less_often() {
        let mut reads = Reads::default();
        let mut tried = 0;
        for _ in 0..1000 {
            if reads.tries() {
                tried += 1;
                reads.miss();
            }
        }
        assert!((10..30).contains(&tried), "{tried}");
        while !reads.tries() {}
        reads.hit();
        assert!(reads.tries() && reads.tries());
        reads.miss();
        assert!(!reads.tries() && reads.tries());
    }

    #[test]
    fn slow_writes_are_queued_for_longer_and_longer() {
        let (mut writes, quick, slow) = (Writes::default(), Duration::from_micros(3), SLOW * 2);
        let mut now = Duration::from_secs(5);
        assert!(writes.tries(now));
        for pause in [50, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000].map(Duration::from_millis) {
            writes.took(now, quick);
            assert!(writes.tries(now));
            writes.took(now, slow);
            assert!(!writes.tries(now) && !writes.tries(now + pause - quick), "{pause:?}");
            now += pause;
            assert!(writes.tries(now), "{pause:?}");
        }
        (0..CALM).for_each(|_| writes.took(now, quick));
        writes.took(now, slow);
        assert!(writes.tries(now + FIRST_PAUSE));
    }
}
