//! virtio-blk (virtio 1.2 §5.2): owns the device's features, its configuration space, and its starts and stops.
//!
//! A device without a disk is an empty slot: the guest sees capacity 0, and every request fails. Disks come and go through the
//! device's [`Port`], at any time. Requests come from the rings in `lanes`, are parsed in `request` and carried out in `serve`, on the I/O thread.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::queue::Position;
use super::state::{DeviceState, StateError};
use super::worker::{Gate, RESET_DEADLINE, Worker};
use super::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::block::Disk;
use crate::event::Ops;

#[cfg(fuzzing)]
pub mod fuzz;
mod lanes;
mod limit;
mod medium;
mod port;
mod request;
pub(super) mod saved;
mod serve;
mod state;

#[cfg(test)]
mod lanes_tests;
#[cfg(test)]
mod port_tests;
#[cfg(test)]
mod tests;

use lanes::Lanes;
use medium::Medium;
pub use medium::Stats;
use port::Session;
pub use port::{Port, PortError};
use serve::Server;

const DEVICE_TYPE: u32 = 2;

/// VIRTIO_BLK_F_*.
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// `struct virtio_blk_config`: offsets of the fields that we fill.
mod config {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    pub(super) const SIZE: usize = 60;
}

/// What a block device is made from.
pub struct BlkOptions {
    /// The disk; `None` makes an empty slot.
    pub backend: Option<Disk>,
    /// Reported by GET_ID; at most 20 bytes are.
    pub serial: Option<String>,
    /// Offer the disk read-only. A disk that was opened so always is.
    pub read_only: bool,
    /// Entries of the queue: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// Queues, 1 to 32. All of them are served by the same thread.
    pub queues: u16,
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Blk {
    port: Arc<Port>,
    queue_sizes: Vec<u16>,
    /// The disk is not as the driver knows it: it is told when the device goes on.
    changed: bool,
}

impl Blk {
    /// A device that nobody drives yet: opens nothing and starts no thread.
    pub fn new(options: BlkOptions) -> Self {
        let BlkOptions { backend, serial, read_only, queue_size, queues, worker } = options;
        let medium = backend.map(|disk| Medium::new(disk, serial, read_only));
        let queue_sizes = vec![queue_size; usize::from(queues.max(1))];
        Self { port: Port::new(medium, queue_size, queues.max(1), worker), queue_sizes, changed: false }
    }

    /// The slot as the thread that owns the machine reaches it, once the device is behind its transport.
    pub fn port(&self) -> Arc<Port> {
        Arc::clone(&self.port)
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        if !self.port.stop(RESET_DEADLINE) {
            // The host's kernel may still write to its buffers: they must never be freed.
            std::mem::forget(self.port.lock().session.take());
        }
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.port.lock().features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.port.lock().config, offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // The only writable field, `writeback`, comes with a feature that we do not offer.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.port.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { memory: _, features, queues, interrupt } = activation;
        // Those that the driver leaves out, because it has fewer processors, it does not use.
        if queues.first().is_none_or(|q| q.index != 0) {
            return Err(ActivateError::MissingQueue(0));
        }
        let worker = self.port.lock().worker.clone();
        let io_thread = worker.start().map_err(ActivateError::Host)?;
        // Held until the session is there: a disk that comes now comes either with the server or through its gate.
        let mut state = self.port.lock();
        let server = Server::new(serve::Parts {
            // §5.2.6.2: a driver that does not know FLUSH gets a write-through disk.
            durable_writes: features & feature::FLUSH == 0,
            unmap: features & feature::DISCARD != 0,
            zero: features & feature::WRITE_ZEROES != 0,
            read_only: state.features & feature::RO != 0,
            lanes: Lanes::new(queues),
            interrupt: Arc::clone(&interrupt),
        });
        let gate = Gate::new(server);
        let (on_thread, medium, signal) = (Arc::clone(&gate), state.medium(), Arc::clone(&interrupt));
        io_thread.post(move |ops: &mut Ops<'_>| serve::start(&on_thread, ops, &medium, &*signal));
        let signal = Arc::clone(&interrupt);
        state.session = Some(Session { gate, io_thread, interrupt });
        if std::mem::take(&mut self.changed) {
            signal.config();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.changed = false;
        if !self.port.stop(RESET_DEADLINE) {
            let drive = self.port.name();
            tracing::error!(drive, "requests do not finish; the device stays down until they do");
        }
        self.port.lock().renew();
    }

    fn wants_doorbell(&self) -> bool {
        self.port.lock().medium.is_some()
    }

    fn suspend(&mut self) -> Result<Vec<(u16, Position)>, StateError> {
        self.port.suspend()
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Blk(self.port.save()))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Blk(saved) => {
                self.changed = self.port.restore(saved)?;
                Ok(())
            }
            _ => Err(StateError::Malformed("device")),
        }
    }

    fn shut_down(&mut self) -> io::Result<()> {
        self.reset();
        self.port.flush()
    }
}
