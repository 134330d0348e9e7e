//! One session of a network device: owns its rings and what they share. `rx` and `tx` hold the two directions.

use std::fmt::Display;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::control::{Command, ControlQueue};
use super::face::Face;
use super::feature;
use super::rx::Receiver;
use super::saved::Carried;
use super::turn::Ended;
use super::tx::Sender;
use super::vhost::LentPair;
use crate::event::Token;
use crate::memory::GuestMemory;
use crate::net::{Offloads, Tap};
use crate::virtio::queue::Position;
use crate::virtio::{ActivateError, ActiveQueue, Interrupt, complain};

/// The two rings of one pair.
pub(super) struct Pair {
    pub(super) rx: Receiver,
    pub(super) tx: Sender,
}

/// The rings of a session by what they are for.
pub(super) struct Rings {
    /// Receive and transmit; at least one pair.
    pub(super) pairs: Vec<(ActiveQueue, ActiveQueue)>,
    pub(super) control: Option<ActiveQueue>,
}

impl Rings {
    /// §5.1.2: pair `n` is queues 2n and 2n + 1. The control queue follows the last pair that the device has, or the first
    /// if the driver does not know of several.
    pub(super) fn sort(
        queues: Vec<ActiveQueue>,
        features: u64,
        pairs_of_device: usize,
    ) -> Result<Self, ActivateError> {
        let most = if features & feature::MQ == 0 { 1 } else { pairs_of_device };
        let mut by_index: Vec<Option<ActiveQueue>> = (0..=2 * most).map(|_| None).collect();
        for queue in queues {
            // Others have no use with these features.
            if let Some(place) = by_index.get_mut(usize::from(queue.index)) {
                *place = Some(queue);
            }
        }
        let control = by_index.pop().flatten().filter(|_| features & feature::CTRL_VQ != 0);
        let mut pairs = Vec::with_capacity(most);
        let mut by_index = by_index.into_iter();
        while let (Some(rx), Some(tx)) = (by_index.next(), by_index.next()) {
            match (rx, tx) {
                (Some(rx), Some(tx)) => pairs.push((rx, tx)),
                (None, _) if pairs.is_empty() => return Err(ActivateError::MissingQueue(super::RX)),
                (_, None) if pairs.is_empty() => return Err(ActivateError::MissingQueue(super::TX)),
                // A driver need not use all pairs.
                _ => break,
            }
        }
        Ok(Self { pairs, control })
    }
}

