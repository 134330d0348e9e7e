//! I/O threads and how devices share them: owns the threads' lives, and the gate between a device's handlers and its reset.
//!
//! A [`Worker`] is one thread with one [`EventLoop`], started when the first device that uses it is activated: a VM whose guest
//! drives no device has no I/O thread. Handlers reach the state of their device through a `Gate`:
//!
//! ```text
//!            enter (I/O thread)                   close (vCPU or main thread)
//!   open ───────────────────────▶ taken      open ───────────────────────────▶ closed ─▶ empty, once nothing is in flight
//!     ▲                             │        taken: waits, with a deadline, until the handler has left
//!     └───────── left ──────────────┘
//! ```
//!
//! A handler holds no lock while it runs, so a reset can give up waiting for one that hangs in the host's kernel.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Interrupt;
use crate::event::{EventFlags, EventLoop, Handler, LoopHandle, Ops, Token};

/// How long a reset waits for the host's kernel before it gives the device up. A disk that takes longer is as good as dead;
/// the guest's vCPU stands still meanwhile.
pub(crate) const RESET_DEADLINE: Duration = Duration::from_secs(20);

/// One I/O thread, shared by the devices that hold a clone of this. The thread ends when the last clone goes.
#[derive(Clone)]
pub struct Worker(Arc<Shared>);

struct Shared {
    name: String,
    running: Mutex<Option<Running>>,
}

struct Running {
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// A worker whose thread, once it is needed, is called `io-ID`.
    pub fn new(id: &str) -> Self {
        Self(Arc::new(Shared { name: format!("io-{id}"), running: Mutex::new(None) }))
    }

    /// The loop of the thread, which is started if it does not run yet.
    pub(crate) fn start(&self) -> io::Result<LoopHandle> {
        let mut running = lock(&self.0.running);
        if let Some(running) = &*running {
            return Ok(running.handle.clone());
        }
        let mut event_loop = EventLoop::new()?;
        let handle = event_loop.handle();
        let thread = std::thread::Builder::new().name(self.0.name.clone()).spawn(move || {
            if let Err(error) = event_loop.run() {
                tracing::error!("I/O thread ends: {error}");
            }
        })?;
        *running = Some(Running { handle: handle.clone(), thread: Some(thread) });
        Ok(handle)
    }
}

impl Worker {
    /// The same from outside the I/O threads. If it must be started, `io_thread` does so: a thread is born with the sandbox of the one
    /// that starts it, and that of the main thread is wider.
    pub(crate) fn start_from(&self, io_thread: &LoopHandle, deadline: Instant) -> io::Result<LoopHandle> {
        if let Some(running) = &*lock(&self.0.running) {
            return Ok(running.handle.clone());
        }
        let (tell, told) = std::sync::mpsc::channel();
        let worker = self.clone();
        io_thread.post(move |_| {
            // The asker may have lost patience.
            let _ = tell.send(worker.start());
        });
        let left = deadline.saturating_duration_since(Instant::now());
        told.recv_timeout(left)
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the I/O thread does not answer"))?
    }

