//! How this process presents itself to the host: owns the log and its trace points, going to the background, the pid file, and termination signals.
//!
//! Called by `main` only, before the first thread starts; all but `trace`, which every room above names its points from.

pub mod daemon;
mod journal;
pub mod log;
pub mod signals;
pub mod trace;

use std::io;
use std::path::PathBuf;

/// The first thing in the process, in place of what Rust's library does before its `main`.
pub fn begin() {
    fill_standard_descriptors();
    // SAFETY: no other thread runs yet. A write to a socket whose peer is gone is an error and not a signal. All threads get one heap:
    // each would otherwise map 64 MiB of its own at its first allocation, touch pages there and keep them; nothing on a hot path
    // here allocates, so there is nothing to contend for. A libc that refuses changes nothing.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Opens /dev/null as each of descriptors 0 to 2 that is closed, so that nothing opened later becomes somebody's standard output.
fn fill_standard_descriptors() {
    let mut fds = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: passes an array and its length.
    let known = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 0) } >= 0;
    for fd in fds.iter().filter(|fd| !known || fd.revents & libc::POLLNVAL != 0) {
        // SAFETY: asks for flags, and opens a file: the lowest free number, which is this one because those below are open.
        unsafe {
            if libc::fcntl(fd.fd, libc::F_GETFD) == -1
                && libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) == -1
            {
                // A process in this state would write its messages into a disk.
                libc::abort();
            }
        }
    }
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
    /// The file of trace points.
    #[error("-trace: {path}: {source}")]
    TraceFile {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A name in it.
    #[error("-trace: {path}: there is no trace point \"{name}\"; trace-get-state with name * lists them")]
    NoTracePoint {
        /// The file.
        path: PathBuf,
        /// What it says.
        name: String,
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
