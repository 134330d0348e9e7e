//! The life of one VM as a pure state machine: owns what may happen when. No IO, no clock, no task: the actor feeds it [`Input`]s and
//! carries out the [`Effect`]s that come back.
//!
//! ```text
//!            Start                  Connected                Pause / STOP
//!  defined ────────▶ starting ───────────────▶ running ◀───────────────────▶ paused
//!  stopped ────────▶    │  │ Deadline            │  │      Resume / RESUME     │
//!  failed  ────────▶    │  └──────────┐   Silent │  │ Shutdown, PowerOff,      │
//!     ▲                 │             ▼          │  │ SHUTDOWN event,          │
//!     │ LaunchFailed,   │        quarantined ◀───┘  │ unit being stopped       │
//!     ├─────────────────┘             │             ▼                          │
//!     │ Gone (crash)                  └────────▶ stopping ◀────────────────────┘
//!     └──────────────────────── any ◀╌╌╌╌╌╌╌╌╌╌╌╌╌┘ Gone ─▶ stopped
//! ```
//!
//! *Intent* is what the administrator wants and changes only by a request (or by the guest's own power-off); *state* is what is
//! observed. `quarantined` means: the process lives and does not answer. It is left alone until it answers or somebody powers it off.
//!
//! A VM that ended by itself is started again if its policy says so, after a pause that grows: it is idle meanwhile, and whatever an
//! administrator asks for then (start, stop, undefine) goes before.
//!
//! Every process has a number ([`Vm::run`]); what is said about an earlier one is ignored.

mod admit;
mod cancel;
mod unit;

use std::time::Duration;

use dbus_api::spec::Restart;

use super::FleetError;
use super::life::{Command, Effect, Exit, Input, Intent, Stage as Sent, State, Verb};
use super::restart::{MOST, Restarts};

/// From launch to the first answer over QMP. Longer than the launcher's own deadline, which therefore speaks first.
pub const START_DEADLINE: Duration = Duration::from_secs(45);
/// From `quit` to the end of the process; then it is killed.
pub const QUIT_GRACE: Duration = Duration::from_secs(5);
/// From the kill to the end of the process: only a process stuck in the kernel takes longer.
pub const KILL_GRACE: Duration = Duration::from_secs(20);
/// From the VMM's SHUTDOWN event to the end of its process.
pub const EXIT_GRACE: Duration = Duration::from_secs(10);

/// How far a stop has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The guest is asked; `force` says what happens when it does not end.
    Asked { force: bool, from: State },
    /// `quit` was sent.
    Quit,
    /// It was killed.
    Killed,
    /// It ends by itself, or somebody else ends it.
    Ending,
}

/// One VM.
#[derive(Debug, Clone)]
pub struct Vm {
    state: State,
    intent: Intent,
    reason: String,
    run: u64,
    launched: bool,
    linked: bool,
    stage: Stage,
    ending: Option<String>,
    job: Option<(u32, Verb)>,
    restarts: Restarts,
    /// The guest ends the process, and nobody asked it to.
    by_guest: bool,
    /// Somebody with a right to pressed the power button over QMP.
    button: bool,
    /// Its vCPUs were stopped when that was last known.
    still: bool,
}

impl Vm {
    /// A VM without a process.
    pub fn idle(state: State, reason: impl Into<String>) -> Self {
        let state = if state.idle() { state } else { State::Stopped };
        Self {
            state,
            intent: Intent::Stopped,
            reason: reason.into(),
            run: 0,
            launched: false,
            linked: false,
            stage: Stage::Ending,
            ending: None,
            job: None,
            restarts: Restarts::default(),
            by_guest: false,
            button: false,
            still: false,
        }
    }

    /// What happens when the VM ends by itself, from now on.
    pub fn set_policy(&mut self, policy: Restart) {
        self.restarts.policy = policy;
    }

    /// As the last daemon left it: `row` restarts were tried, and one was due when the VM is idle and `restarting`.
    #[must_use]
    pub fn restarted(mut self, row: u32, restarting: bool, intent: Intent) -> Self {
        (self.restarts.row, self.restarts.active) = (row, restarting);
        if restarting && intent != Intent::Stopped {
            self.intent = intent;
        }
        self
    }

    /// The process that ended had run well for long: what comes is a new row.
    pub fn settle(&mut self) {
        self.restarts.row = 0;
    }

    /// Restarts in a row.
    pub fn row(&self) -> u32 {
        self.restarts.row
    }

