//! A block slot from outside the guest: owns the disk that is in it, and puts disks in and takes them out while a driver runs.
//!
//! The thread that owns the machine calls [`Port`]; the device model behind the transport reaches the same state. What is in
//! the slot:
//!
//! ```text
//!            insert                       eject: capacity 0, new requests fail, those in flight finish
//!   empty ────────────▶ full ─────────────────────────────────────────────────────────▶ leaving
//!     ▲                                                                                    │
//!     └──────── nothing in flight, written data flushed, file closed and unlocked ─────────┘ (deadline: stays, ask again)
//! ```
//!
//! Beside it, and independent of it, a session exists from the driver's DRIVER_OK to its reset. Lock order: the transport's
//! registers, then the port's state. The state is never locked while something is waited for, so a vCPU that reads the
//! configuration space does not wait for a slow disk.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use std::{io, thread};

use super::medium::{Medium, Stats};
use super::serve::{self, Server};
use super::{config, feature};
use crate::block::{Disk, SECTOR};
use crate::event::{LoopHandle, Ops};
use crate::virtio::worker::{Gate, Worker};
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Interrupt};

/// How long [`Port::eject`] waits for what is in flight and for the flush.
const EJECT_DEADLINE: Duration = Duration::from_secs(10);

/// Why a slot does not do as it is told.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// There is a disk in it, or one that has not left yet.
    #[error("the slot is occupied already")]
    Occupied,
    /// There is none.
    #[error("the slot is empty")]
    Empty,
    /// The host does not finish what was asked of the disk. It stays in the slot, out of the guest's reach; try again.
    #[error("drive \"{0}\": requests do not finish within {seconds} seconds; try again", seconds = EJECT_DEADLINE.as_secs())]
    Busy(String),
    /// The disk has left the slot, but the host could not make durable what the guest had written.
    #[error("drive \"{0}\": data that the guest has written may be lost: {1}")]
    Flush(String, #[source] io::Error),
    /// No thread for the flush, or to serve the slot.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// The thread that serves the slot hangs in the host's kernel.
    #[error("the I/O thread of the slot hangs; the host's log may say why")]
    Hangs,
}

/// From DRIVER_OK to reset; longer if the host's kernel does not let go.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) gate: Arc<Gate<Server>>,
    pub(super) io_thread: LoopHandle,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

pub(super) struct State {
    pub(super) medium: Option<Arc<Medium>>,
    leaving: Option<Arc<Medium>>,
    pub(super) session: Option<Session>,
    pub(super) config: [u8; config::SIZE],
    pub(super) features: u64,
    queue_size: u16,
    queues: u16,
    /// The thread of this session or the next.
    pub(super) worker: Worker,
}

/// A block slot, reached from outside its transport. Works before, during and after the driver's use of the device.
pub struct Port {
    state: Mutex<State>,
}

