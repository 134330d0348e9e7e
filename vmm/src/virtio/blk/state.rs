//! How a running disk comes to a stand to be saved, and how one goes on from what was saved (`saved.rs`).
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

use super::port::Port;
use super::saved::{Saved, SavedDisk};
use super::serve;
use crate::block::SECTOR;
use crate::event::Ops;
use crate::virtio::queue::Position;
use crate::virtio::state::{SUSPEND_DEADLINE, StateError, same};

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
