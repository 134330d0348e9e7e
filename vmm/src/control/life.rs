//! The life of a VM as a pure state machine: `(state, input) -> (next state, effects in order)`. Nothing here touches a machine.
//!
//! ```text
//!              -S                              not -S
//!               |                                |
//!               v                                v
//!          Prelaunch ------- cont ---------> Running <--- cont ---+
//!               |                              |  |               |
//!               |                              |  +--- stop --> Paused
//!               |                              |                  |
//!               +------------ quit, signal, guest ends -----------+
//!                                    |
//!                                    v
//!                                Shutdown
//! ```
//!
//! A reset leads from each state but the last back to itself, also one that the guest asks for where the machine starts again in place; asking the guest to power down changes none.

use crate::machine::{Departure, GuestEvent};

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Created paused; never ran.
    Prelaunch,
    /// vCPUs run.
    Running,
    /// vCPUs are out of the guest.
    Paused,
    /// At its end; the process goes down.
    Shutdown,
}

/// What can happen to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A client says `stop`.
    Stop,
    /// A client says `cont`.
    Cont,
    /// A client says `quit`.
    Quit,
    /// A client says `system_reset`.
    Reset,
    /// A client says `system_powerdown`.
    Powerdown,
    /// The guest ended its run.
    Guest(GuestEvent),
    /// The guest asked for a reset, and its machine starts again in place.
    Restart,
    /// The guest has let a device or a vCPU go.
    Left(Departure),
    /// This process was told to end: the number of the signal.
    Signal(i32),
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// `quit`.
    Quit,
    /// By signal.
    Signal(i32),
    /// By the guest, or by KVM.
    Guest(GuestEvent),
}

impl End {
    /// The reason in the SHUTDOWN event.
    pub fn reason(&self) -> String {
        match self {
            Self::Quit => "host-qmp-quit".to_owned(),
            Self::Signal(number) => format!("Guest shutdown by signal {number}"),
            Self::Guest(GuestEvent::PowerOff | GuestEvent::TripleFault) => "guest-shutdown".to_owned(),
            Self::Guest(GuestEvent::Reset) => "guest-reset".to_owned(),
            Self::Guest(GuestEvent::InternalError(_)) => "host-error".to_owned(),
        }
    }

    /// What happened, for the log: one reason has more than one cause.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Quit => "asked over QMP",
            Self::Signal(_) => "asked by a signal",
            Self::Guest(GuestEvent::PowerOff) => "the guest powered off",
            Self::Guest(GuestEvent::Reset) => "the guest asked for a reset",
            Self::Guest(GuestEvent::TripleFault) => {
                "triple fault: how some kernels reboot, and how a lost one ends"
            }
            Self::Guest(GuestEvent::InternalError(_)) => "KVM could not go on",
        }
    }

    /// Says whether the guest wanted it.
    pub fn by_guest(&self) -> bool {
        matches!(self, Self::Guest(GuestEvent::PowerOff | GuestEvent::TripleFault | GuestEvent::Reset))
    }

    /// The exit status of the process: 0 unless the host failed the guest.
    pub fn exit_code(&self) -> u8 {
        u8::from(matches!(self, Self::Guest(GuestEvent::InternalError(_))))
    }
}

/// Why an input is not for this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// `stop` twice.
    #[error("the VM is paused already")]
    AlreadyPaused,
    /// `cont` twice.
    #[error("the VM is running already")]
    AlreadyRunning,
    /// Too late.
    #[error("the VM has ended")]
    Ended,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Effect {
    /// Pause the machine.
    Pause,
    /// Let the machine run.
    Resume,
    /// Tell everybody that it stopped.
    Stopped,
    /// Tell everybody that it runs again.
    Resumed,
    /// Put the machine, which is paused, back to its start.
    Reset,
    /// Tell everybody that it was reset.
    WasReset,
    /// Press the power button.
    PressButton,
    /// Tell everybody that it was pressed.
    Pressed,
    /// End what the guest has let go, and tell everybody.
    Forget(Departure),
    /// Answer the client.
    Reply,
    /// Tell everybody that it ends, and end the loop.
    End(End),
}

/// A transition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) next: State,
    pub(super) effects: Vec<Effect>,
}

