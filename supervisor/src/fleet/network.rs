//! Bridges and taps of definitions: which of them should be there. `netsetup` knows how.
//!
//! A tap carries its VM's uuid in its tag, so that one whose VM is not defined (a crash between the two steps of a definition) is
//! found and removed at the next start.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use dbus_api::spec::VmSpec;
use netsetup::{BRIDGE_TAG, BridgeSpec, Net, NetError, TAG_PREFIX, TapSpec, tap_name};
use tracing::{info, warn};
use uuid::Uuid;

use super::FleetError;
use super::spec::MAX_NICS;

/// The host's network, as far as definitions name it.
#[derive(Debug, Clone)]
pub struct Network {
    net: Option<Net>,
    bridges: Vec<BridgeSpec>,
}

fn failed(error: &NetError) -> FleetError {
    FleetError::NetworkFailed(error.to_string())
}

fn tag(uuid: Uuid) -> String {
    format!("{TAG_PREFIX}{uuid}")
}

/// Names of a VM's taps.
pub fn taps(name: &str, spec: &VmSpec) -> Vec<String> {
    (0..spec.nics.len()).map(|index| tap_name(name, index)).collect()
}

impl Network {
    /// `bridges` are those of the configuration: made at start, kept when no VM uses them.
    pub fn new(bridges: Vec<BridgeSpec>) -> Self {
        // A host without rtnetlink still runs VMs that have no card.
        let net = Net::connect().inspect_err(|error| warn!("no network for VMs: {error}")).ok();
        Self { net, bridges }
    }

    fn net(&self) -> Result<&Net, FleetError> {
        let missing = || FleetError::NetworkFailed("this host gives no rtnetlink socket".to_owned());
        self.net.as_ref().ok_or_else(missing)
    }

    /// Makes the configured bridges. Problems are logged: a VM that needs the bridge says so when it starts.
    pub async fn ensure_configured(&self) {
        for bridge in &self.bridges {
            let made = match self.net() {
                Ok(net) => net.ensure_bridge(bridge).await.map(drop).map_err(|error| failed(&error)),
                Err(error) => Err(error),
            };
            if let Err(error) = made {
                warn!("configured bridge: {error}");
            }
        }
    }

    /// Makes sure that the bridges and taps of a definition are there. On an error, the taps made by this call are gone again.
    pub async fn ensure(&self, name: &str, uuid: Uuid, spec: &VmSpec) -> Result<Vec<String>, FleetError> {
        let taps = taps(name, spec);
        let mut made = Vec::new();
        for (nic, tap) in spec.nics.iter().zip(&taps) {
            let outcome = self.ensure_one(&nic.bridge, tap, uuid).await;
            match outcome {
                Ok(true) => made.push(tap.clone()),
                Ok(false) => {}
                Err(error) => {
                    for tap in made {
                        self.remove(&tap, &tag(uuid)).await;
                    }
                    return Err(error);
                }
            }
        }
        Ok(taps)
    }

    async fn ensure_one(&self, bridge: &str, tap: &str, uuid: Uuid) -> Result<bool, FleetError> {
        let net = self.net()?;
        let plain = BridgeSpec { name: bridge.to_owned(), addresses: Vec::new(), mtu: None };
        let wanted = self.bridges.iter().find(|configured| configured.name == bridge).unwrap_or(&plain);
        net.ensure_bridge(wanted).await.map_err(|error| failed(&error))?;
        let spec = TapSpec {
            name: tap.to_owned(),
            bridge: Some(bridge.to_owned()),
            owner: None,
            tag: tag(uuid),
            mtu: None,
        };
        let link = net.ensure_tap(&spec).await.map_err(|error| failed(&error))?;
        Ok(link.outcome == netsetup::Outcome::Created)
    }

    /// Opens a tap to hand it over.
    pub async fn open(&self, tap: &str) -> Result<OwnedFd, FleetError> {
        self.net()?.open_tap(tap).await.map_err(|error| failed(&error))
    }

    /// Removes a VM's taps but those in `keep`. Their names are known: nothing is listed, whatever the size of the fleet.
    pub async fn remove_taps(&self, name: &str, uuid: Uuid, keep: &[String]) {
        let tag = tag(uuid);
        for tap in (0..MAX_NICS).map(|index| tap_name(name, index)).filter(|tap| !keep.contains(tap)) {
            self.remove(&tap, &tag).await;
        }
    }

    /// Removes bridges that were made here, are not configured, and are not in `used`.
    pub async fn remove_bridges(&self, candidates: &BTreeSet<String>, used: &BTreeSet<String>) {
        let configured = |name: &str| self.bridges.iter().any(|bridge| bridge.name == name);
        let Some(net) = &self.net else { return };
        for name in candidates.iter().filter(|name| !used.contains(*name) && !configured(name)) {
            match net.remove(name, BRIDGE_TAG).await {
                Ok(()) => info!("bridge {name}: no VM uses it any more"),
                Err(NetError::Foreign { .. }) => {}
                Err(error) => warn!("bridge {name}: {error}"),
            }
        }
    }

    /// Removes links of ours whose VM is not defined.
    pub async fn sweep(&self, uuids: &BTreeSet<Uuid>, used: &BTreeSet<String>) {
        let Some(net) = &self.net else { return };
        let links = match net.tagged().await {
            Ok(links) => links,
            Err(error) => return warn!("leftover links cannot be listed: {error}"),
        };
        let mut bridges = Vec::new();
        let mut ports_of = BTreeSet::new();
        for link in links {
            let Some(found) = link.tag else { continue };
            if found == BRIDGE_TAG {
                bridges.push((link.index, link.name));
            } else if uuids.iter().any(|uuid| tag(*uuid) == found) {
                ports_of.extend(link.controller);
            } else {
                info!("tap {}: its VM ({found}) is not defined, removed", link.name);
                self.remove(&link.name, &found).await;
            }
        }
        // A bridge with a tap that stays is in use, whether or not a definition says so.
        let idle = bridges.into_iter().filter(|(index, _)| !ports_of.contains(index));
        let bridges = idle.map(|(_, name)| name).collect();
        self.remove_bridges(&bridges, used).await;
    }

    async fn remove(&self, name: &str, tag: &str) {
        let Some(net) = &self.net else { return };
        match net.remove(name, tag).await {
            // Somebody else's link of that name is none of ours.
            Ok(()) | Err(NetError::Foreign { .. }) => {}
            Err(error) => warn!("link {name} is left behind: {error}"),
        }
    }
}
