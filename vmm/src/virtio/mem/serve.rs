//! One session of the device: owns its ring, and answers requests in order.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::port::Port;
use super::request::{ANSWER_BYTES, Answer, REQUEST_BYTES, Request};
use crate::virtio::queue::{Chain, Queue, QueueError};
use crate::virtio::{Interrupt, complain};

/// Requests in a row: a reset of the device waits for them. Linux has one at a time.
const BATCH: u32 = 4;

/// What a session is made from.
pub(super) struct Parts {
    pub(super) port: Arc<Port>,
    pub(super) queue: Queue,
    pub(super) notify: Arc<EventFd>,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

pub(super) struct Server {
    port: Arc<Port>,
    queue: Queue,
    pub(super) notify: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    chain: Chain,
    broken: bool,
}

/// Whether a turn may have left work.
type More = bool;

impl Server {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { port, queue, notify, interrupt } = parts;
        Self { port, queue, notify, interrupt, chain: Chain::default(), broken: false }
    }

    /// Takes a turn.
    pub(super) fn run(&mut self) {
        if self.broken {
            return;
        }
        let ended = self.batch();
        if self.queue.publish() {
            self.interrupt.queue(0);
        }
        match ended {
            Ok(false) => {}
            // The watch is edge-triggered: this makes an edge. It cannot fail: the counter is far from full.
            Ok(true) => drop(self.notify.write(1)),
            Err(error) => {
                self.broken = true;
                complain(|| tracing::warn!("virtio-mem needs a reset: queue 0: {error}"));
                self.interrupt.needs_reset();
            }
        }
    }

    fn batch(&mut self) -> Result<More, QueueError> {
        self.queue.disable_notify();
        for _ in 0..BATCH {
            while !self.queue.pop(&mut self.chain)? {
                if !self.queue.enable_notify()? {
                    return Ok(false);
                }
                self.queue.disable_notify();
            }
            self.serve();
        }
        Ok(true)
    }

    fn serve(&mut self) {
        let Self { port, queue, chain, .. } = self;
        let mut written = 0;
        // Nothing is done of which the driver could not be told: such a request comes back as it is.
        if chain.writable.len() >= ANSWER_BYTES as u64 {
            let mut bytes = [0; REQUEST_BYTES];
            let count = chain.readable.take(&mut bytes);
            let request = Request::parse(bytes.get(..count).unwrap_or_default());
            let answer = request.map_or(Answer::Error, |request| port.carry_out(request));
            written = chain.writable.fill(&answer.bytes());
        }
        queue.complete(chain.head, u32::try_from(written).unwrap_or(u32::MAX));
    }
}
