//! virtio-net (virtio 1.2 §5.1): owns the device's features, its configuration space, and its starts and stops.
//!
//! A device without a host end is an empty slot: the guest sees a NIC with no link, what it sends is dropped; [`Port`] fills and
//! empties it.
//!
//! ```text
//! port     what is in the slot          session   the way to the I/O thread and back
//! vhost    rings that the kernel serves
//! serve    all rings of one session     rx tx control     packets and commands, on the I/O thread
//! ```

use std::sync::Arc;
use std::time::Duration;

use super::queue::Position;
use super::state::{DeviceState, StateError};
use super::worker::{RESET_DEADLINE, Worker};
use super::{
    ActivateError, Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, read_config_bytes,
};
use crate::net::Backend;

pub(super) mod control;
mod face;
#[cfg(fuzzing)]
pub mod fuzz;
mod lend;
mod port;
mod rx;
pub(super) mod saved;
mod serve;
mod session;
mod state;
mod turn;
mod tx;
mod vhost;

#[cfg(test)]
mod tests;

pub use port::{NotInserted, Port, PortError};

use port::State;
use serve::{Rings, Server};
use session::Session;

const DEVICE_TYPE: u32 = 1;
const RX: u16 = 0;
const TX: u16 = 1;

/// VIRTIO_NET_F_*.
pub(super) mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(in crate::virtio) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(in crate::virtio) const STATUS: u64 = 1 << 16;
    pub(in crate::virtio) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub(in crate::virtio) const MQ: u64 = 1 << 22;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
}

/// `struct virtio_net_config`: mac, status, max_virtqueue_pairs.
const CONFIG_BYTES: usize = 10;
pub(super) const LINK_UP: u16 = 1;

/// What a network device is made from.
pub struct NetOptions {
    /// The host end; `None` makes an empty slot.
    pub backend: Option<Backend>,
    /// The NIC's address.
    pub mac: [u8; 6],
    /// Offer the guest as many pairs of queues as the host end has; else one.
    pub multi_queue: bool,
    /// Entries of each queue: a power of two, at most 1024.
    pub queue_size: u16,
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Net {
    port: Arc<Port>,
    queue_sizes: Vec<u16>,
    /// What the driver of a suspended device had set up.
    carried: Option<saved::Carried>,
    /// The driver is to look at the link again once the device goes on.
    link_changed: bool,
}

impl Net {
    /// A device that nobody drives yet: opens nothing and starts no thread.
    pub fn new(options: NetOptions) -> Self {
        let NetOptions { backend, mac, multi_queue, queue_size, worker } = options;
        // Chains of more parts than this could not be read in one call.
        let size = queue_size.min(super::queue::MAX_SIZE);
        let pairs = backend.as_ref().filter(|_| multi_queue).map_or(1, |b| b.taps().len().max(1));
        let port = Port::new(backend, pairs, mac, worker);
        // The control queue comes last.
        Self { port, queue_sizes: vec![size; 2 * pairs + 1], carried: None, link_changed: false }
    }

    /// The way to the device once it is in its transport.
    pub fn port(&self) -> Arc<Port> {
        Arc::clone(&self.port)
    }
}

/// Ends the session, if there is one. False: a handler hangs in the host's kernel.
fn stop(state: &mut State, wait: Duration) -> bool {
    let stopped = state.session.as_ref().is_none_or(|session| session.stop(wait));
    if stopped {
        state.session = None;
    }
    stopped
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        use feature::{
            CSUM, CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA, CTRL_VQ, GUEST_CSUM,
            GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MAC, MQ, MRG_RXBUF, STATUS,
        };
        let offloads = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6;
        let control = CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS;
        let several = if self.port.pairs() > 1 { MQ } else { 0 };
        let basic = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | MAC | STATUS | MRG_RXBUF;
        basic | offloads | control | several
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_BYTES];
        space[..6].copy_from_slice(&self.port.face.mac());
        let status = if self.port.face.link() { LINK_UP } else { 0 };
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&(self.port.pairs() as u16).to_le_bytes());
        read_config_bytes(&space, offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // §5.1.4: the address is read-only for drivers that know VERSION_1, and so is the rest.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut state = self.port.lock();
        if !stop(&mut state, Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { memory, features, queues, interrupt } = activation;
        let rings = Rings::sort(queues, features, self.port.pairs())?;
        let io_thread = state.worker.start().map_err(ActivateError::Host)?;
        state.io_thread = Some(io_thread.clone());
        let face = Arc::clone(&self.port.face);
        let mut server = Server::new(rings, features, memory, face, Arc::clone(&interrupt));
        if let Some(carried) = self.carried.take() {
            server.go_on(carried);
        }
        let signal = Arc::clone(&interrupt);
        state.session = Some(Session::start(server, state.reachable(), io_thread, interrupt));
        if std::mem::take(&mut self.link_changed) {
            signal.config();
        }
        Ok(())
    }

    fn wants_doorbell(&self) -> bool {
        self.port.occupied()
    }

    fn suspend(&mut self) -> Result<Vec<(u16, Position)>, StateError> {
        let (positions, carried) = self.port.suspend()?;
        self.carried = Some(carried);
        Ok(positions)
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Net(self.port.save(self.carried)?))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Net(saved) = state else { return Err(StateError::Malformed("device")) };
        let restored = self.port.restore(saved)?;
        (self.carried, self.link_changed) = (restored.carried, restored.link_changed);
        Ok(())
    }

    fn reset(&mut self) {
        (self.carried, self.link_changed) = (None, false);
        let mut state = self.port.lock();
        if !stop(&mut state, RESET_DEADLINE) {
            tracing::error!("a tap hangs; the network device stays down until it does not");
        }
        // Not before: a command that is being obeyed may change it.
        self.port.face.set_mac(state.mac);
    }
}
