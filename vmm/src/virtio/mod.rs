//! virtio: queues, the transports that guests see, and the device models.
//!
//! A transport owns the registers and the one place where status transitions are decided. When the driver sets DRIVER_OK it
//! builds an [`Activation`], an immutable set of queues checked against guest memory once, and gives it to the device: registers
//! written later cannot reach it (virtio 1.2 §2.1, §3.1).

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// How a device tells its driver that something happened. Cheap to call from any thread.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers (the device has already decided that the driver wants to know).
    fn queue(&self, index: u16);
    /// The configuration space has changed.
    fn config(&self);
    /// The rings make no sense: sets DEVICE_NEEDS_RESET and tells the driver (virtio 1.2 §2.1.2).
    fn needs_reset(&self);
}

/// One queue as it was when the driver said DRIVER_OK.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// The ring, valid and wholly in guest RAM.
    pub queue: virtio_queue::Queue,
    /// Signalled when the driver notifies.
    pub notify: EventFd,
}

/// All that a device needs to run, handed over once per DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub memory: Arc<GuestMemory>,
    /// The features that the driver accepted; a subset of [`VirtioDevice::features`].
    pub features: u64,
    /// The queues that the driver enabled, in order.
    pub queues: Vec<ActiveQueue>,
    /// To the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not be activated; the transport answers with DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver enabled fewer queues than the device cannot do without.
    #[error("queue {0} is not enabled")]
    MissingQueue(u16),
    /// A host resource ran out.
    #[error("{0}")]
    Host(#[source] std::io::Error),
}

/// A device model behind any transport. The transport calls it under its own lock, from a vCPU thread: nothing here may block.
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
}
