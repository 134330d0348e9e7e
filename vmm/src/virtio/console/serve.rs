//! One session of the device: owns its rings, and moves bytes between them and the character devices.
//!
//! To the guest: a byte leaves the character device only when there is room for it in `staged`. From the guest: a request of
//! a stream stays in hand until the character device has room for all of it, so a host that does not read makes the guest
//! wait, and only its writers of that port. A terminal's request is taken at once: Linux spins until it is.

use std::collections::VecDeque;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, Effect};
use super::port::{PortEnd, Session};
use super::saved::Carried;
use super::{CONTROL_FROM_DRIVER, CONTROL_TO_DRIVER, queues_of};
use crate::virtio::queue::{Chain, Position, QueueError};
use crate::virtio::worker::Gate;
use crate::virtio::{ActiveQueue, Interrupt, complain};

/// Bytes of one port on their way to the guest.
pub(super) const STAGED_MAX: usize = 4096;
/// Bytes moved at once.
const CHUNK: usize = 4096;
/// Requests, or chunks of a large one, of one queue in one turn.
const TURN: usize = 64;
/// Bytes of a driver's control message that are looked at.
const CONTROL_MAX: usize = super::control::HEADER;

/// A ring and the request of it that is in hand.
struct Ring {
    queue: ActiveQueue,
    chain: Chain,
    held: bool,
    /// Bytes of the request in hand that are taken; of the next one, if none is in hand, those that were taken before a suspension.
    taken: usize,
}

struct PortState {
    end: Arc<PortEnd>,
    to_guest: Option<Ring>,
    from_guest: Option<Ring>,
    staged: VecDeque<u8>,
    /// The guest reads.
    guest_open: bool,
}

pub(super) struct Server {
    ports: Vec<PortState>,
    control: Control,
    to_driver: Option<Ring>,
    from_driver: Option<Ring>,
    interrupt: Arc<dyn Interrupt>,
    broken: bool,
}

/// Whether a turn has left work that nobody will tell of.
type More = bool;

impl Ring {
    fn new(queue: ActiveQueue) -> Self {
        Self { queue, chain: Chain::default(), held: false, taken: 0 }
    }

    /// Makes sure that there is a request in hand. False: there is none, and the driver tells when there is.
    fn next(&mut self) -> Result<bool, QueueError> {
        let queue = &mut self.queue.queue;
        if !self.held {
            queue.disable_notify();
        }
        while !self.held {
            self.held = queue.pop(&mut self.chain)?;
            if self.held && self.taken > 0 {
                let length = usize::try_from(self.chain.readable.len()).unwrap_or(usize::MAX);
                self.chain.readable.advance(self.taken.min(length));
            }
            if !self.held {
                if !queue.enable_notify()? {
                    return Ok(false);
                }
                queue.disable_notify();
            }
        }
        Ok(true)
    }

    fn complete(&mut self, written: usize) {
        (self.held, self.taken) = (false, 0);
        self.queue.queue.complete(self.chain.head, u32::try_from(written).unwrap_or(u32::MAX));
    }

    /// Shows the driver what is done, and comes back if there is more to do.
    fn end_turn(&mut self, more: More, interrupt: &dyn Interrupt) {
        if self.queue.queue.publish() {
            interrupt.queue(self.queue.index);
        }
        if more {
            // The watch is edge-triggered: this makes an edge. It cannot fail: the counter is far from full.
            let _ = self.queue.notify.write(1);
        }
    }
}

impl Session for Gate<Server> {
    fn room(&self, nr: u8) -> usize {
        self.enter(|server| server.room(nr)).unwrap_or(0)
    }

    fn receive(&self, nr: u8, data: &[u8]) {
        self.enter(|server| server.receive(nr, data));
    }

    fn host_changed(&self, nr: u8, open: bool) {
        self.enter(|server| server.host_changed(nr, open));
    }

    fn writable(&self, nr: u8) {
        self.enter(|server| server.writable(nr));
    }
}

