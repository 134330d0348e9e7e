//! What the vCPU threads and their owner share: owns the order that was given to the vCPUs and what they report back. `run` is the
//! threads' side of it, `threads` the owner's, which draws the states.
//!
//! One lock, [`Shared::state`], never held across a KVM call or a device's code.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A vCPU that was told to leave the guest does so in microseconds, unless its host CPU is busy or a device's code blocks.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// What vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Target {
    Run,
    Pause,
    Stop,
}

/// What the vCPU threads and their owner share.
pub(super) struct Shared {
    /// Copy of `State::target` for the hot path.
    target: AtomicU8,
    state: Mutex<State>,
    /// To the owner: `parked`, `tids` or `gone` changed.
    progress: Condvar,
    /// To parked vCPUs: `target` changed.
    retarget: Condvar,
}

struct State {
    target: Target,
    parked: usize,
    gone: usize,
    tids: Vec<i32>,
    /// Whether somebody waits on `progress`: a wake-up is a system call.
    watched: bool,
}

impl Shared {
    /// For `total` vCPUs, which are to wait.
    pub(super) fn new(total: usize) -> Self {
        let state = State { target: Target::Pause, parked: 0, gone: 0, tids: vec![0; total], watched: false };
        Self {
            target: AtomicU8::new(Target::Pause as u8),
            state: Mutex::new(state),
            progress: Condvar::new(),
            retarget: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn target(&self) -> Target {
        match self.target.load(Ordering::Acquire) {
            t if t == Target::Run as u8 => Target::Run,
            t if t == Target::Pause as u8 => Target::Pause,
            _ => Target::Stop,
        }
    }

    /// Tells every vCPU. One in the guest hears of it when it is kicked.
    pub(super) fn set_target(&self, target: Target) {
        let mut state = self.lock();
        // Stop is final.
        if state.target != Target::Stop {
            state.target = target;
            self.target.store(target as u8, Ordering::Release);
        }
        if state.parked > 0 {
            self.retarget.notify_all();
        }
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        if state.watched {
            self.progress.notify_all();
        }
    }

    /// A vCPU's thread has begun.
    pub(super) fn arrived(&self, index: u8) {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        self.note(|s| {
            if let Some(slot) = s.tids.get_mut(usize::from(index)) {
                *slot = tid;
            }
        });
    }

    /// A vCPU's thread ends.
    pub(super) fn left(&self) {
        self.note(|s| s.gone += 1);
    }

    /// The calling vCPU is out of the guest until told otherwise; one that `ended` stays out for good.
    pub(super) fn park(&self, ended: bool) -> Target {
        self.note(|s| s.parked += 1);
        let mut state = self.lock();
        while state.target == Target::Pause || (ended && state.target == Target::Run) {
            state = self.retarget.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.target
    }

    /// Waits until `done` counts to `total`; returns how many are missing when time is up.
    fn wait(&self, total: usize, done: impl Fn(&State) -> usize) -> usize {
        let end = Instant::now() + DEADLINE;
        let mut state = self.lock();
        state.watched = true;
        let missing = loop {
            let missing = total - done(&state).min(total);
            let left = end.saturating_duration_since(Instant::now());
            if missing == 0 || left.is_zero() {
                break missing;
            }
            state = self.progress.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.watched = false;
        missing
    }

    /// Waits until `total` vCPUs are out of the guest; returns how many are missing when time is up.
    pub(super) fn wait_parked(&self, total: usize) -> usize {
        self.wait(total, |s| s.parked)
    }

    /// Waits until `total` threads have ended; returns how many are missing when time is up.
    pub(super) fn wait_gone(&self, total: usize) -> usize {
        self.wait(total, |s| s.gone)
    }

    /// Waits until `total` threads have begun; returns who they are.
    pub(super) fn wait_tids(&self, total: usize) -> Vec<i32> {
        self.wait(total, |s| s.tids.iter().filter(|t| **t != 0).count());
        self.lock().tids.iter().take(total).copied().collect()
    }
}
