//! The launcher under systemd: one instance of the template `flotilla-vm@.service` per VM, started by PID 1.
//!
//! PID 1 is a serial server, and dbus-daemon allows 128 replies under way per connection, so that few calls are in flight at once. The
//! ends of jobs and all property changes come over one match rule each, whatever the size of the fleet (a connection may have 512); a
//! unit's changes are told first for `Service`, then for `Unit`, and that order is promised to clients, so the second completes the first.
//! The reader of these signals never waits for systemd: it would wait for itself.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dbus_api::spec::Limits;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use tokio::sync::{Semaphore, mpsc};
use tracing::{debug, error, info, warn};
use zbus::{Connection, MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant};

#[path = "systemd_dhcp.rs"]
mod dhcp;

use super::server::{Identify, Source, vm_of_process};
use super::systemd1::{ManagerProxy, PropertiesProxy};
use super::unit::{PREFIX, SUFFIX, path_of, unescape, unit_of, vm_of_unit};
use super::{
    CONSOLE_SOCKET, Event, Events, Found, Handed, LaunchError, Launcher, Notice, Prepared, QMP_SOCKET,
    Wanted, limits, signal_name, tail,
};
use crate::fleet::life::Exit;
use crate::store::Process;

const UNIT: &str = "org.freedesktop.systemd1.Unit";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
/// The knee of PID 1's throughput is well below; more only queue there, where they cannot be cancelled.
const IN_FLIGHT: usize = 8;
/// From StartUnit to the end of its job. Shorter than the state machine's own deadline for a start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// For calls that PID 1 answers from memory.
const CALL_DEADLINE: Duration = Duration::from_secs(15);

/// The journal is asked once, when a VM has failed.
const JOURNAL_DEADLINE: Duration = Duration::from_secs(5);
/// Where systemd keeps what was set on units until the host's next boot.
const CONTROL: &str = "/run/systemd/system.control";

/// What is known of a unit from its signals.
#[derive(Debug, Clone, Default)]
struct Known {
    main_pid: u32,
    code: i32,
    status: i32,
    active: String,
    invocation: String,
}

impl Known {
    fn process(&self) -> Process {
        Process { pid: self.main_pid, start_time: 0, invocation: self.invocation.clone() }
    }

    /// `ExecMainCode` is `si_code` of SIGCHLD (sigaction(2)).
    fn exit(&self) -> Exit {
        match self.code {
            libc::CLD_EXITED => Exit::Code(self.status),
            libc::CLD_KILLED | libc::CLD_DUMPED => Exit::Signal(signal_name(self.status)),
            _ => Exit::Unknown,
        }
    }
}

#[derive(Default)]
struct Shared {
    /// Listeners for the ends of a unit's jobs.
    jobs: Mutex<HashMap<String, mpsc::UnboundedSender<(OwnedObjectPath, String)>>>,
    /// What a unit's process will ask for.
    prepared: Mutex<HashMap<String, Prepared>>,
    /// Units that we start and of which no change was seen yet. systemd tells of the queued job first, with the unit still inactive:
    /// that is no end of a process.
    fresh: Mutex<std::collections::HashSet<String>>,
    /// Units that we killed: their failure is no news.
    killed: Mutex<std::collections::HashSet<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module.
pub struct SystemdLauncher {
    connection: Connection,
    manager: ManagerProxy<'static>,
    shared: Arc<Shared>,
    calls: Semaphore,
    directory: PathBuf,
}

impl SystemdLauncher {
    /// Connects to the systemd on this bus and listens to it. The VMs' sockets are below `directory`.
    pub async fn connect(
        connection: Connection,
        directory: PathBuf,
        events: Events,
    ) -> Result<Self, LaunchError> {
        let manager = ManagerProxy::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .map_err(LaunchError::Bus)?;
        let shared = Arc::new(Shared::default());
        // Match before asking: an answer may overtake the call's reply.
        let jobs = rule("org.freedesktop.systemd1.Manager", "JobRemoved", "/org/freedesktop/systemd1");
        let changes =
            rule("org.freedesktop.DBus.Properties", "PropertiesChanged", "/org/freedesktop/systemd1/unit");
        let jobs = MessageStream::for_match_rule(
            jobs.map_err(LaunchError::Bus)?,
            &connection,
            NonZeroUsize::new(1024),
        );
        let jobs = jobs.await.map_err(LaunchError::Bus)?;
        let changes = MessageStream::for_match_rule(
            changes.map_err(LaunchError::Bus)?,
            &connection,
            NonZeroUsize::new(4096),
        );
        let changes = changes.await.map_err(LaunchError::Bus)?;
        manager.subscribe().await.map_err(LaunchError::Bus)?;
        tokio::spawn(read_jobs(jobs, Arc::clone(&shared)));
        tokio::spawn(read_changes(changes, Arc::clone(&shared), manager.clone(), events));
        let calls = Semaphore::new(IN_FLIGHT);
        Ok(Self { connection, manager, shared, calls, directory })
    }

