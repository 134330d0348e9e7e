//! What templates and clones need of a VM beyond its verbs: to be saved, to be defined with an identity that is settled already, and to be started
//! from what was saved. Called by the room above.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::VmSpec;
use tokio::time::timeout;
use uuid::Uuid;

use super::inbox::Request;
use super::life::Verb;
use super::registry::Fleet;
use super::view::News;
use super::{FleetError, spec as rules};
use crate::store::Store;

/// Longer than the longest deadline that the state machine has for any verb asked here.
const VERB: Duration = Duration::from_secs(120);

impl Fleet {
    /// The records, and the places of templates and clones.
    pub fn store(&self) -> &Arc<Store> {
        &self.context.store
    }

    /// A job of the room above, about a VM.
    pub fn open_job(&self, kind: &'static str, name: &str) -> u32 {
        self.context.jobs.open(kind, &name.into())
    }

    /// It has got further: fails when it was cancelled.
    pub fn note_job(&self, id: u32, phase: &'static str, progress: (u64, u64)) -> Result<(), FleetError> {
        self.context.jobs.note(id, phase, progress)
    }

    /// It has ended.
    pub fn close_job(&self, id: u32, result: Result<(), FleetError>) {
        self.context.jobs.close(id, result);
    }

    /// One job under way.
    pub fn job(&self, id: u32) -> Option<super::jobs::Job> {
        self.context.jobs.get(id)
    }

    /// Tells the world.
    pub fn tell(&self, news: News) {
        self.context.tell(news);
    }

    /// Asks for a verb and waits until it is done.
    pub async fn carry_out(&self, name: &str, verb: Verb) -> Result<(), FleetError> {
        let job = self.ask(name, verb).await?;
        self.end_of(name, job).await
    }

    /// Waits for the end of a job of this VM.
    pub async fn end_of(&self, name: &str, job: u32) -> Result<(), FleetError> {
        let Some(end) = self.wait_job(job) else { return Ok(()) };
        let late = || FleetError::Busy(format!("VM \"{name}\": job {job} does not end"));
        timeout(VERB, end).await.map_err(|_| late())?.unwrap_or(Ok(()))
    }

    /// Saves a VM that is paused to two files, which must be empty; they are synced when this returns.
    pub async fn save(&self, name: &str, state: OwnedFd, memory: OwnedFd) -> Result<(), FleetError> {
        let receiver = self.post(name, |answer| Request::Save { state, memory, answer })?;
        let gone = |_| FleetError::NoSuchVm(format!("VM \"{name}\" was undefined"));
        // The command's own deadline ends it.
        receiver.await.map_err(gone)?
    }

    /// Defines a VM of this identity.
    pub async fn define_as(&self, name: &str, uuid: Uuid, spec: VmSpec) -> Result<(), FleetError> {
        let text = serde_json::to_string(&VmSpec { uuid: Some(uuid), ..spec });
        let text = text.map_err(|error| FleetError::InvalidSpec(format!("definition: {error}")))?;
        self.define(name, &text, false, None).await.map(drop)
    }

    /// Starts a VM from what was saved in `incoming`, as another VM than that one, and waits until it answers.
    pub async fn start_from(&self, name: &str, paused: bool, incoming: &Path) -> Result<(), FleetError> {
        let (verb, incoming) = (Verb::Start { paused }, Some(Arc::from(incoming)));
        let job = self.request(name, |answer| Request::Job { verb, incoming, answer }).await??;
        self.end_of(name, job).await
    }

    /// The hardware addresses of a definition's cards.
    pub fn macs(spec: &VmSpec, uuid: Uuid) -> Vec<String> {
        spec.nics.iter().zip(spec.nic_numbers()).map(|(nic, number)| rules::mac(nic, uuid, number)).collect()
    }
}