pub(super) fn step(state: State, input: &Input) -> Result<Step, Refusal> {
    let to = |next, effects| Ok(Step { next, effects });
    match (state, input) {
        (State::Shutdown, _) => Err(Refusal::Ended),
        (State::Running, Input::Stop) => {
            to(State::Paused, vec![Effect::Pause, Effect::Stopped, Effect::Reply])
        }
        (State::Prelaunch | State::Paused, Input::Stop) => Err(Refusal::AlreadyPaused),
        (State::Prelaunch | State::Paused, Input::Cont) => {
            to(State::Running, vec![Effect::Resume, Effect::Resumed, Effect::Reply])
        }
        (State::Running, Input::Cont) => Err(Refusal::AlreadyRunning),
        (State::Running, Input::Reset) => {
            let effects = vec![Effect::Pause, Effect::Reset, Effect::Resume, Effect::Reply, Effect::WasReset];
            to(State::Running, effects)
        }
        (State::Prelaunch | State::Paused, Input::Reset) => {
            to(state, vec![Effect::Reset, Effect::Reply, Effect::WasReset])
        }
        (State::Running, Input::Restart) => {
            let effects = vec![Effect::Pause, Effect::Reset, Effect::Resume, Effect::WasReset];
            to(State::Running, effects)
        }
        // It asked in the moment before.
        (State::Prelaunch | State::Paused, Input::Restart) => {
            to(state, vec![Effect::Reset, Effect::WasReset])
        }
        (_, Input::Left(what)) => to(state, vec![Effect::Forget(what.clone())]),
        (_, Input::Powerdown) => to(state, vec![Effect::PressButton, Effect::Reply, Effect::Pressed]),
        (_, Input::Quit) => to(State::Shutdown, vec![Effect::Reply, Effect::End(End::Quit)]),
        (_, Input::Signal(number)) => to(State::Shutdown, vec![Effect::End(End::Signal(*number))]),
        // Also when paused: the guest may have ended in the moment before.
        (_, Input::Guest(event)) => to(State::Shutdown, vec![Effect::End(End::Guest(event.clone()))]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            4 => Just(Input::Stop),
            4 => Just(Input::Cont),
            1 => Just(Input::Quit),
            2 => Just(Input::Reset),
            2 => Just(Input::Restart),
            1 => Just(Input::Powerdown),
            1 => Just(Input::Left(Departure::Port("pcie.1".to_owned()))),
            1 => Just(Input::Signal(15)),
            1 => Just(Input::Guest(GuestEvent::PowerOff)),
            1 => Just(Input::Guest(GuestEvent::InternalError(String::new()))),
        ]
    }

    proptest! {
        #[test]
        fn a_life_makes_sense(paused: bool, inputs in proptest::collection::vec(any_input(), 0..40)) {
            let mut state = if paused { State::Prelaunch } else { State::Running };
            let mut machine_runs = !paused;
            let mut ends = 0;
            for input in inputs {
                let before = state;
                let Ok(step) = step(state, &input) else {
                    prop_assert!(before == State::Shutdown || matches!(input, Input::Stop | Input::Cont));
                    continue;
                };
                prop_assert_ne!(before, State::Shutdown, "nothing follows the end");
                for effect in &step.effects {
                    match effect {
                        Effect::Pause => prop_assert!(std::mem::replace(&mut machine_runs, false)),
                        Effect::Resume => prop_assert!(!std::mem::replace(&mut machine_runs, true)),
                        Effect::Reset => prop_assert!(!machine_runs, "reset while it runs"),
                        Effect::End(_) => ends += 1,
                        Effect::Stopped
                        | Effect::Resumed
                        | Effect::WasReset
                        | Effect::PressButton
                        | Effect::Pressed
                        | Effect::Forget(_)
                        | Effect::Reply => {}
                    }
                }
                let replies = step.effects.iter().filter(|e| **e == Effect::Reply).count();
                let asked = !matches!(input, Input::Signal(_) | Input::Guest(_) | Input::Restart | Input::Left(_));
                prop_assert_eq!(replies, usize::from(asked), "one answer for each question");
                prop_assert!(step.next != State::Prelaunch || before == State::Prelaunch, "nothing leads back to the beginning");
                state = step.next;
                if state != State::Shutdown {
                    prop_assert_eq!(machine_runs, state == State::Running);
                }
            }
            prop_assert_eq!(ends, i32::from(state == State::Shutdown));
        }
    }
}
