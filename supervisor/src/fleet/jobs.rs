//! Jobs: numbers, rows for lists, ends and those who wait for them; which have been cancelled.

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
    /// Type: `start`, `shutdown`, `power-off`, `pause`, `resume`, `create-template`, `verify-template`, `clone` or `create`.
    pub kind: &'static str,
    /// The VM.
    pub name: Arc<str>,
    /// When it began.
    pub since: Instant,
    /// What it is doing, in a word; empty: what the VM's state says.
    pub phase: &'static str,
    /// How much of that is done, and of how much; 0 of 0 when it cannot be said.
    pub progress: (u64, u64),
    /// It is to end at its next step.
    pub cancelled: bool,
}

/// Jobs that look at each step whether they are cancelled. Those of a VM's own verbs are cancelled by its state machine.
const STEPPED: [&str; 4] = ["create", "clone", "create-template", "verify-template"];

fn cancelled() -> FleetError {
    FleetError::Cancelled("it was cancelled".to_owned())
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
        let job = Job {
            id,
            kind,
            name: Arc::clone(name),
            since: Instant::now(),
            phase: "",
            progress: (0, 0),
            cancelled: false,
        };
        table.open.insert(id, (job, Vec::new()));
        // Told under the lock, so that news of one job cannot overtake each other.
        let _ = self.news.send(News::JobNew { id, kind, name: Arc::clone(name) });
        id
    }

    /// Closes a job.
    pub(super) fn close(&self, id: u32, result: Result<(), FleetError>) {
        let mut table = self.table();
        let Some((job, waiters)) = table.open.remove(&id) else { return };
        // Whatever it stumbled over while it was being ended.
        let result = result.map_err(|error| if job.cancelled { cancelled() } else { error });
        for waiter in waiters {
            let _ = waiter.send(result.clone());
        }
        let _ = self.news.send(News::JobRemoved { id, kind: job.kind, name: job.name, result });
    }

    /// A job is to end. Says whether it does by itself, at its next step; if not, it is for its VM to say.
    pub(super) fn cancel(&self, id: u32) -> Result<(Job, bool), FleetError> {
        let mut table = self.table();
        let missing = || FleetError::NoSuchJob(format!("job {id} has ended, or never was"));
        let (job, _) = table.open.get_mut(&id).ok_or_else(missing)?;
        let stepped = STEPPED.contains(&job.kind);
        job.cancelled |= stepped;
        Ok((job.clone(), stepped))
    }

    /// A job has got further: fails when it was cancelled. Told when the phase is another, or a hundredth more is done.
    pub(super) fn note(&self, id: u32, phase: &'static str, progress: (u64, u64)) -> Result<(), FleetError> {
        let mut table = self.table();
        let Some((job, _)) = table.open.get_mut(&id) else { return Ok(()) };
        if job.cancelled {
            return Err(cancelled());
        }
        let part = |(done, all): (u64, u64)| u128::from(done) * 100 / u128::from(all.max(1));
        let told = job.phase != phase || part(job.progress) != part(progress);
        (job.phase, job.progress) = (phase, progress);
        if told {
            let _ = self.news.send(News::JobChanged { id, name: Arc::clone(&job.name) });
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancelled_job_ends_at_its_next_step_whatever_it_says() {
        let (news, _inbox) = mpsc::unbounded_channel();
        let jobs = Jobs::new(news);
        let (copy, other, start) = (
            jobs.open("create", &"a".into()),
            jobs.open("clone", &"b".into()),
            jobs.open("start", &"c".into()),
        );
        assert_eq!(jobs.note(copy, "copying", (1, 2)), Ok(()));
        assert!(jobs.cancel(copy).unwrap().1 && !jobs.cancel(start).unwrap().1);
        assert_eq!(jobs.note(copy, "copying", (2, 2)), Err(cancelled()));
        assert_eq!((jobs.note(other, "", (0, 0)), jobs.note(start, "", (0, 0))), (Ok(()), Ok(())));
        let mut ends = [copy, other].map(|id| jobs.wait(id).unwrap());
        jobs.close(copy, Err(FleetError::StoreFailed("the copy stopped".to_owned())));
        jobs.close(other, Err(FleetError::StoreFailed("the disk is full".to_owned())));
        assert_eq!(ends[0].try_recv().unwrap(), Err(cancelled()));
        assert!(matches!(ends[1].try_recv().unwrap(), Err(FleetError::StoreFailed(_))));
        assert!(matches!(jobs.cancel(copy), Err(FleetError::NoSuchJob(_))));
        // What was done before anybody noticed is done.
        jobs.cancel(jobs.open("create", &"d".into())).unwrap();
        let late = jobs.list().last().unwrap().id;
        let mut end = jobs.wait(late).unwrap();
        jobs.close(late, Ok(()));
        assert_eq!(end.try_recv().unwrap(), Ok(()));
    }
}
