//! One task per VM: feeds the pure state machine with what happens and carries out its effects. Nothing here waits for the VMM or for
//! systemd: slow effects run as tasks of their own and report back, so that a power-off is always heard.
//!
//! `actor/hear.rs` is what is heard, `actor/taps.rs` taps that clients ask for, `actor/process.rs` the process, `actor/plug.rs` devices that come and go, `actor/definition.rs` changes and removes the definition, `actor/shown.rs`
//! keeps the view.
//!
//! What the host tells (`Internal`) goes before what people ask (`Request`): a decision is made on the newest state.

mod definition;
mod hear;
pub mod plug;
mod process;
mod shown;
mod taps;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::VmSpec;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info};
use uuid::Uuid;

use super::devices::Devices;
use super::inbox::{Answer, Handle, Internal, Request};
use super::life::{Command, Effect, Exit, Input, State, Verb};
use super::link::Link;
use super::seats::Seats;
use super::view::{View, now};
use super::vm::{START_DEADLINE, Vm};
use super::{Context, FleetError, monitor, network};
use crate::launch::{CONSOLE_SOCKET, QMP_SOCKET};
use crate::qmp::{Proxy, Taps, Watch};
use crate::store::{Definition, Process, Runtime};
use plug::{Finishing, Plugging};

/// Requests that wait for the actor; one that gets more answers that it is busy.
const INBOX: usize = 64;
/// How long a restart waits when the host has no room for it.
const NO_ROOM: Duration = Duration::from_secs(30);

/// What an actor begins with.
pub(super) struct Seed {
    pub(super) definition: Definition,
    pub(super) vm: Vm,
    pub(super) record: Option<Runtime>,
    pub(super) process: Option<Process>,
}

struct Actor {
    context: Arc<Context>,
    name: Arc<str>,
    uuid: Uuid,
    spec: Arc<VmSpec>,
    generation: u64,
    vm: Vm,
    since: u64,
    process: Option<Process>,
    /// Where its process runs: under its own name, or as a spare that it took.
    instance: Arc<str>,
    /// An end that was told before the start it belongs to.
    early_end: Option<(String, Exit)>,
    applied_generation: u64,
    command_line: Arc<[String]>,
    exit: Option<Exit>,
    deadline: Option<Instant>,
    restart: Option<Instant>,
    /// Restarts by policy since the daemon's start.
    restarted: u32,
    /// When the process was first known here.
    launched: Instant,
    last_log: Arc<[String]>,
    link: Link,
    own_start: bool,
    /// The snapshot that the next process goes on from.
    incoming: Option<Arc<Path>>,
    devices: Devices,
    /// Of the running process; of no meaning when there is none.
    seats: Arc<Seats>,
    plugging: Option<Plugging>,
    finishing: Finishing,
    /// Taps that were made for back ends of clients, by the back end's id.
    taps: BTreeMap<String, String>,
    /// Who stops its unit and waits for its end.
    stoppers: Vec<Answer<()>>,
    internal: mpsc::UnboundedSender<Internal>,
    view: watch::Sender<Arc<View>>,
}