impl Server {
    pub(super) fn new(
        ends: &[Arc<PortEnd>],
        queues: Vec<ActiveQueue>,
        multiport: bool,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let mut rings: Vec<Option<Ring>> = queues.into_iter().map(|q| Some(Ring::new(q))).collect();
        let mut take = |index: u16| {
            rings
                .iter_mut()
                .find(|r| r.as_ref().is_some_and(|r| r.queue.index == index))
                .and_then(Option::take)
        };
        let mut control = Control::default();
        let mut ports = Vec::new();
        // Without MULTIPORT there is port 0 only, and it is open: nobody could say otherwise.
        for end in ends.iter().filter(|end| multiport || end.nr == 0) {
            control.add(end.nr, end.console, end.name.clone(), end.is_open());
            let (to_guest, from_guest) = queues_of(end.nr);
            ports.push(PortState {
                end: Arc::clone(end),
                to_guest: take(to_guest),
                from_guest: take(from_guest),
                staged: VecDeque::new(),
                guest_open: !multiport,
            });
        }
        let (to_driver, from_driver) =
            if multiport { (take(CONTROL_TO_DRIVER), take(CONTROL_FROM_DRIVER)) } else { (None, None) };
        Self { ports, control, to_driver, from_driver, interrupt, broken: false }
    }

    /// Where each ring stands, and each port, when no handler runs.
    pub(super) fn stand(&self) -> (Vec<(u16, Position)>, Vec<Carried>) {
        let of_ports = self.ports.iter().flat_map(|p| [&p.to_guest, &p.from_guest]);
        let rings = of_ports.chain([&self.to_driver, &self.from_driver]).flatten();
        let positions = rings.map(|r| (r.queue.index, r.queue.queue.position(u16::from(r.held))));
        let ports = self.ports.iter().map(|p| Carried {
            nr: p.end.nr,
            told: self.control.told(p.end.nr),
            staged: p.staged.iter().copied().collect(),
            guest_open: p.guest_open,
            taken: p.from_guest.as_ref().map_or(0, |r| r.taken),
        });
        (positions.collect(), ports.collect())
    }

    /// Before it serves: how the ports stood.
    pub(super) fn go_on(&mut self, carried: Vec<Carried>) {
        for Carried { nr, told, staged, guest_open, taken } in carried {
            let Some(port) = self.position(nr).and_then(|at| self.ports.get_mut(at)) else { continue };
            self.control.go_on(nr, &told);
            (port.staged, port.guest_open) = (staged.into(), guest_open);
            if let Some(ring) = &mut port.from_guest {
                ring.taken = taken;
            }
        }
    }

    /// Queues that are served, and what their drivers signal.
    pub(super) fn notifies(&self) -> Vec<(u16, Arc<EventFd>)> {
        let of_ports = self.ports.iter().flat_map(|p| [&p.to_guest, &p.from_guest]);
        let rings = of_ports.chain([&self.to_driver, &self.from_driver]).flatten();
        rings.map(|r| (r.queue.index, Arc::clone(&r.queue.notify))).collect()
    }

    /// On the main loop, where clients come and go: takes note of those that did while the session was made.
    pub(super) fn look_at_hosts(&mut self) {
        for port in &self.ports {
            self.control.host(port.end.nr, port.end.is_open());
        }
    }

    /// The driver has notified.
    pub(super) fn notified(&mut self, queue: u16) {
        let is = |ring: &Option<Ring>| ring.as_ref().is_some_and(|r| r.queue.index == queue);
        if is(&self.to_driver) {
            self.act(Self::tell_driver);
        } else if is(&self.from_driver) {
            self.act(Self::hear_driver);
        } else if let Some(at) = self.ports.iter().position(|p| is(&p.to_guest)) {
            self.act(|s| s.deliver(at));
        } else if let Some(at) = self.ports.iter().position(|p| is(&p.from_guest)) {
            self.act(|s| s.collect(at));
        }
    }

    fn act(&mut self, work: impl FnOnce(&mut Self) -> Result<(), QueueError>) {
        if self.broken {
            return;
        }
        if let Err(error) = work(self) {
            self.broken = true;
            complain(|| tracing::warn!("virtio-serial needs a reset: {error}"));
            self.interrupt.needs_reset();
        }
    }

    fn position(&self, nr: u8) -> Option<usize> {
        self.ports.iter().position(|p| p.end.nr == nr)
    }

    /// Bytes that port `nr` takes from the host now.
    pub(super) fn room(&self, nr: u8) -> usize {
        let port = self.position(nr).and_then(|at| self.ports.get(at));
        port.filter(|p| p.guest_open && !self.broken)
            .map_or(0, |p| STAGED_MAX - p.staged.len().min(STAGED_MAX))
    }

    /// Bytes from the host, at most [`room`](Self::room).
    pub(super) fn receive(&mut self, nr: u8, data: &[u8]) {
        let Some(at) = self.position(nr) else { return };
        if let Some(port) = self.ports.get_mut(at) {
            port.staged.extend(data);
        }
        self.act(|s| s.deliver(at));
    }

