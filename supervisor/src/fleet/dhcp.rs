//! Addresses for VMs' cards: owns the leases of each network and the files that its DHCP server reads. `network.rs` says which card has a tap;
//! `launch/dhcp.rs` knows how a server comes to run.
//!
//! A lease is on disk before a guest can be told of it. The server may be started, stopped and restarted at any time: it answers only what
//! stands in its file, and clients go on with what they have. One that comes is told with a reload; when an address changes hands the server
//! starts anew, because it would keep the address for whom it gave it to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dbus_api::network::NetworkSpec;
use netsetup::{DhcpServer, dhcp_hosts};
use tracing::{info, warn};

use super::FleetError;
use super::leases::Leases;
use super::network_rules::{self, Plan};
use super::spec::parse_mac;
use crate::launch::dhcp::DhcpServers;
use crate::store::{LeaseRecord, Store};

/// What comes within this time is told to a server at once.
const TOGETHER: Duration = Duration::from_millis(50);

/// What one network gives.
#[derive(Debug, Clone)]
struct Served {
    server: DhcpServer,
    plan: Plan,
    leases: Leases,
}

/// A network's part here before it was changed.
pub(super) struct Before(Option<Served>);

/// The DHCP servers of all networks.
pub struct Dhcp {
    servers: Arc<dyn DhcpServers>,
    directory: PathBuf,
    store: Arc<Store>,
    tables: Mutex<BTreeMap<String, Served>>,
    /// Held while leases are changed and written.
    changing: tokio::sync::Mutex<()>,
    /// Held while a server's files are written and it is told.
    serving: tokio::sync::Mutex<()>,
    /// Networks whose server is to be told.
    waiting: Mutex<BTreeSet<String>>,
    /// Servers that this daemon has told everything once.
    told: Mutex<BTreeSet<String>>,
    /// Networks whose bridge was made again: a server that listens on the one before hears nobody.
    deaf: Mutex<BTreeSet<String>>,
    troubles: Mutex<BTreeMap<String, String>>,
}

impl std::fmt::Debug for Dhcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dhcp").field("directory", &self.directory).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(name: &str, error: impl std::fmt::Display) -> FleetError {
    FleetError::NetworkFailed(format!("the DHCP server of network \"{name}\": {error}"))
}

/// Writes a file that servers with users of their own may read; there is the old text or the new one.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    fs::rename(&temporary, path)
}

/// Somebody in the old text is not, or has another address, in the new one.
fn takes_away(old: &str, new: &str) -> bool {
    let new: BTreeSet<&str> = new.lines().collect();
    old.lines().any(|line| !new.contains(line))
}

