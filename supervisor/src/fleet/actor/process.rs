//! The actor's part that has to do with the process: makes it, or answers a unit that makes it; takes note of its start and end, whoever
//! brought them about; kills it.

use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::HostShutdown;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tracing::{error, warn};

use super::Actor;
use crate::fleet::devices::Devices;
use crate::fleet::inbox::{Answer, Internal};
use crate::fleet::life::{Exit, Input, Intent, State};
use crate::fleet::prepare::{Plan, prepare};
use crate::fleet::restart::SETTLED;
use crate::fleet::{Context, FleetError, network};
use crate::launch::{LaunchError, Notice, Prepared};
use crate::store::Process;

/// How long the connection to a process that ended is still read.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Actor {
    /// What the launcher saw. Under systemd these come for starts and stops of anybody.
    pub(super) async fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Started(process) => {
                if self.vm.state().idle() {
                    self.feed(Input::StartSeen).await;
                }
                // Our own start reports its process itself.
                if self.vm.state() == State::Starting && self.process.is_none() && !self.own_start {
                    self.launched(process).await;
                }
            }
            Notice::Stopping => {
                let run = self.vm.run();
                self.feed(Input::StopSeen { run }).await;
            }
            Notice::Ended { invocation, exit } => match &self.process {
                Some(process) if process.invocation == invocation => self.last_words(invocation, exit).await,
                // A start of ours is under way: this may be its end, or that of the process before.
                None if self.own_start => self.early_end = Some((invocation, exit)),
                None if !self.vm.state().idle() => self.ended(exit).await,
                _ => {}
            },
        }
    }

    pub(super) async fn launched(&mut self, process: Process) {
        self.own_start = false;
        let run = self.vm.run();
        let early = self.early_end.take().filter(|(invocation, _)| *invocation == process.invocation);
        self.process = Some(process);
        self.devices = Devices::default();
        self.last_log = Arc::default();
        self.launched = Instant::now();
        self.exit = None;
        self.feed(Input::Launched { run }).await;
        if let Some((_, exit)) = early {
            self.ended(exit).await;
        }
    }

    /// The kernel tells of a process's end at once; what it said last may still be unread. That says why it ended, so it goes first.
    async fn last_words(&mut self, invocation: String, exit: Exit) {
        let Some(mut link) = self.link.last_words() else { return self.ended(exit).await };
        let internal = self.internal.clone();
        tokio::spawn(async move {
            // Its end of the connection is closed: reading ends by itself, unless somebody else holds the socket.
            if timeout(LAST_WORDS, &mut link).await.is_err() {
                link.abort();
            }
            let _ = internal.send(Internal::Ended { invocation, exit });
        });
    }

    pub(super) async fn ended(&mut self, exit: Exit) {
        let run = self.vm.run();
        if self.launched.elapsed() >= SETTLED {
            self.vm.settle();
        }
        let process = self.process.take();
        // The next one has the VM's own unit.
        self.instance = Arc::clone(&self.name);
        self.applied_generation = 0;
        self.command_line = Arc::default();
        self.exit = Some(exit.clone());
        self.devices = Devices::default();
        self.feed(Input::Gone { run, exit }).await;
        for stopper in self.stoppers.drain(..) {
            // Killed meanwhile, as all of a unit is that must be ended by force.
            let _ = stopper.send(Ok(()));
        }
        if self.vm.state() == State::Failed {
            self.read_log(process);
        }
        if self.vm.state().idle() {
            // A card that a newer definition dropped could not go while the VMM held its tap.
            let keep = network::taps(&self.name, &self.spec);
            let clients = std::mem::take(&mut self.taps);
            let taps = self.seats.taps(&self.name).into_iter().chain(clients.into_values());
            self.context.network.remove_taps(self.uuid, taps, &keep).await;
        }
    }

    /// Asks for the last lines that the process logged.
    fn read_log(&self, process: Option<Process>) {
        let (context, name, run, internal) =
            (Arc::clone(&self.context), Arc::clone(&self.name), self.vm.run(), self.internal.clone());
        tokio::spawn(async move {
            let lines = context.launcher.last_lines(&name, process.as_ref()).await;
            let _ = internal.send(Internal::LastLog { run, lines });
        });
    }

    fn plan(&self, paused: bool) -> Plan {
        Plan {
            name: Arc::clone(&self.name),
            uuid: self.uuid,
            spec: Arc::clone(&self.spec),
            generation: self.generation,
            paused,
            incoming: None,
            instance: Arc::clone(&self.instance),
        }
    }

    pub(super) fn launch(&mut self, paused: bool) {
        self.own_start = true;
        self.early_end = None;
        // For this one process: the next one starts as any VM does.
        let mut plan = Plan { incoming: self.incoming.take(), ..self.plan(paused) };
        let (context, run, internal) = (Arc::clone(&self.context), self.vm.run(), self.internal.clone());
        tokio::spawn(async move {
            // One that goes on from a snapshot is to be there at once.
            let spare = plan.incoming.as_ref().and_then(|_| context.launcher.take(&plan.name));
            let own = Arc::clone(&plan.instance);
            let mut outcome = match spare {
                Some(spare) => {
                    plan.instance = spare.into();
                    start(&context, &plan, run, &internal).await
                }
                None => start(&context, &plan, run, &internal).await,
            };
            if let Err(Start::Spare(error)) = &outcome {
                warn!(FLOTILLA_VM = &*plan.name, "{error}; a unit of its own is started");
                plan.instance = own;
                outcome = start(&context, &plan, run, &internal).await;
            }
            let outcome = outcome.map_err(FleetError::from);
            let _ = internal.send(match outcome {
                Ok(process) => Internal::Launched { run, process },
                Err(error) => Internal::LaunchFailed { run, error },
            });
        });
    }

    /// The unit's process asks for its command line, and no start of ours prepared it: `systemctl start`, or a daemon that was killed
    /// while it started the unit.
    pub(super) async fn hand_over(&mut self, answer: oneshot::Sender<Result<Prepared, FleetError>>) {
        if self.vm.state().idle() {
            if let Err(error) = self.context.gate.enter(&self.name, &self.spec) {
                let _ = answer.send(Err(error));
                return;
            }
            self.feed(Input::StartSeen).await;
        }
        if self.vm.state() != State::Starting {
            let _ = answer.send(Err(FleetError::InvalidState(format!("it is {}", self.vm.state().word()))));
            return;
        }
        let paused = self.vm.intent() == Intent::Paused;
        let (context, plan, run, internal) =
            (Arc::clone(&self.context), self.plan(paused), self.vm.run(), self.internal.clone());
        tokio::spawn(async move {
            let prepared = prepare(&context, &plan).await;
            if let Ok(prepared) = &prepared {
                planned(&plan, run, prepared, &internal).await;
            }
            let _ = answer.send(prepared);
        });
    }

    /// `ExecStop=` of the unit: it is answered when the process has ended.
    pub(super) async fn end_by_unit(&mut self, answer: Answer<()>) {
        if self.vm.state().idle() {
            let _ = answer.send(Ok(()));
            return;
        }
        self.stoppers.push(answer);
        let patience = match self.spec.host_shutdown {
            HostShutdown::Shutdown => Some(Duration::from_secs(u64::from(self.spec.host_shutdown_timeout))),
            HostShutdown::PowerOff => None,
        };
        self.feed(Input::UnitStops { run: self.vm.run(), patience }).await;
    }

    pub(super) fn kill(&self) {
        let (context, instance, process) =
            (Arc::clone(&self.context), Arc::clone(&self.instance), self.process.clone());
        let name = Arc::clone(&self.name);
        tokio::spawn(async move {
            if let Err(error) = context.launcher.kill(&instance, process.as_ref()).await {
                error!(FLOTILLA_VM = &*name, "{error}");
            }
        });
    }
}

