//! The command line of `flotilla job`.

use clap::{Args, Subcommand};

/// `flotilla job`.
#[derive(Debug, Subcommand)]
pub(crate) enum JobVerb {
    /// List what is under way
    #[command(visible_alias = "ls", after_help = "Example:\n  flotilla job list --json")]
    List(ListArgs),
    /// Cancel jobs: what they did is undone
    ///
    /// A start ends the VM's process; a shutdown leaves the VM as it was, though a guest that was asked may end all the same. What lasts as long as
    /// one command (pause, resume, power off) cannot be cancelled.
    #[command(after_help = "Example:\n  flotilla job cancel 17")]
    Cancel(CancelArgs),
}

/// `flotilla job list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `flotilla job cancel`.
#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Numbers, as `flotilla job list` shows them
    #[arg(required = true, value_name = "NUMBER")]
    pub(crate) ids: Vec<u32>,
}