impl Dhcp {
    /// Servers of no network yet. Their files lie in `directory`.
    pub fn new(servers: Arc<dyn DhcpServers>, store: Arc<Store>, directory: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            servers,
            directory,
            store,
            tables: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            serving: tokio::sync::Mutex::default(),
            waiting: Mutex::default(),
            told: Mutex::default(),
            deaf: Mutex::default(),
            troubles: Mutex::default(),
        })
    }

    fn file(&self, name: &str, kind: &str) -> PathBuf {
        self.directory.join(format!("{name}.{kind}"))
    }

    /// A network as it was stored, with the leases that were.
    pub(super) fn load(&self, name: &str, spec: &NetworkSpec, leases: Leases) {
        let (Some(server), Some(Ok(plan))) = (network_rules::server(name, spec), Plan::of(spec)) else {
            return;
        };
        let leases = leases.sound(&plan);
        lock(&self.tables).insert(name.to_owned(), Served { server, plan, leases });
    }

    /// From now on the network gives what this definition says, or nothing. Cards that cannot keep their address have none until they are
    /// given another.
    pub(super) async fn change(
        self: &Arc<Self>,
        name: &str,
        spec: Option<&NetworkSpec>,
    ) -> Result<Before, FleetError> {
        let changing = self.changing.lock().await;
        let before = lock(&self.tables).get(name).cloned();
        let now = match spec.and_then(|spec| Some((network_rules::server(name, spec)?, Plan::of(spec)?))) {
            None => None,
            Some((server, plan)) => {
                let plan = plan?;
                let mut leases = before.as_ref().map(|before| before.leases.clone()).unwrap_or_default();
                leases.prune(&plan, |_| true);
                Some(Served { server, plan, leases })
            }
        };
        self.set(name, now);
        drop(changing);
        if let Err(error) = self.serve(name).await {
            self.restore(name, Before(before)).await;
            return Err(error);
        }
        Ok(Before(before))
    }

    /// The network gives again what it gave before a change.
    pub(super) async fn restore(self: &Arc<Self>, name: &str, before: Before) {
        let changing = self.changing.lock().await;
        self.set(name, before.0);
        drop(changing);
        if let Err(error) = self.serve(name).await {
            warn!("{error}");
        }
    }

    fn set(&self, name: &str, served: Option<Served>) {
        let mut tables = lock(&self.tables);
        match served {
            Some(served) => tables.insert(name.to_owned(), served),
            None => tables.remove(name),
        };
    }

    /// Gives the card behind `tap` an address on `network`, if that gives any, and takes away what it had on others. Says whether it is new.
    pub(super) async fn give(
        self: &Arc<Self>,
        network: &str,
        tap: &str,
        mac: &str,
    ) -> Result<bool, FleetError> {
        self.release_but(&[tap.to_owned()], Some(network)).await;
        let _one = self.changing.lock().await;
        let Some(mut served) = lock(&self.tables).get(network).cloned() else { return Ok(false) };
        let fresh = served.leases.get(tap).is_none();
        let given = served.leases.give(&served.plan, tap, mac);
        let changed = given.map_err(|error| error.map(|text| format!("network \"{network}\": {text}")))?;
        if !changed {
            return Ok(false);
        }
        self.save(network, &served.leases).await?;
        self.set(network, Some(served));
        self.tell_soon(network);
        Ok(fresh)
    }

    /// The cards behind these taps are gone.
    pub(super) async fn release(self: &Arc<Self>, taps: &[String]) {
        self.release_but(taps, None).await;
    }

    async fn release_but(self: &Arc<Self>, taps: &[String], kept: Option<&str>) {
        let holds = |served: &Served| taps.iter().any(|tap| served.leases.get(tap).is_some());
        let names: Vec<String> = {
            let tables = lock(&self.tables);
            let held = tables.iter().filter(|(name, served)| Some(name.as_str()) != kept && holds(served));
            held.map(|(name, _)| name.clone()).collect()
        };
        for name in names {
            let _one = self.changing.lock().await;
            let Some(mut served) = lock(&self.tables).get(&name).cloned() else { continue };
            for tap in taps {
                served.leases.release(tap);
            }
            // On disk it may stay: the next daemon sees that its card is gone.
            if let Err(error) = self.save(&name, &served.leases).await {
                warn!("{error}");
            }
            self.set(&name, Some(served));
            self.tell_soon(&name);
        }
    }

    async fn save(&self, name: &str, leases: &Leases) -> Result<(), FleetError> {
        let (store, record) = (Arc::clone(&self.store), LeaseRecord::new(name.to_owned(), leases.clone()));
        match tokio::task::spawn_blocking(move || store.save_leases(&record)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(FleetError::StoreFailed(error.to_string())),
            Err(error) => Err(FleetError::StoreFailed(format!("network \"{name}\": {error}"))),
        }
    }

    /// The address of the card behind `tap`.
    pub(super) fn address(&self, tap: &str) -> Option<Ipv4Addr> {
        lock(&self.tables).values().find_map(|served| served.leases.get(tap))
    }

    /// What is wrong with a network's server, if it should have one.
    pub(super) async fn trouble(&self, name: &str) -> Option<String> {
        if !lock(&self.tables).contains_key(name) {
            return None;
        }
        if let Some(trouble) = lock(&self.troubles).get(name) {
            return Some(trouble.clone());
        }
        match self.servers.runs(name).await {
            Ok(true) => None,
            Ok(false) => Some(format!("its DHCP server does not run: {}", self.servers.hint(name))),
            Err(error) => Some(format!("its DHCP server: {error}")),
        }
    }

    /// The network's bridge was made: its server has to listen anew.
    pub(super) fn bridge_is_new(self: &Arc<Self>, name: &str) {
        if lock(&self.tables).contains_key(name) {
            lock(&self.deaf).insert(name.to_owned());
            self.tell_soon(name);
        }
    }

    /// Tells a server of its leases in a moment, with all that comes until then.
    fn tell_soon(self: &Arc<Self>, name: &str) {
        let mut waiting = lock(&self.waiting);
        let first = waiting.is_empty();
        waiting.insert(name.to_owned());
        if !first {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(TOGETHER).await;
            let names = std::mem::take(&mut *lock(&this.waiting));
            for name in names {
                if let Err(error) = this.serve(&name).await {
                    warn!("{error}");
                }
            }
        });
    }

    /// Puts everything in order at the start: servers that run are found again, and those of networks that are no more end. Cards whose tap
    /// is not `known` have no address any more.
    pub(super) async fn tidy(self: &Arc<Self>, known: &BTreeSet<String>) {
        let changing = self.changing.lock().await;
        let names: Vec<String> = lock(&self.tables).keys().cloned().collect();
        for name in &names {
            let Some(mut served) = lock(&self.tables).get(name).cloned() else { continue };
            let Served { plan, leases, .. } = &mut served;
            if leases.prune(plan, |tap| known.contains(tap)) {
                if let Err(error) = self.save(name, leases).await {
                    warn!("{error}");
                }
                self.set(name, Some(served));
            }
        }
        drop(changing);
        let others = match self.servers.all().await {
            Ok(all) => all.into_iter().filter(|name| !names.contains(name)).collect(),
            Err(error) => {
                warn!("DHCP servers cannot be listed: {error}");
                Vec::new()
            }
        };
        for name in others.iter().chain(&names) {
            if let Err(error) = self.serve(name).await {
                warn!("{error}");
            }
        }
    }

    /// Makes the server of a network do what its table says: start, learn, start anew or end.
    async fn serve(&self, name: &str) -> Result<(), FleetError> {
        let _one = self.serving.lock().await;
        let done = self.settle(name).await;
        let mut troubles = lock(&self.troubles);
        match &done {
            Err(error) if lock(&self.tables).contains_key(name) => {
                troubles.insert(name.to_owned(), error.to_string());
            }
            _ => drop(troubles.remove(name)),
        }
        done
    }

    async fn settle(&self, name: &str) -> Result<(), FleetError> {
        let Some(served) = lock(&self.tables).get(name).cloned() else { return self.end(name).await };
        let config = served.server.config().map_err(|error| failed(name, error))?;
        // Kept addresses are for whoever has that hardware address, a card that a client made too.
        let mut hosts: BTreeMap<&str, Ipv4Addr> =
            served.plan.kept.iter().map(|(mac, address)| (mac.as_str(), *address)).collect();
        hosts.extend(served.leases.all().map(|lease| (lease.mac.as_str(), lease.address)));
        let hosts = dhcp_hosts(hosts.into_iter().filter_map(|(mac, at)| Some((parse_mac(mac)?, at))));

        let (config_file, hosts_file) = (self.file(name, "conf"), self.file(name, "hosts"));
        let old = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let (same, old_hosts) = (old(&config_file) == config, old(&hosts_file));
        let running = self.servers.runs(name).await.map_err(|error| failed(name, error))?;
        let deaf = lock(&self.deaf).remove(name);
        let anew = deaf || !same || takes_away(&old_hosts, &hosts);
        if running && anew {
            // Before the files say so: a daemon that is killed in between finds a server that does not run, and starts it.
            self.servers.stop(name).await.map_err(|error| failed(name, error))?;
        }
        let written = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.directory)
            .and_then(|()| fs::set_permissions(&self.directory, fs::Permissions::from_mode(0o755)))
            .and_then(|()| write(&config_file, &config))
            .and_then(|()| write(&hosts_file, &hosts));
        written.map_err(|error| failed(name, format!("{}: {error}", self.directory.display())))?;
        let first = !lock(&self.told).contains(name);
        if !running || anew {
            if let Err(error) = self.servers.start(name).await {
                return Err(failed(name, error));
            }
            info!("network {name}: its DHCP server is started");
        } else if first || old_hosts != hosts {
            self.servers.reload(name).await.map_err(|error| failed(name, error))?;
        }
        lock(&self.told).insert(name.to_owned());
        Ok(())
    }

    async fn end(&self, name: &str) -> Result<(), FleetError> {
        lock(&self.told).remove(name);
        let config = self.file(name, "conf");
        let known = config.exists() || self.servers.runs(name).await.unwrap_or(true);
        if !known {
            return Ok(());
        }
        self.servers.stop(name).await.map_err(|error| failed(name, error))?;
        for path in [config, self.file(name, "hosts")] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    warn!("{} is left behind: {error}", path.display());
                }
                _ => {}
            }
        }
        info!("network {name}: its DHCP server is ended");
        Ok(())
    }

    /// Forgets the leases of a network that gives none any more.
    pub(super) async fn forget(&self, name: &str) {
        let (store, record) = (Arc::clone(&self.store), name.to_owned());
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || store.remove_leases(&record)).await {
            warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_changes_hands_is_noticed() {
        for (old, new, anew) in [
            ("", "", false),
            ("", "a,1\n", false),
            ("a,1\n", "a,1\nb,2\n", false),
            ("a,1\nb,2\n", "b,2\n", true),
            ("a,1\n", "a,2\n", true),
        ] {
            assert_eq!(takes_away(old, new), anew, "{old:?} {new:?}");
        }
    }
}
