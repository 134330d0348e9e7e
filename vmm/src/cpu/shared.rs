//! What the vCPU threads and their owner share: owns the order that was given to the vCPUs and what they report back. `run` is the
//! threads' side of it, `threads` the owner's, which draws the states.
//!
//! One lock, [`Shared::state`], never held across a KVM call or a device's code.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::CpuError;
use super::vcpu::Vcpu;

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

/// What is to be done with a vCPU.
pub(super) type Work = dyn Fn(&Vcpu) -> Result<(), CpuError> + Send + Sync;

/// Something that each vCPU's own thread is to do while the vCPU is out of the guest.
#[derive(Clone)]
pub(super) struct Errand {
    pub(super) work: Arc<Work>,
    /// Whatever had ended the vCPU is over afterwards.
    pub(super) revives: bool,
}

/// What ended a vCPU's wait.
pub(super) enum Parked {
    /// An order.
    Told(Target),
    /// This is to be done, reported with [`Shared::done`], and waited again.
    Errand(Errand),
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
    /// vCPUs whose threads have ended.
    gone: Vec<u8>,
    /// vCPUs whose threads have begun, and those threads.
    tids: Vec<(u8, i32)>,
    /// Counts errands: a vCPU does each once.
    errands: u64,
    errand: Option<Errand>,
    /// How many vCPUs have done it, and the first failure.
    done: usize,
    failure: Option<CpuError>,
    /// Whether somebody waits on `progress`: a wake-up is a system call.
    watched: bool,
}

impl Shared {
    /// For vCPUs that are to wait.
    pub(super) fn new() -> Self {
        let state = State {
            target: Target::Pause,
            parked: 0,
            gone: Vec::new(),
            tids: Vec::new(),
            errands: 0,
            errand: None,
            done: 0,
            failure: None,
            watched: false,
        };
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
        self.note(|s| s.tids.push((index, tid)));
    }

    /// A vCPU's thread ends.
    pub(super) fn left(&self, index: u8) {
        self.note(|s| s.gone.push(index));
    }

    /// Has parked vCPUs look whether they are to leave for good.
    pub(super) fn recheck(&self) {
        let _state = self.lock();
        self.retarget.notify_all();
    }

    /// Forgets a vCPU whose thread ends, once it has. Returns whether it did so in time.
    pub(super) fn forget(&self, index: u8) -> bool {
        let missing = self.wait(1, |s| usize::from(s.gone.contains(&index)));
        let mut state = self.lock();
        state.gone.retain(|gone| *gone != index);
        state.tids.retain(|(known, _)| *known != index);
        missing == 0
    }

    /// The calling vCPU is out of the guest until told otherwise; one that `ended` stays out until it has done an errand. `errands`
    /// is the number of the last one that it has done; `leaves` says that this vCPU alone is to end.
    pub(super) fn park(&self, ended: bool, errands: &mut u64, leaves: &AtomicBool) -> Parked {
        self.note(|s| s.parked += 1);
        let mut state = self.lock();
        let why = loop {
            if let Some(errand) = state.errand.clone().filter(|_| state.errands != *errands) {
                *errands = state.errands;
                break Parked::Errand(errand);
            }
            match state.target {
                _ if leaves.load(Ordering::Acquire) => break Parked::Told(Target::Stop),
                Target::Stop => break Parked::Told(Target::Stop),
                Target::Run if !ended => break Parked::Told(Target::Run),
                Target::Run | Target::Pause => {}
            }
            state = self.retarget.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        state.parked -= 1;
        why
    }

    /// The calling vCPU has done its errand.
    pub(super) fn done(&self, result: Result<(), CpuError>) {
        self.note(|s| {
            s.done += 1;
            s.failure = s.failure.take().or(result.err());
        });
    }

    /// Sends every vCPU on an errand and waits until `total` of them have done it; returns how many are missing when time is up.
    /// All must be out of the guest.
    pub(super) fn send(&self, errand: Errand, total: usize) -> Result<usize, CpuError> {
        let mut state = self.lock();
        state.errands += 1;
        state.errand = Some(errand);
        (state.done, state.failure) = (0, None);
        self.retarget.notify_all();
        drop(state);
        let missing = self.wait(total, |s| s.done);
        let mut state = self.lock();
        state.errand = None;
        state.failure.take().map_or(Ok(missing), Err)
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
        self.wait(total, |s| s.gone.len())
    }

    /// Waits until `total` threads have begun; returns whose they are and which, in order of the vCPUs.
    pub(super) fn wait_tids(&self, total: usize) -> Vec<(u8, i32)> {
        self.wait(total, |s| s.tids.len());
        let mut tids = self.lock().tids.clone();
        tids.sort_unstable();
        tids
    }
}
