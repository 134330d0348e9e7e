//! virtio-blk (virtio 1.2 §5.2): owns the device's features, its configuration space, and its starts and stops.
//!
//! A device without a disk is an empty slot: the guest sees capacity 0, and every request fails. Requests are parsed in `request`
//! and carried out in `serve`, on the I/O thread.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::worker::{Gate, RESET_DEADLINE, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, fd_of,
    read_config_bytes,
};
use crate::block::{Disk, SECTOR};
use crate::event::{EventFlags, LoopHandle, Ops};

mod request;
mod serve;

#[cfg(test)]
mod tests;

use serve::Server;

const DEVICE_TYPE: u32 = 2;

/// VIRTIO_BLK_F_*.
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
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
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Blk {
    disk: Option<Arc<Disk>>,
    serial: [u8; request::ID_BYTES],
    features: u64,
    config: [u8; config::SIZE],
    queue_sizes: [u16; 1],
    worker: Worker,
    session: Option<Session>,
}

/// From DRIVER_OK to reset; longer if the host's kernel does not let go.
struct Session {
    gate: Arc<Gate<Server>>,
    io_thread: LoopHandle,
}

impl Blk {
    /// A device that nobody drives yet: opens nothing and starts no thread.
    pub fn new(options: BlkOptions) -> Self {
        let BlkOptions { backend, serial, read_only, queue_size, worker } = options;
        let mut id = [0; request::ID_BYTES];
        for (to, from) in id.iter_mut().zip(serial.unwrap_or_default().bytes()) {
            *to = from;
        }
        let disk = backend.map(Arc::new);
        let mut features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        features |= feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        if read_only || disk.as_ref().is_some_and(|d| d.read_only()) {
            features |= feature::RO;
        } else if disk.as_ref().is_some_and(|d| d.discard()) {
            features |= feature::DISCARD | feature::WRITE_ZEROES;
        }
        let config = config_space(disk.as_deref(), queue_size);
        Self { disk, serial: id, features, config, queue_sizes: [queue_size], worker, session: None }
    }

    /// Ends the session. False: requests are still with the host's kernel, and so is guest memory.
    fn stop(&mut self, wait: Duration) -> bool {
        let Some(session) = &self.session else { return true };
        let deadline = Instant::now() + wait;
        let stopped = session.gate.close(&session.io_thread, deadline, |server| server.drain(deadline));
        if stopped {
            self.session = None;
        }
        stopped
    }

    fn name(&self) -> &str {
        self.disk.as_ref().map_or("(empty slot)", |d| d.id())
    }
}

fn config_space(disk: Option<&Disk>, queue_size: u16) -> [u8; config::SIZE] {
    let mut space = [0; config::SIZE];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(config::CAPACITY, &(disk.map_or(0, Disk::size) / SECTOR).to_le_bytes());
    // Two descriptors of a chain hold header and status (§5.2.6.1 wants at least one segment).
    put(config::SEG_MAX, &u32::from(queue_size.saturating_sub(2).max(1)).to_le_bytes());
    put(config::BLK_SIZE, &disk.map_or(SECTOR as u32, Disk::block_size).to_le_bytes());
    put(config::NUM_QUEUES, &1u16.to_le_bytes());
    if let Some(disk) = disk.filter(|d| d.discard()) {
        let alignment = disk.block_size() / SECTOR as u32;
        put(config::MAX_DISCARD_SECTORS, &request::MAX_DISCARD_SECTORS.to_le_bytes());
        put(config::MAX_DISCARD_SEG, &1u32.to_le_bytes());
        put(config::DISCARD_SECTOR_ALIGNMENT, &alignment.to_le_bytes());
        put(config::MAX_WRITE_ZEROES_SECTORS, &request::MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(config::MAX_WRITE_ZEROES_SEG, &1u32.to_le_bytes());
        put(config::WRITE_ZEROES_MAY_UNMAP, &[1]);
    }
    space
}

impl Drop for Blk {
    fn drop(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            // The host's kernel may still write to its buffers: they must never be freed.
            std::mem::forget(self.session.take());
        }
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // The only writable field, `writeback`, comes with a feature that we do not offer.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { memory: _, features, queues, interrupt } = activation;
        let ActiveQueue { index: _, queue, notify } =
            queues.into_iter().find(|q| q.index == 0).ok_or(ActivateError::MissingQueue(0))?;
        let io_thread = self.worker.start().map_err(ActivateError::Host)?;
        let server = Server::new(serve::Parts {
            disk: self.disk.clone(),
            serial: self.serial,
            read_only: self.features & feature::RO != 0,
            // §5.2.6.2: a driver that does not know FLUSH gets a write-through disk.
            durable_writes: features & feature::FLUSH == 0,
            unmap: features & feature::DISCARD != 0,
            zero: features & feature::WRITE_ZEROES != 0,
            queue,
            notify: Arc::clone(&notify),
            interrupt: Arc::clone(&interrupt),
        });
        let gate = Gate::new(server);
        let on_thread = Arc::clone(&gate);
        io_thread.post(move |ops: &mut Ops<'_>| {
            let started = on_thread.enter(|server| -> io::Result<()> {
                let notified = Arc::clone(&on_thread);
                on_thread.watch(
                    ops,
                    fd_of(&notify),
                    EventFlags::IN | EventFlags::ET,
                    move |_, _: &mut Ops<'_>| {
                        notified.enter(Server::run);
                    },
                )?;
                if let Some(fd) = server.open_engine() {
                    let done = Arc::clone(&on_thread);
                    on_thread.watch(ops, fd, EventFlags::IN, move |_, _: &mut Ops<'_>| {
                        done.enter(Server::run);
                    })?;
                }
                server.run();
                Ok(())
            });
            if let Some(Err(error)) = started {
                tracing::error!("virtio-blk: cannot watch descriptors: {error}");
                interrupt.needs_reset();
            }
        });
        self.session = Some(Session { gate, io_thread });
        Ok(())
    }

    fn reset(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            tracing::error!(
                drive = self.name(),
                "requests do not finish; the device stays down until they do"
            );
        }
    }

    fn wants_doorbell(&self) -> bool {
        self.disk.is_some()
    }

    fn shut_down(&mut self) -> io::Result<()> {
        self.reset();
        match &self.disk {
            Some(disk) if !disk.read_only() => disk.flush(),
            _ => Ok(()),
        }
    }
}
