//! The pool: units that were started before a VM needs one. Owns which of them wait, and which VM has which; called by `systemd` and `signals`.
//!
//! ```text
//! started by `refill` ─▶ coming ─ its process asks ─▶ waiting ─ take ─▶ given to a VM ─ give: its process becomes the VMM ─▶ ended, cleaned
//! ```
//!
//! A spare is an instance of the VMs' own template unit, so its user, limits and sandbox are a VM's. Its process is `flotilla-exec`, which waits
//! for an answer on the launch socket. When the daemon goes, the process asks the next one, who thereby finds it again; when none comes, it ends.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot};
use tracing::{info, warn};
use uuid::Uuid;

use super::unit::{SPARE, unit_of};
use super::{LaunchError, Prepared};
use crate::store::Process;

/// A spare that does not ask within this time after its start never will: longer than its process waits for a daemon.
const COMING: Duration = Duration::from_secs(90);
/// How long the process may take to read what it is to become.
const GIVE_DEADLINE: Duration = Duration::from_secs(10);

/// What a spare's process is to become.
#[derive(Debug)]
pub struct Given {
    /// Command line and descriptors.
    pub prepared: Prepared,
    /// Whether it was sent.
    pub sent: oneshot::Sender<io::Result<()>>,
}

#[derive(Debug)]
struct Spare {
    instance: String,
    process: Process,
    answer: oneshot::Sender<Given>,
}

#[derive(Debug, Default)]
struct Table {
    /// Started, and not heard of yet.
    coming: BTreeMap<String, Instant>,
    /// The oldest first.
    waiting: VecDeque<Spare>,
    /// Taken for a VM, but not told so yet.
    taken: BTreeMap<String, Spare>,
    /// Instances and the VMs that have them.
    owners: BTreeMap<String, String>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pool {
    size: usize,
    table: Mutex<Table>,
    lack: Notify,
    ended: mpsc::UnboundedSender<String>,
}

impl Pool {
    /// A pool of `size` spares, and the names of those that ended: they are to be cleaned.
    pub(super) fn new(size: usize) -> (Self, mpsc::UnboundedReceiver<String>) {
        let (ended, inbox) = mpsc::unbounded_channel();
        (Self { size, table: Mutex::default(), lack: Notify::new(), ended }, inbox)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name for a spare that is to be started; it counts from now on.
    pub(super) fn new_instance(&self) -> String {
        let random = Uuid::new_v4().as_fields().0;
        let instance = format!("{SPARE}{random:08x}");
        self.expect(&instance);
        instance
    }

    /// A spare that will ask soon.
    pub(super) fn expect(&self, instance: &str) {
        self.table().coming.insert(instance.to_owned(), Instant::now());
    }

    /// A spare that an earlier daemon gave to a VM.
    pub(super) fn own(&self, instance: &str, vm: &str) {
        self.table().owners.insert(instance.to_owned(), vm.to_owned());
    }

    /// The VM that has it.
    pub(super) fn owner(&self, instance: &str) -> Option<String> {
        self.table().owners.get(instance).cloned()
    }

    /// How many wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.table().waiting.len()
    }

    fn lacks(&self) -> bool {
        let mut table = self.table();
        table.coming.retain(|instance, since| {
            let late = since.elapsed() > COMING;
            if late {
                warn!("{}: it runs, but is not a spare any more: left alone", unit_of(instance));
            }
            !late
        });
        table.waiting.retain(|spare| !spare.answer.is_closed());
        table.waiting.len() + table.coming.len() < self.size
    }

    /// Returns when there are fewer than there should be.
    pub(super) async fn lacking(&self) {
        while !self.lacks() {
            // Now and then without a reason: one that was expected may not come.
            let _ = tokio::time::timeout(COMING, self.lack.notified()).await;
        }
    }

    /// The process of a spare asks what to become: gives where the answer will come from, or `None` when there are enough.
    pub(super) fn came(&self, instance: &str, process: Process) -> Option<oneshot::Receiver<Given>> {
        let mut table = self.table();
        table.coming.remove(instance);
        table.waiting.retain(|spare| !spare.answer.is_closed());
        if table.waiting.len() + table.coming.len() >= self.size {
            return None;
        }
        let (answer, receiver) = oneshot::channel();
        info!("{}: a spare that waits", unit_of(instance));
        table.waiting.push_back(Spare { instance: instance.to_owned(), process, answer });
        Some(receiver)
    }

