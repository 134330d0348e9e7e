//! Whether a VM that ended is started again, and after which pause: a pure part of the state machine in `vm.rs`.
//!
//! The pause doubles with each restart of a row. A row ends when somebody starts the VM, and when a process has lived for [`SETTLED`].

use std::time::Duration;

use dbus_api::spec::Restart;

/// Pause before the first restart.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(300);
/// Restarts in a row after which the VM is left as it is.
pub(super) const MOST: u32 = 10;
/// A process that lived for so long was no part of a row.
pub(super) const SETTLED: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Restarts {
    pub(super) policy: Restart,
    /// Started by the policy; or, while the VM is idle: about to be.
    pub(super) active: bool,
    /// Restarts in a row.
    pub(super) row: u32,
}

impl Default for Restarts {
    fn default() -> Self {
        Self { policy: Restart::Never, active: false, row: 0 }
    }
}

impl Restarts {
    /// The policy asks for a restart after an end that was a failure or not, and wanted by somebody or not.
    pub(super) fn asked(&self, failed: bool, wanted: bool) -> bool {
        match self.policy {
            Restart::Never => false,
            Restart::OnFailure => failed,
            Restart::Always => !wanted,
        }
    }

    /// Counts one more restart and gives the pause before it; `None`: there were too many.
    pub(super) fn plan(&mut self) -> Option<Duration> {
        self.active = self.row < MOST;
        if !self.active {
            return None;
        }
        self.row += 1;
        Some(self.pause())
    }

    /// The pause before the restart counted last.
    pub(super) fn pause(&self) -> Duration {
        FIRST_PAUSE.saturating_mul(1 << self.row.saturating_sub(1).min(16)).min(LAST_PAUSE)
    }
}