    /// The policy started the process, or is about to.
    pub fn restarting(&self) -> bool {
        self.restarts.active
    }

    /// The pause before the restart that is due.
    pub fn restart_due(&self) -> Option<Duration> {
        (self.restarts.active && self.state.idle()).then(|| self.restarts.pause())
    }

    /// A VM whose process was found alive at start-up. `state` is what the last daemon knew; `stopping` stands only when the end was
    /// ordered for good (`forced`), otherwise the guest may as well go on.
    pub fn found(state: State, intent: Intent, forced: bool) -> Self {
        let (state, stage, intent) = match state {
            State::Stopping if forced => (State::Stopping, Stage::Quit, Intent::Stopped),
            State::Stopping => (State::Starting, Stage::Ending, Intent::Running),
            State::Running | State::Paused | State::Quarantined => (state, Stage::Ending, intent),
            _ => (State::Starting, Stage::Ending, intent),
        };
        Self {
            intent,
            run: 1,
            launched: true,
            stage,
            reason: "found alive".to_owned(),
            ..Self { state, ..Self::idle(State::Defined, "") }
        }
    }

    /// Observed state.
    pub fn state(&self) -> State {
        self.state
    }

    /// What the administrator wants.
    pub fn intent(&self) -> Intent {
        self.intent
    }

    /// Why it is in that state.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Number of the current or last process.
    pub fn run(&self) -> u64 {
        self.run
    }

    /// The VMM answers.
    pub fn linked(&self) -> bool {
        self.linked
    }

    /// The end of the process was ordered for good.
    pub fn forced(&self) -> bool {
        self.state == State::Stopping && matches!(self.stage, Stage::Quit | Stage::Killed)
    }

    /// The job under way.
    pub fn job(&self) -> Option<u32> {
        self.job.map(|(job, _)| job)
    }

    /// One step.
    pub fn step(&mut self, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        match input {
            Input::Request { job, verb } => self.request(job, verb, &mut out),
            Input::Cancel { job } => self.cancel(job, &mut out),
            Input::StartSeen => {
                if self.state.idle() {
                    self.begin(false, "started outside the API", &mut out);
                }
            }
            Input::Deadline => self.deadline(&mut out),
            Input::RestartDue { run } => {
                if run == self.run && self.restart_due().is_some() {
                    let paused = self.intent == Intent::Paused;
                    let reason = format!("restart {} of {MOST} in a row", self.restarts.row);
                    self.begin(paused, &reason, &mut out);
                    self.restarts.active = true;
                    out.push(Effect::Launch { paused });
                }
            }
            Input::Launched { run }
            | Input::LaunchFailed { run, .. }
            | Input::Connected { run, .. }
            | Input::Silent { run }
            | Input::Disconnected { run }
            | Input::VcpusChanged { run, .. }
            | Input::ShutdownSeen { run, .. }
            | Input::StopSeen { run }
            | Input::UnitStops { run, .. }
            | Input::Client { run, .. }
            | Input::CommandDone { run, .. }
            | Input::Gone { run, .. }
                if run != self.run || self.state.idle() => {}
            input => self.observe(input, &mut out),
        }
        out
    }

    fn request(&mut self, job: u32, verb: Verb, out: &mut Vec<Effect>) {
        if let Err(error) = self.admit(verb) {
            out.push(Effect::EndJob { job, result: Err(error) });
            return;
        }
        if matches!(verb, Verb::Shutdown { .. } | Verb::PowerOff) {
            // Whatever brought the end about or the start, from here on it is this.
            self.restarts.active = false;
            self.by_guest = false;
        }
        if matches!(verb, Verb::Shutdown { .. } | Verb::PowerOff) && self.state.idle() {
            self.intent = Intent::Stopped;
            self.enter(State::Stopped, "it was about to be started again, and was told not to");
            out.extend([Effect::Record, Effect::EndJob { job, result: Ok(()) }]);
            return;
        }
        if self.job.is_some() {
            self.end_job(Err(FleetError::Cancelled("the VM was powered off".to_owned())), out);
        }
        match verb {
            Verb::Start { paused } => {
                self.restarts.row = 0;
                self.job = Some((job, verb));
                self.begin(paused, "start was asked for", out);
                out.push(Effect::Launch { paused });
            }
            Verb::Shutdown { force, timeout } => {
                self.job = Some((job, verb));
                let from = self.state;
                self.enter(State::Stopping, "shutdown was asked for");
                self.intent = Intent::Stopped;
                if self.linked {
                    self.stage = Stage::Asked { force, from };
                    out.extend([Effect::Record, Effect::Send(Command::Powerdown), Effect::Arm(timeout)]);
                } else if force {
                    self.force_end(out);
                } else {
                    self.revert(from, FleetError::QmpTimeout("the VMM does not answer".to_owned()), out);
                }
            }
            Verb::PowerOff => {
                self.job = Some((job, verb));
                self.enter(State::Stopping, "power-off was asked for");
                self.intent = Intent::Stopped;
                self.force_end(out);
            }
            Verb::Pause => {
                self.job = Some((job, verb));
                out.push(Effect::Send(Command::Stop));
            }
            Verb::Resume => {
                self.job = Some((job, verb));
                out.push(Effect::Send(Command::Cont));
            }
        }
    }

