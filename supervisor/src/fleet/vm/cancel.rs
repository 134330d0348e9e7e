//! Cancelling a job of the VM: which can be cancelled when, and what the VM is then. Part of the state machine.
//!
//! ```text
//! start     until the VMM answers               the process is ended, as by a power-off
//! shutdown  until the guest's time is over      the VM is what it was; a guest that heard the button may end all the same
//! ```
//!
//! The others last as long as one command of the VMM, and an end that was ordered for good stays ordered.

use super::{Effect, FleetError, Intent, Stage, State, Verb, Vm};

impl Vm {
    /// May this job be cancelled now?
    pub fn admit_cancel(&self, job: u32) -> Result<(), FleetError> {
        match (self.job, self.state, self.stage) {
            (Some((own, Verb::Start { .. })), State::Starting, _) if own == job => Ok(()),
            (Some((own, Verb::Shutdown { .. })), State::Stopping, Stage::Asked { .. }) if own == job => {
                Ok(())
            }
            (Some((own, verb)), ..) if own == job => Err(FleetError::NotSupported(format!(
                "job {job} ({}) cannot be cancelled any more",
                verb.word()
            ))),
            _ => Err(FleetError::NoSuchJob(format!("job {job} has ended"))),
        }
    }

    pub(super) fn cancel(&mut self, job: u32, out: &mut Vec<Effect>) {
        if self.admit_cancel(job).is_err() {
            return;
        }
        let cancelled = || FleetError::Cancelled("it was cancelled".to_owned());
        if let (State::Stopping, Stage::Asked { from, .. }) = (self.state, self.stage) {
            return self.revert(from, cancelled(), out);
        }
        self.restarts.active = false;
        self.by_guest = false;
        self.end_job(Err(cancelled()), out);
        self.enter(State::Stopping, "its start was cancelled");
        self.intent = Intent::Stopped;
        self.force_end(out);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Input;
    use super::*;
    use crate::fleet::life::{Command, Exit};

    fn ended(effects: &[Effect]) -> Vec<u32> {
        let closed = |effect: &Effect| match effect {
            Effect::EndJob { job, result: Err(FleetError::Cancelled(_)) } => Some(*job),
            _ => None,
        };
        effects.iter().filter_map(closed).collect()
    }

    #[test]
    fn a_start_that_is_cancelled_ends_the_process_when_there_is_one() {
        let mut vm = Vm::idle(State::Defined, "");
        vm.step(Input::Request { job: 1, verb: Verb::Start { paused: false } });
        assert!(matches!(vm.admit_cancel(2), Err(FleetError::NoSuchJob(_))));
        let effects = vm.step(Input::Cancel { job: 1 });
        assert_eq!((ended(&effects), vm.state(), vm.intent()), (vec![1], State::Stopping, Intent::Stopped));
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Kill)));
        assert!(vm.step(Input::Launched { run: 1 }).iter().any(|effect| matches!(effect, Effect::Kill)));
        vm.step(Input::Gone { run: 1, exit: Exit::Signal("SIGKILL".into()) });
        assert_eq!(vm.state(), State::Stopped);
        assert!(vm.step(Input::Cancel { job: 1 }).is_empty());
    }

    #[test]
    fn a_shutdown_is_cancelled_as_long_as_the_guest_is_asked() {
        let mut vm = Vm::idle(State::Defined, "");
        vm.step(Input::Request { job: 1, verb: Verb::Start { paused: false } });
        vm.step(Input::Launched { run: 1 });
        vm.step(Input::Connected { run: 1, paused: false });
        let verb = Verb::Shutdown { force: true, timeout: Duration::from_secs(30) };
        vm.step(Input::Request { job: 2, verb });
        assert_eq!(ended(&vm.step(Input::Cancel { job: 2 })), [2]);
        assert_eq!((vm.state(), vm.intent()), (State::Running, Intent::Running));
        // One that has gone further is not.
        vm.step(Input::Request { job: 3, verb });
        vm.step(Input::Deadline);
        assert!(matches!(vm.admit_cancel(3), Err(FleetError::NotSupported(_))));
        assert!(vm.step(Input::Cancel { job: 3 }).is_empty());
        vm.step(Input::CommandDone { run: 1, command: Command::Quit, result: Ok(()) });
        vm.step(Input::Gone { run: 1, exit: Exit::Code(0) });
        assert_eq!(vm.state(), State::Stopped);
    }
}
