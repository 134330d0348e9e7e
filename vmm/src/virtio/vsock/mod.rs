//! virtio-vsock (virtio 1.2 §5.10) over the kernel's vhost-vsock: owns the guest's address and the hand-over of the rings.
//!
//! The kernel serves the two rings that carry data; sockets of the host reach the guest by its address, and the guest reaches the
//! host as address 2. The event queue stays here: its one event tells a driver that its connections are lost because
//! the guest was moved to another host, which does not happen, so the driver's buffers stay in it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::{Gate, RESET_DEADLINE, Session, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt,
    VirtioDevice, complain, fd_of, read_config_bytes,
};
use crate::event::{EventFlags, Ops};
use crate::inherit::Inherited;
use crate::net;
use crate::vhost::{Kind, Ring, Vhost, VhostError};

#[cfg(fuzzing)]
pub mod fuzz;

const DEVICE_TYPE: u32 = 19;
/// To the guest, from the guest, and events.
const QUEUES: [u16; 3] = [256; 3];
/// Rings that the kernel serves.
const SERVED: u16 = 2;
/// VIRTIO_VSOCK_F_SEQPACKET: offered when the kernel knows it.
const F_SEQPACKET: u64 = 1 << 1;
const REQUIRED: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// Why there is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The kernel's side.
    #[error("device \"{device}\": {problem}")]
    Vhost {
        /// `id=` of the device.
        device: String,
        /// What was wrong.
        #[source]
        problem: VhostError,
    },
    /// The number given as `vhostfd=`.
    #[error("device \"{device}\": {problem}")]
    Descriptor {
        /// `id=` of the device.
        device: String,
        /// What was wrong.
        #[source]
        problem: net::Problem,
    },
}

/// What a vsock device is made from.
pub struct VsockOptions<'a> {
    /// `id=` of the device; for errors.
    pub device: &'a str,
    /// The guest's address, 3 or above, its own on this host.
    pub guest_cid: u32,
    /// Number of an open `/dev/vhost-vsock`.
    pub vhost_fd: Option<i32>,
    /// What the launcher has passed.
    pub inherited: &'a Inherited,
    /// The thread that passes interrupts on.
    pub worker: Worker,
}

/// The device.
pub struct Vsock {
    vhost: Arc<Vhost>,
    cid: u64,
    worker: Worker,
    session: Option<Session<Served>>,
}

/// Rings that the kernel has. Dropped before anything that it works on goes.
struct Served {
    vhost: Arc<Vhost>,
    calls: Vec<(u16, EventFd)>,
    error: EventFd,
    interrupt: Arc<dyn Interrupt>,
    /// Keep guest memory mapped; the last one is the driver's event queue, if it has one.
    queues: Vec<ActiveQueue>,
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Err(error) = self.vhost.set_running(false) {
            tracing::error!("vhost-vsock does not stop: {error}");
        }
    }
}

impl Vsock {
    /// Opens the kernel's side and takes the guest's address.
    pub fn open(options: VsockOptions<'_>) -> Result<Self, VsockError> {
        let VsockOptions { device, guest_cid, vhost_fd, inherited, worker } = options;
        let given = vhost_fd.map(net::take_descriptor).transpose();
        let given = given.map_err(|problem| VsockError::Descriptor { device: device.into(), problem })?;
        let failed = |problem| VsockError::Vhost { device: device.into(), problem };
        let vhost = Vhost::open(Kind::Vsock, given, inherited, REQUIRED).map_err(failed)?;
        Self::new(vhost, guest_cid, worker).map_err(failed)
    }

    fn new(vhost: Vhost, guest_cid: u32, worker: Worker) -> Result<Self, VhostError> {
        let cid = u64::from(guest_cid);
        vhost.set_cid(cid)?;
        Ok(Self { vhost: Arc::new(vhost), cid, worker, session: None })
    }

    fn serve(&self, activation: Activation) -> Result<Served, ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let host = ActivateError::Host;
        if let Some(missing) = (0..SERVED).find(|index| !queues.iter().any(|q| q.index == *index)) {
            return Err(ActivateError::MissingQueue(missing));
        }
        self.vhost.prepare(features, &memory).map_err(host)?;
        let error = EventFd::new(EFD_NONBLOCK).map_err(host)?;
        let mut calls = Vec::with_capacity(usize::from(SERVED));
        for queue in queues.iter().filter(|q| q.index < SERVED) {
            let call = EventFd::new(EFD_NONBLOCK).map_err(host)?;
            let place = queue.queue.lend(0);
            let ring = Ring {
                index: u32::from(queue.index),
                size: place.size,
                desc: place.desc,
                avail: place.avail,
                used: place.used,
                base: place.base,
                kick: fd_of(&queue.notify),
                call: fd_of(&call),
                error: fd_of(&error),
            };
            self.vhost.start_ring(&ring).map_err(host)?;
            calls.push((queue.index, call));
        }
        let served = Served { vhost: Arc::clone(&self.vhost), calls, error, interrupt, queues };
        self.vhost.set_running(true).map_err(host)?;
        for queue in &served.queues {
            // What a quick driver has notified between hand-over and start.
            let _ = queue.notify.write(1);
        }
        Ok(served)
    }

    /// False: the I/O thread hangs in a handler.
    fn stop(&mut self, wait: Duration) -> bool {
        Session::end(&mut self.session, wait)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        REQUIRED | self.vhost.features() & F_SEQPACKET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_address(self.cid, offset, data);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // §5.10.4: the address is read-only.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let io_thread = self.worker.start().map_err(ActivateError::Host)?;
        let interrupt = Arc::clone(&activation.interrupt);
        let served = self.serve(activation)?;
        self.session = Some(Session::start(io_thread, served, "vhost-vsock", interrupt, watch));
        Ok(())
    }

    fn reset(&mut self) {
        if !self.stop(RESET_DEADLINE) {
            tracing::error!("an I/O thread hangs; the vsock device stays down until it does not");
        }
    }
}

/// `struct virtio_vsock_config`: guest_cid.
fn read_address(cid: u64, offset: u64, data: &mut [u8]) {
    read_config_bytes(&cid.to_le_bytes(), offset, data);
}

/// On the I/O thread: passes on what the kernel says.
fn watch(served: &mut Served, gate: &Arc<Gate<Served>>, ops: &mut Ops<'_>) -> io::Result<()> {
    let edge = EventFlags::IN | EventFlags::ET;
    for (queue, call) in &served.calls {
        let (queue, interrupt) = (*queue, Arc::clone(&served.interrupt));
        gate.watch(ops, fd_of(call), edge, move |_, _: &mut Ops<'_>| interrupt.queue(queue))?;
    }
    let complaint = Arc::clone(gate);
    gate.watch(ops, fd_of(&served.error), edge, move |_, _: &mut Ops<'_>| {
        complaint.enter(|served| {
            complain(|| tracing::warn!("vhost-vsock needs a reset: the kernel cannot use a ring"));
            served.interrupt.needs_reset();
        });
    })?;
    Ok(())
}

#[cfg(test)]
mod tests;
