//! One session of the device: owns its rings, and gives pages to the host.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryBackend as _};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::pages::Pages;
use super::port::Port;
use super::stats::Stats;
use super::{PAGE, QUEUE_SIZE};
use crate::memory::discard::Discarder;
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::{ActiveQueue, Interrupt, complain};

/// Page numbers read at once, and in one turn: a request may hold a billion, and the thread has other devices.
const CHUNK: usize = 1024;
const CHUNKS_PER_TURN: usize = 8;
/// Reports, of 32 ranges each in Linux, in one turn.
const REPORTS_PER_TURN: usize = 4;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// What a session is made from.
pub(super) struct Parts {
    pub(super) discarder: Discarder,
    pub(super) queues: Vec<(Role, ActiveQueue)>,
    pub(super) port: Arc<Port>,
    /// Signalled when somebody wants new statistics.
    pub(super) refresh: Arc<EventFd>,
    pub(super) follower: Option<Follower>,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

/// The automatic.
pub(super) struct Follower {
    /// Says that it is time to look. Set again each time, so that nobody has to read it.
    pub(super) timer: TimerFd,
    pub(super) interval: Duration,
    /// What the guest keeps of what it could spare.
    pub(super) percent: u8,
    /// The next statistics are those that it has asked for.
    pub(super) waits: bool,
}

struct Line {
    role: Role,
    queue: ActiveQueue,
    chain: Chain,
    /// `chain` is a request that is not done yet.
    held: bool,
}

pub(super) struct Server {
    discarder: Discarder,
    pages: Pages,
    lines: Vec<Line>,
    port: Arc<Port>,
    refresh: Arc<EventFd>,
    follower: Option<Follower>,
    interrupt: Arc<dyn Interrupt>,
    numbers: Vec<u32>,
    broken: bool,
}

/// Whether a turn has left work.
type More = bool;

impl Server {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { discarder, queues, port, refresh, follower, interrupt } = parts;
        let line = |(role, queue)| Line { role, queue, chain: Chain::default(), held: false };
        Self {
            pages: Pages::from(&discarder),
            discarder,
            lines: queues.into_iter().map(line).collect(),
            port,
            refresh,
            follower,
            interrupt,
            numbers: Vec::new(),
            broken: false,
        }
    }

    /// What drivers signal, by the number that [`run`](Self::run) takes.
    pub(super) fn notifies(&self) -> Vec<Arc<EventFd>> {
        self.lines.iter().map(|l| Arc::clone(&l.queue.notify)).collect()
    }

    pub(super) fn refresh(&self) -> Arc<EventFd> {
        Arc::clone(&self.refresh)
    }

    pub(super) fn follower(&self) -> Option<&Follower> {
        self.follower.as_ref()
    }

    /// Time has come for the automatic to look at the guest.
    pub(super) fn look(&mut self) {
        if let Some(follower) = &mut self.follower {
            follower.waits = true;
            if let Err(error) = follower.timer.reset(follower.interval, None) {
                tracing::error!("the automatic balloon stops: {}", io::Error::from(error));
            }
        }
        self.refresh_stats();
    }

    /// Takes a turn at one queue.
    pub(super) fn run(&mut self, number: usize) {
        if self.broken {
            return;
        }
        let Some(role) = self.lines.get(number).map(|l| l.role) else { return };
        let result = match role {
            Role::Inflate | Role::Deflate => self.page_numbers(number),
            Role::Stats => self.take_stats(number),
            Role::Reporting => self.reports(number),
        };
        self.after(number, result);
    }

    /// Gives the buffer for statistics back, which asks the driver for new ones (§5.5.6.3).
    pub(super) fn refresh_stats(&mut self) {
        let Some(number) = self.lines.iter().position(|l| l.role == Role::Stats) else { return };
        if let Some(line) = self.lines.get_mut(number).filter(|l| l.held && !self.broken) {
            line.held = false;
            line.queue.queue.complete(line.chain.head, 0);
            self.after(number, Ok(false));
        }
    }

