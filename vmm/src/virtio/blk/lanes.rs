//! The rings of one session, and which of their requests are in flight: owns the tags that the engine knows them by.
//!
//! A head names a request within its ring only; over all rings a tag does. Tags are as many as the rings have entries together,
//! and the lowest free ones are used first, so that a disk that is hardly used takes hardly any memory.

use super::request::{Kind, Request};
use crate::virtio::queue::{MAX_SIZE, Position, QueueError};
use crate::virtio::{ActiveQueue, Interrupt};

/// The rings that the driver has enabled.
pub(super) struct Lanes(Vec<ActiveQueue>);

impl Lanes {
    pub(super) fn new(queues: Vec<ActiveQueue>) -> Self {
        Self(queues)
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ActiveQueue> {
        self.0.iter()
    }

    /// Requests that are worth having with the engine at once: the entries of all of them, but no more than one may have.
    pub(super) fn depth(&self) -> u16 {
        let entries = self.0.iter().fold(0, |sum: u16, lane| sum.saturating_add(lane.queue.size()));
        entries.min(MAX_SIZE)
    }

    /// Where each stands when nothing is in flight.
    pub(super) fn positions(&self) -> Vec<(u16, Position)> {
        self.0.iter().map(|lane| (lane.index, lane.queue.position(0))).collect()
    }

    /// Takes a request from ring `lane`. False: there is none.
    pub(super) fn pop(&mut self, lane: usize, request: &mut Request) -> Result<bool, QueueError> {
        let Some(ring) = self.0.get_mut(lane) else { return Ok(false) };
        request.lane = lane;
        ring.queue.pop(&mut request.chain)
    }

    pub(super) fn complete(&mut self, request: &Request, written: u32) {
        if let Some(ring) = self.0.get_mut(request.lane) {
            ring.queue.complete(request.chain.head, written);
        }
    }

    /// To drivers that poll.
    pub(super) fn show(&mut self) {
        self.0.iter_mut().for_each(|lane| lane.queue.show());
    }

    /// To drivers that wait, too.
    pub(super) fn publish(&mut self, interrupt: &dyn Interrupt) {
        for lane in &mut self.0 {
            if lane.queue.publish() {
                interrupt.queue(lane.index);
            }
        }
    }

    /// Whether any has requests that were not taken.
    pub(super) fn wait(&self) -> bool {
        self.0.iter().any(|lane| lane.queue.waits())
    }

    pub(super) fn disable_notify(&mut self) {
        self.0.iter_mut().for_each(|lane| lane.queue.disable_notify());
    }

    /// True: requests have come meanwhile.
    pub(super) fn enable_notify(&mut self) -> Result<bool, QueueError> {
        let mut more = false;
        for lane in &mut self.0 {
            more |= lane.queue.enable_notify()?;
        }
        Ok(more)
    }

    /// As if the driver had notified: the watches are edge-triggered, and this makes an edge.
    pub(super) fn come_back(&self) {
        if let Some(lane) = self.0.first() {
            let _ = lane.notify.write(1);
        }
    }
}

/// Requests that the engine has, by tag.
#[derive(Default)]
pub(super) struct InFlight {
    slots: Vec<Option<(Kind, Box<Request>)>>,
    free: Vec<u16>,
    busy: usize,
}

impl InFlight {
    /// How many there are.
    pub(super) fn busy(&self) -> usize {
        self.busy
    }

    /// The tag that the next [`put`](Self::put) gives. `None`: no more than 65535, which the rings' lengths together never reach.
    pub(super) fn next_tag(&mut self) -> Option<u16> {
        if self.free.is_empty() {
            self.free.push(u16::try_from(self.slots.len()).ok()?);
            self.slots.push(None);
        }
        self.free.last().copied()
    }

    pub(super) fn put(&mut self, kind: Kind, request: Box<Request>) {
        let Some(tag) = self.free.pop() else { return };
        if let Some(slot) = self.slots.get_mut(usize::from(tag)) {
            *slot = Some((kind, request));
            self.busy += 1;
        }
    }

    /// What the engine gave back.
    pub(super) fn take(&mut self, tag: u16) -> Option<(Kind, Box<Request>)> {
        let taken = self.slots.get_mut(usize::from(tag)).and_then(Option::take)?;
        self.free.push(tag);
        self.busy -= 1;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_names_one_request_until_it_is_given_back() {
        let mut flying = InFlight::default();
        let put = |flying: &mut InFlight, offset| {
            let tag = flying.next_tag().unwrap();
            assert_eq!(flying.next_tag(), Some(tag), "asking takes nothing");
            flying.put(Kind::Read, Box::new(Request { offset, ..Request::default() }));
            tag
        };
        let tags: Vec<u16> = (0..3).map(|offset| put(&mut flying, offset)).collect();
        assert_eq!((&tags[..], flying.busy()), (&[0, 1, 2][..], 3));
        assert_eq!(flying.take(1).map(|(_, r)| r.offset), Some(1));
        assert!(flying.take(1).is_none() && flying.take(9).is_none());
        assert_eq!(put(&mut flying, 7), 1);
        assert_eq!(flying.take(1).map(|(_, r)| r.offset), Some(7));
        assert_eq!(flying.busy(), 2);
    }
}
