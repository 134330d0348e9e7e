//! What a vCPU's thread does: runs the guest, answers its exits, and stops when told to. See `threads` for the others' side.
//!
//! How a vCPU is called out of the guest without a lost wake-up: the caller stores the new target, then sends the signal. Its handler runs on
//! the vCPU's thread and sets `immediate_exit`, so a KVM_RUN that has not begun yet returns at once, and one under way
//! is interrupted. The vCPU clears the flag *before* it reads the target.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::VcpuExit;

use super::shared::{Parked, Shared, Target};
use super::vcpu::Vcpu;
use crate::bus::Bus;

thread_local! {
    /// Where this vCPU thread's `kvm_run.immediate_exit` is. No lazy initialisation and no destructor: a signal handler reads it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// The handler of the kick signal.
pub(super) extern "C" fn kicked(_: c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the vCPU that owns the mapping sets the pointer after it got the mapping and clears it before it lets go of
        // it, on this same thread.
        unsafe { flag.write_volatile(1) };
    }
}

/// Why a vCPU ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// Triple fault (`KVM_EXIT_SHUTDOWN`).
    Shutdown,
    /// The guest asked KVM to power off.
    PowerOff,
    /// The guest asked KVM to reset.
    Reset,
    /// KVM could not go on; the text says with what.
    Failed(String),
}

/// Told, from the vCPU's thread, that it ended.
pub type OnEnd = Arc<dyn Fn(Ended) + Send + Sync>;

/// Where accesses of the guest go.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
}

/// What a turn in the guest came to.
enum Turn {
    /// An access was answered; KVM completes it when it next runs.
    Access,
    /// Nothing to complete.
    Other,
    /// The vCPU must not run again.
    End,
}

/// A guest can string port accesses together without end; a vCPU that is to pause answers this many before it gives up on leaving KVM
/// with nothing half done.
const MAX_COMPLETIONS: u32 = 256;

impl Vcpu {
    /// The body of the vCPU's thread. It ends when all vCPUs are to stop, or this one `leaves`.
    pub(super) fn run(&mut self, shared: &Shared, leaves: &AtomicBool, buses: &Buses, on_end: &OnEnd) {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: `run` points to the mapping that `self.fd` holds beyond the end of this function.
        IMMEDIATE_EXIT.set(unsafe { &raw mut (*run).immediate_exit });
        shared.arrived(self.index);
        let (mut ended, mut half_done, mut errands) = (false, false, 0);
        loop {
            self.fd.set_kvm_immediate_exit(0);
            compiler_fence(Ordering::SeqCst);
            let target = if leaves.load(Ordering::Acquire) { Target::Stop } else { shared.target() };
            if ended || target != Target::Run {
                if half_done {
                    self.complete_access(buses, on_end, &mut ended);
                    half_done = false;
                }
                if !ended {
                    // Tells the guest's watchdogs that it was not its fault. EINVAL: this guest does not use kvmclock.
                    let _ = self.fd.kvmclock_ctrl();
                }
                match shared.park(ended, &mut errands, leaves) {
                    Parked::Told(Target::Stop) => break,
                    Parked::Told(_) => {}
                    Parked::Errand(errand) => {
                        let result = (errand.work)(self);
                        ended = ended && (result.is_err() || !errand.revives);
                        shared.done(result);
                    }
                }
                continue;
            }
            match self.turn(buses, on_end) {
                Turn::Access => half_done = true,
                Turn::Other => half_done = false,
                Turn::End => (ended, half_done) = (true, false),
            }
        }
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }

    /// Lets KVM finish the instruction whose access was answered last, without running the guest further: a state saved while
    /// paused would otherwise lack its effect.
    fn complete_access(&mut self, buses: &Buses, on_end: &OnEnd, ended: &mut bool) {
        for _ in 0..MAX_COMPLETIONS {
            self.fd.set_kvm_immediate_exit(1);
            match self.turn(buses, on_end) {
                Turn::Access => {}
                Turn::Other => return,
                Turn::End => {
                    *ended = true;
                    return;
                }
            }
        }
    }

    fn turn(&mut self, buses: &Buses, on_end: &OnEnd) -> Turn {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        let ended = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                // `rep outs` brings several items at once; the data lies elsewhere in the mapping than this header.
                // SAFETY: the mapping lives as long as `self.fd`, and the exit reason says that `io` is the valid member.
                let size = unsafe { (*run).__bindgen_anon_1.io.size };
                for item in data.chunks(usize::from(size.max(1))) {
                    buses.ports.write(u64::from(port), item);
                }
                return Turn::Access;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                // SAFETY: as above.
                let size = unsafe { (*run).__bindgen_anon_1.io.size };
                for item in data.chunks_mut(usize::from(size.max(1))) {
                    buses.ports.read(u64::from(port), item);
                }
                return Turn::Access;
            }
            Ok(VcpuExit::MmioRead(addr, data)) => {
                buses.mmio.read(addr, data);
                return Turn::Access;
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                buses.mmio.write(addr, data);
                return Turn::Access;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Turn::Other,
            // EAGAIN: a vCPU that waited for its start-up interrupt, and may now run.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Turn::Other,
            Ok(VcpuExit::Shutdown) => Ended::Shutdown,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Ended::PowerOff,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Ended::Reset,
            Ok(VcpuExit::InternalError) => Ended::Failed(self.internal_error()),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Ended::Failed(format!(
                "the processor refused to enter the guest: reason {reason:#x} on host CPU {cpu}"
            )),
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => Ended::Failed(format!(
                "guest memory at {gpa:#x}+{size:#x} is not accessible (flags {flags:#x})"
            )),
            Ok(exit) => Ended::Failed(format!("unexpected exit: {exit:?}")),
            Err(e) => Ended::Failed(format!("KVM_RUN: {}", std::io::Error::from(e))),
        };
        on_end(match ended {
            Ended::Failed(text) => {
                Ended::Failed(format!("vCPU {}: {text}{}", self.index, self.whereabouts()))
            }
            ended => ended,
        });
        Turn::End
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: KVM_EXIT_INTERNAL_ERROR says that `internal` is the valid member.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let data = internal.data.iter().take(internal.ndata as usize);
        let data = data.map(|d| format!(" {d:#x}")).collect::<String>();
        format!("KVM internal error {}, data{data}", internal.suberror)
    }

    fn whereabouts(&self) -> String {
        self.fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" (rip {:#x})", regs.rip))
    }
}
