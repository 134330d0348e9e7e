//! The launcher under systemd: one instance of the template `flotilla-vm@.service` per VM, started by PID 1.
//!
//! PID 1 is a serial server, and dbus-daemon allows 128 replies under way per connection, so that few calls are in flight at once. The
//! ends of jobs and all property changes come over one match rule each, whatever the size of the fleet (a connection may have 512).

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::Limits;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use tokio::sync::{Semaphore, mpsc, watch};
use tracing::{debug, warn};
use zbus::{Connection, MessageStream, OwnedObjectPath, OwnedVariant};

#[path = "systemd_dhcp.rs"]
mod dhcp;

use super::pool::{Given, Pool};
use super::server::{Identify, Source, vm_of_process};
use super::signals::{CALL_DEADLINE, Known, SERVICE, Shared, UNIT, hex, lock, read_changes, read_jobs, rule};
use super::systemd1::{ManagerProxy, PropertiesProxy};
use super::unit::{PREFIX, SUFFIX, instance_of, is_spare, path_of, unit_of};
use super::{
    CONSOLE_SOCKET, Events, Found, Handed, LaunchError, Launcher, Orphan, Prepared, QMP_SOCKET, Wanted,
    limits, refill, tail,
};
use crate::fleet::life::Exit;
use crate::store::Process;

/// The knee of PID 1's throughput is well below; more only queue there, where they cannot be cancelled.
const IN_FLIGHT: usize = 8;
/// From StartUnit to the end of its job. Shorter than the state machine's own deadline for a start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// The journal is asked once, when a VM has failed.
const JOURNAL_DEADLINE: Duration = Duration::from_secs(5);
/// Where an administrator's own settings for a unit lie.
const SETTINGS: [&str; 2] = ["/etc/systemd/system", "/run/systemd/system"];
/// Where systemd keeps what was set on units until the host's next boot.
const CONTROL: &str = "/run/systemd/system.control";

/// See the module.
pub struct SystemdLauncher {
    connection: Connection,
    manager: ManagerProxy<'static>,
    shared: Arc<Shared>,
    calls: Semaphore,
    directory: PathBuf,
    /// Starts of VMs that PID 1 has not done yet.
    starts: watch::Sender<usize>,
}

impl SystemdLauncher {
    /// Connects to the systemd on this bus and listens to it. The VMs' sockets are below `directory`; `spares` units are to wait for
    /// a VM, once [`SystemdLauncher::source`] is there to answer them.
    pub async fn connect(
        connection: Connection,
        directory: PathBuf,
        events: Events,
        spares: usize,
    ) -> Result<Arc<Self>, LaunchError> {
        let manager = ManagerProxy::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .map_err(LaunchError::Bus)?;
        let (pool, ended) = Pool::new(spares);
        let shared = Arc::new(Shared::new(pool));
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
        let starts = watch::Sender::new(0);
        let launcher = Arc::new(Self { connection, manager, shared, calls, directory, starts });
        tokio::spawn(refill::clean(Arc::clone(&launcher), ended));
        Ok(launcher)
    }

    /// Wraps the fleet as the source of the launch socket: what was prepared for a start is handed over first. From now on there are spares.
    pub fn source(self: &Arc<Self>, fleet: Arc<dyn Source>) -> Arc<dyn Source> {
        tokio::spawn(refill::keep(Arc::clone(self)));
        Arc::new(PreparedFirst { launcher: Arc::clone(self), fleet })
    }

    /// Who waits for a VM, and who has become one.
    pub(super) fn pool(&self) -> &Pool {
        &self.shared.pool
    }

