//! The registry: owns which VMs there are. Reads are served from memory and never wait for a VM's actor, its VMM, the store or systemd.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use dbus_api::spec::VmSpec;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::json;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{info, warn};
use uuid::Uuid;

use super::actor::{self, Seed};
use super::gate::Admission;
use super::inbox::{Handle, Internal, Request, TAKEN};
use super::jobs::Job;
use super::life::{State, Verb};
use super::plug::{Ask, How};
use super::samples::{Sampler, Samples};
use super::spec as rules;
use super::usage::{Meter, Usages};
use super::view::{News, View};
use super::vm::Vm;
use super::words::map_error;
use super::{Context, FleetError};
use crate::launch::Orphan;
use crate::launch::server::Source;
use crate::launch::{Event, Prepared};
use crate::qmp::{Client, QmpError};
use crate::store::{Corrupt, Definition};

/// A forced undefine waits this long for the power-off before it; callers of D-Bus wait 25 s by default.
const FORCED_END: Duration = Duration::from_secs(20);

#[derive(Default)]
pub(super) struct Table {
    pub(super) vms: BTreeMap<String, Handle>,
    pub(super) uuids: BTreeMap<Uuid, String>,
}

/// The fleet. One per daemon, shared by all handlers.
pub struct Fleet {
    pub(super) context: Arc<Context>,
    table: RwLock<Table>,
    /// Names and uuids that are being defined or undefined.
    reserved: Mutex<(BTreeSet<String>, BTreeSet<Uuid>)>,
    pub(super) corrupt: RwLock<Vec<Corrupt>>,
    pub(super) ready: AtomicBool,
    /// Processes that belong to no definition: their links stay.
    pub(super) orphans: RwLock<Vec<Orphan>>,
    meter: Meter,
    sampler: Arc<Sampler>,
    began: Instant,
    readiness: OnceLock<Duration>,
}

