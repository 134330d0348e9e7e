//! The connection to flotillad: one bus connection and the Manager's proxy. Every verb that talks to the daemon gets a `Client`.

use std::time::Duration;

use dbus_api::error::Error;
use dbus_api::proxy::{ManagerProxy, VmProxy};
use zbus::connection::Builder;

use crate::args::Bus;
use crate::failure::{self, Exit, Failure};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long one call may take. Slow verbs are jobs, so only a question of polkit to a person needs so long.
const CALL: Duration = Duration::from_secs(120);

/// A connected client.
pub(crate) struct Client {
    /// The bus connection.
    pub(crate) connection: zbus::Connection,
    /// The fleet.
    pub(crate) manager: ManagerProxy<'static>,
    bus: Bus,
}

impl Client {
    /// Connects to the bus. The daemon itself is first spoken to by the first call.
    pub(crate) async fn connect(bus: &Bus) -> Result<Self, Failure> {
        let builder = match bus {
            Bus::System => Builder::system(),
            Bus::Session => Builder::session(),
            Bus::Address(address) => Builder::address(address.as_str()),
        };
        let connection = tokio::time::timeout(CONNECT, builder.method_timeout(CALL).build())
            .await
            .map_err(|_| Failure::new(Exit::Unreachable, "the bus did not answer within 10 seconds"))?
            .map_err(|error| failure::of_connection(&error, bus))?;
        let manager = ManagerProxy::new(&connection).await.map_err(|error| failure::of_bus(error, bus))?;
        Ok(Self { connection, manager, bus: bus.clone() })
    }

    /// The object of a VM, which must exist.
    pub(crate) async fn vm(&self, name: &str) -> Result<VmProxy<'static>, Failure> {
        let path = self.manager.get_vm(name).await.map_err(|error| self.failed(error))?;
        VmProxy::new(&self.connection, path).await.map_err(|error| self.bus_failed(error))
    }

    /// A failed call as the command reports it.
    pub(crate) fn failed(&self, error: Error) -> Failure {
        failure::of_call(error, &self.bus)
    }

    /// A failed read of a property, or trouble on the bus.
    pub(crate) fn bus_failed(&self, error: zbus::Error) -> Failure {
        // The conversion gives the API's named errors back, which a property can fail with as well.
        failure::of_call(Error::from(error), &self.bus)
    }
}
