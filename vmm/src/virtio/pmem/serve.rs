//! One session of the device: owns its ring, and answers requests in order.
//!
//! All requests that are there are answered by one flush: what each of them is about was written before it was sent.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::Flush;
use crate::virtio::queue::{Chain, Queue, QueueError};
use crate::virtio::{Interrupt, complain};

/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// `struct virtio_pmem_req` and `struct virtio_pmem_resp`: a number each.
const WORD: usize = 4;
/// Answers (§5.19.6.2).
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;
/// Requests that one flush answers at most.
const BATCH: usize = 64;

/// What a session is made from.
pub(super) struct Parts {
    pub(super) device: Arc<str>,
    pub(super) flush: Flush,
    pub(super) queue: Queue,
    pub(super) notify: Arc<EventFd>,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

pub(super) struct Server {
    device: Arc<str>,
    flush: Flush,
    queue: Queue,
    pub(super) notify: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    /// Requests of a turn, and whether each is one; kept for their memory.
    chains: Vec<(Chain, bool)>,
    broken: bool,
}

impl Server {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { device, flush, queue, notify, interrupt } = parts;
        Self { device, flush, queue, notify, interrupt, chains: Vec::new(), broken: false }
    }

    /// Takes a turn.
    pub(super) fn run(&mut self) {
        if self.broken {
            return;
        }
        let (count, ended) = self.collect();
        self.answer(count);
        if self.queue.publish() {
            self.interrupt.queue(0);
        }
        match ended {
            Ok(false) => {}
            // The watch is edge-triggered: this makes an edge. It cannot fail: the counter is far from full.
            Ok(true) => drop(self.notify.write(1)),
            Err(error) => {
                self.broken = true;
                let device = &*self.device;
                complain(|| tracing::warn!(device, "virtio-pmem needs a reset: queue 0: {error}"));
                self.interrupt.needs_reset();
            }
        }
    }

    /// Takes the requests that are there, as many as one turn answers. How many, and whether there may be more.
    fn collect(&mut self) -> (usize, Result<bool, QueueError>) {
        self.queue.disable_notify();
        for count in 0..BATCH {
            if count == self.chains.len() {
                self.chains.push((Chain::default(), false));
            }
            let Some((chain, is_flush)) = self.chains.get_mut(count) else { break };
            loop {
                match self.queue.pop(chain) {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(error) => return (count, Err(error)),
                }
                match self.queue.enable_notify() {
                    Ok(true) => self.queue.disable_notify(),
                    Ok(false) => return (count, Ok(false)),
                    Err(error) => return (count, Err(error)),
                }
            }
            let mut word = [0; WORD];
            *is_flush = chain.readable.take(&mut word) == WORD && u32::from_le_bytes(word) == FLUSH;
        }
        (BATCH, Ok(true))
    }

    fn answer(&mut self, count: usize) {
        let Self { device, flush, queue, chains, .. } = self;
        let chains = chains.get_mut(..count).unwrap_or_default();
        let mut result = DONE;
        if chains.iter().any(|(_, is_flush)| *is_flush)
            && let Err(error) = flush()
        {
            complain(|| {
                tracing::error!(device = &**device, "what the guest has written may be lost: {error}");
            });
            result = FAILED;
        }
        for (chain, is_flush) in chains {
            let answer = if *is_flush { result } else { FAILED };
            // One without room for an answer comes back as it is.
            let fits = chain.writable.len() >= WORD as u64;
            let written = if fits { chain.writable.fill(&answer.to_le_bytes()) } else { 0 };
            queue.complete(chain.head, u32::try_from(written).unwrap_or(u32::MAX));
        }
    }
}
