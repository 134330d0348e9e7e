//! The end of a VM whose unit is being stopped: the host shuts down, or an administrator uses systemctl. Part of the state machine.
//!
//! The guest is asked, as by a shutdown with force: systemd waits for the process to end, and nobody could take the stop back.

use std::time::Duration;

use super::{Command, Effect, Intent, Stage, State, Vm};

impl Vm {
    pub(super) fn unit_stops(&mut self, patience: Option<Duration>, out: &mut Vec<Effect>) {
        let ordered = self.forced();
        self.by_guest = false;
        self.intent = Intent::Stopped;
        self.ending.get_or_insert_with(|| "its unit was stopped".to_owned());
        if self.state != State::Stopping {
            self.enter(State::Stopping, "its unit is being stopped");
        }
        match patience {
            _ if ordered => {}
            // A guest that stands still hears nothing.
            Some(patience) if self.linked && !self.still => {
                self.stage = Stage::Asked { force: true, from: State::Running };
                out.extend([Effect::Record, Effect::Send(Command::Powerdown), Effect::Arm(patience)]);
            }
            _ => {
                self.stage = Stage::Ending;
                self.force_end(out);
            }
        }
    }
}
