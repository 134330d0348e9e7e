//! Rings that the kernel serves: owns their hand-over, in both directions, and the descriptors it answers through.
//!
//! A NIC may come and go while the driver runs, so a ring changes hands in the middle of its life: the position of the next request
//! goes over and comes back, what has been used stands in the ring itself.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::net::Backend;
use crate::vhost::Vhost;

/// Numbers of the rings within a vhost-net device.
pub(super) const RINGS: [u32; 2] = [0, 1];

/// What the kernel signals for one pair.
pub(super) struct Events {
    /// The driver wants an interrupt: to the guest, from the guest.
    pub(super) calls: [EventFd; 2],
    /// A ring makes no sense.
    pub(super) error: EventFd,
}

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Self { calls: [event()?, event()?], error: event()? })
    }
}

/// A pair that the kernel serves. Stops it when dropped: the server, in which it stands before the rings, keeps guest memory
/// mapped until then.
pub(super) struct LentPair {
    pub(super) backend: Arc<Backend>,
    pub(super) pair: usize,
    pub(super) _events: Events,
}

impl LentPair {
    pub(super) fn vhost(&self) -> Option<&Vhost> {
        self.backend.vhosts().get(self.pair)
    }

    pub(super) fn stop(&self) {
        for (index, vhost) in RINGS.into_iter().zip(std::iter::repeat(self.vhost())) {
            if let Some(Err(error)) = vhost.map(|v| v.set_tap(index, None)) {
                tracing::error!(netdev = self.backend.id(), "vhost-net does not stop: {error}");
            }
        }
    }
}

impl Drop for LentPair {
    fn drop(&mut self) {
        self.stop();
    }
}