impl Fleet {
    /// An empty fleet; [`Fleet::adopt`] fills it.
    pub fn new(context: Context) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::new(context),
            table: RwLock::default(),
            reserved: Mutex::default(),
            corrupt: RwLock::default(),
            ready: AtomicBool::new(false),
            orphans: RwLock::default(),
            meter: Meter::default(),
            sampler: Arc::default(),
            began: Instant::now(),
            readiness: OnceLock::new(),
        })
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes what the launcher saw to the actors, until the launcher is gone.
    pub async fn route(self: Arc<Self>, mut events: mpsc::UnboundedReceiver<Event>) {
        while let Some(Event { name, notice }) = events.recv().await {
            match self.read().vms.get(&name) {
                Some(handle) => {
                    let _ = handle.internal.send(Internal::Notice(notice));
                }
                None => {
                    warn!(FLOTILLA_VM = name, "no such VM is defined, but its process reports: {notice:?}");
                }
            }
        }
    }

    // --- reads ------------------------------------------------------------------------------------------------------------------

    /// All VMs by name.
    pub fn list(&self) -> Vec<Arc<View>> {
        self.read().vms.values().map(|handle| Arc::clone(&handle.view.borrow())).collect()
    }

    /// One VM.
    pub fn get(&self, name: &str) -> Result<Arc<View>, FleetError> {
        Ok(Arc::clone(&self.handle(name)?.view.borrow()))
    }

    /// One VM by its uuid.
    pub fn get_by_uuid(&self, text: &str) -> Result<Arc<View>, FleetError> {
        let missing = || FleetError::NoSuchVm(format!("no VM has the uuid {text:?}"));
        let uuid = Uuid::parse_str(text).map_err(|_| missing())?;
        let name = self.read().uuids.get(&uuid).cloned().ok_or_else(missing)?;
        self.get(&name)
    }

    /// Jobs under way.
    pub fn jobs(&self) -> Vec<Job> {
        self.context.jobs.list()
    }

    /// The end of a job; `None` when it has ended.
    pub fn wait_job(&self, id: u32) -> Option<oneshot::Receiver<Result<(), FleetError>>> {
        self.context.jobs.wait(id)
    }

    /// Cancels a job, or says why that cannot be done. Its end is told as any job's; one that was nearly done may end well all the same.
    pub async fn cancel_job(&self, id: u32) -> Result<(), FleetError> {
        let (job, stepped) = self.context.jobs.cancel(id)?;
        if stepped {
            // One that makes a VM may wait for its start, which is a job of its own.
            let makes = matches!(job.kind, "create" | "clone");
            let start = self.jobs().into_iter().find(|other| other.kind == "start" && other.name == job.name);
            if let Some(start) = start.filter(|_| makes) {
                // Ended just now, or cannot be ended any more: the next step sees that this one is cancelled.
                let _ = self.request(&start.name, |answer| Request::Cancel { job: start.id, answer }).await;
            }
            return Ok(());
        }
        self.request(&job.name, |answer| Request::Cancel { job: id, answer }).await?
    }

    /// What the VMs of `views` use of the host.
    pub async fn usages(&self, views: Vec<Arc<View>>) -> Arc<Usages> {
        self.meter.read(views).await
    }

    /// What the VMMs said of themselves when they were asked last; they are asked anew, for whoever reads next.
    pub fn samples(&self) -> Arc<Samples> {
        let all = || {
            let table = self.read();
            table.vms.values().map(|vm| (Arc::clone(&vm.view.borrow()), vm.wire.clone())).collect()
        };
        self.sampler.read(all)
    }

    /// How long the newest answer of each connected VMM took.
    pub fn latencies(&self) -> Vec<(Arc<str>, Duration)> {
        let one = |vm: &Handle| Some((Arc::clone(&vm.view.borrow().name), vm.wire.monitor()?.latency()?));
        self.read().vms.values().filter_map(one).collect()
    }

    /// How long it took until every VM had answered or was known not to; `None`: that is not so yet.
    pub fn readiness(&self) -> Option<Duration> {
        self.readiness.get().copied()
    }

    pub(super) fn classified(&self) {
        // Said once.
        let _ = self.readiness.set(self.began.elapsed());
    }

    /// Starts that were refused since the daemon's start, for lack of room or because the host is drained.
    pub fn refusals(&self) -> u64 {
        self.context.gate.refusals()
    }

    /// What may run at the same time.
    pub fn limits(&self) -> &Admission {
        self.context.gate.limits()
    }

    /// Number of the newest event.
    pub fn sequence(&self) -> u64 {
        self.context.sequence.load(Ordering::SeqCst)
    }

    /// Records that were set aside.
    pub fn corrupt(&self) -> Vec<Corrupt> {
        self.corrupt.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// VMs' processes that were found at start-up and belong to no definition, those that are still there.
    pub fn orphans(&self) -> Vec<Orphan> {
        let orphans = self.orphans.read().unwrap_or_else(PoisonError::into_inner);
        orphans.iter().filter(|orphan| orphan.alive()).cloned().collect()
    }

    /// Nothing is started.
    pub fn draining(&self) -> bool {
        self.context.gate.draining()
    }

    /// Starts nothing any more, or anything again; survives restarts. With `stop` the VMs that run are shut down: gives their jobs.
    pub async fn drain(&self, on: bool, stop: Option<Verb>) -> Result<Vec<u32>, FleetError> {
        self.context.gate.drain(on).map_err(|error| FleetError::StoreFailed(format!("drain: {error}")))?;
        info!("{}", if on { "drained: nothing is started any more" } else { "not drained any more" });
        self.context.tell(News::FleetChanged);
        let mut jobs = Vec::new();
        let running = self.list().into_iter().filter(|view| !view.state.idle());
        for view in running.filter(|_| stop.is_some()) {
            // One that cannot be asked now (it ends already, it is frozen) must not keep the others.
            match self.ask(&view.name, stop.unwrap_or(Verb::PowerOff)).await {
                Ok(job) => jobs.push(job),
                Err(error) => warn!(FLOTILLA_VM = &*view.name, "drain: {error}"),
            }
        }
        Ok(jobs)
    }

    /// `starting`, `draining`, `running` or `degraded`.
    pub fn state(&self) -> &'static str {
        if self.ready.load(Ordering::SeqCst) && self.draining() {
            return "draining";
        }
        if !self.ready.load(Ordering::SeqCst) {
            return "starting";
        }
        let degraded = !self.corrupt.read().unwrap_or_else(PoisonError::into_inner).is_empty()
            || self.orphans.read().unwrap_or_else(PoisonError::into_inner).iter().any(Orphan::alive)
            || self.read().vms.values().any(|handle| handle.view.borrow().state == State::Quarantined);
        if degraded { "degraded" } else { "running" }
    }

    fn handle(&self, name: &str) -> Result<Handle, FleetError> {
        let missing = || FleetError::NoSuchVm(format!("no VM is named {name:?}"));
        self.read().vms.get(name).cloned().ok_or_else(missing)
    }

    /// Returns when everything that happened so far is on the bus.
    pub async fn flush(&self) {
        let (sender, receiver) = oneshot::channel();
        self.context.tell(News::Flush(sender));
        let _ = timeout(TAKEN, receiver).await;
    }

    // --- verbs ------------------------------------------------------------------------------------------------------------------

    /// Gives the actor a request, whatever it takes to be answered.
    pub(super) fn post<T>(
        &self,
        name: &str,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<oneshot::Receiver<T>, FleetError> {
        let handle = self.handle(name)?;
        let (answer, receiver) = oneshot::channel();
        handle.requests.try_send(request(answer)).map_err(|error| match error {
            TrySendError::Full(_) => {
                FleetError::Busy(format!("VM \"{name}\": too many requests wait already"))
            }
            TrySendError::Closed(_) => FleetError::NoSuchVm(format!("VM \"{name}\" was undefined")),
        })?;
        Ok(receiver)
    }

    pub(super) async fn request<T>(
        &self,
        name: &str,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, FleetError> {
        let receiver = self.post(name, request)?;
        match timeout(TAKEN, receiver).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(FleetError::NoSuchVm(format!("VM \"{name}\" was undefined"))),
            Err(_) => Err(FleetError::Busy(format!("VM \"{name}\": the request was not taken in time"))),
        }
    }

    /// Asks for a job and returns its number.
    pub async fn ask(&self, name: &str, verb: Verb) -> Result<u32, FleetError> {
        self.request(name, |answer| Request::Job { verb, incoming: None, answer }).await?
    }

    /// Brings a device to a VM or takes it away; returns its id and the job.
    pub async fn plug(&self, name: &str, ask: Ask, how: How) -> Result<(String, u32), FleetError> {
        self.request(name, |answer| Request::Plug { ask, how, answer }).await?
    }

    /// Stores a definition; returns its generation.
    pub async fn define(
        &self,
        name: &str,
        text: &str,
        replace: bool,
        if_generation: Option<u64>,
    ) -> Result<u64, FleetError> {
        rules::check_name(name)?;
        let spec = rules::parse(text)?;
        let _networks = self.context.network.stable().await;
        if self.read().vms.contains_key(name) {
            if !replace && if_generation.is_none() {
                return Err(FleetError::VmExists(format!(
                    "VM \"{name}\" is defined already: use replace, or another name"
                )));
            }
            let spec = Box::new(spec);
            return self.request(name, |answer| Request::Redefine { spec, if_generation, answer }).await?;
        }
        if if_generation.is_some_and(|wanted| wanted != 0) {
            return Err(FleetError::NoSuchVm(format!("no VM is named {name:?}, so it has no generation")));
        }
        let uuid = spec.uuid.unwrap_or_else(Uuid::new_v4);
        let _reserved = self.reserve(name, uuid)?;
        if let Some(other) = self.read().uuids.get(&uuid) {
            return Err(FleetError::VmExists(format!("uuid: {uuid} is the VM \"{other}\" already")));
        }
        self.define_new(name, uuid, spec).await
    }

    async fn define_new(&self, name: &str, uuid: Uuid, mut spec: VmSpec) -> Result<u64, FleetError> {
        spec.uuid = Some(uuid);
        let context = &self.context;
        context.network.ensure(name, uuid, &spec).await?;
        let definition = Definition::new(name.to_owned(), uuid, 1, spec);
        let (store, saved) = (Arc::clone(&context.store), definition.clone());
        let outcome = tokio::task::spawn_blocking(move || {
            // A process record without a definition is of a VM of that name which is no more.
            store.remove_runtime(&saved.name).and_then(|()| store.save_definition(&saved))
        })
        .await;
        if let Ok(Err(error)) = outcome {
            context.network.remove_taps(uuid, super::network::taps(name, &definition.spec), &[]).await;
            self.remove_unused_bridges(&definition.spec).await;
            return Err(FleetError::StoreFailed(error.to_string()));
        }
        let vm = Vm::idle(State::Defined, "defined");
        let seed = Seed { definition, vm, record: None, process: None };
        let handle = actor::spawn(Arc::clone(context), seed);
        let view = Arc::clone(&handle.view.borrow());
        let mut table = self.write();
        table.uuids.insert(uuid, name.to_owned());
        table.vms.insert(name.to_owned(), handle);
        // Told under the lock: the news of its removal cannot come first.
        context.tell(News::VmNew(view));
        info!(FLOTILLA_VM = name, "defined");
        Ok(1)
    }

    /// Forgets a VM; with `force` it is powered off first.
    pub async fn undefine(&self, name: &str, force: bool) -> Result<(), FleetError> {
        let view = self.get(name)?;
        let _reserved = self.reserve(name, view.uuid)?;
        if force && !view.state.idle() {
            let job = self.ask(name, Verb::PowerOff).await;
            let end = match &job {
                Ok(job) => self.wait_job(*job),
                // A power-off is under way, or it ended by itself just now.
                Err(FleetError::Busy(_)) => {
                    self.jobs().iter().find(|job| &*job.name == name).and_then(|job| self.wait_job(job.id))
                }
                Err(FleetError::InvalidState(_)) => None,
                Err(error) => return Err(error.clone()),
            };
            if let Some(end) = end {
                let late = || FleetError::Busy(format!("VM \"{name}\" does not end: its power-off goes on"));
                timeout(FORCED_END, end).await.map_err(|_| late())?.unwrap_or(Ok(()))?;
            }
        }
        let spec = Arc::clone(&self.get(name)?.spec);
        self.request(name, |answer| Request::Undefine { answer }).await??;
        {
            let mut table = self.write();
            table.vms.remove(name);
            table.uuids.remove(&view.uuid);
            self.context.tell(News::VmRemoved(Arc::clone(&view.name)));
        }
        self.remove_unused_bridges(&spec).await;
        info!(FLOTILLA_VM = name, "undefined");
        Ok(())
    }

    async fn remove_unused_bridges(&self, spec: &VmSpec) {
        if spec.nics.is_empty() {
            return;
        }
        let candidates =
            spec.nics.iter().filter(|nic| nic.network.is_none()).map(|nic| nic.bridge.clone()).collect();
        self.context.network.remove_bridges(&candidates, &self.bridges()).await;
    }

    pub(super) fn bridges(&self) -> BTreeSet<String> {
        let views = self.list();
        let nics = views.iter().flat_map(|view| view.spec.nics.iter().chain(&*view.cards));
        nics.filter(|nic| nic.network.is_none()).map(|nic| nic.bridge.clone()).collect()
    }

    fn reserve<'a>(&'a self, name: &str, uuid: Uuid) -> Result<Reservation<'a>, FleetError> {
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        if reserved.0.contains(name) || reserved.1.contains(&uuid) {
            return Err(FleetError::Busy(format!("VM \"{name}\" is being defined or undefined")));
        }
        reserved.0.insert(name.to_owned());
        reserved.1.insert(uuid);
        Ok(Reservation { fleet: self, name: name.to_owned(), uuid })
    }

    /// Sends one QMP command (JSON, or its name as a JSON string) and returns the VMM's answer (JSON), as a client of the socket gets it.
    pub async fn qmp_command(&self, client: Client, name: &str, text: &str) -> Result<String, FleetError> {
        let named = match serde_json::from_str::<String>(text) {
            Ok(word) => Cow::Owned(json!({ "execute": word }).to_string()),
            Err(_) => Cow::Borrowed(text),
        };
        let caller = self.request(name, |answer| Request::Caller { answer }).await??;
        let answer = caller.execute_raw(client, &named).await;
        answer.map_err(|error| match error {
            QmpError::NotRunning { .. } => map_error(&error),
            error => map_error(&error).map(|text| format!("VM \"{name}\": {text}")),
        })
    }

    /// A stream to the VM's QMP proxy, for `client` to be given.
    pub async fn open_qmp(&self, client: Client, name: &str) -> Result<OwnedFd, FleetError> {
        self.request(name, |answer| Request::OpenQmp { client, answer }).await?
    }

    /// A stream to the VM's serial console.
    pub async fn open_console(&self, name: &str, which: &str) -> Result<OwnedFd, FleetError> {
        let view = self.get(name)?;
        if !matches!(which, "" | "serial0") {
            return Err(FleetError::NotSupported(format!(
                "VM \"{name}\" has no console {which:?}: its serial port is \"\" or \"serial0\""
            )));
        }
        if view.state.idle() {
            return Err(FleetError::InvalidState(format!(
                "VM \"{name}\" is {}: no console",
                view.state.word()
            )));
        }
        let connected = timeout(TAKEN, tokio::net::UnixStream::connect(&view.console_socket)).await;
        let failed = |why: String| {
            FleetError::InvalidState(format!(
                "VM \"{name}\": console {}: {why}",
                view.console_socket.display()
            ))
        };
        let stream = connected
            .map_err(|_| failed("it does not answer".to_owned()))?
            .map_err(|error| failed(error.to_string()))?;
        stream.into_std().map(OwnedFd::from).map_err(|error| failed(error.to_string()))
    }
}

/// Holds a name and a uuid for one definition or undefinition.
struct Reservation<'a> {
    fleet: &'a Fleet,
    name: String,
    uuid: Uuid,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut reserved = self.fleet.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        reserved.0.remove(&self.name);
        reserved.1.remove(&self.uuid);
    }
}

impl Source for Fleet {
    fn hand_over<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Prepared, String>> {
        async move {
            let answer = self.request(name, |answer| Request::HandOver { answer }).await;
            answer.and_then(|prepared| prepared).map_err(|error| error.to_string())
        }
        .boxed()
    }

    fn end<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), String>> {
        async move {
            // It takes as long as the guest takes: the state machine has the deadlines.
            let receiver = self.post(name, |answer| Request::EndByUnit { answer });
            let receiver = receiver.map_err(|error| error.to_string())?;
            let gone = |_| format!("VM \"{name}\" was undefined");
            receiver.await.map_err(gone)?.map_err(|error| error.to_string())
        }
        .boxed()
    }
}
