//! One session of a network device: owns its rings and what they share. `rx` and `tx` hold the two directions.

use std::fmt::Display;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::feature;
use super::port::Face;
use super::rx::Receiver;
use super::turn::Ended;
use super::tx::Sender;
use crate::event::Token;
use crate::net::{Offloads, Tap};
use crate::virtio::{ActiveQueue, Interrupt, complain};

/// The two rings of one pair.
pub(super) struct Pair {
    rx: Receiver,
    tx: Sender,
}

impl Pair {
    pub(super) fn new(rx: ActiveQueue, tx: ActiveQueue, features: u64) -> Self {
        Self { rx: Receiver::new(rx, features), tx: Sender::new(tx, features) }
    }
}

pub(super) struct Server {
    /// None in an empty slot, or when the interface is gone.
    taps: Vec<Arc<Tap>>,
    /// Of the taps, and of the rings that they fill.
    pub(super) watches: Vec<Token>,
    pairs: Vec<Pair>,
    offloads: Offloads,
    face: Arc<Face>,
    interrupt: Arc<dyn Interrupt>,
    broken: bool,
}

/// What the guest can take from the tap when it has accepted `features`.
fn offloads(features: u64) -> Offloads {
    let has = |bit| features & bit != 0;
    Offloads {
        checksum: has(feature::GUEST_CSUM),
        tso4: has(feature::GUEST_TSO4),
        tso6: has(feature::GUEST_TSO6),
    }
}

impl Server {
    pub(super) fn new(
        pairs: Vec<Pair>,
        features: u64,
        face: Arc<Face>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let offloads = offloads(features);
        let (taps, watches) = (Vec::new(), Vec::new());
        Self { taps, watches, pairs, offloads, face, interrupt, broken: false }
    }

    pub(super) fn pairs(&self) -> usize {
        self.pairs.len()
    }

    pub(super) fn notify_rx(&self, pair: usize) -> Option<Arc<EventFd>> {
        self.pairs.get(pair).map(|p| Arc::clone(&p.rx.queue.notify))
    }

    pub(super) fn notify_tx(&self, pair: usize) -> Option<Arc<EventFd>> {
        self.pairs.get(pair).map(|p| Arc::clone(&p.tx.queue.notify))
    }

    /// Takes other taps, or none.
    pub(super) fn set_taps(&mut self, taps: &[Arc<Tap>]) {
        self.taps = taps.to_vec();
        for pair in &mut self.pairs {
            pair.rx.tap_ready = false;
        }
        self.apply_offloads();
    }

    fn apply_offloads(&self) {
        // The interface has them, not its queues: one tells it for all.
        if let Some(tap) = self.taps.first()
            && let Err(error) = tap.set_offloads(self.offloads)
        {
            complain(|| tracing::warn!(netdev = tap.id(), "cannot set the tap's offloads: {error}"));
        }
    }

    /// Shows the guest that its link is up, or that it is not.
    pub(super) fn set_link(&self, up: bool) {
        if self.face.set_link(up) != up {
            self.interrupt.config();
        }
    }

    /// The tap of a pair has packets, or is gone.
    pub(super) fn tap_ready(&mut self, pair: usize) {
        if let Some(pair) = self.pairs.get_mut(pair) {
            pair.rx.tap_ready = true;
        }
        self.receive(pair);
    }

    /// Moves packets to the guest: as many as the tap has and the guest has buffers for.
    pub(super) fn receive(&mut self, pair: usize) {
        let (Some(tap), Some(rings), false) = (self.taps.get(pair), self.pairs.get_mut(pair), self.broken)
        else {
            return;
        };
        let ended = rings.rx.run(tap, &*self.interrupt);
        let notify = &rings.rx.queue;
        if ended == Ok(Ended::Full) {
            // The watches are edge-triggered: this makes an edge.
            let _ = notify.notify.write(1);
        }
        let index = notify.index;
        self.after(index, ended);
    }

    /// Moves packets from the guest. Without a tap they are dropped.
    pub(super) fn transmit(&mut self, pair: usize) {
        let (Some(rings), false) = (self.pairs.get_mut(pair), self.broken) else { return };
        // The guest may send on a pair for which the host has no queue: any other will do.
        let tap = self.taps.get(pair).or(self.taps.first());
        let ended = rings.tx.run(tap.map(AsRef::as_ref), &*self.interrupt);
        let notify = &rings.tx.queue;
        if ended == Ok(Ended::Full) {
            let _ = notify.notify.write(1);
        }
        let index = notify.index;
        self.after(index, ended);
    }

    fn after(&mut self, queue: u16, ended: Result<Ended, impl Display>) {
        match ended {
            Ok(Ended::Idle | Ended::Full) => {}
            Ok(Ended::TapGone) => self.lose_link(),
            Err(error) => {
                self.broken = true;
                complain(|| {
                    tracing::warn!(netdev = self.name(), "virtio-net needs a reset: queue {queue}: {error}");
                });
                self.interrupt.needs_reset();
            }
        }
    }

    fn name(&self) -> &str {
        self.taps.first().map_or("(empty slot)", |t| t.id())
    }

    /// The interface was deleted. What the guest sends from now on is dropped.
    fn lose_link(&mut self) {
        if self.face.set_link(false) {
            tracing::error!(netdev = self.name(), "the tap is gone; the guest's link is down");
            self.interrupt.config();
        }
        self.taps.clear();
    }
}
