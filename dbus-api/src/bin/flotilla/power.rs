//! Verbs that change what VMs do: start, stop, pause, resume, rm. Each takes many names; one that fails does not stop the others.

use std::collections::HashMap;
use std::time::Duration;

use dbus_api::error::Error;
use dbus_api::proxy::{JobProxy, Options};
use zbus::{OwnedObjectPath, Variant};

use crate::args::{DrainArgs, NamesArgs, RmArgs, StartArgs, StopArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::jobs::Jobs;
use crate::output;

/// A verb that is a job.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    /// Start, perhaps with the vCPUs standing.
    Start {
        /// vCPUs stand.
        paused: bool,
    },
    /// Ask the guest, then force.
    Shutdown {
        /// What the guest gets.
        timeout: Duration,
    },
    /// At once.
    PowerOff,
    /// vCPUs stand.
    Pause,
    /// vCPUs go on.
    Resume,
}

impl Verb {
    /// What to print when it is done.
    fn done(self) -> &'static str {
        match self {
            Self::Start { paused: false } => "started",
            Self::Start { paused: true } => "started, paused",
            Self::Shutdown { .. } | Self::PowerOff => "stopped",
            Self::Pause => "paused",
            Self::Resume => "resumed",
        }
    }

    /// What to say while it is under way.
    fn doing(self) -> &'static str {
        match self {
            Self::Start { .. } => "starting",
            Self::Shutdown { .. } | Self::PowerOff => "stopping",
            Self::Pause => "pausing",
            Self::Resume => "resuming",
        }
    }

    /// How long the daemon may take; it has deadlines of its own, so these only catch its silence.
    fn limit(self) -> Duration {
        match self {
            Self::Start { .. } => Duration::from_secs(90),
            Self::Shutdown { timeout } => timeout + Duration::from_secs(30),
            Self::PowerOff => Duration::from_secs(60),
            Self::Pause | Self::Resume => Duration::from_secs(30),
        }
    }

    async fn call(self, client: &Client, name: &str) -> Result<OwnedObjectPath, Error> {
        let manager = &client.manager;
        let options = Options::new();
        match self {
            Self::Start { paused } => {
                manager.start_vm(name, if paused { "paused" } else { "run" }, options).await
            }
            Self::Shutdown { timeout } => {
                let usec = u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX);
                manager.shutdown_vm(name, HashMap::from([("timeout_usec", Variant::from(usec))])).await
            }
            Self::PowerOff => manager.power_off_vm(name, options).await,
            Self::Pause => manager.pause_vm(name, options).await,
            Self::Resume => manager.resume_vm(name, options).await,
        }
    }
}

/// Does a verb to one VM and waits for its end.
pub(crate) async fn drive(client: &Client, name: &str, verb: Verb) -> Result<(), Failure> {
    let mut jobs = Jobs::watch(client).await?;
    let job = verb.call(client, name).await.map_err(|error| client.failed(error).about(name))?;
    jobs.wait(client, verb.doing(), vec![(name.to_owned(), job)], verb.limit())
        .await
        .into_iter()
        .try_for_each(|(_, outcome)| outcome)
}

/// Does a verb to all of them at once. Says each failure but the last, which is returned; its status is the first failure's.
async fn drive_all(client: &Client, names: &[String], verb: Verb, wait: bool) -> Result<(), Failure> {
    let mut jobs = Jobs::watch(client).await?;
    let mut begun = Vec::new();
    let mut failures = Vec::new();
    for name in unique(names) {
        match verb.call(client, name).await {
            Ok(job) => begun.push((name.clone(), job)),
            Err(error) => failures.push(client.failed(error).about(name)),
        }
    }
    if wait {
        for (name, outcome) in jobs.wait(client, verb.doing(), begun, verb.limit()).await {
            match outcome {
                Ok(()) => output::print(&format!("{name} {}\n", verb.done()))?,
                Err(failure) => failures.push(failure),
            }
        }
    }
    report(failures)
}

/// Names without repetitions, in order.
fn unique(names: &[String]) -> impl Iterator<Item = &String> {
    let mut seen = std::collections::HashSet::new();
    names.iter().filter(move |name| seen.insert(*name))
}