/// Starts the task of a VM. With a process that was found alive, it connects to it at once.
pub(super) fn spawn(context: Arc<Context>, seed: Seed) -> Handle {
    let (requests, request_inbox) = mpsc::channel(INBOX);
    let (internal, internal_inbox) = mpsc::unbounded_channel();
    let Seed { definition, mut vm, record, process } = seed;
    vm.set_policy(definition.spec.restart);
    let name: Arc<str> = definition.name.as_str().into();
    let told = internal.clone();
    let watch: Watch = Arc::new(move |news| {
        // An actor that is gone tracks nothing.
        let _ = told.send(Internal::Client(news));
    });
    let told = internal.clone();
    let taps: Taps = Arc::new(move |news| {
        let _ = told.send(Internal::Tap(news));
    });
    let socket = context.proxies.join(format!("{name}.sock"));
    let proxy = Proxy::bind(&socket, &context.shelf, Some(watch), Some(taps))
        .inspect_err(|error| error!(FLOTILLA_VM = &*name, "its QMP socket cannot be made: {error}"))
        .ok();
    let record = record.filter(|record| record.boot_id == context.boot_id);
    let alive = process.is_some();
    let instance = record.as_ref().filter(|_| alive).and_then(|record| record.instance.as_deref());
    let instance: Arc<str> = instance.map_or_else(|| Arc::clone(&name), Arc::from);
    let seats = record.as_ref().map(|record| record.seats.clone()).filter(|seats| !seats.is_empty());
    let taps = record.as_ref().map(|record| record.taps.clone()).unwrap_or_default();
    let mut leftovers = seats.as_ref().filter(|_| !alive).map(|seats| seats.taps(&name)).unwrap_or_default();
    if !alive {
        leftovers.extend(taps.values().cloned());
    }
    let seats = seats.filter(|_| alive).unwrap_or_else(|| Seats::of(&definition.spec));
    let mut link = Link::new(proxy);
    if alive {
        link.expect();
    } else {
        link.cut();
    }
    let (view, _) = watch::channel(Arc::new(View {
        name: Arc::clone(&name),
        uuid: definition.uuid,
        state: vm.state(),
        reason: String::new(),
        since: now(),
        intent: vm.intent(),
        generation: definition.generation,
        applied_generation: 0,
        main_pid: 0,
        unit: context.launcher.unit(&instance),
        log_file: context.launcher.log_file(&name).display().to_string(),
        exit: None,
        spec: Arc::new(definition.spec.clone()),
        command_line: Arc::new([]),
        nics: Arc::new([]),
        qmp_socket: context.proxies.join(format!("{name}.sock")),
        console_socket: context.launcher.sockets(&instance).join(CONSOLE_SOCKET),
        responsive: false,
        devices: Devices::default(),
        disks: Arc::new([]),
        cards: Arc::new([]),
        last_log: Arc::new([]),
        restarts: 0,
        restarted: 0,
    }));
    let mut actor = Actor {
        uuid: definition.uuid,
        spec: Arc::new(definition.spec),
        generation: definition.generation,
        since: now(),
        early_end: None,
        applied_generation: record.as_ref().filter(|_| alive).map_or(0, |record| record.applied_generation),
        command_line: record
            .as_ref()
            .filter(|_| alive)
            .map_or_else(Arc::default, |record| record.command_line.clone().into()),
        devices: record.as_ref().filter(|_| alive).map(|record| record.devices.clone()).unwrap_or_default(),
        seats: Arc::new(seats),
        plugging: None,
        finishing: Finishing::new(),
        taps: if alive { taps } else { BTreeMap::new() },
        stoppers: Vec::new(),
        exit: record.and_then(|record| record.exit),
        deadline: None,
        restart: vm.restart_due().map(|pause| Instant::now() + pause),
        restarted: 0,
        launched: Instant::now(),
        last_log: Arc::new([]),
        link,
        own_start: false,
        incoming: None,
        internal: internal.clone(),
        context,
        name,
        vm,
        process,
        instance,
        view,
    };
    if !actor.vm.state().idle() {
        // Before anybody can ask for a start: what runs already counts.
        actor.context.gate.count(&actor.name, &actor.spec);
    }
    actor.view.send_replace(Arc::new(actor.look()));
    let handle = Handle { requests, internal, view: actor.view.subscribe(), wire: actor.link.wire() };
    tokio::spawn(async move {
        if alive {
            actor.connect();
            if actor.vm.state() == State::Starting {
                actor.deadline = Some(Instant::now() + START_DEADLINE);
            }
        }
        if !leftovers.is_empty() {
            // Cards that were plugged into a process which ended while no daemon was there.
            let keep = network::taps(&actor.name, &actor.spec);
            actor.context.network.remove_taps(actor.uuid, leftovers, &keep).await;
        }
        actor.run(request_inbox, internal_inbox).await;
    });
    handle
}

