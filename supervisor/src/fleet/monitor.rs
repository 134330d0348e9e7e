//! The actor's connection to its VMM: owns the tries, the first question, the forwarding of events and the word that it hangs. Reports to the actor only.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use super::Context;
use super::inbox::Internal;
use super::words::COMMAND;
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
    let mut silent = monitor.silent();
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            // The sender lives in the connection, which this task holds.
            Ok(()) = silent.changed() => {
                if *silent.borrow_and_update() {
                    let _ = actor.send(Internal::Silent { run });
                } else if let Ok(paused) = status(&monitor).await {
                    let _ = actor.send(Internal::Answers { run, paused });
                }
                continue;
            }
        };
        match event {
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
