//! Networks as administrators define them: owns the rules for their definitions and the verbs that change them. Each verb looks first, then makes
//! what is missing, then writes it down; what fails is undone, last step first.
//!
//! `network.rs` below knows which bridge and taps a VM needs from them. A bridge that the host had before is used as it is: never changed,
//! never removed.

use std::collections::BTreeSet;
use std::sync::Arc;

use dbus_api::network::NetworkSpec;
use ipnet::IpNet;
use netsetup::Outcome;
use tracing::{error, info, warn};

use super::FleetError;
use super::network::{bridge_of, wanted};
use super::registry::Fleet;
use super::spec::{check_link_name, check_name};
use super::view::News;
use crate::store::{Corrupt, NetworkRecord, StoreError};

/// Addresses of a bridge at most: more is a mistake, and each is a question to the kernel at every start of a VM.
const MAX_ADDRESSES: usize = 16;

/// Checks a network's name and definition, as far as that does not depend on the host's links.
pub fn check(name: &str, spec: &NetworkSpec) -> Result<(), FleetError> {
    let wrong = |text: String| Err(FleetError::InvalidSpec(text));
    check_name(name)?;
    if let Some(bridge) = &spec.bridge {
        check_link_name("bridge", bridge)?;
    }
    if spec.addresses.len() > MAX_ADDRESSES {
        return wrong(format!("addresses: {} given, at most {MAX_ADDRESSES}", spec.addresses.len()));
    }
    for (at, address) in spec.addresses.iter().enumerate() {
        if spec.addresses[..at].iter().any(|other| other.addr() == address.addr()) {
            return wrong(format!("addresses: {} is given twice", address.addr()));
        }
    }
    if spec.mtu.is_some_and(|mtu| !(68..=65521).contains(&mtu)) {
        return wrong(format!("mtu: {} is outside 68 to 65521", spec.mtu.unwrap_or_default()));
    }
    if spec.description.len() > 1024 {
        return wrong("description: longer than 1024 bytes".to_owned());
    }
    Ok(())
}

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

    /// VMs that have a card on a network.
    pub fn users(&self, network: &str) -> Vec<String> {
        let uses = |view: &Arc<super::view::View>| {
            view.spec.nics.iter().chain(&*view.cards).any(|nic| nic.network.as_deref() == Some(network))
        };
        self.list().iter().filter(|view| uses(view)).map(|view| view.name.to_string()).collect()
    }

    /// Reads the stored networks; says which records had to be set aside.
    pub(super) fn load_networks(&self) -> Result<Vec<Corrupt>, StoreError> {
        let store = &self.context.store;
        let (records, mut corrupt) = store.load_networks()?;
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
        let made = network.ensure_bridge(&wanted(name, &spec)).await?;
        let same_bridge = old.as_ref().is_some_and(|old| bridge_of(name, old) == bridge);
        let before =
            old.as_ref().filter(|_| same_bridge).map(|old| old.addresses.clone()).unwrap_or_default();
        let changed = network.drop_addresses(&bridge, &without(&before, &spec.addresses)).await;
        let saved = match changed {
            Ok(()) => self.save_network(name, &spec).await,
            Err(error) => Err(error),
        };
        if let Err(error) = saved {
            self.take_back(name, old.as_deref(), &spec, made == Outcome::Created).await;
            return Err(error);
        }
        let isolation = old.as_ref().is_some_and(|old| (old.isolated, old.mtu) != (spec.isolated, spec.mtu));
        network.put(name, spec);
        if isolation {
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
                if let Err(error) = self.context.network.ensure_tap(nic, &tap, view.uuid).await {
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
    fn every_error_names_its_field() {
        let long = format!(
            r#"{{"addresses":[{}]}}"#,
            (1..=17).map(|n| format!("\"10.0.{n}.1/24\"")).collect::<Vec<_>>().join(",")
        );
        for (text, word) in [
            (r#"{"bridge":"a/b"}"#, "bridge"),
            (r#"{"bridge":""}"#, "bridge"),
            (r#"{"mtu":67}"#, "mtu"),
            (r#"{"mtu":65522}"#, "mtu"),
            (r#"{"addresses":["10.0.0.1/24","10.0.0.1/16"]}"#, "twice"),
            (long.as_str(), "addresses"),
        ] {
            let error = check("lan", &serde_json::from_str(text).unwrap()).unwrap_err();
            assert!(matches!(&error, FleetError::InvalidSpec(why) if why.contains(word)), "{text}: {error}");
        }
        for text in [r#"{"adresses":[]}"#, r#"{"addresses":["10.0.0.1/33"]}"#, "[]", ""] {
            assert!(matches!(parse(text), Err(FleetError::InvalidSpec(_))), "{text}");
        }
        assert!(check("no name", &NetworkSpec::default()).is_err());
        assert_eq!(check("lan", &NetworkSpec::default()), Ok(()));
        assert_eq!(wanted("lan", &NetworkSpec::default()).name, "flbr-lan");
    }
}