    fn begin(&mut self, paused: bool, reason: &str, out: &mut Vec<Effect>) {
        self.run += 1;
        self.launched = false;
        self.linked = false;
        self.ending = None;
        self.by_guest = false;
        self.button = false;
        self.restarts.active = false;
        self.stage = Stage::Ending;
        self.intent = if paused { Intent::Paused } else { Intent::Running };
        self.enter(State::Starting, reason);
        out.extend([Effect::Record, Effect::Arm(START_DEADLINE)]);
    }

    /// Ends the process: politely when it answers, otherwise not.
    fn force_end(&mut self, out: &mut Vec<Effect>) {
        out.push(Effect::Record);
        if self.linked && !matches!(self.stage, Stage::Quit | Stage::Killed) {
            self.stage = Stage::Quit;
            out.extend([Effect::Send(Command::Quit), Effect::Arm(QUIT_GRACE)]);
        } else {
            self.stage = Stage::Killed;
            out.extend([Effect::Kill, Effect::Arm(KILL_GRACE)]);
        }
    }

    /// A shutdown came to nothing: the VM is what it was.
    fn revert(&mut self, from: State, error: FleetError, out: &mut Vec<Effect>) {
        self.intent = if from == State::Paused { Intent::Paused } else { Intent::Running };
        self.enter(from, "the shutdown came to nothing");
        out.extend([Effect::Disarm, Effect::Record]);
        self.end_job(Err(error), out);
    }

    fn observe(&mut self, input: Input, out: &mut Vec<Effect>) {
        match input {
            Input::Launched { .. } => {
                if !std::mem::replace(&mut self.launched, true) {
                    out.push(Effect::Record);
                    // Killed before there was a process to kill: now there is.
                    let dying = self.state == State::Stopping && self.stage == Stage::Killed;
                    out.push(if dying { Effect::Kill } else { Effect::Connect });
                }
            }
            Input::LaunchFailed { error, .. } => {
                if self.state == State::Stopping || self.intent == Intent::Stopped {
                    self.restarts.active = false;
                    self.enter(State::Stopped, "it was stopped before it came up");
                    self.close(Ok(()), out);
                } else {
                    self.enter(State::Failed, &error.to_string());
                    // Who asked for a start is told why it failed; a start of the policy's own is tried again.
                    let again = self.restarts.active;
                    self.restarts.active = false;
                    let pause = if again { self.plan_restart() } else { None };
                    self.close(Err(error), out);
                    out.extend(pause.map(Effect::RestartIn));
                }
            }
            Input::Connected { paused, .. } => self.connected(paused, out),
            Input::Silent { .. } => match self.state {
                State::Running | State::Paused => {
                    self.enter(State::Quarantined, "its process lives, but does not answer QMP");
                    out.push(Effect::Record);
                }
                // Its end had been ordered before the daemon was restarted.
                State::Stopping if self.stage == Stage::Quit => self.force_end(out),
                _ => {}
            },
            Input::Disconnected { .. } => {
                self.linked = false;
                out.push(Effect::Connect);
            }
            Input::VcpusChanged { paused, .. } => match (self.state, paused) {
                (State::Running, true) => {
                    self.enter(State::Paused, "its vCPUs were stopped");
                    out.push(Effect::Record);
                }
                (State::Paused, false) => {
                    self.enter(State::Running, "its vCPUs go on");
                    out.push(Effect::Record);
                }
                _ => {}
            },
            Input::ShutdownSeen { why, guest, .. } => {
                if self.state != State::Stopping {
                    self.by_guest = guest && !self.button && self.ending.is_none();
                    if !(self.by_guest && self.restarts.policy == Restart::Always) {
                        self.intent = Intent::Stopped;
                    }
                    self.stage = Stage::Ending;
                    self.enter(State::Stopping, &why);
                    out.extend([Effect::Record, Effect::Arm(EXIT_GRACE)]);
                }
                self.ending = Some(why);
            }
            Input::StopSeen { .. } => {
                self.by_guest = false;
                self.intent = Intent::Stopped;
                if self.state != State::Stopping {
                    self.stage = Stage::Ending;
                    self.enter(State::Stopping, "its unit is being stopped");
                    out.extend([Effect::Disarm, Effect::Record]);
                }
                self.ending.get_or_insert_with(|| "its unit was stopped".to_owned());
            }
            Input::UnitStops { patience, .. } => self.unit_stops(patience, out),
            Input::Client { command, stage, .. } => self.client(command, stage, out),
            Input::CommandDone { command, result, .. } => self.command_done(command, result, out),
            Input::Gone { exit, .. } => self.gone(&exit, out),
            Input::Request { .. }
            | Input::Cancel { .. }
            | Input::StartSeen
            | Input::Deadline
            | Input::RestartDue { .. } => {}
        }
    }

