//! The way from the machine's owner to a NIC that is boxed in its transport: owns what is in the slot, and the session if there is one.
//!
//! ```text
//!            insert                       activate                   insert / eject: on the I/O thread, which answers
//!   empty ◀────────▶ filled      idle ◀──────────▶ session
//!            eject                         reset
//! ```
//!
//! A NIC in the slot whose link a client has taken down keeps its host end, and the session has none: as if the cable were out.
//!
//! Locks: the transport's registers, then `state`. It is held over a wait for the I/O thread, which therefore never takes
//! it: what the guest reads meanwhile is in `Face`, which has no lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::face::Face;
use super::session::{Session, SessionError, settle};
use crate::event::LoopHandle;
use crate::net::Backend;
use crate::virtio::Worker;

/// How long the I/O thread may take to let a tap go. Others use it too: a disk on it may be slow.
const DEADLINE: Duration = Duration::from_secs(10);

/// Why a NIC did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// There is a NIC in the slot.
    #[error("the slot is in use by netdev \"{0}\"; remove that device first")]
    Occupied(String),
    /// There is none.
    #[error("the slot is empty")]
    Empty,
    /// More queue pairs than the guest's driver was told of.
    #[error(
        "netdev \"{netdev}\" has {queues} queue pairs, and the slot has {slot}: the guest's driver learns the number at boot; use queues={slot}, or give the NIC on the command line"
    )]
    TooManyQueues {
        /// `id=` of the netdev.
        netdev: String,
        /// What it has.
        queues: usize,
        /// What the slot has had from boot on.
        slot: usize,
    },
    /// The thread that serves the device hangs in the host's kernel.
    #[error("the I/O thread of the device hangs; the host's log may say why")]
    Hangs,
    /// No thread to serve the slot.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] std::io::Error),
    /// A host resource ran out.
    #[error("cannot use netdev \"{netdev}\": {source}")]
    Host {
        /// `id=` of the netdev.
        netdev: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a NIC did not come, and its host end, unless that is lost.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NotInserted {
    /// Why.
    #[source]
    pub error: PortError,
    /// For another try.
    pub backend: Option<Backend>,
}

pub(super) struct State {
    pub(super) backend: Option<Arc<Backend>>,
    /// A client has taken the link down. Not saved: a NIC that is restored has its link.
    cable_out: bool,
    pub(super) session: Option<Session>,
    /// The thread of this session or the last one, which may still hold watches.
    pub(super) io_thread: Option<LoopHandle>,
    /// The NIC's own address: what it has again after a reset.
    pub(super) mac: [u8; 6],
    /// The thread of this session or the next.
    pub(super) worker: Worker,
}

impl State {
    /// The host end that packets go to.
    pub(super) fn reachable(&self) -> Option<Arc<Backend>> {
        self.backend.clone().filter(|_| !self.cable_out)
    }

    /// Takes the host end from the session, if there is one: when this returns no packet moves.
    fn detach(&self, deadline: Instant) -> Result<(), PortError> {
        let done = match (&self.session, &self.io_thread) {
            (Some(session), _) => session.detach(deadline),
            (None, Some(io_thread)) => settle(io_thread, deadline),
            (None, None) => Ok(()),
        };
        done.map_err(|_| PortError::Hangs)
    }

    /// Gives it to the session; the guest sees the link come up.
    fn attach(&self, face: &Face, backend: &Arc<Backend>, deadline: Instant) -> Result<(), PortError> {
        match &self.session {
            None => {
                face.set_link(true);
                Ok(())
            }
            Some(session) => session.attach(Arc::clone(backend), deadline).map_err(|error| match error {
                SessionError::Hangs => PortError::Hangs,
                SessionError::Host(source) => PortError::Host { netdev: backend.id().to_owned(), source },
            }),
        }
    }
}

/// Fills and empties the slot of a NIC, at any time of the device's life, from any thread.
pub struct Port {
    pub(super) face: Arc<Face>,
    pairs: usize,
    /// Without a lock, for the transport on the driver's notifications.
    occupied: AtomicBool,
    state: Mutex<State>,
}

impl Port {
    pub(super) fn new(backend: Option<Backend>, pairs: usize, mac: [u8; 6], worker: Worker) -> Arc<Self> {
        let face = Face::new(mac, backend.is_some());
        let occupied = AtomicBool::new(backend.is_some());
        let backend = backend.map(Arc::new);
        let state =
            Mutex::new(State { backend, cable_out: false, session: None, io_thread: None, mac, worker });
        Arc::new(Self { face: Arc::new(face), pairs, occupied, state })
    }

    /// Only the device and the methods here; after the transport's registers.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn occupied(&self) -> bool {
        self.occupied.load(Ordering::Acquire)
    }

    /// Pairs of queues, from the device's making on.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// `id=` of the netdev in the slot.
    pub fn netdev_id(&self) -> Option<String> {
        self.lock().backend.as_ref().map(|b| b.id().to_owned())
    }

    /// The address that the guest sees.
    pub fn mac(&self) -> [u8; 6] {
        self.face.mac()
    }

    /// Puts a NIC into the empty slot: the guest sees the link come up, and `mac` if it reads it again (Linux does so when its
    /// driver binds). `None` keeps the slot's address. After an error the slot is empty.
    pub fn insert(&self, backend: Backend, mac: Option<[u8; 6]>) -> Result<(), NotInserted> {
        let mut state = self.lock();
        if let Some(there) = &state.backend {
            let error = PortError::Occupied(there.id().to_owned());
            return Err(NotInserted { error, backend: Some(backend) });
        }
        let queues = backend.taps().len();
        if queues > self.pairs {
            let error = PortError::TooManyQueues { netdev: backend.id().into(), queues, slot: self.pairs };
            return Err(NotInserted { error, backend: Some(backend) });
        }
        let backend = Arc::new(backend);
        let before = state.mac;
        if let Some(mac) = mac {
            state.mac = mac;
            self.face.set_mac(mac);
        }
        match state.attach(&self.face, &backend, Instant::now() + DEADLINE) {
            Ok(()) => {
                (state.backend, state.cable_out) = (Some(backend), false);
                self.occupied.store(true, Ordering::Release);
                Ok(())
            }
            Err(error) => {
                state.mac = before;
                self.face.set_mac(before);
                // A thread that hangs may still have it.
                Err(NotInserted { error, backend: Arc::try_unwrap(backend).ok() })
            }
        }
    }

    /// Has another thread serve the slot, which must be empty: the driver notices nothing.
    pub fn serve_on(&self, worker: &Worker) -> Result<(), PortError> {
        let mut state = self.lock();
        if let Some(there) = &state.backend {
            return Err(PortError::Occupied(there.id().to_owned()));
        }
        if state.worker.is(worker) {
            return Ok(());
        }
        if let Some(session) = &state.session {
            let deadline = Instant::now() + DEADLINE;
            let io_thread = session.start_other(worker, deadline).map_err(PortError::Thread)?;
            let moved = session.move_to(io_thread.clone(), deadline);
            state.session = Some(moved.map_err(|_| PortError::Hangs)?);
            state.io_thread = Some(io_thread);
        } else {
            // Nothing that it may still hold is of an empty slot.
            state.io_thread = None;
        }
        state.worker = worker.clone();
        Ok(())
    }

    /// Empties the slot: the guest sees the link go down. No packet moves and the tap's descriptor is closed when this returns.
    pub fn eject(&self) -> Result<(), PortError> {
        let mut state = self.lock();
        // Kept until the I/O thread has let it go: a failed call may be repeated.
        if state.backend.is_none() {
            return Err(PortError::Empty);
        }
        state.detach(Instant::now() + DEADLINE)?;
        self.face.set_link(false);
        (state.backend, state.cable_out) = (None, false);
        self.occupied.store(false, Ordering::Release);
        Ok(())
    }

    /// Takes the link down, or lets it come up again: what the guest sends meanwhile is dropped, and nothing is read from the tap.
    pub fn set_link(&self, up: bool) -> Result<(), PortError> {
        let mut state = self.lock();
        let backend = state.backend.clone().ok_or(PortError::Empty)?;
        if state.cable_out != up {
            return Ok(());
        }
        let deadline = Instant::now() + DEADLINE;
        if up {
            state.attach(&self.face, &backend, deadline)?;
        } else {
            state.detach(deadline)?;
            self.face.set_link(false);
        }
        state.cable_out = !up;
        Ok(())
    }

    /// Puts another host end behind the NIC, whose guest sees the link go down and come up. After an error it has the one that it had.
    pub fn replace(&self, backend: Backend) -> Result<(), PortError> {
        let mut state = self.lock();
        let before = state.backend.clone().ok_or(PortError::Empty)?;
        let queues = backend.taps().len();
        if queues > self.pairs {
            return Err(PortError::TooManyQueues { netdev: backend.id().into(), queues, slot: self.pairs });
        }
        let (backend, deadline) = (Arc::new(backend), Instant::now() + DEADLINE);
        state.detach(deadline)?;
        if !state.cable_out
            && let Err(error) = state.attach(&self.face, &backend, deadline)
        {
            if let Err(lost) = state.attach(&self.face, &before, deadline) {
                tracing::error!(netdev = before.id(), "the NIC has lost its tap: {lost}");
            }
            return Err(error);
        }
        state.backend = Some(backend);
        Ok(())
    }
}