    fn after(&mut self, number: usize, result: Result<More, QueueError>) {
        let Some(line) = self.lines.get_mut(number) else { return };
        if line.queue.queue.publish() {
            self.interrupt.queue(line.queue.index);
        }
        match result {
            Ok(false) => {}
            // The watch is edge-triggered: this makes an edge. It cannot fail: the counter is far from full.
            Ok(true) => drop(line.queue.notify.write(1)),
            Err(error) => {
                self.broken = true;
                let index = line.queue.index;
                complain(|| tracing::warn!("virtio-balloon needs a reset: queue {index}: {error}"));
                self.interrupt.needs_reset();
            }
        }
    }

    /// The inflate and deflate queues: arrays of page numbers.
    fn page_numbers(&mut self, number: usize) -> Result<More, QueueError> {
        let Self { discarder, pages, lines, numbers, .. } = self;
        let Some(line) = lines.get_mut(number) else { return Ok(false) };
        for _ in 0..CHUNKS_PER_TURN {
            if !line.next()? {
                return Ok(false);
            }
            let mut bytes = [0; CHUNK * 4];
            let count = line.chain.readable.take(&mut bytes);
            numbers.clear();
            numbers.extend(
                bytes.get(..count).unwrap_or_default().as_chunks().0.iter().map(|n| u32::from_le_bytes(*n)),
            );
            if line.role == Role::Deflate {
                pages.leave(numbers);
            } else {
                let ram = discarder.memory();
                let is_ram = |n: u64| ram.address_in_range(GuestAddress(n.saturating_mul(PAGE)));
                pages.enter(numbers, is_ram, |at, len| {
                    if let Err(error) = discarder.discard(at, len) {
                        complain(|| tracing::warn!("guest memory at {at:#x}+{len:#x} stays: {error}"));
                    }
                });
            }
            if line.chain.readable.is_empty() {
                line.held = false;
                line.queue.queue.complete(line.chain.head, 0);
            }
        }
        Ok(true)
    }

    /// Free pages, as buffers for the device to write to (§5.5.6.5): they come back without their contents.
    fn reports(&mut self, number: usize) -> Result<More, QueueError> {
        let Self { discarder, lines, .. } = self;
        let Some(line) = lines.get_mut(number) else { return Ok(false) };
        for _ in 0..REPORTS_PER_TURN {
            if !line.next()? {
                return Ok(false);
            }
            for part in line.chain.writable.parts() {
                let len = part.iov_len;
                if let Err(error) = discarder.discard_host(part.iov_base.cast(), len) {
                    complain(|| tracing::warn!("{len} bytes of unused guest memory stay: {error}"));
                }
            }
            line.held = false;
            line.queue.queue.complete(line.chain.head, 0);
        }
        Ok(true)
    }

    /// Keeps the newest message and its buffer.
    fn take_stats(&mut self, number: usize) -> Result<More, QueueError> {
        let Some(line) = self.lines.get_mut(number) else { return Ok(false) };
        // A driver has one buffer; each further one sends the one before back. One round through the ring is as much as there can be.
        for _ in 0..=QUEUE_SIZE {
            if line.held {
                // Keep the buffer unless there is another.
                let mut next = Chain::default();
                if !line.pop_into(&mut next)? {
                    return Ok(false);
                }
                line.queue.queue.complete(line.chain.head, 0);
                line.chain = next;
            } else if !line.next()? {
                return Ok(false);
            }
            let mut bytes = [0; Stats::MAX_BYTES];
            let count = line.chain.readable.take(&mut bytes);
            self.port.set_stats(Stats::parse(bytes.get(..count).unwrap_or_default()));
            if let Some(follower) = &mut self.follower
                && std::mem::take(&mut follower.waits)
            {
                self.port.follow(follower.percent);
            }
        }
        Ok(true)
    }
}

impl Line {
    /// Makes sure that there is a request in hand. False: there is none, and the driver tells when there is.
    fn next(&mut self) -> Result<bool, QueueError> {
        if !self.held {
            let mut chain = std::mem::take(&mut self.chain);
            let found = self.pop_into(&mut chain);
            self.chain = chain;
            self.held = found?;
        }
        Ok(self.held)
    }

    fn pop_into(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let queue = &mut self.queue.queue;
        queue.disable_notify();
        loop {
            if queue.pop(chain)? {
                return Ok(true);
            }
            if !queue.enable_notify()? {
                return Ok(false);
            }
            queue.disable_notify();
        }
    }
}