    /// Whether both are the same thread.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The host's thread; `None` while no device has needed it, or when it does not answer soon.
    pub fn tid(&self) -> Option<i32> {
        const SOON: Duration = Duration::from_millis(200);
        let handle = lock(&self.0.running).as_ref()?.handle.clone();
        let (tell, told) = std::sync::mpsc::channel();
        handle.post(move |_| {
            // The asker may have lost patience.
            let _ = tell.send(rustix::thread::gettid().as_raw_nonzero().get());
        });
        told.recv_timeout(SOON).ok()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(Running { handle, thread }) = running.take() else { return };
        handle.post(|ops: &mut Ops<'_>| ops.stop());
        // Not from a handler of the thread itself: it would wait for itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these locks; if it did, the value would still be whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A handler hangs in the host's kernel.
#[derive(Debug)]
pub(crate) struct Hangs;

/// The running state of one activated device, and who may touch it.
pub(crate) struct Gate<T> {
    inner: Mutex<Inner<T>>,
    left: Condvar,
}

struct Inner<T> {
    state: Option<T>,
    taken: bool,
    closed: bool,
    tokens: Vec<Token>,
}

impl<T: Send + 'static> Gate<T> {
    pub(crate) fn new(state: T) -> Arc<Self> {
        let inner = Inner { state: Some(state), taken: false, closed: false, tokens: Vec::new() };
        Arc::new(Self { inner: Mutex::new(inner), left: Condvar::new() })
    }

    /// Runs `work` on the state unless the gate is closed. Only the device's I/O thread calls this.
    pub(crate) fn enter<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        let mut state = {
            let mut inner = lock(&self.inner);
            if inner.closed {
                return None;
            }
            let state = inner.state.take()?;
            inner.taken = true;
            state
        };
        let result = work(&mut state);
        let mut inner = lock(&self.inner);
        inner.state = Some(state);
        inner.taken = false;
        if inner.closed {
            self.left.notify_all();
        }
        Some(result)
    }

    /// Watches `fd` on the I/O thread until the gate is closed or [`unwatch`](Self::unwatch) says so.
    pub(crate) fn watch(
        &self,
        ops: &mut Ops<'_>,
        fd: impl AsFd,
        interest: EventFlags,
        handler: impl Handler + 'static,
    ) -> io::Result<Token> {
        let token = ops.add(fd, interest, handler)?;
        let mut inner = lock(&self.inner);
        if inner.closed {
            drop(inner);
            ops.remove(token);
        } else {
            inner.tokens.push(token);
        }
        Ok(token)
    }

    /// Ends a watch; the loop's duplicate of the descriptor is closed when this returns. On the I/O thread.
    pub(crate) fn unwatch(&self, ops: &mut Ops<'_>, token: Token) {
        lock(&self.inner).tokens.retain(|t| *t != token);
        ops.remove(token);
    }

    /// Shuts the gate: no handler enters again. Waits for the one inside, then runs `drain`, which returns true when nothing of
    /// the device is in flight any more. True: the state has been dropped. False: it is kept; call again later. When two
    /// threads close at once, the second waits for the first.
    pub(crate) fn close(
        &self,
        worker: &LoopHandle,
        deadline: Instant,
        drain: impl FnOnce(&mut T) -> bool,
    ) -> bool {
        let Some(mut inner) = self.shut(worker, deadline) else { return false };
        let Some(mut state) = inner.state.take() else { return true };
        inner.taken = true;
        drop(inner);
        let kept = if drain(&mut state) {
            drop(state);
            None
        } else {
            Some(state)
        };
        let drained = kept.is_none();
        let mut inner = lock(&self.inner);
        inner.state = kept;
        inner.taken = false;
        self.left.notify_all();
        drained
    }

    /// Shuts the gate and takes the state out, to run it behind another gate. An error: the handler inside does not leave, and the
    /// state stays. None: somebody else has closed the gate. Only while nothing of the device is in flight.
    pub(crate) fn retire(&self, worker: &LoopHandle, deadline: Instant) -> Result<Option<T>, Hangs> {
        let mut inner = self.shut(worker, deadline).ok_or(Hangs)?;
        Ok(inner.state.take())
    }

    /// No handler enters from now on, and none is inside when this returns. None: one still is.
    fn shut(&self, worker: &LoopHandle, deadline: Instant) -> Option<MutexGuard<'_, Inner<T>>> {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        let tokens = std::mem::take(&mut inner.tokens);
        if !tokens.is_empty() {
            worker.post(move |ops| tokens.into_iter().for_each(|t| ops.remove(t)));
        }
        while inner.taken {
            let left = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())?;
            inner = self.left.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(inner)
    }
}

/// Waits until the thread has done all that was posted before. False: it does not answer in time.
pub(crate) fn io_thread_answers(io_thread: &LoopHandle, deadline: Instant) -> bool {
    let (answer, answered) = std::sync::mpsc::channel();
    io_thread.post(move |_| {
        // The asker may have lost patience.
        let _ = answer.send(());
    });
    answered.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
}

/// What a device runs from DRIVER_OK to reset, for devices that have nothing in flight when no handler of theirs runs.
pub(crate) struct Session<T> {
    gate: Arc<Gate<T>>,
    io_thread: LoopHandle,
}

impl<T: Send + 'static> Session<T> {
    /// Runs `begin` on the I/O thread, which sets up the watches. When that fails the driver is told (DEVICE_NEEDS_RESET).
    pub(crate) fn start(
        io_thread: LoopHandle,
        state: T,
        device: &'static str,
        interrupt: Arc<dyn Interrupt>,
        begin: fn(&mut T, &Arc<Gate<T>>, &mut Ops<'_>) -> io::Result<()>,
    ) -> Self {
        let gate = Gate::new(state);
        let on_thread = Arc::clone(&gate);
        io_thread.post(move |ops: &mut Ops<'_>| {
            if let Some(Err(error)) = on_thread.enter(|state| begin(state, &on_thread, ops)) {
                tracing::error!("{device}: cannot watch descriptors: {error}");
                interrupt.needs_reset();
            }
        });
        Self { gate, io_thread }
    }

    /// Ends the session and says what it left, which `read` takes out. `None`: there was none, or the thread hangs; then it goes on.
    pub(crate) fn take<R>(
        session: &mut Option<Self>,
        wait: Duration,
        read: impl FnOnce(&mut T) -> R,
    ) -> Option<R> {
        let deadline = Instant::now() + wait;
        let Self { gate, io_thread } = session.as_ref()?;
        if !io_thread_answers(io_thread, deadline) {
            return None;
        }
        let mut left = None;
        let closed = gate.close(io_thread, deadline, |state| {
            left = Some(read(state));
            true
        });
        if closed {
            *session = None;
        }
        left
    }

    /// Ends the session, if there is one. False: a handler hangs in the host's kernel; the session stays, try again later.
    pub(crate) fn end(session: &mut Option<Self>, wait: Duration) -> bool {
        let ended =
            session.as_ref().is_none_or(|s| s.gate.close(&s.io_thread, Instant::now() + wait, |_| true));
        if ended {
            *session = None;
        }
        ended
    }
}
