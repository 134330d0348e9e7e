//! Waiting for jobs: listens to `JobRemoved` from before the verb is called, shows the phase on a terminal, gives up at a deadline.
//!
//! One `Jobs` watches any number of jobs. Used by every verb that drives VMs.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use dbus_api::proxy::JobProxy;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use zbus::OwnedObjectPath;

use crate::client::Client;
use crate::failure::{self, Exit, Failure};

/// Shows phases for at most so many jobs at once: a line that flickers through hundreds of names helps nobody.
const SHOWN: usize = 16;

enum News {
    Ended { job: OwnedObjectPath, result: String, name: String, text: String },
    Phase { vm: String, phase: String },
    DaemonGone,
}

/// Watches jobs. Make it before calling the verb: a job may end before the call returns.
pub(crate) struct Jobs {
    news: mpsc::UnboundedReceiver<News>,
    sender: mpsc::UnboundedSender<News>,
    tasks: Vec<JoinHandle<()>>,
    line: StatusLine,
}

impl Jobs {
    /// Subscribes.
    pub(crate) async fn watch(client: &Client) -> Result<Self, Failure> {
        let (sender, news) = mpsc::unbounded_channel();
        let mut removed =
            client.manager.receive_job_removed().await.map_err(|error| client.bus_failed(error))?;
        let mut owner =
            client.manager.inner().receive_owner_changed().await.map_err(|error| client.bus_failed(error))?;
        // Tasks of their own drain the streams at once: a full stream would hold up the replies behind it on the same connection.
        let to = sender.clone();
        let ended = tokio::spawn(async move {
            while let Some(signal) = removed.next().await {
                if let Ok(args) = signal.args() {
                    let news = News::Ended {
                        job: args.path().clone(),
                        result: args.result().clone(),
                        name: args.error_name().clone(),
                        text: args.error_message().clone(),
                    };
                    if to.send(news).is_err() {
                        return;
                    }
                }
            }
        });
        let to = sender.clone();
        let gone = tokio::spawn(async move {
            // A new owner is first seen when activation starts the daemon; only a loss ends jobs.
            while let Some(owner) = owner.next().await {
                if owner.is_none() && to.send(News::DaemonGone).is_err() {
                    return;
                }
            }
        });
        Ok(Self { news, sender, tasks: vec![ended, gone], line: StatusLine::new() })
    }

    /// Waits until all jobs have ended; gives each VM's outcome, in the order of the jobs.
    pub(crate) async fn wait(
        &mut self,
        client: &Client,
        doing: &str,
        jobs: Vec<(String, OwnedObjectPath)>,
        limit: Duration,
    ) -> Vec<(String, Result<(), Failure>)> {
        let deadline = Instant::now() + limit;
        if self.line.shown && jobs.len() <= SHOWN {
            for (vm, job) in &jobs {
                self.follow_phase(client, vm.clone(), job.clone());
            }
        }
        let many = jobs.len() > SHOWN;
        let mut outcomes: HashMap<OwnedObjectPath, Result<(), Failure>> = HashMap::new();
        while jobs.iter().any(|(_, job)| !outcomes.contains_key(job)) {
            let trouble = match tokio::time::timeout_at(deadline, self.news.recv()).await {
                Ok(Some(News::Ended { job, result, name, text })) => {
                    let outcome = match result.as_str() {
                        "done" => Ok(()),
                        result => Err(failure::of_job(result, &name, &text)),
                    };
                    outcomes.insert(job, outcome);
                    if many {
                        let done = jobs.iter().filter(|(_, job)| outcomes.contains_key(job)).count();
                        self.line.show(&format!("{doing}: {done} of {}", jobs.len()));
                    }
                    continue;
                }
                Ok(Some(News::Phase { vm, phase })) => {
                    self.line.show(&status(doing, &vm, &phase));
                    continue;
                }
                Ok(Some(News::DaemonGone) | None) => Failure::new(
                    Exit::Unreachable,
                    "flotillad went away meanwhile; see `flotilla list` when it is back",
                ),
                Err(_) => Failure::new(
                    Exit::TimedOut,
                    format!(
                        "not done after {} s; the daemon goes on with it: see `flotilla list`",
                        limit.as_secs()
                    ),
                ),
            };
            for (_, job) in &jobs {
                outcomes.entry(job.clone()).or_insert_with(|| Err(trouble.clone()));
            }
        }
        self.line.clear();
        jobs.into_iter()
            .map(|(vm, job)| {
                let outcome = outcomes.remove(&job).unwrap_or(Ok(()));
                let outcome = outcome.map_err(|failure| failure.about(&vm));
                (vm, outcome)
            })
            .collect()
    }

