//! What is saved of a disk or an empty slot: its form in a snapshot. `state.rs` makes it and takes it.

use serde::{Deserialize, Serialize};

/// A block device as its guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// As it was offered to the driver.
    pub(super) features: u64,
    /// `None`: an empty slot.
    pub(super) disk: Option<SavedDisk>,
    /// The guest is to be told that something has changed.
    #[serde(skip)]
    pub(super) renewed: bool,
}

impl Saved {
    /// A disk that is read-only here is what it is here: it may come to an empty slot, or be in the place of another read-only one. One that is
    /// written must be the one that was saved.
    pub(in crate::virtio) fn take_identity(&mut self, here: &Self) {
        let replaceable = self.disk.as_ref().is_none_or(|disk| disk.read_only);
        if replaceable && here.disk.as_ref().is_some_and(|disk| disk.read_only) && self.disk != here.disk {
            self.disk.clone_from(&here.disk);
            self.renewed = true;
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedDisk {
    pub(super) sectors: u64,
    pub(super) serial: String,
    pub(super) read_only: bool,
}
