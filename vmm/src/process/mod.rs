//! How this process presents itself to the host: owns the log, going to the background, the pid file, and termination signals.
//!
//! Called by `main` only. Everything here happens before the first thread starts.

pub mod daemon;
pub mod log;
pub mod signals;

use std::io;
use std::path::PathBuf;

/// Why the process could not set itself up.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The log file.
    #[error("log file {path}: {source}")]
    Log {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The log was set up before.
    #[error("the log is set up already")]
    LogTwice,
    /// The pid file.
    #[error("pid file {path}: {source}")]
    PidFile {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The pid file is there.
    #[error("pid file {0} exists already: remove it if no VM uses it")]
    PidFileExists(PathBuf),
    /// Going to the background.
    #[error("cannot go to the background: {0}")]
    Daemonize(#[source] io::Error),
    /// Signals.
    #[error("cannot wait for signals: {0}")]
    Signals(#[source] io::Error),
}
