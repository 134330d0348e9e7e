//! How a VMM process comes to be, is found again, and ends: owns the one trait that the fleet knows, and what passes through it.
//!
//! `systemd` starts a unit per VM; `process` makes plain children where there is no systemd. Both report through the same channel of
//! [`Event`]s. `handover` is the wire format by which a unit's process gets its command line and descriptors, `server` its server; `unit` names the
//! units, `sockets` what is in a VM's directory; `signals` is what systemd tells of units; `pool` are units that wait for a VM, `refill` sees that there are enough.
//! `orphan` is a process that belongs to no VM. `dhcp` does for the DHCP servers of networks what these do for VMs.

pub mod dhcp;
pub mod handover;
mod limits;
mod orphan;
mod pool;
pub mod process;
mod refill;
pub mod server;
mod signals;
mod sockets;
pub mod systemd;
mod systemd1;
#[cfg(test)]
pub(crate) mod test_bus;
pub mod unit;
mod watch;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use dbus_api::spec::Limits;
use futures_util::future::BoxFuture;
use serde::Serialize;
use tokio::sync::mpsc;
use uuid::Uuid;

pub use orphan::Orphan;
pub use sockets::{CONSOLE_SOCKET, QMP_SOCKET};

use crate::fleet::life::Exit;
use crate::store::{Process, Runtime};

/// Environment variable that tells the VMM which descriptor stands for which name on its command line.
pub const FLOTILLA_FDS: &str = "FLOTILLA_FDS";

/// Environment variable that tells the VMM under which name its messages go to the journal, where the unit's is another one.
pub const FLOTILLA_JOURNAL: &str = "FLOTILLA_JOURNAL";

/// Why a process could not be made, found or ended.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// systemd said no.
    #[error("{unit}: {text}")]
    Unit {
        /// Which unit.
        unit: String,
        /// Its reason.
        text: String,
    },
    /// systemd could not be asked.
    #[error("systemd: {0}")]
    Bus(#[source] zbus::Error),
    /// It took too long.
    #[error("{unit}: systemd did not {verb} it within {seconds} s")]
    Timeout {
        /// Which unit.
        unit: String,
        /// What was asked.
        verb: &'static str,
        /// How long one waited.
        seconds: u64,
    },
    /// A unit that waited for a VM ended just then: start the VM without it.
    #[error("{unit}: it was to become the VM and has ended: start the VM again")]
    SpareGone {
        /// Which unit.
        unit: String,
    },
    /// This launcher cannot do it.
    #[error("{0}")]
    NotSupported(&'static str),
    /// The kernel said no.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl LaunchError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// What a descriptor stands for on the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Handed {
    /// A file's path.
    Path(PathBuf),
    /// A tap's name.
    Tap(String),
}

/// Everything a process needs to begin.
#[derive(Debug, Default)]
pub struct Prepared {
    /// Command line, program first.
    pub command_line: Vec<String>,
    /// Open descriptors.
    pub descriptors: Vec<(Handed, OwnedFd)>,
}

impl Prepared {
    /// The value of [`FLOTILLA_FDS`] when descriptor `at` of the list has the number `number(at)`.
    pub fn table(&self, number: impl Fn(usize) -> i32) -> String {
        #[derive(Serialize)]
        struct Entry<'a> {
            fd: i32,
            #[serde(flatten)]
            name: &'a Handed,
        }
        let entries: Vec<_> = self
            .descriptors
            .iter()
            .enumerate()
            .map(|(at, (name, _))| Entry { fd: number(at), name })
            .collect();
        // Paths were checked to be UTF-8 with the definition; nothing else here can fail.
        serde_json::to_string(&entries).unwrap_or_default()
    }
}

/// What happened to a process without anybody having asked this launcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// It is there.
    Started(Process),
    /// It is being ended by somebody else.
    Stopping,
    /// It is no more.
    Ended {
        /// systemd's invocation id, to tell it from its successor; empty when the launcher has none.
        invocation: String,
        /// How it ended.
        exit: Exit,
    },
}

/// A notice about the VM `name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The VM.
    pub name: String,
    /// What happened.
    pub notice: Notice,
}

/// Where events go. Unbounded: a launcher must never wait for the fleet, and there are a few events per process.
pub type Events = mpsc::UnboundedSender<Event>;

/// What was found of a VM at start-up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Its process is alive (or about to be: a unit whose main process is not known yet has `pid` 0).
    Alive(Process),
    /// It ended while nobody watched.
    Ended(Exit),
}

/// A VM to look for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The VM.
    pub name: String,
    /// Its identity, which stands on the command line.
    pub uuid: Uuid,
    /// What was last written about its process, in this boot.
    pub record: Option<Runtime>,
}

