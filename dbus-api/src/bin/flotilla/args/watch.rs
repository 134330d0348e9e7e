//! The command line of the verbs that look on: `flotilla events`, `flotilla wait`, `flotilla top`, `flotilla doctor`.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::parse_duration;

/// `flotilla events`.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Only of these VMs
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Print each event as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Leave after so many events
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) count: Option<u64>,
    /// Leave after this time, such as 30s or 2m
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
}

/// `flotilla wait`.
#[derive(Debug, Args)]
pub(crate) struct WaitForArgs {
    /// VM
    pub(crate) name: String,
    /// State to wait for; several, separated by commas: the first that comes
    #[arg(long = "for", value_name = "STATE", value_delimiter = ',', default_value = "running")]
    pub(crate) states: Vec<Wanted>,
    /// How long, such as 30s or 2m; without it, as long as it takes
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) timeout: Option<Duration>,
}

/// What a VM can be waited to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wanted {
    /// Never started since it was defined, or since the host booted
    Defined,
    /// Its process is being made
    Starting,
    /// Its vCPUs run
    Running,
    /// Its vCPUs stand still
    Paused,
    /// It is asked to end
    Stopping,
    /// It ended as wanted
    Stopped,
    /// It does not answer
    Quarantined,
    /// It ended by itself, or never came up
    Failed,
    /// It does not run, however that came: defined, stopped or failed
    Down,
    /// It is not defined any more
    Gone,
}

/// `flotilla top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Only these VMs
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Time between two looks, at least 1s
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    pub(crate) interval: Duration,
    /// Leave after so many tables [default: 1 where the output is no terminal]
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) count: Option<u64>,
    /// Print each table as one line of JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `flotilla doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
