//! Networks as administrators define them: owns the verbs that change them. Each verb looks first, then makes what is missing, then writes it down;
//! what fails is undone, last step first. `network_rules.rs` has the rules for their definitions.
//!
//! `network.rs` below knows which bridge and taps a VM needs from them. A bridge that the host had before is used as it is: never changed,
//! never removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dbus_api::network::NetworkSpec;
use ipnet::IpNet;
use netsetup::Outcome;
use tracing::{error, info, warn};

use super::FleetError;
use super::leases::Leases;
use super::network_rules::{bridge_of, check, check_apart, wanted};
use super::registry::Fleet;
use super::view::{News, View};
use crate::store::{Corrupt, LeaseRecord, NetworkRecord, StoreError};

/// Reads a definition as it comes over D-Bus.
fn parse(text: &str) -> Result<NetworkSpec, FleetError> {
    // A list would do for serde, as a struct without the names of its fields.
    if text.trim_start().starts_with('[') {
        return Err(FleetError::InvalidSpec("network: a list, not an object".to_owned()));
    }
    serde_json::from_str(text).map_err(|error| FleetError::InvalidSpec(format!("network: {error}")))
}

/// Addresses of `one` that `other` does not have.
fn without(one: &[IpNet], other: &[IpNet]) -> Vec<IpNet> {
    one.iter().filter(|address| !other.contains(address)).copied().collect()
}

impl Fleet {
    /// All networks by name.
    pub fn networks(&self) -> Vec<(String, Arc<NetworkSpec>)> {
        self.context.network.all()
    }

    /// One network.
    pub fn network(&self, name: &str) -> Result<Arc<NetworkSpec>, FleetError> {
        self.context.network.get(name)
    }

    /// What keeps a network from doing what its definition says, and what to do about it.
    pub async fn network_problems(&self, name: &str) -> Vec<String> {
        match self.network(name) {
            Ok(spec) => self.context.network.problems(name, &spec).await,
            Err(_) => Vec::new(),
        }
    }

    /// Keeps the table of NAT as it is to be, whoever changes it, for as long as the daemon runs.
    pub async fn watch_nat(&self) {
        if let Err(error) = self.context.network.watch_nat().await {
            warn!("nat: changes of its table by others cannot be seen: {error}");
        }
    }

    /// Addresses that networks give to a VM's cards: card, address.
    pub fn addresses(&self, view: &View) -> Vec<(String, String)> {
        let address = |tap: &str| self.context.network.dhcp.address(tap);
        let of_card = |(id, tap, _, _): &(String, String, String, String)| {
            Some((id.clone(), address(tap)?.to_string()))
        };
        view.nics.iter().filter_map(of_card).collect()
    }

    /// VMs that have a card on a network.
    pub fn users(&self, network: &str) -> Vec<String> {
        let uses = |view: &Arc<View>| {
            view.spec.nics.iter().chain(&*view.cards).any(|nic| nic.network.as_deref() == Some(network))
        };
        self.list().iter().filter(|view| uses(view)).map(|view| view.name.to_string()).collect()
    }

    /// Reads the stored networks; says which records had to be set aside.
    pub(super) fn load_networks(&self) -> Result<Vec<Corrupt>, StoreError> {
        let store = &self.context.store;
        let (records, mut corrupt) = store.load_networks()?;
        let (leases, broken) = store.load_leases()?;
        corrupt.extend(broken);
        let mut leases: BTreeMap<String, Leases> =
            leases.into_iter().map(|LeaseRecord { name, leases, .. }| (name, leases)).collect();
        for NetworkRecord { name, spec, .. } in records {
            let taken = || {
                FleetError::NetworkExists(format!("bridge {} is another network's", bridge_of(&name, &spec)))
            };
            let checked = check(&name, &spec).and_then(|()| {
                if self.context.network.on_bridge(&bridge_of(&name, &spec), &name).is_some() {
                    Err(taken())
                } else {
                    Ok(())
                }
            });
            match checked {
                Ok(()) => {
                    let given = leases.remove(&name).unwrap_or_default();
                    self.context.network.dhcp.load(&name, &spec, given);
                    self.context.network.put(&name, spec);
                    self.context.tell(News::NetworkNew(name));
                }
                Err(error) => corrupt.push(store.set_network_aside(&name, error.to_string())?),
            }
        }
        Ok(corrupt)
    }

