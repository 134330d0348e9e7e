//! What a QMP command is: its name, the shape of its arguments and of its answer, and who answers it. The table of them is in `commands`.

use serde_json::Value;

use super::arguments::{Arguments, Kind, Member};
use super::descriptors::Descriptors;
use super::message::QmpError;
use crate::control::Command;

/// Who answers a command.
pub(super) enum Action {
    /// The owner of the VM's life.
    Control(Command),
    /// The same, and its answer's value is to become text.
    Text(Command, fn(&Value) -> String),
    /// Nobody needs to be asked.
    Answer(Value),
}

pub(super) type Outcome = Result<Action, QmpError>;

/// One command.
pub(super) struct Spec {
    pub(super) name: &'static str,
    pub(super) arguments: &'static [Member],
    pub(super) returns: Kind,
    pub(super) action: fn(&Arguments, &Descriptors) -> Outcome,
}

/// One that has arguments to look at.
pub(super) const fn command(
    name: &'static str,
    arguments: &'static [Member],
    returns: Kind,
    action: fn(&Arguments, &Descriptors) -> Outcome,
) -> Spec {
    Spec { name, arguments, returns, action }
}
