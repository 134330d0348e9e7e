//! Keeps the pool full, and PID 1 free: owns when a spare is started, and the removal of those that ended. Two tasks, started by `systemd`.
//!
//! PID 1 starts one unit at a time. So a spare is started only when no VM waits for its start, never two at once, and then there is a pause at least
//! as long as that start took: filling a pool of any size takes PID 1 for half of its time at most.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::Launcher as _;
use super::systemd::SystemdLauncher;

/// The shortest time between two starts.
const PAUSE: Duration = Duration::from_millis(20);
/// After a start that failed: what is wrong does not go away by itself.
const FAILED: Duration = Duration::from_secs(30);

/// Starts spares as long as the launcher is there.
pub(super) async fn keep(launcher: Arc<SystemdLauncher>) {
    loop {
        launcher.pool().lacking().await;
        let _ = launcher.starts().wait_for(|waiting| *waiting == 0).await;
        let began = Instant::now();
        let pause = match launcher.start_spare().await {
            Ok(()) => began.elapsed().max(PAUSE),
            Err(error) => {
                warn!("a spare for the pool: {error}");
                FAILED
            }
        };
        sleep(pause).await;
    }
}

/// Removes what spares that ended leave on the host.
pub(super) async fn clean(launcher: Arc<SystemdLauncher>, mut ended: mpsc::UnboundedReceiver<String>) {
    while let Some(instance) = ended.recv().await {
        launcher.clean(&instance).await;
    }
}
