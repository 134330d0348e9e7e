//! What may be asked of a VM now: the requests that the state machine takes, and why it refuses the others.

use super::Vm;
use crate::fleet::FleetError;
use crate::fleet::life::{State, Verb};

impl Vm {
    /// May `verb` be asked now? The policy of the house: one job at a time, but a power-off is never refused because another job hangs.
    pub fn admit(&self, verb: Verb) -> Result<(), FleetError> {
        let invalid = |text: &str| Err(FleetError::InvalidState(text.to_owned()));
        if let Some((job, running)) = self.job
            && (verb != Verb::PowerOff || running == Verb::PowerOff)
        {
            let word = running.word();
            return Err(FleetError::Busy(format!(
                "job {job} ({word}) is under way: wait for it, or power the VM off"
            )));
        }
        match (verb, self.state) {
            (Verb::Start { .. }, state) if state.idle() => Ok(()),
            (Verb::Shutdown { .. } | Verb::PowerOff, _) if self.restart_due().is_some() => Ok(()),
            (Verb::Start { .. }, _) => invalid(&format!("it is {} already", self.state.word())),
            (Verb::Shutdown { .. } | Verb::PowerOff, State::Stopped) => invalid("it is stopped already"),
            (Verb::Shutdown { .. } | Verb::PowerOff, state) if state.idle() => {
                invalid(&format!("it is {}: there is nothing to stop", state.word()))
            }
            (_, state) if state.idle() => invalid(&format!("it is {}: start it first", state.word())),
            (Verb::PowerOff, _) => Ok(()),
            (Verb::Shutdown { force: true, .. }, State::Running | State::Paused | State::Quarantined) => {
                Ok(())
            }
            (Verb::Shutdown { .. }, State::Running | State::Paused) => Ok(()),
            (Verb::Pause, State::Running) | (Verb::Resume, State::Paused) => Ok(()),
            (Verb::Pause, State::Paused) => invalid("it is paused already"),
            (Verb::Resume, State::Running) => invalid("it is running already"),
            (_, State::Quarantined) => invalid("it does not answer: power it off, or wait until it does"),
            (_, state) => invalid(&format!("it is {}", state.word())),
        }
    }

    /// May the definition be removed now?
    pub fn admit_undefine(&self) -> Result<(), FleetError> {
        match self.job {
            Some((job, verb)) => Err(FleetError::Busy(format!("job {job} ({}) is under way", verb.word()))),
            None if self.state.idle() => Ok(()),
            None => Err(FleetError::InvalidState(format!(
                "it is {}: power it off first, or ask with force",
                self.state.word()
            ))),
        }
    }
}