    /// Wraps the fleet as the source of the launch socket: what was prepared for a start is handed over first.
    pub fn source(&self, fleet: Arc<dyn Source>) -> Arc<dyn Source> {
        Arc::new(PreparedFirst { shared: Arc::clone(&self.shared), fleet })
    }

    /// How the launch socket tells its peers apart.
    pub fn identify() -> Identify {
        Arc::new(vm_of_process)
    }

    async fn call<T>(
        &self,
        unit: &str,
        verb: &'static str,
        call: impl Future<Output = zbus::Result<T>>,
    ) -> Result<T, LaunchError> {
        let _slot = self.calls.acquire().await;
        match tokio::time::timeout(CALL_DEADLINE, call).await {
            Ok(result) => result.map_err(|error| refused(unit, error)),
            Err(_) => {
                Err(LaunchError::Timeout { unit: unit.to_owned(), verb, seconds: CALL_DEADLINE.as_secs() })
            }
        }
    }

    async fn property<T>(&self, unit: &str, interface: &str, property: &str) -> Result<T, LaunchError>
    where
        T: TryFrom<OwnedVariant>,
    {
        let proxy = PropertiesProxy::builder(&self.connection)
            .path(path_of(unit))
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .map_err(LaunchError::Bus)?;
        let value = self.call(unit, "describe", proxy.get(interface, property)).await?;
        T::try_from(value).map_err(|_| LaunchError::Unit {
            unit: unit.to_owned(),
            text: format!("property {property} has an unexpected type"),
        })
    }

    async fn describe(&self, unit: &str) -> Result<Known, LaunchError> {
        Ok(Known {
            main_pid: self.property(unit, SERVICE, "MainPID").await?,
            code: self.property(unit, SERVICE, "ExecMainCode").await?,
            status: self.property(unit, SERVICE, "ExecMainStatus").await?,
            active: self.property(unit, UNIT, "ActiveState").await?,
            invocation: hex(&self.property::<Vec<u8>>(unit, UNIT, "InvocationID").await?),
        })
    }

    /// Asks for a job by `ask` and waits for its end: systemd's word for it.
    async fn job(
        &self,
        unit: &str,
        verb: &'static str,
        ask: impl Future<Output = zbus::Result<OwnedObjectPath>>,
    ) -> Result<String, LaunchError> {
        let (sender, mut ended) = mpsc::unbounded_channel();
        lock(&self.shared.jobs).insert(unit.to_owned(), sender);
        let result = tokio::time::timeout(START_DEADLINE, async {
            let job = self.call(unit, verb, ask).await?;
            while let Some((path, result)) = ended.recv().await {
                if path == job {
                    return Ok(result);
                }
            }
            Err(LaunchError::Unit { unit: unit.to_owned(), text: "systemd went away".to_owned() })
        })
        .await;
        lock(&self.shared.jobs).remove(unit);
        result.unwrap_or_else(|_| {
            let seconds = START_DEADLINE.as_secs();
            Err(LaunchError::Timeout { unit: unit.to_owned(), verb, seconds })
        })
    }

