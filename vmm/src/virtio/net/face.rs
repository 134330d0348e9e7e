//! What the guest sees of a NIC in its configuration space: written by any thread, read by the guest without a lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What the guest sees in configuration space.
pub(super) struct Face {
    mac: AtomicU64,
    link: AtomicBool,
}

impl Face {
    pub(super) fn new(mac: [u8; 6], link: bool) -> Self {
        let face = Self { mac: AtomicU64::new(0), link: AtomicBool::new(link) };
        face.set_mac(mac);
        face
    }

    pub(super) fn mac(&self) -> [u8; 6] {
        let [mac @ .., _, _] = self.mac.load(Ordering::Acquire).to_le_bytes();
        mac
    }

    pub(super) fn set_mac(&self, [a, b, c, d, e, f]: [u8; 6]) {
        self.mac.store(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), Ordering::Release);
    }

    pub(super) fn link(&self) -> bool {
        self.link.load(Ordering::Acquire)
    }

    /// Returns what it was.
    pub(super) fn set_link(&self, up: bool) -> bool {
        self.link.swap(up, Ordering::AcqRel)
    }
}
