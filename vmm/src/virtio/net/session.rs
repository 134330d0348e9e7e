//! From DRIVER_OK to reset: owns the watches of a running NIC, and brings taps to the I/O thread and away from it.
//!
//! Everything that touches the `Server` runs on the I/O thread as a job; who asks waits for the answer, with a deadline. Jobs run
//! in the order in which they were posted, so one that came too late for its asker is still in its place.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use super::saved::Carried;
use super::serve::Server;
use super::vhost::Events;
use crate::event::{EventFlags, LoopHandle, Ops};
use crate::net::Backend;
use crate::virtio::queue::Position;
use crate::virtio::worker::{Gate, Worker};
use crate::virtio::{Interrupt, fd_of};

/// Edge-triggered throughout: notifications need not be read back, and a tap without buffers to read into need not be taken off
/// the watch.
const EDGE: EventFlags = EventFlags::IN.union(EventFlags::ET);

/// Why the I/O thread did not do as it was asked.
pub(super) enum SessionError {
    /// It does not answer.
    Hangs,
    /// A descriptor cannot be watched.
    Host(io::Error),
}

pub(super) struct Session {
    gate: Arc<Gate<Server>>,
    io_thread: LoopHandle,
}

impl Session {
    /// Begins to serve, on the I/O thread and soon.
    pub(super) fn start(
        server: Server,
        backend: Option<Arc<Backend>>,
        io_thread: LoopHandle,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let gate = Gate::new(server);
        let on_thread = Arc::clone(&gate);
        io_thread.post(move |ops: &mut Ops<'_>| {
            let started = on_thread.enter(|server| {
                if let Some(backend) = &backend {
                    attach(server, &on_thread, backend, ops)?;
                }
                watch_control(server, &on_thread, ops)?;
                watch_driver(server, &on_thread, ops)
            });
            if let Some(Err(error)) = started {
                tracing::error!("virtio-net: cannot watch descriptors: {error}");
                interrupt.needs_reset();
            }
        });
        Self { gate, io_thread }
    }

    /// Ends it. False: a handler hangs in the host's kernel; call again later.
    pub(super) fn stop(&self, wait: Duration) -> bool {
        // Reads and writes of a tap are synchronous: nothing is in flight when no handler runs.
        self.gate.close(&self.io_thread, Instant::now() + wait, |_| true)
    }

    /// Starts the thread of `worker` from this one's: see [`Worker::start_from`].
    pub(super) fn start_other(&self, worker: &Worker, deadline: Instant) -> io::Result<LoopHandle> {
        worker.start_from(&self.io_thread, deadline)
    }

    /// Has another thread serve the device, which must have no taps.
    pub(super) fn move_to(&self, io_thread: LoopHandle, deadline: Instant) -> Result<Self, SessionError> {
        let server = self.gate.retire(&self.io_thread, deadline).map_err(|_| SessionError::Hangs)?;
        // None: closed by a reset that could not wait for a handler.
        let mut server = server.ok_or(SessionError::Hangs)?;
        server.watches.clear();
        server.driver_watches.clear();
        let interrupt = Arc::clone(&server.interrupt);
        Ok(Self::start(server, None, io_thread, interrupt))
    }

    /// Ends it and says where it stood. `None`: the I/O thread does not answer; the session goes on.
    pub(super) fn suspend(&self, wait: Duration) -> Option<(Vec<(u16, Position)>, Carried)> {
        let deadline = Instant::now() + wait;
        settle(&self.io_thread, deadline).ok()?;
        let mut stood = None;
        let closed = self.gate.close(&self.io_thread, deadline, |server| {
            stood = Some(server.stand());
            true
        });
        stood.filter(|_| closed)
    }

    /// Gives the running device taps; the guest sees its link come up.
    pub(super) fn attach(&self, backend: Arc<Backend>, deadline: Instant) -> Result<(), SessionError> {
        self.ask(deadline, move |server, gate, ops| {
            let result = attach(server, gate, &backend, ops);
            match &result {
                Ok(()) => server.set_link(true),
                Err(_) => detach(server, gate, ops)?,
            }
            // Before the asker hears of it: the last reference must be its own.
            drop(backend);
            result
        })
        .and_then(|result| result.map_err(SessionError::Host))
    }

    /// Takes the taps from the running device: when this returns the I/O thread has no descriptor of theirs.
    pub(super) fn detach(&self, deadline: Instant) -> Result<(), SessionError> {
        self.ask(deadline, |server, gate, ops| {
            let result = detach(server, gate, ops);
            server.set_link(false);
            result
        })
        .and_then(|result| result.map_err(SessionError::Host))
    }

    fn ask<R: Send + 'static>(
        &self,
        deadline: Instant,
        work: impl FnOnce(&mut Server, &Arc<Gate<Server>>, &mut Ops<'_>) -> R + Send + 'static,
    ) -> Result<R, SessionError> {
        let gate = Arc::clone(&self.gate);
        let done = ask(&self.io_thread, deadline, move |ops| gate.enter(|server| work(server, &gate, ops)))?;
        // None: closed by a reset that could not wait for a handler.
        done.ok_or(SessionError::Hangs)
    }
}