    async fn start_unit(&self, name: &str, prepared: Prepared) -> Result<Process, LaunchError> {
        let unit = unit_of(name);
        lock(&self.shared.killed).remove(&unit);
        lock(&self.shared.fresh).insert(unit.clone());
        lock(&self.shared.prepared).insert(name.to_owned(), prepared);
        let outcome = match self.job(&unit, "start", self.manager.start_unit(&unit, "replace")).await {
            Ok(result) if result == "done" => match self.describe(&unit).await {
                Ok(known) if known.main_pid == 0 => {
                    let text = format!("it ended at once ({}): see journalctl -u {unit}", known.exit());
                    Err(LaunchError::Unit { text, unit: unit.clone() })
                }
                described => described,
            },
            Ok(result) => Err(LaunchError::Unit { text: reason_of(&result, &unit), unit: unit.clone() }),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(known) => Ok(known.process()),
            Err(error) => {
                lock(&self.shared.prepared).remove(name);
                if let Err(error) = self.end_unit(name).await {
                    warn!(FLOTILLA_VM = name, "{error}");
                }
                Err(error)
            }
        }
    }

    async fn end_unit(&self, name: &str) -> Result<(), LaunchError> {
        let unit = unit_of(name);
        lock(&self.shared.killed).insert(unit.clone());
        // No process yet is an error here and fine: the stop that follows cancels the start.
        if let Err(error) =
            self.call(&unit, "kill", self.manager.kill_unit(&unit, "all", libc::SIGKILL)).await
        {
            debug!(FLOTILLA_VM = name, "{error}");
        }
        self.call(&unit, "stop", self.manager.stop_unit(&unit, "replace")).await.map(drop)
    }

    async fn set_limits(&self, name: &str, limits: &Limits) -> Result<(), LaunchError> {
        let unit = unit_of(name);
        // Most VMs have none, and then nothing is to be taken back either.
        if limits.is_none() && !drop_ins(&unit).exists() {
            return Ok(());
        }
        let properties = limits::properties(limits);
        self.call(&unit, "limit", self.manager.set_unit_properties(&unit, true, &properties)).await
    }

    async fn find_all(&self, wanted: &[Wanted]) -> Result<BTreeMap<String, Found>, LaunchError> {
        let pattern = format!("{PREFIX}*{SUFFIX}");
        let rows = self.call(&pattern, "list", self.manager.list_units_by_patterns(&[], &[&pattern])).await?;
        let states: HashMap<&str, &str> =
            rows.iter().filter_map(|row| Some((vm_of_unit(&row.0)?, row.3.as_str()))).collect();
        for (name, state) in &states {
            if !wanted.iter().any(|w| w.name == *name) && !matches!(*state, "inactive" | "failed") {
                warn!(
                    FLOTILLA_VM = name,
                    "{}: {state}, but no such VM is defined: left alone",
                    unit_of(name)
                );
            }
        }
        let look = |w: &Wanted| {
            let (name, state) = (w.name.clone(), states.get(w.name.as_str()).map(ToString::to_string));
            let record = w.record.clone();
            async move {
                let alive =
                    matches!(state.as_deref(), Some("active" | "activating" | "deactivating" | "reloading"));
                // A unit that never failed is forgotten by systemd when it ends; our record remembers it.
                if !alive && record.as_ref().is_none_or(|record| record.state.idle()) {
                    return Ok(None);
                }
                if state.is_none() {
                    return Ok(Some((name, Found::Ended(Exit::Unknown))));
                }
                let known = self.describe(&unit_of(&name)).await?;
                let found = if alive && !(known.main_pid == 0 && known.code != 0) {
                    Found::Alive(known.process())
                } else {
                    Found::Ended(known.exit())
                };
                Ok(Some((name, found)))
            }
        };
        let found: Vec<Option<_>> = futures_util::stream::iter(wanted.iter().map(look))
            .buffer_unordered(IN_FLIGHT)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }
}

impl Launcher for SystemdLauncher {
    fn unit(&self, name: &str) -> String {
        unit_of(name)
    }