    /// Gives a spare to a VM, if one waits.
    pub(super) fn take(&self, vm: &str) -> Option<String> {
        let mut table = self.table();
        let spare = loop {
            let spare = table.waiting.pop_front()?;
            // The process may have gone without a word.
            if !spare.answer.is_closed() {
                break spare;
            }
        };
        let instance = spare.instance.clone();
        table.owners.insert(instance.clone(), vm.to_owned());
        table.taken.insert(instance.clone(), spare);
        self.lack.notify_one();
        Some(instance)
    }

    /// Tells a spare that was taken what to become; its process is the VMM then.
    pub(super) async fn give(&self, instance: &str, prepared: Prepared) -> Result<Process, LaunchError> {
        let spare = self.table().taken.remove(instance);
        let gone = || LaunchError::SpareGone { unit: unit_of(instance) };
        let Spare { process, answer, .. } = spare.ok_or_else(gone)?;
        let (sent, receiver) = oneshot::channel();
        answer.send(Given { prepared, sent }).map_err(|_| gone())?;
        match tokio::time::timeout(GIVE_DEADLINE, receiver).await {
            Ok(Ok(Ok(()))) => Ok(process),
            _ => Err(gone()),
        }
    }

    /// A VM has no use for it: its unit is being ended, which is no news of that VM.
    pub(super) fn disown(&self, instance: &str) {
        let mut table = self.table();
        table.owners.remove(instance);
        table.taken.remove(instance);
    }

    /// The unit has no process any more.
    pub(super) fn ended(&self, instance: &str) {
        let mut table = self.table();
        table.coming.remove(instance);
        table.waiting.retain(|spare| spare.instance != instance);
        table.owners.remove(instance);
        table.taken.remove(instance);
        // The keeper ends with the daemon.
        let _ = self.ended.send(instance.to_owned());
        self.lack.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32) -> Process {
        Process { pid, start_time: 0, invocation: format!("{pid:x}") }
    }

    #[tokio::test]
    async fn a_spare_waits_is_taken_and_told() {
        let (pool, mut ended) = Pool::new(2);
        assert!(pool.lacks() && pool.take("web").is_none());
        let (one, two) = (pool.new_instance(), pool.new_instance());
        assert!(!pool.lacks(), "two are coming");
        let answer = pool.came(&one, process(1)).unwrap();
        let gone = pool.came(&two, process(2)).unwrap();
        assert!(pool.came("Spare-more", process(3)).is_none(), "there are enough");
        assert_eq!(pool.waiting(), 2);
        assert_eq!(pool.take("web").as_deref(), Some(one.as_str()));
        assert_eq!(pool.owner(&one).as_deref(), Some("web"));
        assert!(pool.lacks());
        tokio::spawn(async move {
            let given = answer.await.unwrap();
            assert_eq!(given.prepared.command_line, ["vmm"]);
            given.sent.send(Ok(())).unwrap();
        });
        let prepared = Prepared { command_line: vec!["vmm".into()], ..Prepared::default() };
        assert_eq!(pool.give(&one, prepared).await.unwrap(), process(1));
        // A process that went without a word is not given to anybody.
        drop(gone);
        assert_eq!(pool.take("db"), None);
        pool.ended(&one);
        assert_eq!((pool.owner(&one), ended.recv().await), (None, Some(one.clone())));
        let again = pool.give(&one, Prepared::default()).await.unwrap_err();
        assert!(matches!(again, LaunchError::SpareGone { .. }));
    }

    #[tokio::test]
    async fn one_that_hangs_up_when_it_is_told_is_gone() {
        let (pool, _ended) = Pool::new(1);
        for sent in [false, true] {
            let answer = pool.came("Spare-1", process(1)).unwrap();
            let instance = pool.take("web").unwrap();
            tokio::spawn(async move {
                if sent {
                    let given = answer.await.unwrap();
                    given.sent.send(Err(io::ErrorKind::BrokenPipe.into())).unwrap();
                }
            });
            let error = pool.give(&instance, Prepared::default()).await.unwrap_err();
            assert!(matches!(error, LaunchError::SpareGone { .. }), "{error}");
            pool.disown(&instance);
            assert_eq!(pool.owner(&instance), None);
        }
    }
}
