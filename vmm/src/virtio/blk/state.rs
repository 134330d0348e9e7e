//! What is saved of a disk or an empty slot, and how a running device comes to a stand for it.
//!
//! ```text
//!   runs ── quiesce: takes no new requests ──▶ nothing in flight, all told ── gate closed ──▶ suspended ── activate ──▶ runs
//!     ▲                                              │ deadline
//!     └──────────────────── goes on ─────────────────┘
//! ```
//!
//! What is on the disk is not saved, nor where it is: only what the guest knows of it.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::port::Port;
use super::serve;
use crate::block::SECTOR;
use crate::event::Ops;
use crate::virtio::queue::Position;
use crate::virtio::state::{SUSPEND_DEADLINE, StateError, same};

/// A block device as its guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// As it was offered to the driver.
    features: u64,
    /// `None`: an empty slot.
    disk: Option<SavedDisk>,
    /// The guest is to be told that something has changed.
    #[serde(skip)]
    renewed: bool,
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
struct SavedDisk {
    sectors: u64,
    serial: String,
    read_only: bool,
}

impl Port {
    /// Ends the session with nothing in flight; says where each ring stands. After an error the session goes on.
    pub(super) fn suspend(&self) -> Result<Vec<(u16, Position)>, StateError> {
        let deadline = Instant::now() + SUSPEND_DEADLINE;
        let Some(session) = self.lock().session.clone() else {
            self.settle()?;
            return Ok(Vec::new());
        };
        let (quiet, is_quiet) = channel();
        let gate = Arc::clone(&session.gate);
        session.io_thread.post(move |ops: &mut Ops<'_>| serve::quiesce(&gate, ops, quiet));
        let is_quiet = is_quiet.recv_timeout(SUSPEND_DEADLINE).map_err(|_| StateError::Busy);
        if let Err(error) = is_quiet.and_then(|()| self.settle()) {
            let gate = Arc::clone(&session.gate);
            session.io_thread.post(move |ops: &mut Ops<'_>| serve::go_on(&gate, ops));
            return Err(error);
        }
        let mut positions = Vec::new();
        let closed = session.gate.close(&session.io_thread, deadline, |server| {
            positions = server.positions();
            true
        });
        if !closed {
            return Err(StateError::Busy);
        }
        self.lock().session = None;
        Ok(positions)
    }

    /// Nothing is in flight: the image is made whole, because it may be copied while the VM stands still.
    fn settle(&self) -> Result<(), StateError> {
        let medium = self.lock().medium.clone();
        let writable = medium.filter(|medium| !medium.read_only);
        writable.map_or(Ok(()), |medium| medium.disk.settle()).map_err(StateError::Image)
    }

    pub(super) fn save(&self) -> Saved {
        let state = self.lock();
        let disk = state.medium.as_ref().map(|medium| SavedDisk {
            sectors: medium.disk.size() / SECTOR,
            serial: text(&medium.serial),
            read_only: medium.read_only,
        });
        Saved { features: state.features, disk, renewed: false }
    }

    /// Says whether the guest is to be told when it goes on.
    pub(super) fn restore(&self, saved: &Saved) -> Result<bool, StateError> {
        let here = self.save();
        let there = |disk: &Option<SavedDisk>| if disk.is_some() { "a disk" } else { "an empty slot" };
        same("what is in the slot", &there(&saved.disk), &there(&here.disk))?;
        if let (Some(saved), Some(here)) = (&saved.disk, &here.disk) {
            same("serial", &saved.serial, &here.serial)?;
            same("readonly", &saved.read_only, &here.read_only)?;
            same("the size of the disk in sectors", &saved.sectors, &here.sectors)?;
        }
        self.lock().offer_again(saved.features).ok_or(StateError::Malformed("set of features"))?;
        Ok(saved.renewed)
    }
}

/// A serial number as people write it.
fn text(serial: &[u8]) -> String {
    let end = serial.iter().position(|b| *b == 0).unwrap_or(serial.len());
    String::from_utf8_lossy(serial.get(..end).unwrap_or_default()).into_owned()
}
