//! Devices that another process serves (vhost-user): a shared file system (virtio 1.2 §5.11), a disk (§5.2), a NIC (§5.1). Owns the
//! hand-over of the rings, the device's configuration, and what happens when the other process goes.
//!
//! ```text
//!   open ──▶ idle ── DRIVER_OK: hand over, on the I/O thread ──▶ served ── reset: rings come back ──▶ idle
//!                                                                  │
//!                             the back end goes, or breaks the protocol: DEVICE_NEEDS_RESET; requests in flight are lost
//! ```
//!
//! A device whose back end has gone connects to the socket again when its driver starts it anew. It does not go on by itself: which of the
//! requests in flight were done only the back end knew (it would have to keep them in memory shared with us), and to do a write twice, or
//! never, is worse than to say that the device needs a reset.
//!
//! Each device has an I/O thread of its own: a back end that is slow to answer holds up nobody else. Connecting again is done by the main
//! thread, because no other may.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::net::control::ControlQueue;
use super::queue::Position;
use super::state::StateError;
use super::worker::{Gate, RESET_DEADLINE, Session, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt,
    VirtioDevice, complain, fd_of, read_config_bytes,
};
use crate::event::{EventFlags, LoopHandle, Ops};
use crate::memory::GuestMemory;
use crate::vhost::Ring;
use crate::vhost::user::{Front, PATIENCE, UserError};

mod model;
mod pairs;

#[cfg(test)]
mod tests;

pub use model::{Model, TAG_MAX};

/// Features of the rings, which the back end must know.
const RINGS: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
/// How long the main thread may take to connect again.
const RECONNECT: Duration = Duration::from_secs(2);

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
#[error("device \"{device}\": chardev \"{chardev}\": {problem}")]
pub struct VhostUserError {
    /// `id=` of the device.
    pub device: String,
    /// `id=` of the chardev.
    pub chardev: String,
    /// What was wrong.
    #[source]
    pub problem: UserError,
}

/// What a device is made from.
pub struct VhostUserOptions {
    /// `id=` of the device.
    pub device: String,
    /// `id=` of the chardev.
    pub chardev: String,
    /// The back end's socket.
    pub socket: PathBuf,
    /// What the device is.
    pub model: Model,
    /// Entries of each queue: a power of two.
    pub queue_size: u16,
    /// Reaches the thread that may connect again.
    pub main_loop: LoopHandle,
}

/// The device.
pub struct VhostUser {
    peer: Arc<Peer>,
    model: Model,
    features: u64,
    config: Vec<u8>,
    queue_sizes: Vec<u16>,
    worker: Worker,
    session: Option<Session<Served>>,
    /// Pairs of queues that the driver of a suspended NIC uses.
    carried: Option<u16>,
}

/// The back end, gone or not.
struct Peer {
    device: String,
    socket: PathBuf,
    model: Model,
    /// What the guest has been offered of the back end's.
    features: u64,
    front: Mutex<Arc<Front>>,
    main_loop: LoopHandle,
}

/// Rings that the back end has, or is about to get. Taken back when dropped.
struct Served {
    peer: Arc<Peer>,
    front: Option<Arc<Front>>,
    memory: Arc<GuestMemory>,
    features: u64,
    /// Keep guest memory mapped.
    queues: Vec<ActiveQueue>,
    control: Option<ControlQueue>,
    /// Of a NIC, 1 to all.
    pairs_in_use: u16,
    calls: Vec<EventFd>,
    error: EventFd,
    interrupt: Arc<dyn Interrupt>,
    /// Those of the queues, from the first on, that the back end has.
    lent: usize,
}

impl VhostUser {
    /// Connects to the back end.
    pub fn open(options: VhostUserOptions) -> Result<Self, VhostUserError> {
        let VhostUserOptions { device, chardev, socket, model, queue_size, main_loop } = options;
        let failed = |problem| VhostUserError { device: device.clone(), chardev, problem };
        let open = || {
            let front = Front::connect(&socket)?;
            let (features, config) = greet(&front, &model)?;
            Ok((front, features, config))
        };
        let (front, features, config) = open().map_err(failed)?;
        let worker = Worker::new(&device);
        let front = Mutex::new(Arc::new(front));
        let queue_sizes = vec![queue_size; usize::from(model.queues())];
        let peer = Arc::new(Peer { device, socket, model: model.clone(), features, front, main_loop });
        Ok(Self { peer, model, features, config, queue_sizes, worker, session: None, carried: None })
    }

