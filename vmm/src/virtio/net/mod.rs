//! virtio-net (virtio 1.2 §5.1): owns the device's features, its configuration space, and its starts and stops.
//!
//! One pair of queues and no control queue. A device without a tap is an empty slot: the guest sees a NIC with no link, what it
//! sends is dropped. Packets move in `rx` and `tx`, on the I/O thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::worker::{Gate, RESET_DEADLINE, Worker};
use super::{
    ActivateError, Activation, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice, complain, fd_of,
    read_config_bytes,
};
use crate::event::{EventFlags, LoopHandle, Ops};
use crate::net::{Offloads, Tap};

mod rx;
mod serve;
mod turn;
mod tx;

#[cfg(test)]
mod tests;

use serve::Server;

const DEVICE_TYPE: u32 = 1;
const RX: u16 = 0;
const TX: u16 = 1;

/// VIRTIO_NET_F_*.
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
}

/// `struct virtio_net_config`: mac, status, max_virtqueue_pairs.
const CONFIG_BYTES: usize = 10;
const LINK_UP: u16 = 1;

/// What a network device is made from.
pub struct NetOptions {
    /// The tap; `None` makes an empty slot.
    pub backend: Option<Tap>,
    /// The NIC's address.
    pub mac: [u8; 6],
    /// Entries of each queue: a power of two, at most 1024.
    pub queue_size: u16,
    /// The thread that serves it.
    pub worker: Worker,
}

/// The device.
pub struct Net {
    tap: Option<Arc<Tap>>,
    mac: [u8; 6],
    /// Cleared by the I/O thread when the tap goes away.
    link: Arc<AtomicBool>,
    queue_sizes: [u16; 2],
    worker: Worker,
    session: Option<Session>,
}

/// From DRIVER_OK to reset.
struct Session {
    gate: Arc<Gate<Server>>,
    io_thread: LoopHandle,
}

impl Net {
    /// A device that nobody drives yet: opens nothing and starts no thread.
    pub fn new(options: NetOptions) -> Self {
        let NetOptions { backend, mac, queue_size, worker } = options;
        let link = Arc::new(AtomicBool::new(backend.is_some()));
        // Chains of more parts than this could not be read in one call.
        let size = queue_size.min(super::queue::MAX_SIZE);
        Self { tap: backend.map(Arc::new), mac, link, queue_sizes: [size; 2], worker, session: None }
    }

    /// Ends the session. False: a handler hangs in the host's kernel.
    fn stop(&mut self, wait: Duration) -> bool {
        let Some(session) = &self.session else { return true };
        // Reads and writes of a tap are synchronous: nothing is in flight when no handler runs.
        let stopped = session.gate.close(&session.io_thread, Instant::now() + wait, |_| true);
        if stopped {
            self.session = None;
        }
        stopped
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        use feature::{
            CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MAC, MRG_RXBUF, STATUS,
        };
        let offloads = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6;
        F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | MAC | STATUS | MRG_RXBUF | offloads
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_BYTES];
        space[..6].copy_from_slice(&self.mac);
        let status = if self.link.load(Ordering::Acquire) { LINK_UP } else { 0 };
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        read_config_bytes(&space, offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // §5.1.4: the address is read-only for drivers that know VERSION_1, and so is the rest.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { memory: _, features, queues, interrupt } = activation;
        let mut queues = queues.into_iter();
        let rx = queues.next().filter(|q| q.index == RX).ok_or(ActivateError::MissingQueue(RX))?;
        let tx = queues.next().filter(|q| q.index == TX).ok_or(ActivateError::MissingQueue(TX))?;
        let notify = [Arc::clone(&rx.notify), Arc::clone(&tx.notify)];
        let io_thread = self.worker.start().map_err(ActivateError::Host)?;
        let server = Server::new(serve::Parts {
            tap: self.tap.clone(),
            link: Arc::clone(&self.link),
            features,
            rx,
            tx,
            interrupt: Arc::clone(&interrupt),
        });
        let gate = Gate::new(server);
        let on_thread = Arc::clone(&gate);
        let tap = self.tap.clone();
        io_thread.post(move |ops: &mut Ops<'_>| {
            let started =
                on_thread.enter(|server| start(server, &on_thread, &notify, tap.as_deref(), features, ops));
            if let Some(Err(error)) = started {
                tracing::error!("virtio-net: cannot watch descriptors: {error}");
                interrupt.needs_reset();
            }
        });
        self.session = Some(Session { gate, io_thread });
        Ok(())
    }

    fn wants_doorbell(&self) -> bool {
        self.tap.is_some()
    }

    fn reset(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            tracing::error!("a tap hangs; the network device stays down until it does not");
        }
    }
}

/// On the I/O thread: watches the queues and the tap, and serves what has come before.
fn start(
    server: &mut Server,
    gate: &Arc<Gate<Server>>,
    notify: &[Arc<vmm_sys_util::eventfd::EventFd>; 2],
    tap: Option<&Tap>,
    features: u64,
    ops: &mut Ops<'_>,
) -> io::Result<()> {
    // Edge-triggered throughout: notifications need not be read back, and a tap without buffers to read into need not be
    // taken off the watch.
    let edge = EventFlags::IN | EventFlags::ET;
    if let Some(tap) = tap {
        let has = |bit| features & bit != 0;
        let offloads = Offloads {
            checksum: has(feature::GUEST_CSUM),
            tso4: has(feature::GUEST_TSO4),
            tso6: has(feature::GUEST_TSO6),
        };
        if let Err(error) = tap.set_offloads(offloads) {
            complain(|| tracing::warn!(netdev = tap.id(), "cannot set the tap's offloads: {error}"));
        }
        let arrived = Arc::clone(gate);
        gate.watch(ops, tap, edge, move |_, _: &mut Ops<'_>| {
            arrived.enter(Server::tap_ready);
        })?;
        let refilled = Arc::clone(gate);
        gate.watch(ops, fd_of(&notify[0]), edge, move |_, _: &mut Ops<'_>| {
            refilled.enter(Server::receive);
        })?;
    }
    let sent = Arc::clone(gate);
    gate.watch(ops, fd_of(&notify[1]), edge, move |_, _: &mut Ops<'_>| {
        sent.enter(Server::transmit);
    })?;
    server.tap_ready();
    server.transmit();
    Ok(())
}