    fn sockets(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn listeners(&self, name: &str) -> Result<Vec<(Handed, OwnedFd)>, LaunchError> {
        listen(&self.sockets(name))
    }

    fn log_file(&self, _name: &str) -> PathBuf {
        PathBuf::new()
    }

    fn start<'a>(&'a self, name: &'a str, prepared: Prepared) -> BoxFuture<'a, Result<Process, LaunchError>> {
        self.start_unit(name, prepared).boxed()
    }

    fn limit<'a>(&'a self, name: &'a str, limits: &'a Limits) -> BoxFuture<'a, Result<(), LaunchError>> {
        self.set_limits(name, limits).boxed()
    }

    fn last_lines<'a>(&'a self, name: &'a str, process: Option<&'a Process>) -> BoxFuture<'a, Vec<String>> {
        async move {
            let Some(process) = process.filter(|process| !process.invocation.is_empty()) else {
                return Vec::new();
            };
            let mut command = tokio::process::Command::new("journalctl");
            let invocation = format!("_SYSTEMD_INVOCATION_ID={}", process.invocation);
            command.args(["--quiet", "--no-pager", "--output=cat", "--lines=20", &invocation]);
            let output = command.stdin(std::process::Stdio::null()).kill_on_drop(true).output();
            match tokio::time::timeout(JOURNAL_DEADLINE, output).await {
                Ok(Ok(output)) => tail(&String::from_utf8_lossy(&output.stdout)),
                Ok(Err(error)) => {
                    warn!(FLOTILLA_VM = name, "journalctl: {error}");
                    Vec::new()
                }
                Err(_) => Vec::new(),
            }
        }
        .boxed()
    }

    fn log(&self, name: &str, lines: u64, follow: bool) -> std::process::Command {
        let mut command = std::process::Command::new("journalctl");
        command.args(["--quiet", "--no-pager", "--output=short-iso-precise"]);
        command.arg(format!("--unit={}", self.unit(name))).arg(format!("--lines={lines}"));
        if follow {
            command.arg("--follow");
        }
        command
    }

    fn kill<'a>(
        &'a self,
        name: &'a str,
        _process: Option<&'a Process>,
    ) -> BoxFuture<'a, Result<(), LaunchError>> {
        self.end_unit(name).boxed()
    }

    fn find<'a>(
        &'a self,
        wanted: &'a [Wanted],
    ) -> BoxFuture<'a, Result<BTreeMap<String, Found>, LaunchError>> {
        self.find_all(wanted).boxed()
    }

    fn clean<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        async move {
            let unit = unit_of(name);
            // Not failed, not loaded: both fine.
            let reset = self.call(&unit, "reset", self.manager.reset_failed_unit(&unit)).await;
            debug!(FLOTILLA_VM = name, "reset: {reset:?}");
            // What was set on the unit stays with systemd until the host's next boot; the next VM of this name sets its own.
            let directory = self.sockets(name);
            if let Err(error) = std::fs::remove_dir_all(&directory)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                warn!(FLOTILLA_VM = name, "{} is left behind: {error}", directory.display());
            }
        }
        .boxed()
    }
}

/// Binds a VM's sockets in a directory that is the daemon's alone: the VMM gets them as descriptors, and its user reaches no socket.
fn listen(directory: &Path) -> Result<Vec<(Handed, OwnedFd)>, LaunchError> {
    let failed = || LaunchError::io(format!("sockets in {}", directory.display()));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed())?;
    let bind = |name: &&str| {
        let path = directory.join(name);
        // Of the process before, which has ended.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed()(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed())?;
        Ok((Handed::Path(path), listener.into()))
    };
    [QMP_SOCKET, CONSOLE_SOCKET].iter().map(bind).collect()
}