/// Prints all failures but the last and returns that one with the first one's status.
pub(crate) fn report(mut failures: Vec<Failure>) -> Result<(), Failure> {
    let exit = failures.first().map(|failure| failure.exit);
    let last = failures.pop();
    failures.dedup();
    for failure in failures.iter().filter(|failure| last.as_ref() != Some(failure)) {
        output::note(&format!("flotilla: {failure}"));
    }
    match (exit, last) {
        (Some(exit), Some(last)) => Err(Failure { exit, ..last }),
        _ => Ok(()),
    }
}

/// `flotilla start`.
pub(crate) async fn start(client: &Client, args: StartArgs) -> Result<(), Failure> {
    drive_all(client, &args.names, Verb::Start { paused: args.paused }, !args.wait.no_wait).await
}

/// `flotilla stop`.
pub(crate) async fn stop(client: &Client, args: StopArgs) -> Result<(), Failure> {
    let verb = if args.now { Verb::PowerOff } else { Verb::Shutdown { timeout: args.timeout } };
    drive_all(client, &args.names, verb, !args.wait.no_wait).await
}

/// `flotilla pause`.
pub(crate) async fn pause(client: &Client, args: NamesArgs) -> Result<(), Failure> {
    drive_all(client, &args.names, Verb::Pause, true).await
}

/// `flotilla resume`.
pub(crate) async fn resume(client: &Client, args: NamesArgs) -> Result<(), Failure> {
    drive_all(client, &args.names, Verb::Resume, true).await
}

/// `flotilla drain`.
pub(crate) async fn drain(client: &Client, args: DrainArgs) -> Result<(), Failure> {
    let mut jobs = Jobs::watch(client).await?;
    let usec = u64::try_from(args.timeout.as_micros()).unwrap_or(u64::MAX);
    let options = HashMap::from([("stop", Variant::from(args.stop)), ("timeout_usec", Variant::from(usec))]);
    let begun = client.manager.drain(options).await.map_err(|error| client.failed(error))?;
    let mut named = Vec::new();
    for job in begun {
        // One that has ended already is known by its path only.
        let vm = match JobProxy::new(&client.connection, job.clone()).await {
            Ok(proxy) => proxy.vm().await.unwrap_or_default(),
            Err(_) => String::new(),
        };
        named.push((vm, job));
    }
    let mut failures = Vec::new();
    let verb = Verb::Shutdown { timeout: args.timeout };
    for (name, outcome) in jobs.wait(client, verb.doing(), named, verb.limit()).await {
        match outcome {
            Ok(()) if name.is_empty() => {}
            Ok(()) => output::print(&format!("{name} {}\n", verb.done()))?,
            Err(failure) => failures.push(failure),
        }
    }
    output::print("drained: no VM starts on this host until `flotilla undrain`\n")?;
    report(failures)
}

/// `flotilla undrain`.
pub(crate) async fn undrain(client: &Client) -> Result<(), Failure> {
    client.manager.undrain().await.map_err(|error| client.failed(error))?;
    output::print("VMs may start on this host again\n")
}

/// Forgets one VM.
pub(crate) async fn undefine(client: &Client, name: &str, force: bool) -> Result<(), Failure> {
    let options = HashMap::from([("force", Variant::from(force))]);
    client.manager.undefine_vm(name, options).await.map_err(|error| client.failed(error).about(name))
}

/// `flotilla rm`.
pub(crate) async fn rm(client: &Client, args: RmArgs) -> Result<(), Failure> {
    let mut failures = Vec::new();
    for name in unique(&args.names) {
        match undefine(client, name, args.force).await {
            Ok(()) => output::print(&format!("{name} removed\n"))?,
            Err(failure) => failures.push(failure),
        }
    }
    report(failures)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    #[test]
    fn the_first_failure_decides_the_status() {
        assert_eq!(report(Vec::new()), Ok(()));
        let failures = vec![Failure::new(Exit::NoSuchVm, "a"), Failure::new(Exit::State, "b")];
        assert_eq!(report(failures), Err(Failure::new(Exit::NoSuchVm, "b")));
    }

    #[test]
    fn a_name_given_twice_counts_once() {
        let names = ["a", "b", "a"].map(str::to_owned);
        assert_eq!(unique(&names).collect::<Vec<_>>(), ["a", "b"]);
    }
}