    /// A client has come or gone.
    pub(super) fn host_changed(&mut self, nr: u8, open: bool) {
        let Some(at) = self.position(nr) else { return };
        if !self.ports.get(at).is_some_and(|p| p.end.console) {
            self.control.host(nr, open);
        }
        // What waited for room in a client that is gone waits no more.
        self.act(|s| s.collect(at).and_then(|()| s.tell_driver()));
    }

    /// The character device has room again.
    pub(super) fn writable(&mut self, nr: u8) {
        if let Some(at) = self.position(nr) {
            self.act(|s| s.collect(at));
        }
    }

    /// Staged bytes into the guest's buffers.
    fn deliver(&mut self, at: usize) -> Result<(), QueueError> {
        let Some(port) = self.ports.get_mut(at) else { return Ok(()) };
        let Some(ring) = &mut port.to_guest else { return Ok(()) };
        let before = port.staged.len();
        let mut more = false;
        for turn in 0.. {
            if port.staged.is_empty() {
                break;
            }
            if turn == TURN {
                more = true;
                break;
            }
            if !ring.next()? {
                break;
            }
            let mut written = 0;
            // The two halves of the ring buffer.
            for _ in 0..2 {
                let n = ring.chain.writable.fill(port.staged.as_slices().0);
                port.staged.drain(..n);
                written += n;
            }
            ring.complete(written);
        }
        ring.end_turn(more, &*self.interrupt);
        if port.staged.len() < before {
            port.end.backend.front_end_ready();
            if port.staged.is_empty() {
                // A close that had to wait for the last bytes.
                return self.tell_driver();
            }
        }
        Ok(())
    }

    /// The guest's bytes to the character device.
    fn collect(&mut self, at: usize) -> Result<(), QueueError> {
        let Some(port) = self.ports.get_mut(at) else { return Ok(()) };
        let Some(ring) = &mut port.from_guest else { return Ok(()) };
        let mut more = true;
        for _ in 0..TURN {
            if !ring.next()? {
                more = false;
                break;
            }
            let room = if port.end.console { usize::MAX } else { port.end.backend.room() };
            if room == 0 {
                more = false;
                break;
            }
            let mut bytes = [0; CHUNK];
            let part = bytes.get_mut(..room.min(CHUNK)).unwrap_or_default();
            let count = ring.chain.readable.take(part);
            ring.taken += count;
            port.end.backend.write(part.get(..count).unwrap_or_default());
            if ring.chain.readable.is_empty() {
                ring.complete(0);
            }
        }
        ring.end_turn(more, &*self.interrupt);
        Ok(())
    }

    /// Messages of the driver.
    fn hear_driver(&mut self) -> Result<(), QueueError> {
        let mut opened = Vec::new();
        let Some(ring) = &mut self.from_driver else { return Ok(()) };
        let mut more = true;
        for _ in 0..TURN {
            if !ring.next()? {
                more = false;
                break;
            }
            let mut bytes = [0; CONTROL_MAX];
            let count = ring.chain.readable.take(&mut bytes);
            let message = bytes.get(..count).unwrap_or_default();
            match self.control.message(message) {
                Effect::None => {}
                Effect::Guest { nr, open } => opened.push((nr, open)),
                Effect::Nonsense => complain(|| tracing::warn!("virtio-serial: control message {message:?}")),
            }
            ring.complete(0);
        }
        ring.end_turn(more, &*self.interrupt);
        for (nr, open) in opened {
            let Some(port) = self.position(nr).and_then(|at| self.ports.get_mut(at)) else { continue };
            port.guest_open = open;
            if open {
                port.end.backend.front_end_ready();
            } else {
                // For a reader that is gone.
                port.staged.clear();
            }
        }
        self.tell_driver()
    }

    /// Messages to the driver, as many as it has buffers for.
    fn tell_driver(&mut self) -> Result<(), QueueError> {
        let Self { ports, control, to_driver, interrupt, .. } = self;
        let Some(ring) = to_driver else { return Ok(()) };
        let unread = |nr: u8| ports.iter().any(|p| p.end.nr == nr && !p.staged.is_empty());
        let mut more = true;
        for _ in 0..TURN {
            let Some((nr, message)) = control.next(unread) else {
                more = false;
                break;
            };
            if !ring.next()? {
                more = false;
                break;
            }
            let written = ring.chain.writable.fill(&message);
            ring.complete(written);
            // One that does not fit is cut, and the driver's own loss.
            control.said(nr);
        }
        ring.end_turn(more, &**interrupt);
        Ok(())
    }
}
