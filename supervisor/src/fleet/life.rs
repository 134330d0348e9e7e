//! The words of a VM's life: its states, what may be asked, what may happen and what is to be done. Plain types without rules; the
//! rules are those of `vm.rs`, and everybody in the daemon may use the words.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::FleetError;
pub use crate::qmp::Stage;

/// What is observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Never started since it was defined, or since the host booted.
    Defined,
    /// Its process is being made, or does not answer yet.
    Starting,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped.
    Paused,
    /// The process is asked to end.
    Stopping,
    /// Ended as wanted.
    Stopped,
    /// Alive, but does not answer.
    Quarantined,
    /// Ended by itself, or never came up.
    Failed,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Defined,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Stopped,
        Self::Quarantined,
        Self::Failed,
    ];

    /// The word on D-Bus.
    pub fn word(self) -> &'static str {
        match self {
            Self::Defined => "defined",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Quarantined => "quarantined",
            Self::Failed => "failed",
        }
    }

    /// No process belongs to the VM.
    pub fn idle(self) -> bool {
        matches!(self, Self::Defined | Self::Stopped | Self::Failed)
    }
}

/// What the administrator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Intent {
    /// Up, with its vCPUs running.
    Running,
    /// Up, with its vCPUs stopped.
    Paused,
    /// Down.
    Stopped,
}

impl Intent {
    /// The word on D-Bus.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// What can be asked of a VM; each request is a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Make the process.
    Start {
        /// Leave the vCPUs stopped.
        paused: bool,
    },
    /// Ask the guest to end.
    Shutdown {
        /// End it anyway when the guest does not, or cannot be asked.
        force: bool,
        /// How long the guest has.
        timeout: Duration,
    },
    /// End it now.
    PowerOff,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs go on.
    Resume,
}

impl Verb {
    /// The job type on D-Bus.
    pub fn word(self) -> &'static str {
        match self {
            Self::Start { .. } => "start",
            Self::Shutdown { .. } => "shutdown",
            Self::PowerOff => "power-off",
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By a signal (its name, `SIGSEGV`).
    Signal(String),
    /// Nobody saw it: it was not our child, or ended while the daemon was away.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(name) => write!(f, "signal {name}"),
            Self::Unknown => f.write_str("exit status unknown"),
        }
    }
}

/// A command to the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Press the power button.
    Powerdown,
    /// End.
    Quit,
    /// Stop the vCPUs.
    Stop,
    /// Let the vCPUs go on.
    Cont,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// Somebody asks; refused requests end their job at once.
    Request {
        /// Number of the job.
        job: u32,
        /// What is asked.
        verb: Verb,
    },
    /// A job is to end before its time, if it still can.
    Cancel {
        /// Number of the job.
        job: u32,
    },
    /// A process is being made that nobody asked us for: `systemctl start`.
    StartSeen,
    /// The process exists.
    Launched {
        /// Which process.
        run: u64,
    },
    /// No process came to be.
    LaunchFailed {
        /// Which process.
        run: u64,
        /// Why.
        error: FleetError,
    },
    /// The VMM answers.
    Connected {
        /// Which process.
        run: u64,
        /// Its vCPUs are stopped.
        paused: bool,
    },
    /// The VMM did not answer for as long as one waits.
    Silent {
        /// Which process.
        run: u64,
    },
    /// The connection to the VMM ended.
    Disconnected {
        /// Which process.
        run: u64,
    },
    /// The vCPUs stopped or went on.
    VcpusChanged {
        /// Which process.
        run: u64,
        /// They are stopped.
        paused: bool,
    },
    /// The VMM announces its end.
    ShutdownSeen {
        /// Which process.
        run: u64,
        /// Why, in words.
        why: String,
        /// The guest did it, not somebody on the host.
        guest: bool,
    },
    /// The time before a restart has passed.
    RestartDue {
        /// The process that ended.
        run: u64,
    },
    /// The process is being ended by somebody else: `systemctl stop`.
    StopSeen {
        /// Which process.
        run: u64,
    },
    /// Its unit asks for its end, and waits for it.
    UnitStops {
        /// Which process.
        run: u64,
        /// How long the guest has; without it, it is not asked.
        patience: Option<Duration>,
    },
    /// A client of the QMP socket sends a command whose effect is tracked, or has sent it.
    Client {
        /// Which process.
        run: u64,
        /// The command.
        command: Command,
        /// How far it has got.
        stage: Stage,
    },
    /// A command was answered, or its deadline passed.
    CommandDone {
        /// Which process.
        run: u64,
        /// The command.
        command: Command,
        /// The answer.
        result: Result<(), FleetError>,
    },
    /// The process ended.
    Gone {
        /// Which process.
        run: u64,
        /// How.
        exit: Exit,
    },
    /// The armed deadline passed.
    Deadline,
}

/// What to do.
#[derive(Debug, Clone)]
pub enum Effect {
    /// Make the process; answer `Launched` or `LaunchFailed`.
    Launch {
        /// Its vCPUs stay stopped.
        paused: bool,
    },
    /// Connect to the VMM and keep trying; answer `Connected`, and `Silent` when it takes long.
    Connect,
    /// Drop the connection and stop trying.
    Unlink,
    /// Send a command; answer `CommandDone`.
    Send(Command),
    /// End the process without asking it.
    Kill,
    /// Send `Deadline` after this time; replaces an earlier one.
    Arm(Duration),
    /// No deadline any more.
    Disarm,
    /// Send `RestartDue` after this time, unless [`super::vm::Vm::restart_due`] says meanwhile that nothing is due.
    RestartIn(Duration),
    /// Close a job.
    EndJob {
        /// Number of the job.
        job: u32,
        /// How it went.
        result: Result<(), FleetError>,
    },
    /// What a record needs to know has changed: write it before the effects that follow.
    Record,
}