    fn connected(&mut self, paused: bool, out: &mut Vec<Effect>) {
        self.linked = true;
        let state = if paused { State::Paused } else { State::Running };
        match self.state {
            State::Starting => {
                self.enter(state, if paused { "started, waiting for resume" } else { "started" });
                out.extend([Effect::Disarm, Effect::Record]);
                self.end_job_if(|verb| matches!(verb, Verb::Start { .. }), Ok(()), out);
            }
            State::Stopping => {
                if matches!(self.stage, Stage::Quit | Stage::Killed) {
                    self.stage = Stage::Quit;
                    out.extend([Effect::Send(Command::Quit), Effect::Arm(QUIT_GRACE)]);
                }
            }
            _ if self.state != state => {
                self.stage = Stage::Ending;
                self.enter(state, "it answers");
                out.push(Effect::Record);
            }
            _ => {}
        }
    }

    fn command_done(&mut self, command: Command, result: Result<(), FleetError>, out: &mut Vec<Effect>) {
        match (command, result) {
            (Command::Stop | Command::Cont, Ok(())) => {
                self.vcpus(command == Command::Stop, out);
                self.end_job_if(|verb| matches!(verb, Verb::Pause | Verb::Resume), Ok(()), out);
            }
            (Command::Stop | Command::Cont, Err(error)) => {
                self.end_job_if(|verb| matches!(verb, Verb::Pause | Verb::Resume), Err(error), out);
            }
            (Command::Powerdown, Err(error)) => {
                if let (State::Stopping, Stage::Asked { force, from }) = (self.state, self.stage) {
                    if force {
                        self.force_end(out);
                    } else {
                        self.revert(from, error, out);
                    }
                }
            }
            (Command::Quit, Err(_)) if self.state == State::Stopping && self.stage == Stage::Quit => {
                self.force_end(out);
            }
            (Command::Powerdown | Command::Quit, _) => {}
        }
    }

    /// The VMM did `stop` or `cont` for somebody who may ask for it.
    fn vcpus(&mut self, stopping: bool, out: &mut Vec<Effect>) {
        let (from, to) =
            if stopping { (State::Running, State::Paused) } else { (State::Paused, State::Running) };
        self.want_vcpus(stopping);
        if self.state == from {
            self.enter(to, if stopping { "paused" } else { "resumed" });
        }
        out.push(Effect::Record);
    }

    fn want_vcpus(&mut self, stopping: bool) {
        self.intent = match self.state {
            State::Running | State::Paused if stopping => Intent::Paused,
            State::Running | State::Paused => Intent::Running,
            _ => self.intent,
        };
    }

    /// A client of the QMP socket is an administrator too: what it asks for is wanted. What comes of it, events and the process tell.
    fn client(&mut self, command: Command, sent: Sent, out: &mut Vec<Effect>) {
        match (command, sent) {
            (Command::Quit, Sent::Asked) => {
                self.by_guest = false;
                self.ending.get_or_insert_with(|| "ended over QMP".to_owned());
            }
            (Command::Quit, Sent::Refused) if self.state != State::Stopping => self.ending = None,
            (Command::Stop | Command::Cont, Sent::Done) => self.vcpus(command == Command::Stop, out),
            (Command::Powerdown, Sent::Done | Sent::Left) => self.button = true,
            (Command::Stop | Command::Cont, Sent::Left) => {
                self.want_vcpus(command == Command::Stop);
                out.push(Effect::Record);
            }
            _ => {}
        }
    }

