//! How rings go to the kernel and come back, in the middle of their lives: the server lends them and takes them back.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::serve::Server;
use super::vhost::{Events, LentPair, RINGS};
use crate::net::Backend;
use crate::vhost::Ring;
use crate::virtio::fd_of;

impl Server {
    /// Hands both rings of a pair to the kernel. After an error it has neither.
    pub(super) fn lend(&mut self, pair: usize, backend: &Arc<Backend>, events: Events) -> io::Result<()> {
        let (Some(rings), Some(vhost), Some(tap)) =
            (self.pairs.get_mut(pair), backend.vhosts().get(pair), backend.taps().get(pair))
        else {
            return Ok(());
        };
        vhost.prepare(self.features, &self.memory)?;
        let notify = [&rings.rx.queue.notify, &rings.tx.queue.notify].map(Arc::clone);
        let places = [rings.rx.lend(), rings.tx.queue.queue.lend(0)];
        for (index, ((place, kick), call)) in
            RINGS.into_iter().zip(places.iter().zip(&notify).zip(&events.calls))
        {
            vhost.start_ring(&Ring {
                index,
                size: place.size,
                desc: place.desc,
                avail: place.avail,
                used: place.used,
                base: place.base,
                kick: fd_of(kick),
                call: fd_of(call),
                error: fd_of(&events.error),
            })?;
        }
        // From here on what goes wrong is stopped by the drop.
        let lent = LentPair { backend: Arc::clone(backend), pair, _events: events };
        self.lent.push(lent);
        for index in RINGS {
            vhost.set_tap(index, Some(tap.as_fd()))?;
        }
        for kick in notify {
            // What the driver queued while nobody looked.
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Takes all rings back from the kernel. False: it had none.
    pub(super) fn take_back(&mut self) -> bool {
        let lent = std::mem::take(&mut self.lent);
        for pair in &lent {
            pair.stop();
            let (Some(vhost), Some(rings)) = (pair.vhost(), self.pairs.get_mut(pair.pair)) else { continue };
            match RINGS.map(|index| vhost.base(index)) {
                [Ok(rx), Ok(tx)] => {
                    for (queue, base) in [(&mut rings.rx.queue, rx), (&mut rings.tx.queue, tx)] {
                        queue.queue.take_back(base);
                        // What the kernel signalled last may not have been passed on: nobody listens to it any more. The driver
                        // would wait for that for ever, because with EVENT_IDX it asks for one interrupt, at a position
                        // that is past. One too many does no harm.
                        self.interrupt.queue(queue.index);
                    }
                }
                [Err(error), _] | [_, Err(error)] => {
                    let index = rings.rx.queue.index;
                    self.break_down(index, format_args!("lost its place: {error}"));
                }
            }
        }
        !lent.is_empty()
    }
}