    /// Stores a network and makes its bridge.
    pub async fn define_network(&self, name: &str, text: &str, replace: bool) -> Result<(), FleetError> {
        let spec = parse(text)?;
        check(name, &spec)?;
        let network = &self.context.network;
        let _alone = network.changing().await;
        let old = network.get(name).ok();
        let bridge = bridge_of(name, &spec);
        if let Some(other) = network.on_bridge(&bridge, name) {
            return Err(FleetError::NetworkExists(format!(
                "bridge {bridge} is that of the network \"{other}\""
            )));
        }
        if let Some(old) = &old {
            if !replace {
                return Err(FleetError::NetworkExists(format!(
                    "network \"{name}\" is defined already: use replace, or another name"
                )));
            }
            let users = self.users(name);
            if bridge_of(name, old) != bridge && !users.is_empty() {
                return Err(FleetError::InvalidState(format!(
                    "network \"{name}\" is used by {}: it keeps its bridge {} until no VM uses it",
                    users.join(", "),
                    bridge_of(name, old)
                )));
            }
        }
        let others: Vec<_> = network.all().into_iter().filter(|(other, _)| other != name).collect();
        check_apart(&spec, &others)?;
        let made = network.ensure_bridge(&wanted(name, &spec)).await?;
        let same_bridge = old.as_ref().is_some_and(|old| bridge_of(name, old) == bridge);
        let before =
            old.as_ref().filter(|_| same_bridge).map(|old| old.addresses.clone()).unwrap_or_default();
        let changed = network.drop_addresses(&bridge, &without(&before, &spec.addresses)).await;
        let served = match changed {
            Ok(()) => self.serve_and_save(name, &spec).await,
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            self.take_back(name, old.as_deref(), &spec, made == Outcome::Created).await;
            return Err(error);
        }
        let taps = |spec: &NetworkSpec| (spec.isolated, spec.mtu, spec.dhcp.clone(), spec.addresses.clone());
        let mend = old.as_ref().is_some_and(|old| taps(old) != taps(&spec));
        if spec.dhcp.is_none() {
            network.dhcp.forget(name).await;
        }
        network.put(name, spec);
        if mend {
            self.mend_taps(name).await;
        }
        match old {
            None => {
                info!("network {name}: defined, bridge {bridge}");
                self.context.tell(News::NetworkNew(name.to_owned()));
            }
            Some(old) => {
                let former = bridge_of(name, &old);
                if former != bridge {
                    network.remove_bridges(&BTreeSet::from([former]), &self.bridges()).await;
                }
                info!("network {name}: defined again");
                self.context.tell(News::NetworkChanged(name.to_owned()));
            }
        }
        Ok(())
    }

    /// What goes on over the bridge: the way out, addresses; then the record of it all.
    async fn serve_and_save(&self, name: &str, spec: &NetworkSpec) -> Result<(), FleetError> {
        let network = &self.context.network;
        let done = async {
            network.apply_nat(Some((name, Some(spec)))).await?;
            let before = network.dhcp.change(name, Some(spec)).await?;
            let saved = self.save_network(name, spec).await;
            if saved.is_err() {
                network.dhcp.restore(name, before).await;
            }
            saved
        };
        let done = done.await;
        if done.is_err()
            && let Err(error) = network.apply_nat(None).await
        {
            warn!("network {name}: {error}");
        }
        done
    }

