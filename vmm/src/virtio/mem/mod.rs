//! virtio-mem (virtio 1.2 §5.15): owns the device's features, its configuration space, and its starts and stops.
//!
//! The host says in the configuration how much memory it wants the guest to have (`requested_size`); the guest asks for blocks, or gives
//! them back, until it has as much (`plugged_size`). `request` is the wire, `blocks` knows which are plugged, `port` carries requests out and
//! is how the rest of the process sees the device, `serve` is the ring, on an I/O thread of the device's own: KVM needs milliseconds for
//! each piece of memory, and no disk shall wait for that.
//!
//! Memory that is not plugged is not there for the guest. It is told so (UNPLUGGED_INACCESSIBLE), and a driver that does not listen reads
//! what lies at an address without a device. A reset of the device leaves blocks plugged (§5.15.5); one of the machine does not.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::worker::{Gate, RESET_DEADLINE, Session, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, fd_of,
    read_config_bytes,
};
use crate::event::{EventFlags, Ops};

mod blocks;
#[cfg(fuzzing)]
pub mod fuzz;
mod port;
mod request;
mod serve;

#[cfg(test)]
mod tests;

pub use port::{BadSize, Info, Port, Store};
use serve::Server;

const DEVICE_TYPE: u32 = 24;
const QUEUE_SIZE: u16 = 64;

/// VIRTIO_MEM_F_*.
mod feature {
    pub(super) const ACPI_PXM: u64 = 1 << 0;
    pub(super) const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
}

/// `struct virtio_mem_config`.
const CONFIG_BYTES: usize = 56;

/// What a device is made from.
pub struct MemOptions {
    /// What blocks are made of.
    pub store: Arc<dyn Store>,
    /// Bytes of a block: a power of two.
    pub block_size: u64,
    /// The guest's node, of a machine whose tables have nodes.
    pub node: Option<u16>,
    /// Bytes that the guest is to have at first: a number of blocks that there are.
    pub requested_size: u64,
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Mem {
    port: Arc<Port>,
    features: u64,
    worker: Worker,
    session: Option<Session<Server>>,
}

impl Mem {
    /// A device that nobody drives yet: starts no thread.
    pub fn new(options: MemOptions) -> Self {
        let MemOptions { store, block_size, node, requested_size, worker } = options;
        let mut features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | feature::UNPLUGGED_INACCESSIBLE;
        if node.is_some() {
            features |= feature::ACPI_PXM;
        }
        let port = Port::new(store, block_size, node.unwrap_or(0), requested_size);
        Self { port, features, worker, session: None }
    }

    /// How the rest of the process reaches the device.
    pub fn port(&self) -> Arc<Port> {
        Arc::clone(&self.port)
    }

    fn stop(&mut self, wait: Duration) -> bool {
        self.port.disconnect();
        Session::end(&mut self.session, wait)
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let Info { block_size, node, plugged_size, requested_size, size } = self.port.info();
        // The usable part is all: how far the guest looks for blocks is its own affair.
        let fields =
            [block_size, u64::from(node), self.port.base(), size, size, plugged_size, requested_size];
        let mut config = [0; CONFIG_BYTES];
        for (to, field) in config.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
            *to = field.to_le_bytes();
        }
        config
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
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
        self.port.connect(Arc::clone(&interrupt));
        let port = Arc::clone(&self.port);
        let server = Server::new(serve::Parts { port, queue, notify, interrupt: Arc::clone(&interrupt) });
        self.session = Some(Session::start(io_thread, server, "virtio-mem", interrupt, start));
        Ok(())
    }

    /// A guest sends a request for each 128 MiB or so, and only while its memory changes.
    fn wants_doorbell(&self) -> bool {
        false
    }

    fn reset(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            tracing::error!(
                "KVM does not finish with a piece of guest memory; the device stays down until it does"
            );
        }
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
