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

use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;

use super::CpuError;
use super::run::{Buses, Ended, OnEnd, kicked};
use super::shared::{DEADLINE, Errand, Parked, Shared, Target};
use super::vcpu::Vcpu;
use crate::sandbox;

/// vCPU threads only exit to devices: they need little stack.
const STACK: usize = 256 << 10;

/// The vCPUs of one machine.
pub struct Vcpus {
    waiting: Vec<Vcpu>,
    buses: Buses,
    on_end: OnEnd,
    shared: Arc<Shared>,
    threads: Vec<Runner>,
}

/// A vCPU's thread, which gives the vCPU back when it ends.
struct Runner {
    index: u8,
    /// This vCPU alone is to end.
    leaves: Arc<AtomicBool>,
    thread: JoinHandle<Vcpu>,
}

impl Runner {
    fn kick(&self) {
        // SAFETY: the thread has not been joined, so its handle is valid even if it has ended.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), libc::SIGRTMIN()) };
    }
}

impl Vcpus {
    /// Takes vCPUs that are ready to run. `on_end` is called from their threads.
    pub fn new(vcpus: Vec<Vcpu>, buses: Buses, on_end: OnEnd) -> Self {
        let shared = Arc::new(Shared::new());
        Self { waiting: vcpus, buses, on_end, shared, threads: Vec::new() }
    }

    /// Starts the threads, once; with `paused` they wait for [`Vcpus::resume`] before they enter the guest.
    pub fn start(&mut self, paused: bool) -> Result<(), CpuError> {
        catch_kicks();
        if !paused {
            self.shared.set_target(Target::Run);
        }
        for vcpu in std::mem::take(&mut self.waiting) {
            self.spawn(vcpu)?;
        }
        Ok(())
    }

    /// Adds a vCPU to those that run, or are paused. It waits for the guest to start it.
    pub fn add(&mut self, vcpu: Vcpu) -> Result<(), CpuError> {
        self.spawn(vcpu)
    }

    fn spawn(&mut self, mut vcpu: Vcpu) -> Result<(), CpuError> {
        let index = vcpu.index();
        let (shared, buses, on_end) =
            (Arc::clone(&self.shared), self.buses.clone(), Arc::clone(&self.on_end));
        let leaves = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&leaves);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || {
                allow_kicks();
                match sandbox::enter_worker() {
                    Ok(()) => vcpu.run(&shared, &told, &buses, &on_end),
                    // A guest never runs unconfined. The thread stays, so that pause and stop find it.
                    Err(e) => {
                        shared.arrived(index);
                        on_end(Ended::Failed(e.to_string()));
                        let mut errands = 0;
                        while !matches!(shared.park(true, &mut errands, &told), Parked::Told(Target::Stop)) {}
                    }
                }
                shared.left(index);
                vcpu
            })
            .map_err(|source| CpuError::Thread { index: index.into(), source })?;
        self.threads.push(Runner { index, leaves, thread });
        Ok(())
    }

    /// Takes a vCPU out, wherever it is; none if there is no such vCPU. After an error it is out as well, but cannot be used again.
    pub fn remove(&mut self, index: u8) -> Result<Option<Vcpu>, CpuError> {
        let Some(at) = self.threads.iter().position(|t| t.index == index) else { return Ok(None) };
        let runner = self.threads.remove(at);
        runner.leaves.store(true, Ordering::Release);
        self.shared.recheck();
        runner.kick();
        if !self.shared.forget(index) {
            return Err(CpuError::Deadline { missing: 1, total: 1, deadline: DEADLINE });
        }
        // A thread that panicked has said so already.
        Ok(runner.thread.join().ok())
    }

    /// Returns when every vCPU is out of the guest. If one does not come in time all go on, and the error says so.
    pub fn pause(&self) -> Result<(), CpuError> {
        self.shared.set_target(Target::Pause);
        self.kick();
        let total = self.threads.len();
        match self.shared.wait_parked(total) {
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

    /// Has each vCPU's thread run `reset`, and makes those runnable again that had ended. All must be out of the guest, and stay so.
    pub fn reset(
        &self,
        reset: impl Fn(&Vcpu) -> Result<(), CpuError> + Send + Sync + 'static,
    ) -> Result<(), CpuError> {
        self.send(Errand { work: Arc::new(reset), revives: true })
    }

    /// Has each vCPU's thread run `work`, and waits for all of them. All must be out of the guest, and stay so.
    pub fn each(
        &self,
        work: impl Fn(&Vcpu) -> Result<(), CpuError> + Send + Sync + 'static,
    ) -> Result<(), CpuError> {
        self.send(Errand { work: Arc::new(work), revives: false })
    }

    fn send(&self, errand: Errand) -> Result<(), CpuError> {
        let total = self.threads.len();
        match self.shared.send(errand, total)? {
            0 => Ok(()),
            missing => Err(CpuError::Deadline { missing, total, deadline: DEADLINE }),
        }
    }

    /// Ends the threads. After an error some still run, and with them their hold on guest memory and devices.
    pub fn stop(&mut self) -> Result<(), CpuError> {
        self.waiting.clear();
        self.shared.set_target(Target::Stop);
        self.kick();
        let total = self.threads.len();
        match self.shared.wait_gone(total) {
            0 => {
                for runner in self.threads.drain(..) {
                    // A thread that panicked has said so already.
                    let _ = runner.thread.join();
                }
                Ok(())
            }
            missing => Err(CpuError::Deadline { missing, total, deadline: DEADLINE }),
        }
    }

    /// Each vCPU by its number, with the host's thread of it.
    pub fn tids(&self) -> Vec<(u8, i32)> {
        let total = self.threads.len();
        self.shared.wait_tids(total)
    }

    fn kick(&self) {
        self.threads.iter().for_each(Runner::kick);
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