    /// Tells how many starts of VMs PID 1 has not done yet.
    pub(super) fn starts(&self) -> watch::Receiver<usize> {
        self.starts.subscribe()
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

    /// Starts the unit of a spare; its process asks by itself.
    pub(super) async fn start_spare(&self) -> Result<(), LaunchError> {
        let instance = self.pool().new_instance();
        let unit = unit_of(&instance);
        lock(&self.shared.fresh).insert(unit.clone());
        let error = match self.job(&unit, "start", self.manager.start_unit(&unit, "replace")).await {
            Ok(result) if result == "done" => return Ok(()),
            Ok(result) => LaunchError::Unit { text: reason_of(&result, &unit), unit: unit.clone() },
            Err(error) => error,
        };
        if let Err(error) = self.end_unit(&instance).await {
            debug!("{unit}: {error}");
        }
        lock(&self.shared.fresh).remove(&unit);
        self.pool().ended(&instance);
        Err(error)
    }

    /// Has a spare become the VM. Also an end that nobody was told of is an end.
    async fn become_vm(&self, instance: &str, prepared: Prepared) -> Result<Process, LaunchError> {
        let given = self.pool().give(instance, prepared).await;
        if given.is_err() {
            self.pool().disown(instance);
            if let Err(error) = self.end_unit(instance).await {
                debug!("{}: {error}", unit_of(instance));
            }
        }
        given
    }

    async fn start_unit(&self, name: &str, prepared: Prepared) -> Result<Process, LaunchError> {
        let unit = unit_of(name);
        let _waits = Waits::new(&self.starts);
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

    pub(super) async fn end_unit(&self, name: &str) -> Result<(), LaunchError> {
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
            rows.iter().filter_map(|row| Some((instance_of(&row.0)?, row.3.as_str()))).collect();
        for (instance, state) in &states {
            let ended = matches!(*state, "inactive" | "failed" | "maintenance");
            if wanted.iter().any(|w| w.instance() == *instance) {
                continue;
            } else if is_spare(instance) {
                if ended { self.pool().ended(instance) } else { self.pool().expect(instance) }
            }
        }
        let look = |w: &Wanted| {
            let (name, instance) = (w.name.clone(), w.instance().to_owned());
            let state = states.get(instance.as_str()).map(ToString::to_string);
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
                let known = self.describe(&unit_of(&instance)).await?;
                let found = if alive && !(known.main_pid == 0 && known.code != 0) {
                    if is_spare(&instance) {
                        self.pool().own(&instance, &name);
                    }
                    Found::Alive(known.process())
                } else {
                    if is_spare(&instance) {
                        self.pool().ended(&instance);
                    }
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

impl SystemdLauncher {
    async fn find_orphans(&self, wanted: &[Wanted]) -> Result<Vec<Orphan>, LaunchError> {
        let pattern = format!("{PREFIX}*{SUFFIX}");
        let states = ["active", "activating", "deactivating", "reloading"];
        let rows =
            self.call(&pattern, "list", self.manager.list_units_by_patterns(&states, &[&pattern])).await?;
        let mut orphans = Vec::new();
        for instance in rows.iter().filter_map(|row| instance_of(&row.0)) {
            if !is_spare(instance) && wanted.iter().all(|w| w.instance() != instance) {
                let unit = unit_of(instance);
                let pid = self.property(&unit, SERVICE, "MainPID").await?;
                orphans.extend(Orphan::look(instance, unit, pid));
            }
        }
        Ok(orphans)
    }
}

impl Launcher for SystemdLauncher {
    fn unit(&self, instance: &str) -> String {
        unit_of(instance)
    }

    fn sockets(&self, instance: &str) -> PathBuf {
        self.directory.join(instance)
    }

    fn take(&self, name: &str) -> Option<String> {
        // What an administrator has set for this VM's unit alone, a spare does not have.
        let own = format!("{}.d", unit_of(name));
        if SETTINGS.iter().any(|directory| Path::new(directory).join(&own).exists()) {
            return None;
        }
        self.pool().take(name)
    }

    fn listeners(&self, instance: &str) -> Result<Vec<(Handed, OwnedFd)>, LaunchError> {
        listen(&self.sockets(instance))
    }

    fn log_file(&self, _name: &str) -> PathBuf {
        PathBuf::new()
    }

    fn start<'a>(
        &'a self,
        instance: &'a str,
        prepared: Prepared,
    ) -> BoxFuture<'a, Result<Process, LaunchError>> {
        if is_spare(instance) {
            return self.become_vm(instance, prepared).boxed();
        }
        self.start_unit(instance, prepared).boxed()
    }

    fn limit<'a>(&'a self, instance: &'a str, limits: &'a Limits) -> BoxFuture<'a, Result<(), LaunchError>> {
        self.set_limits(instance, limits).boxed()
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
        command.arg(format!("--lines={lines}"));
        if follow {
            command.arg("--follow");
        }
        command.args(dbus_api::journal::matches(name));
        command
    }

    fn kill<'a>(
        &'a self,
        instance: &'a str,
        _process: Option<&'a Process>,
    ) -> BoxFuture<'a, Result<(), LaunchError>> {
        self.end_unit(instance).boxed()
    }

    fn find<'a>(
        &'a self,
        wanted: &'a [Wanted],
    ) -> BoxFuture<'a, Result<BTreeMap<String, Found>, LaunchError>> {
        self.find_all(wanted).boxed()
    }

    fn orphans<'a>(&'a self, wanted: &'a [Wanted]) -> BoxFuture<'a, Result<Vec<Orphan>, LaunchError>> {
        self.find_orphans(wanted).boxed()
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

/// Counts a start for as long as it lasts.
struct Waits<'a>(&'a watch::Sender<usize>);

impl<'a> Waits<'a> {
    fn new(starts: &'a watch::Sender<usize>) -> Self {
        starts.send_modify(|count| *count += 1);
        Self(starts)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

struct PreparedFirst {
    launcher: Arc<SystemdLauncher>,
    fleet: Arc<dyn Source>,
}

impl PreparedFirst {
    async fn answer(&self, instance: &str, pid: u32) -> Result<Option<Given>, String> {
        let pool = self.launcher.pool();
        if let Some(vm) = pool.owner(instance) {
            // The daemon that gave it to a VM ended before it could say so.
            let prepared = self.fleet.hand_over(&vm).await?;
            return Ok(Some(Given { prepared, sent: tokio::sync::oneshot::channel().0 }));
        }
        let known = self.launcher.describe(&unit_of(instance)).await.map_err(|error| error.to_string())?;
        if known.main_pid != pid {
            return Err(format!("process {pid} is not the main process of {}", unit_of(instance)));
        }
        let Some(answer) = pool.came(instance, known.process()) else { return Ok(None) };
        answer.await.map(Some).map_err(|_| "it was given to nobody".to_owned())
    }
}

impl Source for PreparedFirst {
    fn hand_over<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Prepared, String>> {
        let ready = lock(&self.launcher.shared.prepared).remove(name);
        match ready {
            Some(prepared) => async { Ok(prepared) }.boxed(),
            None => self.fleet.hand_over(name),
        }
    }

    fn wait<'a>(&'a self, instance: &'a str, pid: u32) -> BoxFuture<'a, Result<Option<Given>, String>> {
        self.answer(instance, pid).boxed()
    }

    fn end<'a>(&'a self, instance: &'a str) -> BoxFuture<'a, Result<(), String>> {
        if !is_spare(instance) {
            return self.fleet.end(instance);
        }
        async move {
            match self.launcher.pool().owner(instance) {
                Some(vm) => self.fleet.end(&vm).await,
                None => Ok(()),
            }
        }
        .boxed()
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

#[cfg(test)]
#[path = "systemd_tests.rs"]
mod tests;