impl Actor {
    async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut internal: mpsc::UnboundedReceiver<Internal>,
    ) {
        loop {
            let deadline = self.deadline;
            let expiry = async {
                match deadline {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let restart = self.restart;
            let restart_due = async {
                match restart {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some(news) = internal.recv() => self.hear(news).await,
                () = expiry => {
                    self.deadline = None;
                    self.feed(Input::Deadline).await;
                }
                () = restart_due => {
                    self.restart = None;
                    let run = self.vm.run();
                    match self.context.gate.enter(&self.name, &self.spec) {
                        Ok(()) => {
                            self.restarted = self.restarted.saturating_add(1);
                            self.feed(Input::RestartDue { run }).await;
                        }
                        Err(error) => {
                            info!(FLOTILLA_VM = &*self.name, "its restart waits: {error}");
                            self.restart = Some(Instant::now() + NO_ROOM);
                        }
                    }
                }
                request = requests.recv() => match request {
                    Some(Request::Undefine { answer }) => {
                        let removed = self.undefine().await;
                        let gone = removed.is_ok();
                        let _ = answer.send(removed);
                        if gone {
                            return;
                        }
                    }
                    Some(request) => self.serve(request).await,
                    None => return,
                },
            }
            self.publish();
        }
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Save { state, memory, answer } => {
                let saved = self.link.save(state, memory);
                let name = Arc::clone(&self.name);
                tokio::spawn(async move {
                    let _ = answer.send(saved.await.map_err(|error| named(&name, error)));
                });
            }
            Request::Job { verb, incoming, answer } => {
                if let Err(error) = self.vm.admit(verb) {
                    let _ = answer.send(Err(named(&self.name, error)));
                    return;
                }
                if matches!(verb, Verb::Start { .. })
                    && let Err(error) = self.context.gate.enter(&self.name, &self.spec)
                {
                    let _ = answer.send(Err(named(&self.name, error)));
                    return;
                }
                let job = self.context.jobs.open(verb.word(), &self.name);
                if matches!(verb, Verb::Start { .. }) {
                    self.incoming = incoming;
                }
                let _ = answer.send(Ok(job));
                self.feed(Input::Request { job, verb }).await;
            }
            Request::Cancel { job, answer } => {
                let own = self.plugging.as_ref().is_some_and(|plugging| plugging.is(job));
                let admitted = match self.vm.admit_cancel(job) {
                    Err(FleetError::NoSuchJob(_)) if own => Err(FleetError::NotSupported(format!(
                        "job {job} cannot be cancelled: a device comes or leaves"
                    ))),
                    admitted => admitted,
                };
                let cancelled = admitted.is_ok();
                let _ = answer.send(admitted.map_err(|error| named(&self.name, error)));
                if cancelled {
                    self.feed(Input::Cancel { job }).await;
                }
            }
            Request::Redefine { spec, if_generation, answer } => {
                let _ = answer.send(self.redefine(*spec, if_generation, false).await);
            }
            Request::HandOver { answer } => self.hand_over(answer).await,
            Request::EndByUnit { answer } => self.end_by_unit(answer).await,
            Request::Caller { answer } => {
                let _ = answer.send(self.link.proxy().map(Proxy::caller));
            }
            Request::OpenQmp { client, answer } => {
                let failed = |error: std::io::Error| {
                    FleetError::ResourceExhausted(format!("no stream to the QMP proxy: {error}"))
                };
                let _ = answer.send(self.link.proxy().and_then(|proxy| proxy.open(client).map_err(failed)));
            }
            Request::Plug { ask, how, answer } => self.plug(ask, how, answer).await,
            Request::Undefine { .. } => {}
        }
    }

    async fn feed(&mut self, input: Input) {
        let before = self.vm.state();
        let effects = self.vm.step(input);
        if self.vm.restart_due().is_none() {
            self.restart = None;
        }
        if before != self.vm.state() {
            self.since = now();
            let (state, reason) = (self.vm.state().word(), self.vm.reason());
            info!(FLOTILLA_VM = &*self.name, "{} -> {state}: {reason}", before.word());
        }
        for effect in effects {
            match effect {
                Effect::Record => self.record().await,
                Effect::Launch { paused } => self.launch(paused),
                Effect::Connect => self.connect(),
                Effect::Unlink => self.link.cut(),
                Effect::Send(command) => self.send(command),
                Effect::Kill => self.kill(),
                Effect::Arm(after) => self.deadline = Some(Instant::now() + after),
                Effect::Disarm => self.deadline = None,
                Effect::RestartIn(after) => self.restart = Some(Instant::now() + after),
                Effect::EndJob { job, result } => {
                    // The state first, then the end of the job that brought it about.
                    self.publish();
                    self.context.jobs.close(job, result.map_err(|error| named(&self.name, error)));
                }
            }
        }
    }

    async fn record(&self) {
        let mut runtime = Runtime::new(&self.name, &self.context.boot_id, self.vm.state(), self.vm.intent());
        runtime.forced = self.vm.forced();
        runtime.applied_generation = self.applied_generation;
        runtime.process.clone_from(&self.process);
        runtime.instance = (self.instance != self.name).then(|| self.instance.to_string());
        runtime.command_line = self.command_line.to_vec();
        runtime.exit.clone_from(&self.exit);
        runtime.devices.clone_from(&self.devices);
        runtime.taps.clone_from(&self.taps);
        if !self.vm.state().idle() {
            runtime.seats = (*self.seats).clone();
        }
        (runtime.restarts, runtime.restarting) = (self.vm.row(), self.vm.restarting());
        let store = Arc::clone(&self.context.store);
        let saved = tokio::task::spawn_blocking(move || store.save_runtime(&runtime)).await;
        if let Ok(Err(error)) = saved {
            // The VM goes on; what is lost is knowledge that the unit and QMP can give again.
            error!(FLOTILLA_VM = &*self.name, "{error}");
        }
    }

    fn connect(&mut self) {
        let path = self.context.launcher.sockets(&self.instance).join(QMP_SOCKET);
        let task = monitor::run(Arc::clone(&self.context), path, self.vm.run(), self.internal.clone());
        self.link.connect(task);
    }

    fn send(&self, command: Command) {
        let (sent, run, internal) = (self.link.send(command), self.vm.run(), self.internal.clone());
        tokio::spawn(async move {
            let result = sent.await;
            let _ = internal.send(Internal::CommandDone { run, command, result });
        });
    }
}

/// Puts the VM's name before an error's text.
fn named(name: &str, error: FleetError) -> FleetError {
    error.map(|text| format!("VM \"{name}\": {text}"))
}