    fn stop(&mut self, wait: Duration) -> bool {
        Session::end(&mut self.session, wait)
    }
}

/// What a back end and a device of this kind have in common: features and configuration.
fn greet(front: &Front, model: &Model) -> Result<(u64, Vec<u8>), UserError> {
    let missing = (F_VERSION_1 | model.needed_features()) & !front.features();
    if missing != 0 {
        return Err(UserError::Features(missing));
    }
    match model {
        Model::Net { pairs, .. } => front.check_pairs(*pairs)?,
        Model::Fs { .. } | Model::Blk { .. } => front.check_queues(model.queues())?,
    }
    let features = front.features() & (RINGS | model.features()) | model.own_features();
    let config = match model.config_bytes() {
        0 => Vec::new(),
        length => front.config(length)?,
    };
    Ok((features, model.config(config)))
}

impl Peer {
    /// The back end, connected to anew if it had gone. Waits for it.
    fn front(&self) -> Result<Arc<Front>, UserError> {
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        if front.is_well() {
            return Ok(Arc::clone(&front));
        }
        let (tell, told) = std::sync::mpsc::channel();
        let socket = self.socket.clone();
        self.main_loop.post(move |_| {
            // The asker may have lost patience.
            let _ = tell.send(Front::dial(&socket));
        });
        let socket = told.recv_timeout(RECONNECT).map_err(|_| {
            UserError::Io(io::Error::new(io::ErrorKind::TimedOut, "the main thread is busy"))
        })??;
        let new = Front::new(socket)?;
        let (features, _) = greet(&new, &self.model)?;
        // The guest may have accepted any of them.
        if self.features & !features != 0 {
            return Err(UserError::Features(self.features & !features));
        }
        tracing::info!(device = self.device, "connected to the vhost-user back end again");
        *front = Arc::new(new);
        Ok(Arc::clone(&front))
    }
}

impl Served {
    /// Gives all rings to the back end.
    fn hand_over(&mut self) -> Result<(), UserError> {
        let front = self.peer.front()?;
        let end = Instant::now() + PATIENCE;
        front.prepare(self.features, &self.memory, end)?;
        for (queue, call) in self.queues.iter().zip(&self.calls) {
            let place = queue.queue.lend(0);
            // Counted before it is sent: one that was refused half-way is taken back, too.
            self.lent += 1;
            self.front = Some(Arc::clone(&front));
            let ring = Ring {
                index: queue.index.into(),
                size: place.size,
                desc: place.desc,
                avail: place.avail,
                used: place.used,
                base: place.base,
                kick: fd_of(&queue.notify),
                call: fd_of(call),
                error: fd_of(&self.error),
            };
            front.start_ring(&ring, self.is_in_use(queue.index), end)?;
            // What a quick driver has notified before the back end listened.
            let _ = queue.notify.write(1);
        }
        Ok(())
    }

    /// Takes the rings back; says where each stands.
    fn take_back(&mut self) -> Result<Vec<(u16, Position)>, UserError> {
        let Some(front) = self.front.take() else { return Ok(Vec::new()) };
        let end = Instant::now() + PATIENCE;
        let lent = std::mem::take(&mut self.lent);
        let control = self.control.iter().map(ControlQueue::place).map(Ok);
        self.queues
            .iter_mut()
            .zip(&self.calls)
            .take(lent)
            .map(|(queue, call)| {
                queue.queue.take_back(front.stop_ring(queue.index.into(), end)?);
                // What it has signalled last, and nobody has seen yet, the driver would wait for.
                if call.read().is_ok() {
                    self.interrupt.queue(queue.index);
                }
                Ok((queue.index, queue.queue.position(0)))
            })
            .chain(control)
            .collect()
    }

    /// The socket has something to say, which means nothing good.
    fn heard(&mut self) {
        if self.front.as_ref().is_some_and(|front| !front.is_well()) {
            self.front = None;
            self.give_up(&UserError::Lost);
        }
    }