/// Why a process was not made.
enum Start {
    /// The spare that it was to be is gone: it can be tried without one.
    Spare(LaunchError),
    Failed(FleetError),
}

impl From<Start> for FleetError {
    fn from(start: Start) -> Self {
        match start {
            Start::Spare(error) => Self::LaunchFailed(error.to_string()),
            Start::Failed(error) => error,
        }
    }
}

async fn start(
    context: &Context,
    plan: &Plan,
    run: u64,
    internal: &mpsc::UnboundedSender<Internal>,
) -> Result<Process, Start> {
    let prepared = prepare(context, plan).await;
    if prepared.is_err() && plan.instance != plan.name {
        // Its limits may be those of this VM already: it is of no use to another one.
        if let Err(error) = context.launcher.kill(&plan.instance, None).await {
            warn!(FLOTILLA_VM = &*plan.name, "{error}");
        }
    }
    let prepared = prepared.map_err(Start::Failed)?;
    planned(plan, run, &prepared, internal).await;
    context.launcher.start(&plan.instance, prepared).await.map_err(|error| match error {
        LaunchError::SpareGone { .. } => Start::Spare(error),
        error => Start::Failed(FleetError::LaunchFailed(error.to_string())),
    })
}

/// Tells the actor what is about to run, and waits until that is written down.
async fn planned(plan: &Plan, run: u64, prepared: &Prepared, internal: &mpsc::UnboundedSender<Internal>) {
    let (written, done) = oneshot::channel();
    let _ = internal.send(Internal::Planned {
        run,
        generation: plan.generation,
        spec: Arc::clone(&plan.spec),
        instance: Arc::clone(&plan.instance),
        command_line: prepared.command_line.clone(),
        written,
    });
    // An actor that has given this run up does not answer.
    let _ = done.await;
}