/// What was set on a unit.
fn drop_ins(unit: &str) -> PathBuf {
    Path::new(CONTROL).join(format!("{unit}.d"))
}

struct PreparedFirst {
    shared: Arc<Shared>,
    fleet: Arc<dyn Source>,
}

impl Source for PreparedFirst {
    fn hand_over<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Prepared, String>> {
        let ready = lock(&self.shared.prepared).remove(name);
        match ready {
            Some(prepared) => async { Ok(prepared) }.boxed(),
            None => self.fleet.hand_over(name),
        }
    }

    fn end<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), String>> {
        self.fleet.end(name)
    }
}

fn refused(unit: &str, error: zbus::Error) -> LaunchError {
    match error {
        zbus::Error::MethodError(_, Some(text), _) => {
            LaunchError::Unit { unit: unit.to_owned(), text: text.trim_end_matches('.').to_owned() }
        }
        error => LaunchError::Bus(error),
    }
}

/// The words of `JobRemoved`'s result, for people.
fn reason_of(result: &str, unit: &str) -> String {
    match result {
        "canceled" => "its start was cancelled, by a stop most likely".to_owned(),
        "timeout" => "it did not start in time".to_owned(),
        "dependency" => "a unit that it needs failed".to_owned(),
        other => format!("its start ended as \"{other}\": see journalctl -u {unit}"),
    }
}

fn rule(interface: &str, member: &str, paths: &str) -> zbus::Result<MatchRule<'static>> {
    MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .sender("org.freedesktop.systemd1")
        .interface(interface.to_owned())
        .member(member.to_owned())
        .path_namespace(paths.to_owned())
        .build()
}

async fn read_jobs(mut stream: MessageStream, shared: Arc<Shared>) {
    while let Some(Ok(message)) = stream.next().await {
        type Body = (u32, OwnedObjectPath, String, String);
        let Ok((_, job, unit, result)) = message.body().deserialize::<Body>() else { continue };
        if let Some(listener) = lock(&shared.jobs).get(&unit) {
            let _ = listener.send((job, result));
        }
    }
    error!("systemd's signals ended");
}

async fn read_changes(
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
        let Some(name) = vm_of_unit(&change.unit) else { continue };
        let notice = match (before.as_str(), known.active.as_str()) {
            (_, "inactive" | "failed") if !matches!(before.as_str(), "inactive" | "failed") => {
                Notice::Ended { invocation: known.invocation.clone(), exit: known.exit() }
            }
            (_, "activating" | "active") if known.main_pid != 0 => Notice::Started(known.process()),
            // While ExecStop= runs after the process ended by itself, there is no main process: that is no stop.
            (_, "deactivating") if known.main_pid != 0 => Notice::Stopping,
            _ => continue,
        };
        let failed = known.active == "failed";
        if matches!(notice, Notice::Ended { .. }) {
            info!(FLOTILLA_VM = name, "{} ended: {}", change.unit, known.exit());
            if lock(&shared.killed).remove(&change.unit) && failed {
                let (manager, unit) = (manager.clone(), change.unit.clone());
                tokio::spawn(async move {
                    // Awaited before the macro: what stands in a disabled one is never evaluated.
                    let reset = tokio::time::timeout(CALL_DEADLINE, manager.reset_failed_unit(&unit)).await;
                    debug!("{unit}: reset: {reset:?}");
                });
            }
            let event = Event { name: name.to_owned(), notice };
            units.remove(&change.unit);
            let _ = events.send(event);
        } else {
            let _ = events.send(Event { name: name.to_owned(), notice });
        }
    }
    error!("systemd's signals ended");
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

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[path = "systemd_tests.rs"]
mod tests;