impl Wanted {
    /// Where its process runs, if it does.
    pub fn instance(&self) -> &str {
        self.record.as_ref().and_then(|record| record.instance.as_deref()).unwrap_or(&self.name)
    }
}

/// Makes, finds and ends processes. What is called `instance` here is where a VM's process runs: under the VM's own name, or as the spare that
/// [`Launcher::take`] gave it.
pub trait Launcher: Send + Sync {
    /// The systemd unit of the instance; empty when there is none.
    fn unit(&self, instance: &str) -> String;

    /// Directory of the instance's own sockets.
    fn sockets(&self, instance: &str) -> PathBuf;

    /// A spare for the next process of the VM `name`, if one waits: its name. It must be started or killed next.
    fn take(&self, name: &str) -> Option<String> {
        let _ = name;
        None
    }

    /// Sockets in that directory that the VMM is to listen on, bound for it where it may not make them itself.
    fn listeners(&self, instance: &str) -> Result<Vec<(Handed, OwnedFd)>, LaunchError> {
        let _ = instance;
        Ok(Vec::new())
    }

    /// File of the VMM's own messages; empty where they go to the journal of the unit.
    fn log_file(&self, name: &str) -> PathBuf;

    /// Makes the process. Bounded in time. When it fails, no process is left.
    fn start<'a>(
        &'a self,
        instance: &'a str,
        prepared: Prepared,
    ) -> BoxFuture<'a, Result<Process, LaunchError>>;

    /// Sets the limits of the instance's next process, and of the one that runs. Bounded in time.
    fn limit<'a>(&'a self, instance: &'a str, limits: &'a Limits) -> BoxFuture<'a, Result<(), LaunchError>>;

    /// The last lines that a process logged: few, short, free of control characters; none when they cannot be had. Bounded in time.
    fn last_lines<'a>(&'a self, name: &'a str, process: Option<&'a Process>) -> BoxFuture<'a, Vec<String>>;

    /// A program that prints the newest `lines` lines of the log of the VM `name`, and with `follow` goes on with those that come.
    fn log(&self, name: &str, lines: u64, follow: bool) -> std::process::Command;

    /// Ends the process without asking it; fine when there is none. Its end is reported as an event.
    fn kill<'a>(
        &'a self,
        instance: &'a str,
        process: Option<&'a Process>,
    ) -> BoxFuture<'a, Result<(), LaunchError>>;

    /// Looks for processes of earlier daemons; those alive are watched from now on. A VM without an entry never had one.
    fn find<'a>(
        &'a self,
        wanted: &'a [Wanted],
    ) -> BoxFuture<'a, Result<BTreeMap<String, Found>, LaunchError>>;

    /// Processes of VMs beside these, as far as this launcher can tell them from other people's.
    fn orphans<'a>(&'a self, wanted: &'a [Wanted]) -> BoxFuture<'a, Result<Vec<Orphan>, LaunchError>>;

    /// Removes what a VM without process leaves on the host: its directory, a failed unit. Problems are logged.
    fn clean<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()>;
}

/// How many lines [`Launcher::last_lines`] gives.
const LINES: usize = 10;
/// Characters of each of them.
const LINE: usize = 400;

/// The last lines of a log, fit to be shown.
fn tail(text: &str) -> Vec<String> {
    let shown = |line: &str| line.chars().take(LINE).map(|c| if c.is_control() { '?' } else { c }).collect();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].iter().map(|line| shown(line)).collect()
}

/// A signal's name.
pub(crate) fn signal_name(number: i32) -> String {
    match nix::sys::signal::Signal::try_from(number) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) => format!("SIG{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log() {
        assert!(tail("").is_empty() && tail("\n \n").is_empty());
        assert_eq!(tail("a\n\nb\u{1b}[31m\n"), ["a", "b?[31m"]);
        let long: String = (0..50).map(|line| format!("{line} {}\n", "x".repeat(1000))).collect();
        let lines = tail(&long);
        assert_eq!((lines.len(), lines[9].len()), (LINES, LINE));
        assert!(lines[9].starts_with("49 "));
    }

    #[test]
    fn the_table_is_what_the_vmm_reads() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let prepared = Prepared {
            command_line: Vec::new(),
            descriptors: vec![
                (Handed::Path("/srv/a.img".into()), null()),
                (Handed::Tap("fl-web-0".into()), null()),
            ],
        };
        assert_eq!(
            prepared.table(|at| 3 + at as i32),
            r#"[{"fd":3,"path":"/srv/a.img"},{"fd":4,"tap":"fl-web-0"}]"#
        );
    }
}
