//! What devices of the command line refer to by name: the I/O threads of a VM, and the error for a name that nothing has.

use super::MachineError;
use crate::config::VmConfig;
use crate::virtio::Worker;

/// The I/O thread of devices that name none: `io-default`.
const DEFAULT_IOTHREAD: &str = "default";

/// The I/O threads of a VM by name. A thread starts when a guest first drives a device on it.
#[derive(Clone)]
pub(super) struct Workers {
    named: Vec<(String, Worker)>,
    default: Worker,
}

impl Workers {
    pub(super) fn new(config: &VmConfig) -> Self {
        Self {
            named: config.iothreads.iter().map(|id| (id.clone(), Worker::new(id))).collect(),
            default: Worker::new(DEFAULT_IOTHREAD),
        }
    }

    /// Those that the command line names, in its order.
    pub(super) fn named(&self) -> impl Iterator<Item = (&str, &Worker)> {
        self.named.iter().map(|(id, worker)| (id.as_str(), worker))
    }

    /// That of devices that name none.
    pub(super) fn default(&self) -> &Worker {
        &self.default
    }

    /// The one of that name, or that of devices that name none.
    pub(super) fn find(&self, iothread: Option<&String>) -> Option<&Worker> {
        let Some(id) = iothread else { return Some(&self.default) };
        self.named.iter().find(|(name, _)| name == id).map(|(_, worker)| worker)
    }

    /// As [`find`](Self::find), for `device` of the command line.
    pub(super) fn get(&self, device: &str, iothread: Option<&String>) -> Result<Worker, MachineError> {
        let missing = || {
            let id = iothread.cloned().unwrap_or_default();
            no_such(device, "iothread", &id, "-object iothread")
        };
        self.find(iothread).cloned().ok_or_else(missing)
    }
}

/// `device` of the command line names a `what` that no `option` makes.
pub(super) fn no_such(device: &str, what: &'static str, id: &str, option: &'static str) -> MachineError {
    MachineError::NoSuch { device: device.into(), what, id: id.into(), option }
}
