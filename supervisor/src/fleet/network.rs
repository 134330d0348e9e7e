//! Bridges and taps of definitions: which of them should be there, and the table of networks that they are found in. `netsetup` knows how.
//!
//! A tap carries its VM's uuid in its tag, so that one whose VM is not defined (a crash between the two steps of a definition) is
//! found and removed at the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use dbus_api::network::NetworkSpec;
use dbus_api::spec::{Nic, VmSpec};
use ipnet::IpNet;
use netsetup::{BRIDGE_TAG, BridgeSpec, NatWatch, Net, NetError, Outcome, TAG_PREFIX, TapSpec, tap_name};
use tokio::sync::{RwLockReadGuard, RwLockWriteGuard};
use tokio::time::sleep;
use tracing::{info, warn};
use uuid::Uuid;

use super::FleetError;
use super::dhcp::Dhcp;
use super::nat::Nat;
pub use super::network_rules::bridge_of;
use super::network_rules::wanted;
use super::spec::mac;
use crate::launch::dhcp::DhcpServers;
use crate::store::Store;

/// From a change of the table of NAT to the look at it; two who both want it their way do not keep the host busy.
const NAT_PAUSE: Duration = Duration::from_secs(1);

/// The host's network, as far as definitions name it.
#[derive(Debug)]
pub struct Network {
    net: Option<Net>,
    bridges: Vec<BridgeSpec>,
    defined: RwLock<BTreeMap<String, Arc<NetworkSpec>>>,
    /// Read while a VM is defined on the networks as they are, written while one of them changes.
    order: tokio::sync::RwLock<()>,
    pub(super) dhcp: Arc<Dhcp>,
    nat: Nat,
}

fn failed(error: &NetError) -> FleetError {
    match error {
        NetError::Name { .. } | NetError::Mtu { .. } | NetError::Address { .. } => {
            FleetError::InvalidSpec(error.to_string())
        }
        error => FleetError::NetworkFailed(error.to_string()),
    }
}

/// Directory of the DHCP servers' files, below the runtime directory.
pub const DHCP: &str = "dhcp";

/// What there was to make for a card.
#[derive(Clone, Copy)]
struct Made {
    tap: bool,
    address: bool,
}

/// Where a card's tap goes.
struct Port {
    bridge: BridgeSpec,
    isolated: bool,
    mtu: Option<u32>,
}

fn tag(uuid: Uuid) -> String {
    format!("{TAG_PREFIX}{uuid}")
}

/// Names of a VM's taps.
pub fn taps(name: &str, spec: &VmSpec) -> Vec<String> {
    spec.nic_numbers().into_iter().map(|number| tap_name(name, number.into())).collect()
}

impl Network {
    /// `bridges` are those of the configuration: made at start, kept when no VM uses them. What DHCP servers read is below `runtime_dir`.
    pub fn new(
        bridges: Vec<BridgeSpec>,
        servers: Arc<dyn DhcpServers>,
        store: Arc<Store>,
        runtime_dir: &Path,
    ) -> Self {
        // A host without rtnetlink still runs VMs that have no card.
        let net = Net::connect().inspect_err(|error| warn!("no network for VMs: {error}")).ok();
        Self {
            net,
            bridges,
            defined: RwLock::default(),
            order: tokio::sync::RwLock::default(),
            dhcp: Dhcp::new(servers, store, runtime_dir.join(DHCP)),
            nat: Nat::new(runtime_dir.join("nat")),
        }
    }

    fn net(&self) -> Result<&Net, FleetError> {
        let missing = || FleetError::NetworkFailed("this host gives no rtnetlink socket".to_owned());
        self.net.as_ref().ok_or_else(missing)
    }

