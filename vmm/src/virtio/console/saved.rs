//! What is saved of a virtio-serial device: which ports it has, what driver and device have told each other about them, and the bytes that
//! are on their way.

use serde::{Deserialize, Serialize};

use super::control::Told;

/// A virtio-serial device as its guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub(super) ports: Vec<SavedPort>,
    /// Of a running device.
    pub(super) carried: Option<Vec<Carried>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedPort {
    pub(super) nr: u8,
    pub(super) console: bool,
    pub(super) name: Option<String>,
}

/// One port of a suspended device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Carried {
    pub(super) nr: u8,
    pub(super) told: Told,
    /// Bytes that have left the character device and not reached the guest.
    pub(super) staged: Vec<u8>,
    /// The guest reads.
    pub(super) guest_open: bool,
    /// Bytes of the guest's next request that the character device has had already.
    pub(super) taken: usize,
}
