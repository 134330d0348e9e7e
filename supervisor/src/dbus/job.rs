//! `org.flotilla.Flotilla1.Job`: a job under way. The object goes when the job ends; `JobRemoved` of the Manager tells how.

use std::sync::Arc;

use dbus_api::error::Error;
use zbus::interface;
use zbus::message::Header;

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
    /// As CancelJob of the Manager.
    async fn cancel(&self, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        self.shared.cancel(&header, self.id).await
    }

    /// Number.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> u32 {
        self.id
    }

    /// "start", "shutdown", "power-off", "pause", "resume", "attach-nic", "detach-nic", "attach-disk", "detach-disk", "create-template",
    /// "verify-template", "clone" or "create".
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

    /// What it is doing now, in a word or two: the VM's state, unless the job has words of its own.
    #[zbus(property)]
    fn phase(&self) -> &'static str {
        let own = self.shared.fleet.job(self.id).map(|job| job.phase).filter(|phase| !phase.is_empty());
        if let Some(phase) = own {
            return phase;
        }
        self.shared.fleet.get(&self.name).map(|view| view.state.word()).unwrap_or_default()
    }

    /// How much of the phase is done, and of how much; 0 of 0 when that cannot be said.
    #[zbus(property)]
    fn progress(&self) -> (u64, u64) {
        self.shared.fleet.job(self.id).map(|job| job.progress).unwrap_or_default()
    }
}
