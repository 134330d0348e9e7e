//! virtio: queues, the transports that guests see, and the device models.
//!
//! A transport owns the registers and the one place where status transitions are decided (`status`). When the driver sets
//! DRIVER_OK it builds an [`Activation`], an immutable set of queues checked against guest memory once, and gives it to the
//! device: registers written later cannot reach it (virtio 1.2 §2.1, §3.1).
//!
//! ```text
//! mmio pci   register layouts, interrupts                   status   who may write what when (pure)
//! registers  what they come to on every transport
//! blk net    device models: configuration, requests         queue    the split ring and its chains
//! rng balloon console  small devices
//! mem pmem   memory that devices bring
//! worker     I/O threads and the gate that reset waits at   state    what is saved of a transport and its device
//! spin       how long a device looks before it sleeps (pure)
//! ```

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::memory::GuestMemory;
use queue::Position;
use state::{DeviceState, StateError};

pub mod balloon;
pub mod blk;
mod chain;
pub mod console;
#[cfg(fuzzing)]
mod fuzz;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
mod registers;
pub mod rng;
mod spin;
pub mod state;
pub mod status;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod testing;

pub use worker::Worker;

/// VIRTIO_F_INDIRECT_DESC (virtio 1.2 §6): a descriptor may point to a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX: each side says at which index it wants to be told.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1: not a legacy device. Always offered, and required of the driver.
pub const F_VERSION_1: u64 = 1 << 32;

/// How a device tells its driver that something happened. Cheap to call from any thread.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers (the device has already decided that the driver wants to know).
    fn queue(&self, index: u16);
    /// The configuration space has changed.
    fn config(&self);
    /// The rings make no sense: sets DEVICE_NEEDS_RESET and tells the driver (virtio 1.2 §2.1.2).
    fn needs_reset(&self);
}

/// Lets the kernel signal a queue's descriptor on the driver's write, with no exit to user space. The machine implements it
/// with KVM's ioeventfd. A transport works without it: a write that does reach it signals the same descriptor.
pub trait Doorbell: Send + Sync {
    /// From now on the driver's notification of `queue` at guest physical address `addr` signals `fd`. Over MMIO all queues have one address,
    /// at which their number is written; on PCI each has its own.
    fn attach(&self, addr: u64, queue: u16, fd: &EventFd) -> io::Result<()>;
    /// Undoes `attach` with the same arguments.
    fn detach(&self, addr: u64, queue: u16, fd: &EventFd) -> io::Result<()>;
}

/// One queue as it was when the driver said DRIVER_OK.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// The ring, valid and wholly in guest RAM.
    pub queue: queue::Queue,
    /// Signalled when the driver notifies. Non-blocking; nobody has to read it (watch it edge-triggered).
    pub notify: Arc<EventFd>,
}

/// All that a device needs to run, handed over once per DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// The features that the driver accepted; a subset of [`VirtioDevice::features`].
    pub features: u64,
    /// The queues that the driver enabled, in order of their number.
    pub queues: Vec<ActiveQueue>,
    /// To the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// The descriptor of `eventfd`, to watch it.
pub(crate) fn fd_of(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd keeps it open as long as the borrow lasts.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

/// The descriptor of `timer`, to watch it.
pub(crate) fn fd_of_timer(timer: &TimerFd) -> BorrowedFd<'_> {
    // SAFETY: the timer keeps it open as long as the borrow lasts.
    unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) }
}

/// Why a device could not be activated; the transport answers with DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver enabled fewer queues than the device cannot do without.
    #[error("queue {0} is not enabled")]
    MissingQueue(u16),
    /// A queue that the driver enabled makes no sense.
    #[error("queue {0}: {1}")]
    BadQueue(u16, #[source] queue::QueueError),
    /// Requests from before the last reset are still with the host's kernel.
    #[error("requests from before the last reset have not finished")]
    StillBusy,
    /// A host resource ran out.
    #[error("{0}")]
    Host(#[source] io::Error),
}

/// A device model behind any transport. The transport calls it under its own lock, from a vCPU thread: nothing here may block,
/// but for [`reset`](Self::reset), which waits (with a deadline) for the host's kernel to give up guest memory.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2 §5).
    fn device_type(&self) -> u32;
    /// Features offered, VIRTIO_F_VERSION_1 included.
    fn features(&self) -> u64;
    /// Largest size of each queue; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Reads configuration space; bytes beyond it read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space; bytes that are read-only or beyond it are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The driver said DRIVER_OK.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// The driver wrote 0 to the status, or the machine goes down: when this returns no thread of the device touches guest memory
    /// or the queues again (requests in flight have finished or will only touch buffers that the device owns).
    fn reset(&mut self);
    /// Whether notifications will come often enough to pay for a doorbell, which costs the guest's start some time.
    fn wants_doorbell(&self) -> bool {
        true
    }
    /// Whether another process works on the rings: it would write to guest memory while the VM is paused, so the device is suspended then.
    fn is_served_elsewhere(&self) -> bool {
        false
    }
    /// Finishes what is in flight and stops touching rings and buffers; says where each ring stands. Only while the device runs, and the
    /// driver does not. `activate` lets it go on as if nothing had been. Waits with a deadline; after an error the device runs.
    fn suspend(&mut self) -> Result<Vec<(u16, Position)>, StateError> {
        Err(StateError::Excluded("a device of this kind"))
    }
    /// The state besides the rings, of a device that does not run or was suspended.
    fn save(&self) -> Result<DeviceState, StateError> {
        Err(StateError::Excluded("a device of this kind"))
    }
    /// Takes what [`save`](Self::save) has said of a device like this one. Nobody has driven it yet.
    fn restore(&mut self, _: &DeviceState) -> Result<(), StateError> {
        Err(StateError::Excluded("a device of this kind"))
    }
    /// The machine goes down for good: like [`reset`](Self::reset), then what the guest has written is made durable.
    fn shut_down(&mut self) -> io::Result<()> {
        self.reset();
        Ok(())
    }
}

/// Copies the part of `config` that a read at `offset` covers; bytes beyond it become zero.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset).ok().and_then(|o| config.get(o..)).unwrap_or_default();
    let n = from.len().min(data.len());
    data[..n].copy_from_slice(&from[..n]);
}

/// Runs `log` unless it has run very often: what a guest can cause without end must not fill the host's log.
pub(crate) fn complain(log: impl FnOnce()) {
    static TIMES: AtomicU64 = AtomicU64::new(0);
    let times = TIMES.fetch_add(1, Ordering::Relaxed);
    if times < 64 || times.is_power_of_two() {
        log();
    }
}