    /// Networks stay as they are while this is held.
    pub async fn stable(&self) -> RwLockReadGuard<'_, ()> {
        self.order.read().await
    }

    /// No VM is defined, and no other network changed, while this is held.
    pub async fn changing(&self) -> RwLockWriteGuard<'_, ()> {
        self.order.write().await
    }

    fn table(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<NetworkSpec>>> {
        self.defined.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// All networks by name.
    pub fn all(&self) -> Vec<(String, Arc<NetworkSpec>)> {
        self.table().iter().map(|(name, spec)| (name.clone(), Arc::clone(spec))).collect()
    }

    /// One network.
    pub fn get(&self, name: &str) -> Result<Arc<NetworkSpec>, FleetError> {
        let missing = || FleetError::NoSuchNetwork(format!("no network is named {name:?}"));
        self.table().get(name).cloned().ok_or_else(missing)
    }

    /// The network other than `name` that is on a bridge.
    pub fn on_bridge(&self, bridge: &str, name: &str) -> Option<String> {
        let table = self.table();
        let mut others =
            table.iter().filter(|(other, spec)| *other != name && bridge_of(other, spec) == bridge);
        others.next().map(|(other, _)| other.clone())
    }

    /// From now on there is this network.
    pub fn put(&self, name: &str, spec: NetworkSpec) {
        self.defined.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), Arc::new(spec));
    }

    /// From now on there is none of that name.
    pub fn forget(&self, name: &str) {
        self.defined.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Makes sure of one bridge; says what there was to do.
    pub async fn ensure_bridge(&self, bridge: &BridgeSpec) -> Result<Outcome, FleetError> {
        let link = self.net()?.ensure_bridge(bridge).await.map_err(|error| failed(&error))?;
        if link.outcome == Outcome::Created
            && let Some(network) = self.on_bridge(&bridge.name, "")
        {
            self.dhcp.bridge_is_new(&network);
        }
        Ok(link.outcome)
    }

    /// Takes addresses off a bridge of ours.
    pub async fn drop_addresses(&self, bridge: &str, addresses: &[IpNet]) -> Result<(), FleetError> {
        if addresses.is_empty() {
            return Ok(());
        }
        self.net()?.drop_addresses(bridge, addresses).await.map_err(|error| failed(&error))
    }

    /// Makes the bridges of configuration and networks. Problems are logged: a VM that needs the bridge says so when it starts.
    pub async fn ensure_configured(&self) {
        let networks = self.all();
        let networks = networks.iter().map(|(name, spec)| wanted(name, spec));
        for bridge in self.bridges.iter().cloned().chain(networks) {
            if let Err(error) = self.ensure_bridge(&bridge).await {
                warn!("bridge {}: {error}", bridge.name);
            }
        }
    }

    /// Makes sure that the bridges and taps of a definition are there. On an error, the taps made by this call are gone again.
    pub async fn ensure(&self, name: &str, uuid: Uuid, spec: &VmSpec) -> Result<Vec<String>, FleetError> {
        let taps = taps(name, spec);
        let mut all = Vec::new();
        for ((nic, tap), number) in spec.nics.iter().zip(&taps).zip(spec.nic_numbers()) {
            match self.ensure_one(nic, tap, uuid, Some(number)).await {
                Ok(made) => all.push((tap, made)),
                Err(error) => {
                    for (tap, made) in all {
                        self.unmake(tap, uuid, made).await;
                    }
                    return Err(error);
                }
            }
        }
        Ok(taps)
    }

    fn port(&self, nic: &Nic) -> Result<Port, FleetError> {
        if let Some(name) = &nic.network {
            let spec = self.get(name)?;
            let bridge = wanted(name, &spec);
            return Ok(Port { bridge, isolated: spec.isolated, mtu: spec.mtu });
        }
        // A bridge by its own name, which may be that of a network as well.
        let table = self.table();
        let network = table.iter().find(|(name, spec)| bridge_of(name, spec) == nic.bridge);
        let configured = self.bridges.iter().find(|bridge| bridge.name == nic.bridge);
        let plain = || BridgeSpec { name: nic.bridge.clone(), addresses: Vec::new(), mtu: None };
        let bridge = match network {
            Some((name, spec)) => wanted(name, spec),
            None => configured.cloned().unwrap_or_else(plain),
        };
        Ok(Port { bridge, isolated: false, mtu: None })
    }

    /// The card's address comes first: without one there is nothing to undo.
    async fn ensure_one(
        &self,
        nic: &Nic,
        tap: &str,
        uuid: Uuid,
        number: Option<u8>,
    ) -> Result<Made, FleetError> {
        let address = match (&nic.network, number) {
            (Some(network), Some(number)) => self.dhcp.give(network, tap, &mac(nic, uuid, number)).await?,
            _ => {
                self.dhcp.release(&[tap.to_owned()]).await;
                false
            }
        };
        let made = self.ensure_link(nic, tap, uuid).await;
        if made.is_err() {
            self.unmake(tap, uuid, Made { tap: false, address }).await;
        }
        Ok(Made { tap: made?, address })
    }

    async fn unmake(&self, tap: &str, uuid: Uuid, made: Made) {
        if made.tap {
            self.remove(tap, &tag(uuid)).await;
        }
        if made.address {
            self.dhcp.release(&[tap.to_owned()]).await;
        }
    }

    async fn ensure_link(&self, nic: &Nic, tap: &str, uuid: Uuid) -> Result<bool, FleetError> {
        let net = self.net()?;
        let port = self.port(nic)?;
        self.ensure_bridge(&port.bridge).await?;
        let spec = TapSpec {
            name: tap.to_owned(),
            bridge: Some(port.bridge.name),
            owner: None,
            tag: tag(uuid),
            mtu: port.mtu,
            isolated: port.isolated,
        };
        let link = net.ensure_tap(&spec).await.map_err(|error| failed(&error))?;
        Ok(link.outcome == Outcome::Created)
    }

    /// Opens a tap to hand it over.
    pub async fn open(&self, tap: &str) -> Result<OwnedFd, FleetError> {
        self.net()?.open_tap(tap).await.map_err(|error| failed(&error))
    }

    /// Makes sure of the tap of one card; without a number it is a client's, and has no address of ours.
    pub async fn ensure_tap(
        &self,
        nic: &Nic,
        tap: &str,
        uuid: Uuid,
        number: Option<u8>,
    ) -> Result<(), FleetError> {
        self.ensure_one(nic, tap, uuid, number).await.map(drop)
    }

    /// Removes taps of a VM but those in `keep`, and takes back their addresses. Their names are known: nothing is listed, whatever the size
    /// of the fleet.
    pub async fn remove_taps(&self, uuid: Uuid, taps: impl IntoIterator<Item = String>, keep: &[String]) {
        let tag = tag(uuid);
        let gone: Vec<String> = taps.into_iter().filter(|tap| !keep.contains(tap)).collect();
        for tap in &gone {
            self.remove(tap, &tag).await;
        }
        self.dhcp.release(&gone).await;
    }

    /// Writes the table of NAT as it is to be when `name` has another definition, or none.
    pub(super) async fn apply_nat(
        &self,
        change: Option<(&str, Option<&NetworkSpec>)>,
    ) -> Result<(), FleetError> {
        let all = self.all();
        let others = all.iter().filter(|(name, _)| change.is_none_or(|(changed, _)| changed != *name));
        let others = others.map(|(name, spec)| (name.as_str(), &**spec));
        let changed = change.and_then(|(name, spec)| Some((name, spec?)));
        self.nat.apply(others.chain(changed)).await
    }

    /// Puts the table of NAT back when somebody takes it away, or some of it. Returns when that cannot be seen.
    pub(super) async fn watch_nat(&self) -> io::Result<()> {
        let watch = NatWatch::new()?;
        loop {
            // First a look: it may have gone between its writing and now.
            let all = self.all();
            if let Err(error) =
                self.nat.put_back(all.iter().map(|(name, spec)| (name.as_str(), &**spec))).await
            {
                warn!("{error}");
            }
            watch.taken().await?;
            // Whoever reloads a firewall does it in several steps.
            sleep(NAT_PAUSE).await;
        }
    }

    /// What keeps a network from doing what its definition says, and what to do about it.
    pub(super) async fn problems(&self, name: &str, spec: &NetworkSpec) -> Vec<String> {
        let mut problems = Vec::new();
        if spec.nat {
            problems.extend(self.nat.trouble());
            problems.extend(netsetup::check_forwarding().err().map(|error| error.to_string()));
        }
        problems.extend(self.dhcp.trouble(name).await);
        problems
    }

    /// Removes bridges that were made here, are not configured or a network's, and are not in `used`.
    pub async fn remove_bridges(&self, candidates: &BTreeSet<String>, used: &BTreeSet<String>) {
        let configured = |name: &str| {
            self.bridges.iter().any(|bridge| bridge.name == name) || self.on_bridge(name, "").is_some()
        };
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
