//! What can go wrong with a test host; each text says where to look further.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a host, an image or a command in a host failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A system call on this machine failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path or program.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// An image could not be built.
    #[error("{script} failed ({status}); last lines of {}:\n{tail}", log.display())]
    Build {
        /// Name of the script in `tests/images`.
        script: String,
        /// How it ended.
        status: String,
        /// Everything it printed.
        log: PathBuf,
        /// The end of that.
        tail: String,
    },
    /// The emulator ended, or answered with an error.
    #[error("host {host}: {what}\n{console}")]
    Emulator {
        /// Name of the host.
        host: String,
        /// What happened.
        what: String,
        /// The last lines of the emulator's messages and of the host's console.
        console: String,
    },
    /// Something did not happen in time.
    #[error("host {host}: {what}: nothing after {limit:?}\n{console}")]
    Late {
        /// Name of the host.
        host: String,
        /// What was waited for, with the newest answer.
        what: String,
        /// How long.
        limit: Duration,
        /// The last lines of the host's console.
        console: String,
    },
    /// A command that had to succeed did not, or the other way round.
    #[error("host {host}: `{command}` exited with {code}\nstdout: {stdout}\nstderr: {stderr}")]
    Command {
        /// Name of the host.
        host: String,
        /// The line that was run.
        command: String,
        /// Exit code.
        code: i32,
        /// What it printed.
        stdout: String,
        /// What it complained about.
        stderr: String,
    },
    /// A bad name, or a host that is (not) there.
    #[error("{0}")]
    Usage(String),
}

/// For `map_err`: an [`HostError::Io`] that says what was being done.
pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> HostError {
    let what = what.into();
    move |source| HostError::Io { what, source }
}
