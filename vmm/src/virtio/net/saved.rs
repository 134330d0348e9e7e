//! What is saved of a NIC or an empty slot. Packets are not: what the tap holds stays there, as on any link that is down for a while.

use serde::{Deserialize, Serialize};

/// What a driver has set up through the control queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Carried {
    /// Pairs of queues in use.
    pub(super) pairs: u16,
    /// Offloads to the guest, as feature bits.
    pub(super) offloads: u64,
}

/// A NIC as its guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// There is a NIC in the slot.
    pub(super) present: bool,
    /// The NIC's own address, and the one that the driver has given it.
    pub(super) mac: [u8; 6],
    pub(super) face: [u8; 6],
    pub(super) pairs: u16,
    /// The link is up.
    #[serde(default = "up")]
    pub(super) link: bool,
    /// Of a running device.
    pub(super) carried: Option<Carried>,
    /// The guest is to be told that something has changed.
    #[serde(skip)]
    pub(super) renewed: bool,
}

impl Saved {
    /// The address becomes that of `here`: the one that the driver has given the NIC was of the VM that was saved.
    pub(in crate::virtio) fn take_identity(&mut self, here: &Self) {
        if self.present && here.present {
            (self.mac, self.face) = (here.mac, here.mac);
            self.renewed = true;
        }
    }
}

/// Of a NIC whose state does not say.
fn up() -> bool {
    true
}
