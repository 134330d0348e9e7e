//! The D-Bus face `org.flotilla.Flotilla1`: thin handlers that authorise, ask the fleet and answer. No state of its own.
//!
//! Every handler takes `&self`: a `&mut self` method would hold the object's write lock for as long as it waits, and property reads,
//! introspection and signals of that object would hang with it.
//!
//! ```text
//! manager.rs, vm.rs, network.rs, template.rs, job.rs   the interfaces
//! plug.rs                     devices that come and go, for the first two
//! create.rs                   what CreateVm takes
//! stats.rs                    what VMs use
//! access.rs                   may this caller do that? (polkit)
//! folder.rs                   introspection, one level at a time
//! publish.rs                  news of the fleet -> objects, signals, property changes
//! ```

pub mod access;
mod create;
mod folder;
mod job;
#[expect(clippy::too_many_arguments, reason = "a signal's arguments are its wire format")]
mod manager;
mod network;
mod plug;
mod publish;
mod stats;
mod template;
mod vm;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use dbus_api::error::Error;
use dbus_api::{BUS_NAME, MANAGER_PATH};
use tokio::sync::mpsc;
use zbus::{Connection, OwnedObjectPath, OwnedVariant};

use crate::fleet::life::Verb;
use crate::fleet::view::News;
use crate::fleet::{Fleet, FleetError};
use crate::template::Templates;
use access::Access;

/// How long a guest has to shut down when the caller does not say.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time a caller may give.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What the handlers share.
#[derive(Clone)]
struct Shared {
    fleet: Arc<Fleet>,
    templates: Arc<Templates>,
    access: Arc<Access>,
}

/// Options of a call, as they come.
type Options = HashMap<String, OwnedVariant>;

/// Serves the interfaces on this connection and takes the bus name. Returns when the name is ours and the objects are there.
pub async fn serve(
    connection: &Connection,
    templates: Arc<Templates>,
    access: Access,
    news: mpsc::UnboundedReceiver<News>,
) -> zbus::Result<()> {
    let fleet = Arc::clone(templates.fleet());
    let shared = Shared { fleet: Arc::clone(&fleet), templates, access: Arc::new(access) };
    connection.object_server().at(MANAGER_PATH, manager::Manager::new(shared.clone())).await?;
    folder::over(connection.object_server(), &shared, MANAGER_PATH).await?;
    tokio::spawn(publish::run(connection.clone(), shared, news));
    fleet.flush().await;
    if connection.is_bus() {
        connection.request_name(BUS_NAME).await?;
    }
    Ok(())
}

/// The one place where the fleet's errors get their D-Bus names.
fn named(error: FleetError) -> Error {
    match error {
        FleetError::NoSuchVm(text) => Error::NoSuchVm(text),
        FleetError::VmExists(text) => Error::VmExists(text),
        FleetError::NoSuchNetwork(text) => Error::NoSuchNetwork(text),
        FleetError::NetworkExists(text) => Error::NetworkExists(text),
        FleetError::NoSuchTemplate(text) => Error::NoSuchTemplate(text),
        FleetError::TemplateExists(text) => Error::TemplateExists(text),
        FleetError::TemplateInUse(text) => Error::TemplateInUse(text),
        FleetError::NoSuchJob(text) => Error::NoSuchJob(text),
        FleetError::InvalidSpec(text) => Error::InvalidSpec(text),
        FleetError::GenerationMismatch(text) => Error::GenerationMismatch(text),
        FleetError::InvalidState(text) => Error::InvalidState(text),
        FleetError::Busy(text) => Error::Busy(text),
        FleetError::ResourceExhausted(text) => Error::ResourceExhausted(text),
        FleetError::QmpTimeout(text) => Error::QmpTimeout(text),
        FleetError::QmpError(text) => Error::QmpError(text),
        FleetError::VmmDied(text) => Error::VmmDied(text),
        FleetError::NotSupported(text) => Error::NotSupported(text),
        FleetError::LaunchFailed(text) => Error::LaunchFailed(text),
        FleetError::NetworkFailed(text) => Error::NetworkFailed(text),
        FleetError::StoreFailed(text) => Error::StoreFailed(text),
        FleetError::Draining(text) => Error::Draining(text),
        FleetError::Cancelled(text) => Error::Cancelled(text),
    }
}

fn path(text: String) -> Result<OwnedObjectPath, Error> {
    OwnedObjectPath::try_from(text).map_err(Error::ZBus)
}

/// Takes known options out of the dictionary; [`Taken::finish`] refuses what nobody took.
struct Taken(Options);

impl Taken {
    fn get<T: TryFrom<OwnedVariant>>(&mut self, name: &str, kind: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.0.remove(name) else { return Ok(None) };
        let wrong = || invalid(format!("option {name:?} must have the type {kind:?}"));
        T::try_from(value).map(Some).map_err(|_| wrong())
    }

    fn flag(&mut self, name: &str, default: bool) -> Result<bool, Error> {
        Ok(self.get(name, "b")?.unwrap_or(default))
    }

    fn finish(self) -> Result<(), Error> {
        match self.0.keys().next() {
            Some(name) => Err(invalid(format!("unknown option {name:?}"))),
            None => Ok(()),
        }
    }
}

fn invalid(text: String) -> Error {
    Error::ZBus(zbus::fdo::Error::InvalidArgs(text).into())
}

fn no_options(options: Options) -> Result<(), Error> {
    Taken(options).finish()
}

fn start_verb(mode: &str, options: Options) -> Result<Verb, Error> {
    no_options(options)?;
    match mode {
        "run" | "" => Ok(Verb::Start { paused: false }),
        "paused" => Ok(Verb::Start { paused: true }),
        other => Err(invalid(format!("mode {other:?}: use \"run\" or \"paused\""))),
    }
}

fn shutdown_verb(options: Options) -> Result<Verb, Error> {
    let mut options = Taken(options);
    let force = options.flag("force", true)?;
    let timeout = options.get::<u64>("timeout_usec", "t")?.map_or(SHUTDOWN_TIMEOUT, Duration::from_micros);
    options.finish()?;
    Ok(Verb::Shutdown { force, timeout: timeout.min(MAX_TIMEOUT) })
}

impl Shared {
    /// Cancels a job, for somebody who may do that to its VM.
    async fn cancel(&self, header: &zbus::message::Header<'_>, id: u32) -> Result<(), Error> {
        let name = self.fleet.job(id).map(|job| job.name.to_string()).unwrap_or_default();
        self.access.check(header, dbus_api::ACTION_MANAGE, &name).await?;
        self.fleet.cancel_job(id).await.map_err(named)
    }

    async fn ask(&self, name: &str, verb: Verb) -> Result<OwnedObjectPath, Error> {
        let job = self.fleet.ask(name, verb).await.map_err(named)?;
        // The job's object is there before its path is told.
        self.fleet.flush().await;
        path(dbus_api::job_path(job))
    }
}

#[cfg(test)]
mod bus_tests;
#[cfg(test)]
mod fake_launcher;
