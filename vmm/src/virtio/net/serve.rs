//! One session of a network device: owns both rings and what they share. `rx` and `tx` hold the two directions.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::rx::Receiver;
use super::turn::Ended;
use super::tx::Sender;
use super::{RX, TX};
use crate::net::Tap;
use crate::virtio::{ActiveQueue, Interrupt, complain};

/// What a session is made from.
pub(super) struct Parts {
    pub(super) tap: Option<Arc<Tap>>,
    pub(super) link: Arc<AtomicBool>,
    pub(super) features: u64,
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

pub(super) struct Server {
    tap: Option<Arc<Tap>>,
    link: Arc<AtomicBool>,
    interrupt: Arc<dyn Interrupt>,
    rx: Receiver,
    tx: Sender,
    broken: bool,
}

impl Server {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { tap, link, features, rx, tx, interrupt } = parts;
        Self {
            tap,
            link,
            interrupt,
            rx: Receiver::new(rx, features),
            tx: Sender::new(tx, features),
            broken: false,
        }
    }

    /// The tap has packets, or is gone.
    pub(super) fn tap_ready(&mut self) {
        self.rx.tap_ready = true;
        self.receive();
    }

    /// Moves packets to the guest: as many as the tap has and the guest has buffers for.
    pub(super) fn receive(&mut self) {
        let Some(tap) = self.tap.clone().filter(|_| !self.broken) else { return };
        let ended = self.rx.run(&tap, &*self.interrupt);
        self.after(RX, ended);
    }

    /// Moves packets from the guest.
    pub(super) fn transmit(&mut self) {
        if self.broken {
            return;
        }
        let ended = self.tx.run(self.tap.as_deref(), &*self.interrupt);
        self.after(TX, ended);
    }

    fn after(&mut self, queue: u16, ended: Result<Ended, impl Display>) {
        match ended {
            Ok(Ended::Idle) => {}
            // The watches are edge-triggered: this makes an edge.
            Ok(Ended::Full) if queue == RX => drop(self.rx.queue.notify.write(1)),
            Ok(Ended::Full) => drop(self.tx.queue.notify.write(1)),
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
        self.tap.as_ref().map_or("(empty slot)", |t| t.id())
    }

    /// The interface was deleted. What the guest sends from now on is dropped.
    fn lose_link(&mut self) {
        if self.link.swap(false, Ordering::AcqRel) {
            tracing::error!(netdev = self.name(), "the tap is gone; the guest's link is down");
            self.interrupt.config();
        }
        self.tap = None;
    }
}