pub(super) struct Server {
    /// None in an empty slot, or when the interface is gone.
    taps: Vec<Arc<Tap>>,
    /// Of the taps, and of the rings that they fill.
    pub(super) watches: Vec<Token>,
    /// Of the driver's notifications, but for those of the rings that the taps fill.
    pub(super) driver_watches: Vec<Token>,
    /// The kernel serves so many pairs, the first ones.
    pub(super) lent: Vec<LentPair>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) pairs: Vec<Pair>,
    /// Pairs in use, 1 to all.
    enabled: usize,
    control: Option<ControlQueue>,
    pub(super) features: u64,
    offloads: Offloads,
    face: Arc<Face>,
    pub(super) interrupt: Arc<dyn Interrupt>,
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
        rings: Rings,
        features: u64,
        memory: Arc<GuestMemory>,
        face: Arc<Face>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let pair = |(rx, tx)| Pair { rx: Receiver::new(rx, features), tx: Sender::new(tx, features) };
        Self {
            taps: Vec::new(),
            watches: Vec::new(),
            driver_watches: Vec::new(),
            lent: Vec::new(),
            memory,
            pairs: rings.pairs.into_iter().map(pair).collect(),
            enabled: 1,
            control: rings.control.map(ControlQueue::new),
            features,
            offloads: offloads(features),
            face,
            interrupt,
            broken: false,
        }
    }

    /// Where each ring stands when no handler runs, buffers in hand not counted as taken; and what the driver has set up.
    pub(super) fn stand(&self) -> (Vec<(u16, Position)>, Carried) {
        let of_pair = |p: &Pair| {
            let (rx, tx) = (&p.rx.queue, &p.tx.queue);
            [(rx.index, p.rx.position()), (tx.index, tx.queue.position(0))]
        };
        let control = self.control.iter().map(ControlQueue::place);
        let positions = self.pairs.iter().flat_map(of_pair).chain(control).collect();
        let bits = [
            (self.offloads.checksum, feature::GUEST_CSUM),
            (self.offloads.tso4, feature::GUEST_TSO4),
            (self.offloads.tso6, feature::GUEST_TSO6),
        ];
        let offloads = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        (positions, Carried { pairs: self.enabled as u16, offloads })
    }

    /// Before it serves: what the driver had set up.
    pub(super) fn go_on(&mut self, carried: Carried) {
        self.enabled = usize::from(carried.pairs).clamp(1, self.pairs.len().max(1));
        self.offloads = offloads(carried.offloads & self.features);
    }

    pub(super) fn notify_control(&self) -> Option<Arc<EventFd>> {
        self.control.as_ref().map(ControlQueue::notify)
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
        if let Err(error) = self.apply_offloads() {
            complain(|| tracing::warn!(netdev = self.name(), "cannot set the tap's offloads: {error}"));
        }
        if let Err(error) = self.apply_enabled() {
            complain(|| tracing::warn!(netdev = self.name(), "cannot set the tap's queues: {error}"));
        }
    }

    /// The interface has them, not its queues: one tells it for all.
    fn apply_offloads(&self) -> io::Result<()> {
        self.taps.first().map_or(Ok(()), |tap| tap.set_offloads(self.offloads))
    }

    /// A queue that nobody reads must not get packets.
    fn apply_enabled(&self) -> io::Result<()> {
        self.taps.iter().enumerate().try_for_each(|(pair, tap)| tap.set_enabled(pair < self.enabled))
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
        if self.broken || pair >= self.enabled || pair < self.lent.len() {
            return;
        }
        let (Some(tap), Some(rings)) = (self.taps.get(pair), self.pairs.get_mut(pair)) else { return };
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
        if self.broken || pair < self.lent.len() {
            return;
        }
        let Some(rings) = self.pairs.get_mut(pair) else { return };
        // The guest may send on a pair for which the host has no queue, or none in use: any other will do.
        let tap = self.taps.get(pair).filter(|_| pair < self.enabled).or(self.taps.first());
        let ended = rings.tx.run(tap.map(AsRef::as_ref), &*self.interrupt);
        let notify = &rings.tx.queue;
        if ended == Ok(Ended::Full) {
            let _ = notify.notify.write(1);
        }
        let index = notify.index;
        self.after(index, ended);
    }

    /// Does what the driver says on the control queue.
    pub(super) fn control(&mut self) {
        let Some(mut control) = self.control.take().filter(|_| !self.broken) else { return };
        let (features, interrupt) = (self.features, Arc::clone(&self.interrupt));
        let ended = control.run(features, &*interrupt, |command| self.obey(command));
        let index = control.index();
        self.control = Some(control);
        self.after(index, ended.map(|()| Ended::Idle));
    }

    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Granted => true,
            Command::Mac(mac) => {
                self.face.set_mac(mac);
                true
            }
            Command::Pairs(pairs) => {
                let (pairs, before) = (usize::from(pairs), self.enabled);
                if pairs > self.pairs.len() {
                    return false;
                }
                self.enabled = pairs;
                if let Err(error) = self.apply_enabled() {
                    complain(|| tracing::warn!(netdev = self.name(), "cannot set the tap's queues: {error}"));
                    self.enabled = before;
                    return false;
                }
                // An edge that came while the queue was not in use is past.
                (before..pairs).for_each(|pair| self.tap_ready(pair));
                true
            }
            Command::Offloads(bits) => {
                let before = std::mem::replace(&mut self.offloads, offloads(bits));
                let done = self.apply_offloads();
                if done.is_err() {
                    self.offloads = before;
                }
                done.is_ok()
            }
        }
    }

    fn after(&mut self, queue: u16, ended: Result<Ended, impl Display>) {
        match ended {
            Ok(Ended::Idle | Ended::Full) => {}
            Ok(Ended::TapGone) => self.lose_link(),
            Err(error) => self.break_down(queue, error),
        }
    }

    /// Stops until the driver resets the device.
    pub(super) fn break_down(&mut self, queue: u16, why: impl Display) {
        self.broken = true;
        complain(|| tracing::warn!(netdev = self.name(), "virtio-net needs a reset: queue {queue}: {why}"));
        self.interrupt.needs_reset();
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
