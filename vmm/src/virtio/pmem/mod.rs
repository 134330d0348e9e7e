//! virtio-pmem (virtio 1.2 §5.19): owns the device's start and stop. A file of the host is memory of the guest; what goes over the ring is
//! the wish that what was written to it be durable. `serve` answers, on an I/O thread of the device's own, since a flush takes as long as
//! the host's disk does.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::worker::{Gate, RESET_DEADLINE, Session, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, fd_of,
    read_config_bytes,
};
use crate::event::{EventFlags, Ops};

mod serve;

#[cfg(test)]
mod tests;

use serve::Server;

const DEVICE_TYPE: u32 = 27;
const QUEUE_SIZE: u16 = 64;

/// `struct virtio_pmem_config`: start and size.
const CONFIG_BYTES: usize = 16;

/// Makes durable what has been written; returns when it is.
pub type Flush = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What a device is made from.
pub struct PmemOptions {
    /// Its id, for the log.
    pub device: String,
    /// Guest physical address of the memory.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Of the file under it.
    pub flush: Flush,
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Pmem {
    device: Arc<str>,
    base: u64,
    size: u64,
    flush: Flush,
    worker: Worker,
    session: Option<Session<Server>>,
}

impl Pmem {
    /// A device that nobody drives yet: starts no thread.
    pub fn new(options: PmemOptions) -> Self {
        let PmemOptions { device, base, size, flush, worker } = options;
        Self { device: device.into(), base, size, flush, worker, session: None }
    }

    fn stop(&mut self, wait: Duration) -> bool {
        Session::end(&mut self.session, wait)
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        let (start, size) = config.split_at_mut(8);
        start.copy_from_slice(&self.base.to_le_bytes());
        size.copy_from_slice(&self.size.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { queues, interrupt, .. } = activation;
        let ActiveQueue { index: _, queue, notify } =
            queues.into_iter().find(|q| q.index == 0).ok_or(ActivateError::MissingQueue(0))?;
        let io_thread = self.worker.start().map_err(ActivateError::Host)?;
        let server = Server::new(serve::Parts {
            device: Arc::clone(&self.device),
            flush: Arc::clone(&self.flush),
            queue,
            notify,
            interrupt: Arc::clone(&interrupt),
        });
        self.session = Some(Session::start(io_thread, server, "virtio-pmem", interrupt, start));
        Ok(())
    }

    /// Each request waits for the host's disk.
    fn wants_doorbell(&self) -> bool {
        false
    }

    fn reset(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            tracing::error!(device = &*self.device, "a flush hangs; the device stays down until it does not");
        }
    }

    fn shut_down(&mut self) -> io::Result<()> {
        self.reset();
        (self.flush)()
    }
}

/// On the I/O thread: watches the queue, and serves what has come before.
fn start(server: &mut Server, gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) -> io::Result<()> {
    let notified = Arc::clone(gate);
    // Edge-triggered: the notification need not be read back.
    let edge = EventFlags::IN | EventFlags::ET;
    gate.watch(ops, fd_of(&server.notify), edge, move |_, _: &mut Ops<'_>| {
        notified.enter(Server::run);
    })?;
    server.run();
    Ok(())
}
