//! How this process presents itself to the host: owns the log, going to the background, the pid file, and termination signals.
//!
//! Called by `main` only. Everything here happens before the first thread starts.

pub mod daemon;
pub mod log;
pub mod signals;

use std::io;
use std::path::PathBuf;

/// Gives all threads one heap. Each would otherwise map 64 MiB of its own at its first allocation, touch pages there and keep
/// them; nothing on a hot path here allocates, so there is nothing to contend for.
pub fn share_heap() {
    // SAFETY: no other thread runs yet. A libc that refuses changes nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

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