    fn gone(&mut self, exit: &Exit, out: &mut Vec<Effect>) {
        // An end that somebody asked for may come long after it was given up.
        let asked = self.intent == Intent::Stopped;
        let wanted = asked || self.state == State::Stopping || self.ending.is_some();
        let starting = self.state == State::Starting;
        if wanted {
            let why = self.ending.take().unwrap_or_else(|| match self.stage {
                Stage::Killed => "powered off; its process had to be killed".to_owned(),
                _ => "powered off".to_owned(),
            });
            self.enter(State::Stopped, &why);
        } else if !starting && matches!(exit, Exit::Code(0) | Exit::Unknown) {
            self.enter(State::Stopped, &format!("its process ended ({exit})"));
        } else {
            self.enter(State::Failed, &format!("its process died ({exit})"));
        }
        let again = self.restarts.asked(self.state == State::Failed, asked || wanted && !self.by_guest);
        // A start that somebody asked for has somebody who is told of its end.
        let told = starting && matches!(self.job, Some((_, Verb::Start { .. })));
        self.restarts.active = false;
        let pause = if again && !told { self.plan_restart() } else { None };
        if self.state == State::Stopped && pause.is_none() {
            self.intent = Intent::Stopped;
        }
        let died = || FleetError::VmmDied(format!("the VMM ended ({exit}): see its log"));
        let result = match self.job {
            Some((_, Verb::Shutdown { .. } | Verb::PowerOff)) => Ok(()),
            _ => Err(died()),
        };
        self.close(result, out);
        out.extend(pause.map(Effect::RestartIn));
    }

    /// The VM ended and is to be started again: the pause before that, unless it was tried too often. Says in the reason which of both.
    fn plan_restart(&mut self) -> Option<Duration> {
        let pause = self.restarts.plan();
        self.reason += &match pause {
            Some(pause) => format!("; starts again in {} s", pause.as_secs()),
            None => format!("; not started again: {MOST} restarts in a row did not help"),
        };
        pause
    }

    fn deadline(&mut self, out: &mut Vec<Effect>) {
        let silent = "its process lives, but does not answer QMP";
        match self.state {
            State::Starting => {
                self.enter(State::Quarantined, silent);
                out.push(Effect::Record);
                self.end_job(Err(FleetError::QmpTimeout(format!("{silent}: power it off, or wait"))), out);
            }
            State::Stopping => match self.stage {
                Stage::Asked { force: true, .. } | Stage::Quit => self.force_end(out),
                Stage::Asked { force: false, from } => {
                    let error = FleetError::QmpTimeout("the guest did not shut down in time".to_owned());
                    self.revert(from, error, out);
                }
                Stage::Killed => {
                    self.enter(State::Quarantined, "its process was killed and is still there");
                    out.push(Effect::Record);
                    let error = FleetError::LaunchFailed("the process does not die".to_owned());
                    self.end_job(Err(error), out);
                }
                Stage::Ending => {
                    self.enter(State::Quarantined, "it announced its end, but its process is still there");
                    out.push(Effect::Record);
                }
            },
            _ => {}
        }
    }

    fn enter(&mut self, state: State, reason: &str) {
        self.state = state;
        self.still = match state {
            State::Running | State::Starting => false,
            State::Paused => true,
            _ => self.still,
        };
        reason.clone_into(&mut self.reason);
    }

    /// The process is no more.
    fn close(&mut self, result: Result<(), FleetError>, out: &mut Vec<Effect>) {
        self.launched = false;
        self.linked = false;
        self.ending = None;
        out.extend([Effect::Disarm, Effect::Unlink, Effect::Record]);
        self.end_job(result, out);
    }

    fn end_job(&mut self, result: Result<(), FleetError>, out: &mut Vec<Effect>) {
        if let Some((job, _)) = self.job.take() {
            out.push(Effect::EndJob { job, result });
        }
    }

    fn end_job_if(
        &mut self,
        wanted: impl Fn(Verb) -> bool,
        result: Result<(), FleetError>,
        out: &mut Vec<Effect>,
    ) {
        if self.job.is_some_and(|(_, verb)| wanted(verb)) {
            self.end_job(result, out);
        }
    }
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;
