//! How a NIC comes to a stand to be saved, and how one goes on from what was saved (`saved.rs`).

use super::port::Port;
use super::saved::{Carried, Saved};
use crate::virtio::queue::Position;
use crate::virtio::state::{SUSPEND_DEADLINE, StateError, same};

/// What a NIC that is restored goes on with.
pub(super) struct Restored {
    pub(super) carried: Option<Carried>,
    /// The NIC is not as the driver knows it: its tap was gone and is there again, or it has another address.
    pub(super) link_changed: bool,
}

const VHOST: &str = "a NIC with vhost=on";

/// An address as people write it.
fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Port {
    /// Ends the session, and says where it stood. After an error it goes on.
    pub(super) fn suspend(&self) -> Result<(Vec<(u16, Position)>, Carried), StateError> {
        let mut state = self.lock();
        let session = state.session.as_ref().ok_or(StateError::Busy)?;
        let stood = session.suspend(SUSPEND_DEADLINE).ok_or(StateError::Busy)?;
        state.session = None;
        Ok(stood)
    }

    pub(super) fn save(&self, carried: Option<Carried>) -> Result<Saved, StateError> {
        let state = self.lock();
        if state.backend.as_ref().is_some_and(|backend| !backend.vhosts().is_empty()) {
            return Err(StateError::Excluded(VHOST));
        }
        let (present, pairs) = (state.backend.is_some(), self.pairs() as u16);
        Ok(Saved {
            present,
            mac: state.mac,
            face: self.face.mac(),
            pairs,
            link: self.face.link(),
            carried,
            renewed: false,
        })
    }

    pub(super) fn restore(&self, saved: &Saved) -> Result<Restored, StateError> {
        let here = self.save(None)?;
        let there = |present: bool| if present { "a NIC" } else { "an empty slot" };
        same("what is in the slot", &there(saved.present), &there(here.present))?;
        if saved.present {
            same("mac", &text(saved.mac), &text(here.mac))?;
        }
        same("the number of queue pairs", &saved.pairs, &here.pairs)?;
        self.lock().mac = saved.mac;
        self.face.set_mac(saved.face);
        let link_changed = saved.present && (saved.link != here.link || saved.renewed);
        Ok(Restored { carried: saved.carried, link_changed })
    }
}
