//! What is saved of a virtio-serial device: which ports it has, what driver and device have told each other about them, and the bytes that
//! are on their way.

use serde::{Deserialize, Serialize};

use super::Console;
use super::control::Told;
use crate::virtio::state::{StateError, same};

/// A virtio-serial device as its guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    ports: Vec<SavedPort>,
    /// Of a running device.
    carried: Option<Vec<Carried>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedPort {
    nr: u8,
    console: bool,
    name: Option<String>,
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

impl Console {
    pub(super) fn saved(&self) -> Saved {
        let port = |port: &std::sync::Arc<super::port::PortEnd>| SavedPort {
            nr: port.nr,
            console: port.console,
            name: port.name.clone(),
        };
        let mut ports: Vec<_> = self.ports.iter().map(port).collect();
        ports.sort_by_key(|p| p.nr);
        Saved { ports, carried: self.carried.clone() }
    }

    pub(super) fn take_saved(&mut self, saved: &Saved) -> Result<(), StateError> {
        same("the ports of virtio-serial", &saved.ports, &self.saved().ports)?;
        let fits = |c: &Carried| c.staged.len() <= super::serve::STAGED_MAX;
        if !saved.carried.iter().flatten().all(fits) {
            return Err(StateError::Malformed("input of a port"));
        }
        self.carried.clone_from(&saved.carried);
        Ok(())
    }
}
