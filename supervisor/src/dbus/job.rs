//! `org.flotilla.Flotilla1.Job`: a job under way. The object goes when the job ends; `JobRemoved` of the Manager tells how.

use std::sync::Arc;

use zbus::interface;

use super::Shared;

pub(super) struct Job {
    pub(super) shared: Shared,
    pub(super) id: u32,
    pub(super) kind: &'static str,
    pub(super) name: Arc<str>,
}

/// A job under way.
#[interface(name = "org.flotilla.Flotilla1.Job")]
impl Job {
    /// Number.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> u32 {
        self.id
    }

    /// "start", "shutdown", "power-off", "pause", "resume", "attach-nic", "detach-nic", "attach-disk" or "detach-disk".
    #[zbus(property(emits_changed_signal = "const"), name = "Type")]
    fn kind(&self) -> &'static str {
        self.kind
    }

    /// The VM's name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn vm(&self) -> &str {
        &self.name
    }

    /// "running".
    #[zbus(property)]
    fn state(&self) -> &'static str {
        "running"
    }

    /// What it is doing now, in a word: the VM's state.
    #[zbus(property)]
    fn phase(&self) -> &'static str {
        self.shared.fleet.get(&self.name).map(|view| view.state.word()).unwrap_or_default()
    }
}
