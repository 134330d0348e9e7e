//! `migrate`: owns what state it is in, and what a snapshot does to a running VM.
//!
//! ```text
//!             migrate          done
//!   setup ────────────▶ active ─────▶ completed      a VM that was restored begins as completed
//!     ▲                   │  ▲            │
//!     │ (next)      error ▼  └────────────┘ migrate
//!     └─────────────── failed
//! ```
//!
//! A snapshot is made while the client waits: nobody ever reads *active*. A VM that ran is paused afterwards; if it could not be saved it
//! runs on.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde_json::json;

use crate::process::trace;
use crate::snapshot::Target;

use super::{CommandError, Control, Event, Outcome, Refusal, State, reply};

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Setup,
    Active,
    Completed,
    Failed,
}

/// Why a VM does not go anywhere.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// Only snapshots.
    #[error("MicroVM does not support migration: use file:/absolute/path to make a snapshot")]
    NoLiveMigration,
    /// Not `SCHEME:PLACE` with a known scheme.
    #[error("Invalid uri: {0}: use file:/absolute/path")]
    Uri(String),
    /// Not two.
    #[error("Invalid uri: name two descriptors of empty files: fd:STATE:MEMORY")]
    Descriptors,
    /// Not from this state.
    #[error("Failed to transfer migration status from {0} to {1}.")]
    Transition(&'static str, &'static str),
}

impl Status {
    pub(super) fn at_start(restored: bool) -> Self {
        if restored { Self::Completed } else { Self::Setup }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    fn to(self, next: Self) -> Result<Self, MigrationError> {
        tracing::trace!(target: trace::MIGRATION_STATE, "{} -> {}", self.name(), next.name());
        match (self, next) {
            (Self::Setup | Self::Completed | Self::Failed, Self::Active)
            | (Self::Active, Self::Completed | Self::Failed) => Ok(next),
            _ => Err(MigrationError::Transition(self.name(), next.name())),
        }
    }
}

/// The place that a URI names.
fn place(uri: &str, descriptors: Vec<OwnedFd>) -> Result<Target, MigrationError> {
    match uri.split_once(':') {
        Some(("file", path)) if path.starts_with('/') => Ok(Target::Directory(PathBuf::from(path))),
        Some(("fd", _)) => {
            let files = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| MigrationError::Descriptors)?;
            let [state, memory] = files.map(File::from);
            Ok(Target::Files { state, memory })
        }
        Some(("tcp" | "unix", _)) => Err(MigrationError::NoLiveMigration),
        _ => Err(MigrationError::Uri(uri.to_owned())),
    }
}

impl Control {
    /// Makes a snapshot.
    pub(super) fn migrate(&mut self, uri: &str, descriptors: Vec<OwnedFd>) -> Vec<Outcome> {
        match self.try_migrate(uri, descriptors) {
            Ok(paused) => {
                let stopped = paused.then(|| Outcome::Event(Event { name: "STOP", data: json!({}) }));
                stopped.into_iter().chain(reply(json!({}))).collect()
            }
            Err(error) => vec![Outcome::Reply(Err(error))],
        }
    }

    /// Returns whether the VM ran before.
    fn try_migrate(&mut self, uri: &str, descriptors: Vec<OwnedFd>) -> Result<bool, CommandError> {
        let target = place(uri, descriptors)?;
        if self.state == State::Shutdown {
            return Err(Refusal::Ended.into());
        }
        self.migration = self.migration.to(Status::Active)?;
        let ran = self.state == State::Running;
        let result = self.save(&target, ran);
        self.migration =
            self.migration.to(if result.is_ok() { Status::Completed } else { Status::Failed })?;
        result.map(|()| ran)
    }

    fn save(&mut self, target: &Target, ran: bool) -> Result<(), CommandError> {
        if ran {
            self.machine("cannot pause the VM", |vm| vm.pause())?;
        }
        let saved = self.machine("cannot make a snapshot", |vm| vm.save(target));
        match saved {
            Ok(()) if ran => self.state = State::Paused,
            Err(_) if ran => self.machine("cannot resume the VM", |vm| vm.resume())?,
            _ => {}
        }
        saved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_transitions() {
        use Status::{Active, Completed, Failed, Setup};
        let all = [Setup, Active, Completed, Failed];
        let fine =
            [(Setup, Active), (Completed, Active), (Failed, Active), (Active, Completed), (Active, Failed)];
        for from in all {
            for to in all {
                assert_eq!(from.to(to).is_ok(), fine.contains(&(from, to)), "{from:?} {to:?}");
            }
        }
    }

    #[test]
    fn places() {
        let path = place("file:/a/b", Vec::new()).unwrap();
        assert!(matches!(path, Target::Directory(path) if path.ends_with("a/b")));
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(matches!(place("fd:a:b", vec![null(), null()]), Ok(Target::Files { .. })));
        for (uri, text) in [
            ("file:a", "Invalid uri: file:a"),
            ("", "Invalid uri: "),
            ("fd:a", "Invalid uri: name two descriptors"),
            ("exec:cat", "Invalid uri: exec:cat"),
            ("tcp:127.0.0.1:4", "MicroVM does not support migration"),
        ] {
            let error = place(uri, Vec::new()).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