    /// The bridge is again as it was before a definition that came to nothing.
    async fn take_back(&self, name: &str, old: Option<&NetworkSpec>, new: &NetworkSpec, created: bool) {
        let network = &self.context.network;
        let bridge = bridge_of(name, new);
        if created {
            return network.remove_bridges(&BTreeSet::from([bridge]), &self.bridges()).await;
        }
        let old = old.filter(|old| bridge_of(name, old) == bridge);
        let addresses = old.map(|old| old.addresses.clone()).unwrap_or_default();
        let undone = match network.drop_addresses(&bridge, &without(&new.addresses, &addresses)).await {
            Ok(()) => match old {
                Some(old) => network.ensure_bridge(&wanted(name, old)).await.map(drop),
                None => Ok(()),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = undone {
            warn!("network {name}: bridge {bridge} is not as it was: {error}");
        }
    }

    async fn save_network(&self, name: &str, spec: &NetworkSpec) -> Result<(), FleetError> {
        let (store, record) =
            (Arc::clone(&self.context.store), NetworkRecord::new(name.to_owned(), spec.clone()));
        let saved = tokio::task::spawn_blocking(move || store.save_network(&record)).await;
        match saved {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(FleetError::StoreFailed(error.to_string())),
            Err(error) => Err(FleetError::StoreFailed(format!("network \"{name}\": {error}"))),
        }
    }

    /// The taps of the VMs on a network as it is now.
    async fn mend_taps(&self, network: &str) {
        for name in self.users(network) {
            let Ok(view) = self.get(&name) else { continue };
            if let Err(error) = self.context.network.ensure(&name, view.uuid, &view.spec).await {
                error!(FLOTILLA_VM = &*name, "network {network}: {error}");
            }
            // Cards that were plugged into what runs.
            let plugged = view.cards.iter().filter(|nic| !view.spec.nics.contains(nic));
            for (nic, number) in plugged.filter_map(|nic| Some((nic, nic.number?))) {
                let tap = netsetup::tap_name(&name, number.into());
                if let Err(error) = self.context.network.ensure_tap(nic, &tap, view.uuid, Some(number)).await
                {
                    error!(FLOTILLA_VM = &*name, "network {network}: {error}");
                }
            }
        }
    }

    /// Forgets a network that no VM uses.
    pub async fn delete_network(&self, name: &str) -> Result<(), FleetError> {
        let network = &self.context.network;
        let _alone = network.changing().await;
        let spec = network.get(name)?;
        let users = self.users(name);
        if !users.is_empty() {
            return Err(FleetError::InvalidState(format!(
                "network \"{name}\" is used by {}: give them another network first",
                users.join(", ")
            )));
        }
        let (store, record) = (Arc::clone(&self.context.store), name.to_owned());
        let removed = tokio::task::spawn_blocking(move || store.remove_network(&record)).await;
        if let Ok(Err(error)) = removed {
            return Err(FleetError::StoreFailed(error.to_string()));
        }
        network.forget(name);
        // It is deleted, whatever comes of these: the next start puts in order what they leave.
        for ended in [network.dhcp.change(name, None).await.map(drop), network.apply_nat(None).await] {
            if let Err(error) = ended {
                warn!("network {name}: {error}");
            }
        }
        network.dhcp.forget(name).await;
        network.remove_bridges(&BTreeSet::from([bridge_of(name, &spec)]), &self.bridges()).await;
        info!("network {name}: deleted");
        self.context.tell(News::NetworkRemoved(name.to_owned()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_definition_is_refused() {
        for text in [
            r#"{"adresses":[]}"#,
            r#"{"addresses":["10.0.0.1/33"]}"#,
            r#"{"nat":"yes"}"#,
            r#"{"dhcp":true}"#,
            r#"{"dhcp":{"range":"10.5.0.9"}}"#,
            r#"{"dhcp":{"dns":["one.example"]}}"#,
            "[]",
            "",
        ] {
            assert!(matches!(parse(text), Err(FleetError::InvalidSpec(_))), "{text}");
        }
    }
}
