//! Pairs of queues of a NIC that another process serves, and the control queue, which this process serves: owns which rings the back end gets,
//! and which of them are in use.
//!
//! The driver begins with one pair (virtio 1.2 §5.1.6.5.5). The back end is given the rings of all pairs that the driver has set up, and is told
//! ring by ring which are in use when the driver says so.

use std::time::Instant;

use super::model::Model;
use super::{Served, complain};
use crate::vhost::user::{PATIENCE, UserError};
use crate::virtio::ActiveQueue;
use crate::virtio::net::control::{Command, ControlQueue};

/// The queues that the back end is to get, and the one that it is not.
pub(super) fn sort(
    model: &Model,
    features: u64,
    queues: Vec<ActiveQueue>,
) -> (Vec<ActiveQueue>, Option<ControlQueue>) {
    let (served, control) = (model.served_queues(features), model.control_queue(features));
    let (mut rings, mut commands) = (Vec::with_capacity(queues.len()), None);
    for queue in queues {
        if Some(queue.index) == control {
            commands = Some(ControlQueue::new(queue));
        } else if queue.index < served {
            rings.push(queue);
        }
        // Others have no use with these features.
    }
    if model.has_pairs() {
        // A driver need not use all pairs; what follows a gap it cannot use either.
        let whole = rings.iter().zip(0..).take_while(|(ring, place)| ring.index == *place).count();
        rings.truncate(whole & !1);
    }
    (rings, commands)
}

impl Served {
    /// Whether the driver uses a ring. Only NICs have some that it does not.
    pub(super) fn is_in_use(&self, index: u16) -> bool {
        !self.peer.model.has_pairs() || index / 2 < self.pairs_in_use
    }

    /// Does what the driver says on the control queue.
    pub(super) fn commands(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        let (features, interrupt) = (self.features, std::sync::Arc::clone(&self.interrupt));
        match control.run(features, &*interrupt, |command| self.obey(command)) {
            Ok(()) => self.control = Some(control),
            // The queue is not looked at again.
            Err(error) => {
                let (device, queue) = (&self.peer.device, control.index());
                complain(|| tracing::warn!(device, "needs a reset: queue {queue}: {error}"));
                interrupt.needs_reset();
            }
        }
    }

    fn obey(&mut self, command: Command) -> bool {
        let Command::Pairs(pairs) = command else { return false };
        if usize::from(pairs) > self.queues.len() / 2 {
            return false;
        }
        match self.use_pairs(pairs) {
            Ok(()) => true,
            Err(error) => {
                self.front = None;
                self.give_up(&error);
                false
            }
        }
    }

    fn use_pairs(&mut self, pairs: u16) -> Result<(), UserError> {
        let front = self.front.clone().ok_or(UserError::Lost)?;
        let before = std::mem::replace(&mut self.pairs_in_use, pairs);
        let end = Instant::now() + PATIENCE;
        let changed = before.min(pairs)..before.max(pairs);
        for queue in self.queues.iter().filter(|q| changed.contains(&(q.index / 2))) {
            front.use_ring(queue.index.into(), pairs > before, end)?;
            if pairs > before {
                // What a quick driver has notified before the back end listened.
                let _ = queue.notify.write(1);
            }
        }
        Ok(())
    }
}
