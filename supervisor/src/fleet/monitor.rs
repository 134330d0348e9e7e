//! The actor's connection to its VMM: owns the tries, the first question and the forwarding of events. Reports to the actor only.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::inbox::Internal;
use super::life::Command;
use super::{Context, FleetError};
use crate::qmp::{Monitor, QmpError, QmpEvent};

/// One try. A VMM greets at once; one that is frozen accepts and never greets.
const TRY: Duration = Duration::from_secs(2);
/// How much of it counts against the tries at the same time.
const SLOT: Duration = Duration::from_millis(50);
/// After this long without an answer the VM is said to be silent.
const SILENT: Duration = Duration::from_secs(2);
/// A new VMM listens a few milliseconds after it was made. There is no event to wait for: between `bind` and `listen` the socket's file
/// exists and refuses.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// Commands that change the run state answer at once.
pub(super) const COMMAND: Duration = Duration::from_secs(5);

/// Writing all of a large guest's memory takes as long as the disk takes.
const SAVE: Duration = Duration::from_secs(1800);

/// Keeps trying until the VMM answers, then forwards its events until the connection ends.
pub(super) async fn run(
    context: Arc<Context>,
    path: PathBuf,
    run: u64,
    actor: mpsc::UnboundedSender<Internal>,
) {
    let since = Instant::now();
    let mut told = false;
    let mut pause = FIRST_PAUSE;
    let (monitor, mut events, paused) = loop {
        let tried = {
            let Ok(slot) = context.connects.acquire().await else { return };
            let mut answer = pin!(timeout(TRY, first_answer(&path)));
            // A VMM that does not answer must not keep its place from those that would.
            match timeout(SLOT, &mut answer).await {
                Ok(tried) => tried,
                Err(_) => {
                    drop(slot);
                    answer.await
                }
            }
        };
        match tried {
            Ok(Ok(connected)) => break connected,
            Ok(Err(error)) => debug!(run, "not connected: {error}"),
            Err(_) => debug!(run, "not connected: no answer within {TRY:?}"),
        }
        if !told && since.elapsed() >= SILENT {
            told = true;
            let _ = actor.send(Internal::Silent { run });
        }
        if actor.is_closed() {
            return;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
        // A first verdict is due on time, not a pause later.
        if !told {
            pause = pause.min(SILENT.saturating_sub(since.elapsed()).max(FIRST_PAUSE));
        }
    };
    let _ = actor.send(Internal::Linked { run, monitor: monitor.clone(), paused });
    loop {
        match events.recv().await {
            Ok(event) => {
                let _ = actor.send(Internal::Event { run, event });
            }
            // Some events were missed: ask what they would have told.
            Err(broadcast::error::RecvError::Lagged(_)) => {
                if let Ok(paused) = status(&monitor).await {
                    let _ = actor.send(Internal::VcpusChanged { run, paused });
                }
            }
            Err(broadcast::error::RecvError::Closed) => break,
        }
    }
    monitor.closed().await;
    let _ = actor.send(Internal::Disconnected { run });
}

async fn first_answer(
    path: &std::path::Path,
) -> Result<(Monitor, broadcast::Receiver<QmpEvent>, bool), QmpError> {
    let monitor = Monitor::connect(path, TRY).await?;
    // Listen before asking: what happens in between is told by an event.
    let events = monitor.events();
    let paused = status(&monitor).await?;
    Ok((monitor, events, paused))
}

async fn status(monitor: &Monitor) -> Result<bool, QmpError> {
    let answer = monitor.execute("query-status", None, COMMAND).await?;
    Ok(!answer.get("running").and_then(Value::as_bool).unwrap_or(false))
}

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