/// Waits until the I/O thread has done all that was posted before: the watches of a session that has ended are gone then.
pub(super) fn settle(io_thread: &LoopHandle, deadline: Instant) -> Result<(), SessionError> {
    ask(io_thread, deadline, |_| ())
}

fn ask<R: Send + 'static>(
    io_thread: &LoopHandle,
    deadline: Instant,
    work: impl FnOnce(&mut Ops<'_>) -> R + Send + 'static,
) -> Result<R, SessionError> {
    let (answer, answered) = sync_channel(1);
    io_thread.post(move |ops: &mut Ops<'_>| {
        // Nobody listens any more when the asker has given up.
        let _ = answer.send(work(ops));
    });
    let left = deadline.saturating_duration_since(Instant::now());
    // Late, or the thread has ended.
    answered.recv_timeout(left).map_err(|_| SessionError::Hangs)
}

/// On the I/O thread: gives the device its host end, watches what must be watched, and serves what has come before.
fn attach(
    server: &mut Server,
    gate: &Arc<Gate<Server>>,
    backend: &Arc<Backend>,
    ops: &mut Ops<'_>,
) -> io::Result<()> {
    let taps = backend.taps();
    server.set_taps(taps);
    if !backend.vhosts().is_empty() {
        lend(server, gate, backend, ops)?;
        return watch_driver(server, gate, ops);
    }
    for (pair, tap) in taps.iter().enumerate() {
        let arrived = Arc::clone(gate);
        let token = gate.watch(ops, tap.as_ref(), EDGE, move |_, _: &mut Ops<'_>| {
            arrived.enter(|server| server.tap_ready(pair));
        })?;
        server.watches.push(token);
        let Some(notify) = server.notify_rx(pair) else { continue };
        let refilled = Arc::clone(gate);
        let token = gate.watch(ops, fd_of(&notify), EDGE, move |_, _: &mut Ops<'_>| {
            refilled.enter(|server| server.receive(pair));
        })?;
        server.watches.push(token);
    }
    (0..taps.len()).for_each(|pair| server.tap_ready(pair));
    Ok(())
}

/// Hands the rings to the kernel, and passes on what it says about them.
fn lend(
    server: &mut Server,
    gate: &Arc<Gate<Server>>,
    backend: &Arc<Backend>,
    ops: &mut Ops<'_>,
) -> io::Result<()> {
    for pair in 0..backend.vhosts().len().min(server.pairs()) {
        let events = Events::new()?;
        for (queue, call) in (2 * pair as u16..).zip(&events.calls) {
            let interrupt = Arc::clone(&server.interrupt);
            let token =
                gate.watch(ops, fd_of(call), EDGE, move |_, _: &mut Ops<'_>| interrupt.queue(queue))?;
            server.watches.push(token);
        }
        let complaint = Arc::clone(gate);
        let token = gate.watch(ops, fd_of(&events.error), EDGE, move |_, _: &mut Ops<'_>| {
            complaint.enter(|server| server.break_down(2 * pair as u16, "the kernel cannot use the ring"));
        })?;
        server.watches.push(token);
        server.lend(pair, backend, events)?;
    }
    Ok(())
}

fn detach(server: &mut Server, gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) -> io::Result<()> {
    for token in std::mem::take(&mut server.watches) {
        gate.unwatch(ops, token);
    }
    server.set_taps(&[]);
    if server.take_back() {
        return watch_driver(server, gate, ops);
    }
    Ok(())
}

/// What the driver sends, unless the kernel looks after it: anew after each change of that. A slot may have more pairs than the
/// kernel has rings.
fn watch_driver(server: &mut Server, gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) -> io::Result<()> {
    for token in std::mem::take(&mut server.driver_watches) {
        gate.unwatch(ops, token);
    }
    for pair in server.lent.len()..server.pairs() {
        let Some(notify) = server.notify_tx(pair) else { continue };
        let sent = Arc::clone(gate);
        let token = gate.watch(ops, fd_of(&notify), EDGE, move |_, _: &mut Ops<'_>| {
            sent.enter(|server| server.transmit(pair));
        })?;
        server.driver_watches.push(token);
        server.transmit(pair);
    }
    Ok(())
}

fn watch_control(server: &mut Server, gate: &Arc<Gate<Server>>, ops: &mut Ops<'_>) -> io::Result<()> {
    if let Some(notify) = server.notify_control() {
        let told = Arc::clone(gate);
        gate.watch(ops, fd_of(&notify), EDGE, move |_, _: &mut Ops<'_>| {
            told.enter(Server::control);
        })?;
        server.control();
    }
    Ok(())
}
