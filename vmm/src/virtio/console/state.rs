//! How a virtio-serial device is saved, and how one is given what was saved (`saved.rs`).

use super::Console;
use super::saved::{Carried, Saved, SavedPort};
use crate::virtio::state::{StateError, same};

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
