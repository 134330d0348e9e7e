//! What a VM's actor can be told, and the way to it: the registry asks, the monitor task and the launcher report. No rules here.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dbus_api::spec::VmSpec;
use tokio::sync::{mpsc, oneshot, watch};

use super::FleetError;
use super::life::{Command, Exit, Verb};
use super::link::Wire;
use super::plug::{Ask, How, Rewrite};
use super::view::View;
use crate::launch::{Notice, Prepared};
use crate::qmp::{Caller, Client, Monitor, QmpEvent, TapNews, Told};
use crate::store::Process;

/// How long a request may take to be taken by the actor: it does nothing slow.
pub(super) const TAKEN: Duration = Duration::from_secs(20);

/// Where a request's answer goes.
pub(super) type Answer<T> = oneshot::Sender<Result<T, FleetError>>;

/// What people ask.
pub(super) enum Request {
    Job { verb: Verb, incoming: Option<Arc<Path>>, answer: Answer<u32> },
    Save { state: OwnedFd, memory: OwnedFd, answer: Answer<()> },
    Redefine { spec: Box<VmSpec>, if_generation: Option<u64>, answer: Answer<u64> },
    Undefine { answer: Answer<()> },
    Cancel { job: u32, answer: Answer<()> },
    Plug { ask: Ask, how: How, answer: Answer<(String, u32)> },
    HandOver { answer: oneshot::Sender<Result<Prepared, FleetError>> },
    EndByUnit { answer: Answer<()> },
    Caller { answer: Answer<Caller> },
    OpenQmp { client: Client, answer: Answer<OwnedFd> },
}

/// What the host tells.
pub(super) enum Internal {
    Notice(Notice),
    /// What is started next; the answer says that it is written down where.
    Planned {
        run: u64,
        generation: u64,
        spec: Arc<VmSpec>,
        instance: Arc<str>,
        command_line: Vec<String>,
        written: oneshot::Sender<()>,
    },
    Launched {
        run: u64,
        process: Process,
    },
    LaunchFailed {
        run: u64,
        error: FleetError,
    },
    Linked {
        run: u64,
        monitor: Monitor,
        paused: bool,
    },
    /// The process ended, and the last words of its connection are heard.
    Ended {
        invocation: String,
        exit: Exit,
    },
    /// What the process of a run that failed had logged at last.
    LastLog {
        run: u64,
        lines: Vec<String>,
    },
    Silent {
        run: u64,
    },
    /// It was silent, and answers again.
    Answers {
        run: u64,
        paused: bool,
    },
    Disconnected {
        run: u64,
    },
    VcpusChanged {
        run: u64,
        paused: bool,
    },
    Event {
        run: u64,
        event: QmpEvent,
    },
    /// The task that plugs a device asks for a definition to match.
    Rewrite {
        rewrite: Rewrite,
        answer: oneshot::Sender<Result<(), FleetError>>,
    },
    /// That task has ended; `gone`: nothing of the device is left.
    Plugged {
        run: u64,
        result: Result<(), FleetError>,
        gone: bool,
    },
    /// The task that puts a device away which nobody waits for has ended; `gone`: nothing is left of it.
    Finished {
        run: u64,
        id: String,
        gone: bool,
    },
    /// A client of the QMP socket sends something that is tracked.
    Client(Told),
    /// A client of the QMP socket needs a tap, or does not any more.
    Tap(TapNews),
    CommandDone {
        run: u64,
        command: Command,
        result: Result<(), FleetError>,
    },
}

/// The way to an actor.
#[derive(Clone)]
pub(super) struct Handle {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) internal: mpsc::UnboundedSender<Internal>,
    pub(super) view: watch::Receiver<Arc<View>>,
    pub(super) wire: Wire,
}
