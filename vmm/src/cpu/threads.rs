//! All vCPUs of a machine: starts their threads, and pauses, resumes and stops them together.
//!
//! ```text
//!           start(paused)           resume
//! (created) ------------> Pause <----------> Run        stop, from any state
//!           ------------------------------>  Run   ------------------------> Stop (threads end)
//!           start(running)          pause
//! ```
//!
//! Everybody is told first and waited for afterwards, so a pause costs as much as the slowest vCPU, not the sum.
//! Locks: [`Shared::state`] is the only one and is never held across a KVM call or a device's code.

use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::CpuError;
use super::run::{Buses, Ended, OnEnd, Vcpu, kicked};
use crate::sandbox;

/// A vCPU that was told to leave the guest does so in microseconds, unless its host CPU is busy or a device's code blocks.
const DEADLINE: Duration = Duration::from_secs(10);
/// vCPU threads only exit to devices: they need little stack.
const STACK: usize = 256 << 10;

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

    fn set_target(&self, target: Target) {
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
}

/// The vCPUs of one machine.
pub struct Vcpus {
    waiting: Vec<Vcpu>,
    buses: Buses,
    on_end: OnEnd,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Takes vCPUs that are ready to run. `on_end` is called from their threads.
    pub fn new(vcpus: Vec<Vcpu>, buses: Buses, on_end: OnEnd) -> Self {
        let state =
            State { target: Target::Pause, parked: 0, gone: 0, tids: vec![0; vcpus.len()], watched: false };
        let shared = Arc::new(Shared {
            target: AtomicU8::new(Target::Pause as u8),
            state: Mutex::new(state),
            progress: Condvar::new(),
            retarget: Condvar::new(),
        });
        Self { waiting: vcpus, buses, on_end, shared, threads: Vec::new() }
    }

    /// Starts the threads, once; with `paused` they wait for [`Vcpus::resume`] before they enter the guest.
    pub fn start(&mut self, paused: bool) -> Result<(), CpuError> {
        catch_kicks();
        if !paused {
            self.shared.set_target(Target::Run);
        }
        for vcpu in std::mem::take(&mut self.waiting) {
            let index = usize::from(vcpu.index());
            let (shared, buses, on_end) =
                (Arc::clone(&self.shared), self.buses.clone(), Arc::clone(&self.on_end));
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK)
                .spawn(move || {
                    allow_kicks();
                    match sandbox::enter_worker() {
                        Ok(()) => vcpu.run(&shared, &buses, &on_end),
                        // A guest never runs unconfined. The thread stays, so that pause and stop find it.
                        Err(e) => {
                            shared.arrived(vcpu.index());
                            on_end(Ended::Failed(e.to_string()));
                            while shared.park(true) != Target::Stop {}
                        }
                    }
                    shared.note(|s| s.gone += 1);
                })
                .map_err(|source| CpuError::Thread { index, source })?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Returns when every vCPU is out of the guest. If one does not come in time all go on, and the error says so.
    pub fn pause(&self) -> Result<(), CpuError> {
        self.shared.set_target(Target::Pause);
        self.kick();
        let total = self.threads.len();
        match self.shared.wait(total, |s| s.parked) {
            0 => Ok(()),
            missing => {
                self.shared.set_target(Target::Run);
                Err(CpuError::Deadline { missing, total, deadline: DEADLINE })
            }
        }
    }

    /// Lets every vCPU enter the guest.
    pub fn resume(&self) {
        self.shared.set_target(Target::Run);
    }

    /// Ends the threads. After an error some still run, and with them their hold on guest memory and devices.
    pub fn stop(&mut self) -> Result<(), CpuError> {
        self.waiting.clear();
        self.shared.set_target(Target::Stop);
        self.kick();
        let total = self.threads.len();
        match self.shared.wait(total, |s| s.gone) {
            0 => {
                for thread in self.threads.drain(..) {
                    // A thread that panicked has said so already.
                    let _ = thread.join();
                }
                Ok(())
            }
            missing => Err(CpuError::Deadline { missing, total, deadline: DEADLINE }),
        }
    }

    /// The host's thread of each vCPU, in order.
    pub fn tids(&self) -> Vec<i32> {
        let total = self.threads.len();
        self.shared.wait(total, |s| s.tids.iter().filter(|t| **t != 0).count());
        self.shared.lock().tids.iter().take(total).copied().collect()
    }

    fn kick(&self) {
        for thread in &self.threads {
            // SAFETY: the thread has not been joined, so its handle is valid even if it has ended.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN()) };
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "vCPU threads left behind");
        }
    }
}

/// Installs the handler of the kick signal, once for the process.
fn catch_kicks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid value of the type.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = kicked as extern "C" fn(libc::c_int) as usize;
        // A kick that meets a device's system call must not fail it; KVM_RUN returns in any case.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler only writes through a pointer of its own thread, which is async-signal-safe.
        unsafe { libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut()) };
    });
}

/// A vCPU thread takes kicks whatever mask it inherited.
fn allow_kicks() {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set that the other two calls use.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}