    fn give_up(&mut self, error: &UserError) {
        let Peer { device, socket, .. } = &*self.peer;
        tracing::error!(
            device,
            "{error}: the device stands still; start the back end at {} again, and have the guest start the driver",
            socket.display()
        );
        self.interrupt.needs_reset();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Err(error) = self.take_back() {
            tracing::error!(device = self.peer.device, "cannot take the rings back: {error}");
        }
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.model.device_type()
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
        // Nothing of what is offered can be written to.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !self.stop(Duration::ZERO) {
            return Err(ActivateError::StillBusy);
        }
        let Activation { memory, features, queues, interrupt } = activation;
        let (queues, control) = pairs::sort(&self.model, features, queues);
        let needed = self.model.needed_queues();
        if let Some(missing) = (0..needed).find(|index| !queues.iter().any(|q| q.index == *index)) {
            return Err(ActivateError::MissingQueue(missing));
        }
        let event = || EventFd::new(EFD_NONBLOCK).map_err(ActivateError::Host);
        let calls = queues.iter().map(|_| event()).collect::<Result<_, _>>()?;
        let served = Served {
            peer: Arc::clone(&self.peer),
            front: None,
            memory,
            features,
            queues,
            control,
            pairs_in_use: self.carried.take().unwrap_or(1),
            calls,
            error: event()?,
            interrupt: Arc::clone(&interrupt),
            lent: 0,
        };
        let io_thread = self.worker.start().map_err(ActivateError::Host)?;
        self.session = Some(Session::start(io_thread, served, "vhost-user", interrupt, start));
        Ok(())
    }

    fn reset(&mut self) {
        self.carried = None;
        if !self.stop(RESET_DEADLINE) {
            let device = &self.peer.device;
            tracing::error!(device, "an I/O thread hangs; the device stays down until it does not");
        }
    }

    /// The connection ends, too: a back end takes the next only then.
    fn shut_down(&mut self) -> io::Result<()> {
        self.reset();
        self.peer.front.lock().unwrap_or_else(PoisonError::into_inner).close();
        Ok(())
    }

    fn is_served_elsewhere(&self) -> bool {
        true
    }

    fn suspend(&mut self) -> Result<Vec<(u16, Position)>, StateError> {
        let left = Session::take(&mut self.session, RESET_DEADLINE, |served| {
            let places = served.take_back().inspect_err(|error| served.give_up(error)).unwrap_or_default();
            (places, served.pairs_in_use)
        });
        let (places, pairs) = left.ok_or(StateError::Busy)?;
        self.carried = Some(pairs);
        Ok(places)
    }
}

/// On the I/O thread: hands the rings over, and passes on what the back end says.
fn start(served: &mut Served, gate: &Arc<Gate<Served>>, ops: &mut Ops<'_>) -> io::Result<()> {
    if let Err(error) = served.hand_over() {
        served.give_up(&error);
        return Ok(());
    }
    let edge = EventFlags::IN | EventFlags::ET;
    for (queue, call) in served.queues.iter().zip(&served.calls) {
        let (queue, interrupt) = (queue.index, Arc::clone(&served.interrupt));
        gate.watch(ops, fd_of(call), edge, move |_, _: &mut Ops<'_>| interrupt.queue(queue))?;
    }
    if let Some(notify) = served.control.as_ref().map(ControlQueue::notify) {
        let commands = Arc::clone(gate);
        gate.watch(ops, fd_of(&notify), edge, move |_, _: &mut Ops<'_>| {
            commands.enter(Served::commands);
        })?;
    }
    let complaint = Arc::clone(gate);
    gate.watch(ops, fd_of(&served.error), edge, move |_, _: &mut Ops<'_>| {
        complaint.enter(|served| {
            let device = &served.peer.device;
            complain(|| tracing::warn!(device, "needs a reset: the back end cannot use a ring"));
            served.interrupt.needs_reset();
        });
    })?;
    if let Some(front) = &served.front {
        let words = Arc::clone(gate);
        gate.watch(ops, front.socket(), edge | EventFlags::RDHUP, move |_, _: &mut Ops<'_>| {
            words.enter(Served::heard);
        })?;
    }
    Ok(())
}