    /// As [`wait`](Self::wait), for the one job of a verb about `name`.
    pub(crate) async fn finish(
        &mut self,
        client: &Client,
        doing: &str,
        name: &str,
        job: OwnedObjectPath,
        limit: Duration,
    ) -> Result<(), Failure> {
        let ended = self.wait(client, doing, vec![(name.to_owned(), job)], limit).await;
        ended.into_iter().try_for_each(|(_, outcome)| outcome)
    }

    fn follow_phase(&mut self, client: &Client, vm: String, job: OwnedObjectPath) {
        let connection = client.connection.clone();
        let to = self.sender.clone();
        self.tasks.push(tokio::spawn(async move {
            // The job may be over already: then there is nothing to show.
            let Ok(job) = JobProxy::new(&connection, job).await else { return };
            // Told after the phase that it belongs to; most jobs have none.
            let mut progress = job.receive_progress_changed().await;
            let mut phases = job.receive_phase_changed().await;
            let mut phase = String::new();
            loop {
                let text = tokio::select! {
                    change = phases.next() => match change {
                        Some(change) => match change.get().await {
                            Ok(new) => {
                                phase = new;
                                phase.clone()
                            }
                            Err(_) => continue,
                        },
                        None => return,
                    },
                    change = progress.next() => match change {
                        Some(change) => match change.get().await {
                            Ok(progress) => with_part(&phase, progress),
                            Err(_) => continue,
                        },
                        None => return,
                    },
                };
                if !text.is_empty() && to.send(News::Phase { vm: vm.clone(), phase: text }).is_err() {
                    return;
                }
            }
        }));
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.line.clear();
    }
}

/// What is under way, for people. Before a job's first step its phase is the state at rest, which would only confuse.
fn status(doing: &str, vm: &str, phase: &str) -> String {
    match phase {
        "defined" | "stopped" | "running" | "paused" | "failed" => format!("{doing} {vm}"),
        phase if phase == doing => format!("{doing} {vm}"),
        phase => format!("{doing} {vm}: {phase}"),
    }
}

/// A phase with how much of it is done; just the phase when nobody knows.
fn with_part(phase: &str, (done, all): (u64, u64)) -> String {
    match u128::from(done).saturating_mul(100).checked_div(u128::from(all)) {
        Some(part) if !phase.is_empty() => format!("{phase}, {part} %"),
        _ => phase.to_owned(),
    }
}

/// One line on the terminal that is written over.
struct StatusLine {
    shown: bool,
    dirty: bool,
}

impl StatusLine {
    fn new() -> Self {
        Self { shown: std::io::stderr().is_terminal(), dirty: false }
    }

    fn show(&mut self, text: &str) {
        if self.shown {
            // Nothing can be done about a standard error that is closed.
            let _ = write!(std::io::stderr(), "\r\x1b[K{}…", crate::output::plain(text));
            self.dirty = true;
        }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.dirty) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_shown_when_it_says_something() {
        assert_eq!(status("starting", "web", "defined"), "starting web");
        assert_eq!(status("starting", "web", "starting"), "starting web");
        assert_eq!(status("starting", "web", "network"), "starting web: network");
        assert_eq!(with_part("copying disks", (1, 3)), "copying disks, 33 %");
        assert_eq!((with_part("pausing", (0, 0)), with_part("", (1, 2))), ("pausing".into(), String::new()));
    }
}
