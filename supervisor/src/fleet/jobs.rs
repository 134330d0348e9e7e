//! Jobs: numbers, rows for lists, ends and those who wait for them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::FleetError;
use super::view::News;

/// A job under way.
#[derive(Debug, Clone)]
pub struct Job {
    /// Number.
    pub id: u32,
    /// Type: `start`, `shutdown`, `power-off`, `pause`, `resume`, `create-template`, `verify-template` or `clone`.
    pub kind: &'static str,
    /// The VM.
    pub name: Arc<str>,
    /// When it began.
    pub since: Instant,
    /// What it is doing, in a word; empty: what the VM's state says.
    pub phase: &'static str,
    /// How much of that is done, and of how much; 0 of 0 when it cannot be said.
    pub progress: (u64, u64),
}

type Waiter = oneshot::Sender<Result<(), FleetError>>;

#[derive(Default)]
struct Table {
    last: u32,
    open: BTreeMap<u32, (Job, Vec<Waiter>)>,
}

/// All jobs.
pub struct Jobs {
    table: Mutex<Table>,
    news: mpsc::UnboundedSender<News>,
}

impl Jobs {
    pub(super) fn new(news: mpsc::UnboundedSender<News>) -> Self {
        Self { table: Mutex::default(), news }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a job.
    pub(super) fn open(&self, kind: &'static str, name: &Arc<str>) -> u32 {
        let mut table = self.table();
        // Number 0 is no job. After 2^32 jobs the numbers begin again; a job open for that long keeps its own.
        let mut id = table.last.wrapping_add(1).max(1);
        while table.open.contains_key(&id) {
            id = id.wrapping_add(1).max(1);
        }
        table.last = id;
        let job =
            Job { id, kind, name: Arc::clone(name), since: Instant::now(), phase: "", progress: (0, 0) };
        table.open.insert(id, (job, Vec::new()));
        // Told under the lock, so that news of one job cannot overtake each other.
        let _ = self.news.send(News::JobNew { id, kind, name: Arc::clone(name) });
        id
    }

    /// Closes a job.
    pub(super) fn close(&self, id: u32, result: Result<(), FleetError>) {
        let mut table = self.table();
        let Some((job, waiters)) = table.open.remove(&id) else { return };
        for waiter in waiters {
            let _ = waiter.send(result.clone());
        }
        let _ = self.news.send(News::JobRemoved { id, kind: job.kind, name: job.name, result });
    }

    /// A job has got further. Told when the phase is another, or a hundredth more is done.
    pub(super) fn note(&self, id: u32, phase: &'static str, progress: (u64, u64)) {
        let mut table = self.table();
        let Some((job, _)) = table.open.get_mut(&id) else { return };
        let part = |(done, all): (u64, u64)| u128::from(done) * 100 / u128::from(all.max(1));
        let told = job.phase != phase || part(job.progress) != part(progress);
        (job.phase, job.progress) = (phase, progress);
        if told {
            let _ = self.news.send(News::JobChanged { id, name: Arc::clone(&job.name) });
        }
    }

    /// One job under way.
    pub fn get(&self, id: u32) -> Option<Job> {
        self.table().open.get(&id).map(|(job, _)| job.clone())
    }

    /// The end of a job; `None` when it has ended already.
    pub fn wait(&self, id: u32) -> Option<oneshot::Receiver<Result<(), FleetError>>> {
        let mut table = self.table();
        let (_, waiters) = table.open.get_mut(&id)?;
        let (sender, receiver) = oneshot::channel();
        waiters.push(sender);
        Some(receiver)
    }

    /// All jobs under way.
    pub fn list(&self) -> Vec<Job> {
        self.table().open.values().map(|(job, _)| job.clone()).collect()
    }
}
