//! One session of the device: owns the ring and the request that waits for bytes.
//!
//! ```text
//!   run ─▶ a request? ── none ──▶ wait for a notification
//!             │ held
//!             ▼
//!          may bytes go? ── not yet ──▶ wait for the timer        has the source some? ── no ──▶ wait for the source
//!             └───────────── yes ───────────────────────────────────▶ yes: fill, give back, next
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::limit::Limiter;
use super::source::Source;
use crate::virtio::queue::{Chain, Position, Queue, QueueError};
use crate::virtio::{Interrupt, complain};

/// Bytes given to one request at most: a device may fill less than it is offered (§5.4.6), and a request for 4 GiB must not
/// keep the thread.
const PER_REQUEST: usize = 4096;
/// Requests in a row before other devices on the thread get their turn.
const BATCH: u32 = 64;

/// What a session is made from.
pub(super) struct Parts {
    pub(super) source: Arc<Source>,
    pub(super) limiter: Option<Arc<Mutex<Limiter>>>,
    /// There when `limiter` is.
    pub(super) timer: Option<TimerFd>,
    pub(super) queue: Queue,
    pub(super) notify: Arc<EventFd>,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

pub(super) struct Server {
    pub(super) source: Arc<Source>,
    limiter: Option<Arc<Mutex<Limiter>>>,
    pub(super) timer: Option<TimerFd>,
    queue: Queue,
    pub(super) notify: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    chain: Chain,
    /// `chain` is a request that has not been served yet.
    held: bool,
    buffer: Box<[u8]>,
    broken: bool,
}

/// Why a turn ended.
enum Ended {
    /// No request.
    Idle,
    /// There may be more requests.
    Full,
    /// The limit is reached; it opens again after this long.
    Limited(Duration),
    /// The source has nothing now.
    Dry,
}

/// What ends a session.
enum Fatal {
    Queue(QueueError),
    Source(io::Error),
}

impl From<QueueError> for Fatal {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Queue(error) => write!(f, "queue 0: {error}"),
            Self::Source(error) => write!(f, "the source of random bytes: {error}"),
        }
    }
}

impl Server {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { source, limiter, timer, queue, notify, interrupt } = parts;
        Self {
            source,
            limiter,
            timer,
            queue,
            notify,
            interrupt,
            chain: Chain::default(),
            held: false,
            buffer: vec![0; PER_REQUEST].into(),
            broken: false,
        }
    }

    /// Where the ring stands; a request that waits for bytes counts as not taken.
    pub(super) fn position(&self) -> Position {
        self.queue.position(u16::from(self.held))
    }

    /// Serves what can be served now.
    pub(super) fn run(&mut self) {
        if self.broken {
            return;
        }
        let ended = self.batch();
        if self.queue.publish() {
            self.interrupt.queue(0);
        }
        let ended = match ended {
            // The watch is edge-triggered: this makes an edge. It cannot fail: the counter is far from full.
            Ok(Ended::Full) => return drop(self.notify.write(1)),
            Ok(Ended::Limited(wait)) => self.arm(wait),
            Ok(Ended::Idle | Ended::Dry) => return,
            Err(fatal) => Err(fatal),
        };
        if let Err(fatal) = ended {
            self.broken = true;
            let id = self.source.id();
            complain(|| tracing::warn!(rng = id, "virtio-rng needs a reset: {fatal}"));
            self.interrupt.needs_reset();
        }
    }

    fn arm(&mut self, wait: Duration) -> Result<(), Fatal> {
        let Some(timer) = &mut self.timer else { return Ok(()) };
        // Zero would switch the timer off.
        timer.reset(wait.max(Duration::from_nanos(1)), None).map_err(|e| Fatal::Source(e.into()))
    }

    fn batch(&mut self) -> Result<Ended, Fatal> {
        self.queue.disable_notify();
        for _ in 0..BATCH {
            while !self.held {
                self.held = self.queue.pop(&mut self.chain)?;
                if !self.held {
                    if !self.queue.enable_notify()? {
                        return Ok(Ended::Idle);
                    }
                    self.queue.disable_notify();
                }
            }
            if let Some(ended) = self.serve()? {
                return Ok(ended);
            }
        }
        Ok(Ended::Full)
    }

    /// Serves the request in hand. `Some`: it has to wait.
    fn serve(&mut self) -> Result<Option<Ended>, Fatal> {
        let room = self.chain.writable.len();
        let wanted = usize::try_from(room).map_or(PER_REQUEST, |room| room.min(PER_REQUEST));
        let mut written = 0;
        // A request without room (§5.4.6.1 forbids it) comes back as it is.
        if wanted > 0 {
            let allowed = match &self.limiter {
                None => wanted,
                Some(limiter) => {
                    let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
                    match limiter.allow(Instant::now(), wanted) {
                        Ok(allowed) => allowed,
                        Err(wait) => return Ok(Some(Ended::Limited(wait))),
                    }
                }
            };
            let buffer = self.buffer.get_mut(..allowed).unwrap_or_default();
            let count = match self.source.read(buffer) {
                Ok(0) => return Err(Fatal::Source(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Some(Ended::Dry)),
                Err(e) => return Err(Fatal::Source(e)),
            };
            if let Some(limiter) = &self.limiter {
                limiter.lock().unwrap_or_else(PoisonError::into_inner).spend(count);
            }
            let bytes = buffer.get_mut(..count).unwrap_or_default();
            written = self.chain.writable.fill(bytes);
            // What one guest has got no other may see.
            bytes.fill(0);
        }
        self.queue.complete(self.chain.head, u32::try_from(written).unwrap_or(u32::MAX));
        self.held = false;
        Ok(None)
    }
}
