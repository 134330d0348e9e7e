//! A limit on a disk's requests per second: owns the budget and the timer that says when it allows more.
//!
//! Used by the session (`serve`), on the I/O thread. Requests above the limit stay in the ring, in their order, until the timer fires.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use vmm_sys_util::timerfd::TimerFd;

use crate::block::Throttle;
use crate::event::Token;
use crate::virtio::complain;

pub(super) struct Limit {
    throttle: Throttle,
    since: Instant,
    timer: TimerFd,
    watch: Token,
    /// The timer runs.
    waiting: bool,
}

impl Limit {
    /// `watch` is that of `timer`, and calls [`fired`](Self::fired).
    pub(super) fn new(throttle: Throttle, timer: TimerFd, watch: Token) -> Self {
        Self { throttle, since: Instant::now(), timer, watch, waiting: false }
    }

    /// False: not now; the timer will say when.
    pub(super) fn allows_one(&mut self) -> bool {
        if self.waiting {
            return false;
        }
        let Err(wait) = self.throttle.ready(self.since.elapsed()) else { return true };
        match self.timer.reset(wait, None) {
            Ok(()) => self.waiting = true,
            // Never seen; better no limit than a disk that stands still.
            Err(error) => complain(|| tracing::warn!("virtio-blk: cannot set a timer: {error}")),
        }
        !self.waiting
    }

    /// One request is taken.
    pub(super) fn spend_one(&mut self) {
        self.throttle.spend(self.since.elapsed());
    }

    /// The timer has fired: it is time to look again.
    pub(super) fn fired(&mut self) {
        self.waiting = false;
    }

    /// What to unwatch when the disk leaves.
    pub(super) fn watch(&self) -> Token {
        self.watch
    }
}

/// The timer's descriptor, to watch it.
pub(super) fn borrow_timer(timer: &TimerFd) -> BorrowedFd<'_> {
    // SAFETY: the timer keeps its descriptor open as long as the borrow lasts.
    unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) }
}
