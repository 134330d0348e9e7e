//! What systemd tells of units: owns what is known from its signals, and what the launcher and the reader of the signals share. For `systemd`.
//!
//! A unit's changes are told first for `Service`, then for `Unit`, and that order is promised to clients, so the second completes the first.
//! The reader never waits for systemd: it would wait for itself.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tracing::{debug, error, info};
use zbus::{MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant};

use super::pool::Pool;
use super::systemd1::ManagerProxy;
use super::unit::{PREFIX, instance_of, is_spare, path_of, unescape};
use super::{Event, Events, Notice, Prepared, signal_name};
use crate::fleet::life::Exit;
use crate::store::Process;

pub(super) const UNIT: &str = "org.freedesktop.systemd1.Unit";
pub(super) const SERVICE: &str = "org.freedesktop.systemd1.Service";
/// For calls that PID 1 answers from memory.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(15);

/// What is known of a unit from its signals.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub(super) main_pid: u32,
    pub(super) code: i32,
    pub(super) status: i32,
    pub(super) active: String,
    pub(super) invocation: String,
}

impl Known {
    pub(super) fn process(&self) -> Process {
        Process { pid: self.main_pid, start_time: 0, invocation: self.invocation.clone() }
    }

    /// `ExecMainCode` is `si_code` of SIGCHLD (sigaction(2)).
    pub(super) fn exit(&self) -> Exit {
        match self.code {
            libc::CLD_EXITED => Exit::Code(self.status),
            libc::CLD_KILLED | libc::CLD_DUMPED => Exit::Signal(signal_name(self.status)),
            _ => Exit::Unknown,
        }
    }
}

/// What the launcher and the reader of the signals both know.
pub(super) struct Shared {
    /// Listeners for the ends of a unit's jobs.
    pub(super) jobs: Mutex<HashMap<String, mpsc::UnboundedSender<(OwnedObjectPath, String)>>>,
    /// What a unit's process will ask for.
    pub(super) prepared: Mutex<HashMap<String, Prepared>>,
    /// Units that we start and of which no change was seen yet. systemd tells of the queued job first, with the unit still inactive:
    /// that is no end of a process.
    pub(super) fresh: Mutex<HashSet<String>>,
    /// Units that we killed: their failure is no news.
    pub(super) killed: Mutex<HashSet<String>>,
    /// Units that wait for a VM, and those that were given to one.
    pub(super) pool: Pool,
}

impl Shared {
    pub(super) fn new(pool: Pool) -> Self {
        Self {
            jobs: Mutex::default(),
            prepared: Mutex::default(),
            fresh: Mutex::default(),
            killed: Mutex::default(),
            pool,
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn rule(interface: &str, member: &str, paths: &str) -> zbus::Result<MatchRule<'static>> {
    MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .sender("org.freedesktop.systemd1")
        .interface(interface.to_owned())
        .member(member.to_owned())
        .path_namespace(paths.to_owned())
        .build()
}

pub(super) async fn read_jobs(mut stream: MessageStream, shared: Arc<Shared>) {
    while let Some(Ok(message)) = stream.next().await {
        type Body = (u32, OwnedObjectPath, String, String);
        let Ok((_, job, unit, result)) = message.body().deserialize::<Body>() else { continue };
        if let Some(listener) = lock(&shared.jobs).get(&unit) {
            let _ = listener.send((job, result));
        }
    }
    error!("systemd's signals ended");
}

pub(super) async fn read_changes(
    mut stream: MessageStream,
    shared: Arc<Shared>,
    manager: ManagerProxy<'static>,
    events: Events,
) {
    let prefix = path_of(PREFIX);
    let mut units: HashMap<String, Known> = HashMap::new();
    while let Some(Ok(message)) = stream.next().await {
        let ours = message.header().path().is_some_and(|path| path.starts_with(&prefix));
        if !ours {
            continue;
        }
        let Some(change) = Change::read(&message) else { continue };
        let known = units.entry(change.unit.clone()).or_default();
        let Some(mut before) = change.apply(known) else { continue };
        if lock(&shared.fresh).remove(&change.unit) && before.is_empty() {
            "inactive".clone_into(&mut before);
        }
        let Some(instance) = instance_of(&change.unit) else { continue };
        let Some(notice) = meaning(&before, known) else { continue };
        let (failed, ended) = (known.active == "failed", matches!(notice, Notice::Ended { .. }));
        let name = if is_spare(instance) { shared.pool.owner(instance) } else { Some(instance.to_owned()) };
        if ended {
            let whose = name.as_deref().unwrap_or_default();
            info!(FLOTILLA_VM = whose, "{} ended: {}", change.unit, known.exit());
            let killed = lock(&shared.killed).remove(&change.unit);
            if is_spare(instance) {
                shared.pool.ended(instance);
            } else if killed && failed {
                let (manager, unit) = (manager.clone(), change.unit.clone());
                tokio::spawn(async move {
                    // Awaited before the macro: what stands in a disabled one is never evaluated.
                    let reset = tokio::time::timeout(CALL_DEADLINE, manager.reset_failed_unit(&unit)).await;
                    debug!("{unit}: reset: {reset:?}");
                });
            }
            units.remove(&change.unit);
        }
        if let Some(name) = name {
            let _ = events.send(Event { name, notice });
        }
    }
    error!("systemd's signals ended");
}

/// What the change of a unit from the active state `before` says of its process.
fn meaning(before: &str, known: &Known) -> Option<Notice> {
    match (before, known.active.as_str()) {
        // "maintenance" is what CleanUnit does to a unit without a process; that it is over is no end of one.
        ("inactive" | "failed" | "maintenance", "inactive" | "failed") => None,
        (_, "inactive" | "failed") => {
            Some(Notice::Ended { invocation: known.invocation.clone(), exit: known.exit() })
        }
        (_, "activating" | "active") if known.main_pid != 0 => Some(Notice::Started(known.process())),
        // While ExecStop= runs after the process ended by itself, there is no main process: that is no stop.
        (_, "deactivating") if known.main_pid != 0 => Some(Notice::Stopping),
        _ => None,
    }
}

/// One `PropertiesChanged` of a unit.
struct Change {
    unit: String,
    interface: String,
    properties: HashMap<String, OwnedVariant>,
}

impl Change {
    fn read(message: &Message) -> Option<Self> {
        let header = message.header();
        let unit = unescape(header.path()?.as_str().strip_prefix("/org/freedesktop/systemd1/unit/")?)?;
        type Body = (String, HashMap<String, OwnedVariant>, Vec<String>);
        let (interface, properties, _) = message.body().deserialize::<Body>().ok()?;
        Some(Self { unit, interface, properties })
    }

    fn get<T: TryFrom<OwnedVariant>>(&self, name: &str) -> Option<T> {
        T::try_from(self.properties.get(name)?.try_clone().ok()?).ok()
    }

    /// Takes the change over. `Some` (the active state before) when it completes a pair.
    fn apply(&self, known: &mut Known) -> Option<String> {
        if self.interface == SERVICE {
            known.main_pid = self.get("MainPID").unwrap_or(known.main_pid);
            known.code = self.get("ExecMainCode").unwrap_or(known.code);
            known.status = self.get("ExecMainStatus").unwrap_or(known.status);
            return None;
        }
        if self.interface != UNIT {
            return None;
        }
        if let Some(invocation) = self.get::<Vec<u8>>("InvocationID") {
            known.invocation = hex(&invocation);
        }
        let active: String = self.get("ActiveState")?;
        Some(std::mem::replace(&mut known.active, active))
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
