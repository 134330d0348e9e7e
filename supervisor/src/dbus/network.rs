//! `org.flotilla.Flotilla1.Network`: a network's properties, from the daemon's memory. Its verbs are the Manager's.

use std::sync::Arc;

use dbus_api::network::NetworkSpec;
use zbus::{fdo, interface};

use super::Shared;
use crate::fleet::network::bridge_of;

pub(super) struct Network {
    shared: Shared,
    name: String,
}

impl Network {
    pub(super) fn new(shared: Shared, name: String) -> Self {
        Self { shared, name }
    }

    fn definition(&self) -> fdo::Result<Arc<NetworkSpec>> {
        self.shared.fleet.network(&self.name).map_err(|error| fdo::Error::UnknownObject(error.to_string()))
    }
}

/// One network.
#[interface(name = "org.flotilla.Flotilla1.Network")]
impl Network {
    /// Name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.name.clone()
    }

    /// Its bridge.
    #[zbus(property)]
    fn bridge(&self) -> fdo::Result<String> {
        Ok(bridge_of(&self.name, &*self.definition()?))
    }

    /// The definition, JSON.
    #[zbus(property(emits_changed_signal = "invalidates"))]
    fn spec(&self) -> fdo::Result<String> {
        serde_json::to_string(&*self.definition()?).map_err(|error| fdo::Error::Failed(error.to_string()))
    }

    /// VMs that have a card on it.
    #[zbus(property(emits_changed_signal = "false"))]
    fn vms(&self) -> Vec<String> {
        self.shared.fleet.users(&self.name)
    }

    /// What keeps it from doing what its definition says (a host that does not forward, a DHCP server that does not run), and what to do
    /// about it; empty when all is well. Looked at when it is asked for.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn problems(&self) -> Vec<String> {
        self.shared.fleet.network_problems(&self.name).await
    }
}
