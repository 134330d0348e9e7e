//! What the fleet says to a VMM and hears of its end, once there is a connection: the commands of the state machine, saving, and QMP's
//! errors as the fleet's. No tries and no state here: `link` and the tasks that plug devices use it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::{Value, json};

use super::FleetError;
use super::life::Command;
use crate::qmp::{Monitor, QmpError, QmpEvent};

/// Commands that change the run state answer at once.
pub(super) const COMMAND: Duration = Duration::from_secs(5);
/// Writing all of a large guest's memory takes as long as the disk takes.
const SAVE: Duration = Duration::from_secs(1800);

/// Why a VMM ends, in words, from its SHUTDOWN event.
pub(super) fn ending(event: &QmpEvent) -> String {
    let reason = event.data.get("reason").and_then(Value::as_str).unwrap_or_default();
    let guest = event.data.get("guest").and_then(Value::as_bool) == Some(true);
    match (guest, reason) {
        (true, "guest-reset") => "the guest rebooted, which ends a microvm".to_owned(),
        (true, _) => "the guest powered off".to_owned(),
        (false, "host-qmp-quit") => "ended over QMP".to_owned(),
        (false, reason) => format!("ended: {reason}"),
    }
}

/// Sends a command of the state machine.
pub(super) async fn send(monitor: &Monitor, command: Command) -> Result<(), FleetError> {
    let word = match command {
        Command::Powerdown => "system_powerdown",
        Command::Quit => "quit",
        Command::Stop => "stop",
        Command::Cont => "cont",
    };
    match monitor.execute(word, None, COMMAND).await {
        Ok(_) => Ok(()),
        // It may hang up before its answer is out: that is what was asked for.
        Err(QmpError::Closed { .. }) if command == Command::Quit => Ok(()),
        Err(QmpError::Refused { class, .. })
            if command == Command::Powerdown && class == "CommandNotFound" =>
        {
            Err(FleetError::NotSupported(
                "this board has no power button, so the guest cannot be asked: shut it down from inside, or use force"
                    .to_owned(),
            ))
        }
        Err(error) => Err(map_error(&error)),
    }
}

/// Has the VM saved to two files, whose names are the caller's business.
pub(super) async fn save(monitor: &Monitor, state: OwnedFd, memory: OwnedFd) -> Result<(), FleetError> {
    let (one, two) = ("flotilla-state", "flotilla-memory");
    for (name, descriptor) in [(one, state), (two, memory)] {
        let arguments = json!({ "fdname": name });
        let given = monitor.execute_with("getfd", Some(arguments), vec![descriptor], COMMAND).await;
        given.map_err(|error| map_error(&error))?;
    }
    let arguments = json!({ "uri": format!("fd:{one}:{two}") });
    let saved = monitor.execute("migrate", Some(arguments), SAVE).await;
    saved.map(drop).map_err(|error| map_error(&error))
}

/// A QMP error as the fleet's.
pub(super) fn map_error(error: &QmpError) -> FleetError {
    let text = error.to_string();
    match error {
        QmpError::Deadline { .. } | QmpError::Connect { .. } | QmpError::NotQmp { .. } => {
            FleetError::QmpTimeout(text)
        }
        QmpError::Closed { .. } => FleetError::VmmDied(text),
        QmpError::NotRunning { .. } => FleetError::InvalidState(text),
        QmpError::Refused { .. } | QmpError::BadRequest { .. } => FleetError::QmpError(text),
    }
}