impl Port {
    pub(super) fn new(medium: Option<Medium>, queue_size: u16, queues: u16, worker: Worker) -> Arc<Self> {
        let medium = medium.map(Arc::new);
        let mut state = State {
            medium,
            leaving: None,
            session: None,
            config: [0; config::SIZE],
            features: 0,
            queue_size,
            queues,
            worker,
        };
        state.offer();
        state.describe();
        Arc::new(Self { state: Mutex::new(state) })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a disk into an empty slot. A driver that runs is told by a configuration interrupt, once it can use the disk.
    ///
    /// What the driver has negotiated stays: it finds out that a disk is read-only, or cannot discard, from requests that fail.
    pub fn insert(&self, disk: Disk, serial: Option<String>) -> Result<(), PortError> {
        let mut state = self.lock();
        if state.medium.is_some() || state.leaving.is_some() {
            return Err(PortError::Occupied);
        }
        let medium = Arc::new(Medium::new(disk, serial, false));
        state.medium = Some(medium);
        state.describe();
        if let Some(Session { gate, io_thread, interrupt }) = state.session.clone() {
            let medium = state.medium();
            // The interrupt comes from there, so that the driver's first request finds the disk.
            io_thread.post(move |ops: &mut Ops<'_>| serve::insert(&gate, ops, &medium, &*interrupt));
        }
        Ok(())
    }

    /// Has another thread serve the slot, which must be empty: so nothing is in flight, and the driver notices nothing.
    pub fn serve_on(&self, worker: &Worker) -> Result<(), PortError> {
        let session = {
            let mut state = self.lock();
            if state.medium.is_some() || state.leaving.is_some() {
                return Err(PortError::Occupied);
            }
            if state.worker.is(worker) {
                return Ok(());
            }
            match state.session.clone() {
                Some(session) => session,
                None => {
                    let before = std::mem::replace(&mut state.worker, worker.clone());
                    drop(state);
                    // Not under the lock: a thread that nobody needs any more is waited for.
                    drop(before);
                    return Ok(());
                }
            }
        };
        let deadline = Instant::now() + EJECT_DEADLINE;
        let io_thread = worker.start_from(&session.io_thread, deadline).map_err(PortError::Thread)?;
        let retired = session.gate.retire(&session.io_thread, deadline);
        let server = retired.map_err(|_| {
            session.interrupt.needs_reset();
            PortError::Hangs
        })?;
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.worker, worker.clone());
        // The driver may have reset the device meanwhile.
        let current = state.session.as_ref().is_some_and(|s| Arc::ptr_eq(&s.gate, &session.gate));
        if let Some(server) = server.filter(|_| current) {
            let gate = Gate::new(server);
            let (on_thread, signal) = (Arc::clone(&gate), Arc::clone(&session.interrupt));
            io_thread.post(move |ops: &mut Ops<'_>| serve::start(&on_thread, ops, &Weak::new(), &*signal));
            state.session = Some(Session { gate, io_thread, interrupt: session.interrupt });
        }
        drop(state);
        drop(before);
        Ok(())
    }

    /// Takes the disk out. When this returns, no request of the guest reaches it any more, what was written is durable, and the
    /// file is closed and unlocked. Waits ten seconds at most.
    pub fn eject(&self) -> Result<(), PortError> {
        let deadline = Instant::now() + EJECT_DEADLINE;
        let (session, name) = {
            let mut guard = self.lock();
            let state = &mut *guard;
            if state.leaving.is_none() {
                state.leaving = Some(state.medium.take().ok_or(PortError::Empty)?);
            }
            state.describe();
            let name = state.leaving.as_ref().map_or_else(String::new, |m| m.disk.id().to_owned());
            (state.session.clone(), name)
        };
        if let Some(session) = session
            && !session.let_go(deadline)
        {
            return Err(PortError::Busy(name));
        }
        let Some(medium) = self.lock().leaving.clone() else { return Err(PortError::Empty) };
        let flushed = flush(medium, deadline)?;
        let mut state = self.lock();
        match state.leaving.take().map(Arc::try_unwrap) {
            Some(Err(medium)) => {
                state.leaving = Some(medium);
                return Err(PortError::Busy(name));
            }
            Some(Ok(medium)) => drop(medium),
            None => {}
        }
        flushed.map_err(|e| PortError::Flush(name, e))
    }

    /// `id=` of the drive in the slot.
    pub fn disk_id(&self) -> Option<String> {
        self.lock().medium.as_ref().map(|m| m.disk.id().to_owned())
    }

    /// What has been done with the disk in the slot; zeroes for an empty one.
    pub fn stats(&self) -> Stats {
        self.lock().medium.as_ref().map_or_else(Stats::default, |m| m.counters.read_out())
    }

    /// Ends the session. False: requests are still with the host's kernel, and so is guest memory.
    pub(super) fn stop(&self, wait: Duration) -> bool {
        let deadline = Instant::now() + wait;
        loop {
            let Some(session) = self.lock().session.clone() else { return true };
            if !session.close(deadline) {
                return false;
            }
            let mut state = self.lock();
            // Another one when the slot has just been moved to another thread: that one, too.
            if state.session.as_ref().is_some_and(|s| Arc::ptr_eq(&s.gate, &session.gate)) {
                state.session = None;
                return true;
            }
        }
    }

    /// Makes durable what the guest has written, before the machine goes.
    pub(super) fn flush(&self) -> io::Result<()> {
        let medium = self.lock().medium.clone();
        medium.filter(|m| !m.read_only).map_or(Ok(()), |m| m.disk.flush())
    }

    pub(super) fn name(&self) -> String {
        let state = self.lock();
        let medium = state.medium.as_ref().or(state.leaving.as_ref());
        medium.map_or_else(|| "(empty slot)".to_owned(), |m| m.disk.id().to_owned())
    }
}

impl Session {
    fn close(&self, deadline: Instant) -> bool {
        self.gate.close(&self.io_thread, deadline, |server| server.drain(deadline))
    }

    /// Makes the server forget its disk, once nothing is in flight. False: not before the deadline.
    fn let_go(&self, deadline: Instant) -> bool {
        self.interrupt.config();
        let (gone, wait): (Sender<()>, _) = channel();
        let gate = Arc::clone(&self.gate);
        self.io_thread.post(move |ops: &mut Ops<'_>| serve::eject(&gate, ops, gone));
        let left = deadline.saturating_duration_since(Instant::now());
        match wait.recv_timeout(left) {
            Ok(()) => true,
            Err(RecvTimeoutError::Timeout) => false,
            // The driver has reset the device meanwhile: nothing of the session is left when it has drained.
            Err(RecvTimeoutError::Disconnected) => self.close(deadline),
        }
    }
}

/// Flushes on a thread of its own: a host's storage that hangs must not take the caller with it.
fn flush(medium: Arc<Medium>, deadline: Instant) -> Result<io::Result<()>, PortError> {
    if medium.disk.read_only() {
        return Ok(Ok(()));
    }
    let name = medium.disk.id().to_owned();
    let (done, wait) = channel();
    let work = move || {
        let result = medium.disk.flush();
        drop(medium);
        let _ = done.send(result);
    };
    thread::Builder::new().name("eject".to_owned()).spawn(work).map_err(PortError::Thread)?;
    wait.recv_timeout(deadline.saturating_duration_since(Instant::now())).map_err(|_| PortError::Busy(name))
}

impl State {
    /// Decides the features anew; only while no driver has them.
    pub(super) fn offer(&mut self) {
        let medium = self.medium.as_deref();
        self.features = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        self.features |= feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        if self.queues > 1 {
            self.features |= feature::MQ;
        }
        if medium.is_some_and(|m| m.read_only) {
            self.features |= feature::RO;
        } else {
            self.features |= feature::WRITE_ZEROES;
            // An empty slot offers it for the disk that may come.
            if medium.is_none_or(|m| m.disk.discard()) {
                self.features |= feature::DISCARD;
            }
        }
    }

    /// Writes the configuration space anew.
    fn describe(&mut self) {
        let medium = self.medium.as_deref();
        let mut space = [0; config::SIZE];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let block_size = medium.map_or(SECTOR as u32, |m| m.disk.block_size());
        put(config::CAPACITY, &(medium.map_or(0, |m| m.disk.size()) / SECTOR).to_le_bytes());
        // Two descriptors of a chain hold header and status (§5.2.6.1 wants at least one segment).
        put(config::SEG_MAX, &u32::from(self.queue_size.saturating_sub(2).max(1)).to_le_bytes());
        put(config::BLK_SIZE, &block_size.to_le_bytes());
        put(config::NUM_QUEUES, &self.queues.to_le_bytes());
        if self.features & feature::DISCARD != 0 {
            put(config::MAX_DISCARD_SECTORS, &super::request::MAX_DISCARD_SECTORS.to_le_bytes());
            put(config::MAX_DISCARD_SEG, &1u32.to_le_bytes());
            put(config::DISCARD_SECTOR_ALIGNMENT, &(block_size / SECTOR as u32).to_le_bytes());
        }
        if self.features & feature::WRITE_ZEROES != 0 {
            put(config::MAX_WRITE_ZEROES_SECTORS, &super::request::MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(config::MAX_WRITE_ZEROES_SEG, &1u32.to_le_bytes());
            put(config::WRITE_ZEROES_MAY_UNMAP, &[u8::from(self.features & feature::DISCARD != 0)]);
        }
        self.config = space;
    }

    /// Offers what was offered to the driver of a device that was saved. `None`: no slot can have offered that.
    pub(super) fn offer_again(&mut self, features: u64) -> Option<()> {
        let always = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
        let always = always | feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        // The transport has compared the number of queues.
        let always = always | if self.queues > 1 { feature::MQ } else { 0 };
        let at_times = feature::RO | feature::WRITE_ZEROES | feature::DISCARD;
        if features & always != always || features & !(always | at_times) != 0 {
            return None;
        }
        self.features = features;
        self.describe();
        Some(())
    }

    /// For the I/O thread.
    pub(super) fn medium(&self) -> Weak<Medium> {
        self.medium.as_ref().map_or_else(Weak::new, Arc::downgrade)
    }

    /// The driver is gone: what is offered may change again.
    pub(super) fn renew(&mut self) {
        self.offer();
        self.describe();
    }
}
