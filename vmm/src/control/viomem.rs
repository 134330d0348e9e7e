//! `get-viomem` and `set-viomem`: how much of a virtio-mem device's memory the guest has, and is to have.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{CommandError, Control, Refusal, State};
use crate::virtio::mem::{Info, Port};

impl Control {
    fn memory_device(&self, id: &str) -> Result<Arc<Port>, CommandError> {
        let vm = self.vm.as_ref().filter(|_| self.state != State::Shutdown).ok_or(Refusal::Ended)?;
        let none = || {
            CommandError::NotFound(format!(
                "Device {id} not found: the VM has no virtio-mem device of this name"
            ))
        };
        vm.memory_device(id).ok_or_else(none)
    }

    pub(super) fn viomem(&self, id: &str) -> Result<Value, CommandError> {
        let Info { block_size, node, plugged_size, requested_size, size } = self.memory_device(id)?.info();
        Ok(json!({
            "block-size": block_size, "node": node, "plugged-size": plugged_size,
            "requested-size": requested_size, "size": size,
        }))
    }

    /// The guest takes its time; `get-viomem` shows how far it is.
    pub(super) fn set_viomem(&self, id: &str, size: u64) -> Result<Value, CommandError> {
        let set = self.memory_device(id)?.request(size);
        set.map_err(|e| CommandError::Bad(format!("Device {id}: {e}")))?;
        Ok(json!({}))
    }
}
