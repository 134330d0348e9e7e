//! Start-up: reads the store, looks for the processes of earlier daemons, and puts both together. Nothing is killed here: what is alive
//! and silent becomes `quarantined`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use dbus_api::spec::Restart;
use futures_util::future::join_all;
use tokio::time::timeout;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::actor::{self, Seed};
use super::life::{Exit, Input, Intent, State};
use super::registry::Fleet;
use super::spec as rules;
use super::view::News;
use super::vm::Vm;
use crate::launch::{Found, LaunchError, Orphan, Wanted};
use crate::store::{Corrupt, Definition, Process, Runtime, StoreError};

/// How long classification may take: each VM is told apart within two seconds, all at the same time.
const CLASSIFY: Duration = Duration::from_millis(2500);

/// Why the fleet cannot come up.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The directories cannot be read at all.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Processes cannot be looked for: without knowing them nothing may be started.
    #[error("looking for running VMs: {0}")]
    Launch(#[from] LaunchError),
}

impl Fleet {
    /// Fills the registry. When this returns every VM is known and can be asked for; [`Fleet::classify`] waits for the answers of those
    /// that run.
    pub async fn adopt(&self) -> Result<(), AdoptError> {
        let store = &self.context.store;
        let (definitions, mut corrupt) = store.load_definitions()?;
        let (runtimes, broken) = store.load_runtimes()?;
        corrupt.extend(broken);
        corrupt.extend(self.load_networks()?);
        let mut uuids = BTreeSet::new();
        let mut good: Vec<Definition> = Vec::new();
        for definition in definitions {
            let checked = rules::check_name(&definition.name)
                .and_then(|()| rules::check(&definition.spec))
                .map_err(|error| error.to_string())
                .and_then(|()| {
                    let first = uuids.insert(definition.uuid);
                    first.then_some(()).ok_or_else(|| format!("uuid {} is another VM's", definition.uuid))
                });
            match checked {
                Ok(()) => good.push(definition),
                Err(reason) => corrupt.push(store.set_aside(&definition.name, reason)?),
            }
        }
        for Corrupt { path, reason } in &corrupt {
            error!("a record was set aside as {}: {reason}", path.display());
        }
        *self.corrupt.write().unwrap_or_else(PoisonError::into_inner) = corrupt;

        let boot = &self.context.boot_id;
        let mut records: BTreeMap<String, Runtime> =
            runtimes.into_iter().filter(|r| r.boot_id == *boot).map(|r| (r.name.clone(), r)).collect();
        let wanted: Vec<Wanted> = good
            .iter()
            .map(|d| Wanted { name: d.name.clone(), uuid: d.uuid, record: records.get(&d.name).cloned() })
            .collect();
        self.note_orphans(&wanted, &records).await?;
        let mut found = self.context.launcher.find(&wanted).await?;
        let alive = found.values().filter(|found| matches!(found, Found::Alive(_))).count();
        info!("{} VMs defined, {alive} running", good.len());
        {
            let mut table = self.write();
            for definition in good {
                let name = definition.name.clone();
                let uuid = definition.uuid;
                let mut record = records.remove(&name);
                let policy = definition.spec.restart;
                let (vm, process) = put_together(&mut record, found.remove(&name), policy);
                let seed = Seed { definition, vm, record, process };
                let handle = actor::spawn(Arc::clone(&self.context), seed);
                self.context.tell(News::VmNew(Arc::clone(&handle.view.borrow())));
                table.uuids.insert(uuid, name.clone());
                table.vms.insert(name, handle);
            }
        }
        Ok(())
    }

    /// Processes whose definition is not there (its record is corrupt, or was taken away by hand) are shown and left alone, and so are
    /// their links.
    async fn note_orphans(
        &self,
        wanted: &[Wanted],
        records: &BTreeMap<String, Runtime>,
    ) -> Result<(), AdoptError> {
        let launcher = &self.context.launcher;
        let mut orphans = launcher.orphans(wanted).await?;
        for (name, record) in records {
            if wanted.iter().any(|wanted| wanted.name == *name) {
                continue;
            }
            let unit = launcher.unit(record.instance.as_deref().unwrap_or(name));
            let process = record.process.as_ref().and_then(|process| Orphan::look(name, unit, process.pid));
            match process {
                Some(orphan) => {
                    orphans.retain(|other| other.pid != orphan.pid);
                    orphans.push(orphan);
                }
                None => {
                    if let Err(error) = self.context.store.remove_runtime(name) {
                        warn!(FLOTILLA_VM = name, "{error}");
                    }
                }
            }
        }
        for Orphan { name, pid, .. } in &orphans {
            warn!(FLOTILLA_VM = name, "process {pid} runs, but no such VM is defined: left alone");
        }
        *self.orphans.write().unwrap_or_else(PoisonError::into_inner) = orphans;
        Ok(())
    }

    /// Puts the host's links in order: configured bridges are there, leftovers are not.
    pub async fn tidy_network(&self) {
        // Callers are served already: what a definition makes meanwhile would pass for a leftover.
        let _alone = self.context.network.changing().await;
        self.context.network.ensure_configured().await;
        let mut uuids: BTreeSet<Uuid> = self.list().iter().map(|view| view.uuid).collect();
        uuids.extend(self.orphans().iter().filter_map(|orphan| orphan.uuid));
        self.context.network.sweep(&uuids, &self.bridges()).await;
        self.tidy_addresses().await;
    }

    /// Servers of addresses and NAT are as the networks say; every card of a VM has its address.
    async fn tidy_addresses(&self) {
        let network = &self.context.network;
        let views = self.list();
        let defined = views.iter().flat_map(|view| super::network::taps(&view.name, &view.spec));
        let plugged = views.iter().flat_map(|view| view.nics.iter().map(|nic| nic.1.clone()));
        network.dhcp.tidy(&defined.chain(plugged).collect()).await;
        for view in views {
            // In the same order: see the actor's `look`.
            for ((_, tap, mac, _), nic) in view.nics.iter().zip(&*view.cards) {
                let Some(of) = &nic.network else { continue };
                if let Err(error) = network.dhcp.give(of, tap, mac).await {
                    error!(FLOTILLA_VM = &*view.name, "no address: {error}");
                }
            }
        }
        if let Err(error) = network.apply_nat(None).await {
            error!("{error}");
        }
    }

    /// Removes proxy sockets of VMs that are not defined: an undefinition cut short leaves one.
    pub fn tidy_sockets(&self) {
        self.context.shelf.clear();
        let table = self.read();
        for entry in std::fs::read_dir(&self.context.proxies).into_iter().flatten().flatten() {
            let file = entry.file_name().to_string_lossy().into_owned();
            if file.strip_suffix(".sock").is_some_and(|name| !table.vms.contains_key(name)) {
                info!("socket {file}: no such VM is defined, removed");
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Returns when every VM that runs has answered or is known to be silent.
    pub async fn classify(&self) {
        let open: Vec<_> = self.read().vms.values().map(|handle| handle.view.clone()).collect();
        let known = open.into_iter().map(|mut view| async move {
            let told = |view: &Arc<super::view::View>| {
                view.responsive || view.state.idle() || view.state == State::Quarantined
            };
            let _ = view.wait_for(told).await;
        });
        let _ = timeout(CLASSIFY, join_all(known)).await;
        self.classified();
    }

    /// From now on the fleet is as it is meant to be: nothing that an earlier daemon left is in the way any more.
    pub fn be_ready(&self) {
        self.ready.store(true, Ordering::SeqCst);
        self.context.tell(News::FleetChanged);
    }
}

/// A VM's state from what was written down and what is there.
fn put_together(
    record: &mut Option<Runtime>,
    found: Option<Found>,
    policy: Restart,
) -> (Vm, Option<Process>) {
    let (row, restarting) = record.as_ref().map_or((0, false), |record| (record.restarts, record.restarting));
    let wanted = record.as_ref().map_or(Intent::Stopped, |record| record.intent);
    // What was going on goes on; an end that nobody saw is judged anew.
    let goes_on = match &found {
        Some(Found::Alive(_)) => true,
        Some(Found::Ended(_)) => false,
        None => record.as_ref().is_some_and(|record| record.state.idle()),
    };
    let (mut vm, process) = observed(record, found, policy);
    if goes_on {
        vm = vm.restarted(row, restarting && policy != Restart::Never, wanted);
    }
    vm.set_policy(policy);
    (vm, process)
}

fn observed(record: &mut Option<Runtime>, found: Option<Found>, policy: Restart) -> (Vm, Option<Process>) {
    let (state, intent, forced) = match record {
        Some(record) if !record.state.idle() => (record.state, record.intent, record.forced),
        // Started while no daemon was there.
        _ => (State::Starting, Intent::Running, false),
    };
    match found {
        Some(Found::Alive(process)) => (Vm::found(state, intent, forced), Some(process)),
        Some(Found::Ended(exit)) if state == State::Stopping => {
            if let Some(record) = record {
                record.exit = Some(exit);
            }
            (Vm::idle(State::Stopped, "ended as asked"), None)
        }
        Some(Found::Ended(exit)) => {
            let row = record.as_ref().map_or(0, |record| record.restarts);
            let mut vm = Vm::found(state, intent, forced).restarted(row, false, intent);
            // Whether the guest or an administrator ended it in peace nobody knows: only a failure is acted upon.
            vm.set_policy(if policy == Restart::Never { policy } else { Restart::OnFailure });
            // The guest may have ended it in peace, and nobody heard: only a visible failure counts as one.
            let exit_seen = if state == State::Starting { exit.clone() } else { quiet(exit.clone()) };
            let run = vm.run();
            vm.step(Input::Gone { run, exit: exit_seen });
            if let Some(record) = record {
                record.exit = Some(exit);
            }
            (vm, None)
        }
        None => match record {
            Some(record) if record.state.idle() => {
                (Vm::idle(record.state, "as before the daemon was restarted"), None)
            }
            Some(_) => (Vm::idle(State::Failed, "its process is not there any more"), None),
            None => (Vm::idle(State::Defined, "not started since the host booted"), None),
        },
    }
}

fn quiet(exit: Exit) -> Exit {
    match exit {
        Exit::Signal(name) if name == "SIGTERM" => Exit::Code(0),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_and_what_is_there() {
        let process = Process { pid: 9, start_time: 1, invocation: "a".into() };
        let record = |state| Some(Runtime::new("web", "boot", state, Intent::Running));
        let alive = || Some(Found::Alive(process.clone()));
        let ended = |exit| Some(Found::Ended(exit));
        let crash = || Exit::Signal("SIGSEGV".into());
        let cases = [
            (None, None, State::Defined),
            (None, alive(), State::Starting),
            (record(State::Stopped), alive(), State::Starting),
            (record(State::Running), alive(), State::Running),
            (record(State::Paused), alive(), State::Paused),
            (record(State::Quarantined), alive(), State::Quarantined),
            (record(State::Running), ended(Exit::Code(0)), State::Stopped),
            (record(State::Running), ended(Exit::Unknown), State::Stopped),
            (record(State::Running), ended(Exit::Signal("SIGTERM".into())), State::Stopped),
            (record(State::Running), ended(crash()), State::Failed),
            (record(State::Starting), ended(Exit::Unknown), State::Failed),
            (record(State::Stopping), ended(crash()), State::Stopped),
            (record(State::Failed), None, State::Failed),
            (record(State::Stopped), None, State::Stopped),
            (record(State::Running), None, State::Failed),
        ];
        for (mut record, found, state) in cases {
            let text = format!("{record:?} {found:?}");
            assert_eq!(put_together(&mut record, found, Restart::Never).0.state(), state, "{text}");
        }
    }

    #[test]
    fn restarts_go_on_after_the_daemon() {
        let record = |state, restarting| {
            let mut record = Runtime::new("web", "boot", state, Intent::Running);
            (record.restarts, record.restarting) = (2, restarting);
            Some(record)
        };
        let ended = |exit| Some(Found::Ended(exit));
        let crash = || Exit::Signal("SIGSEGV".into());
        let on_failure = Restart::OnFailure;
        let cases = [
            (record(State::Failed, true), None, on_failure, Some(2)),
            (record(State::Failed, false), None, on_failure, None),
            (record(State::Failed, true), None, Restart::Never, None),
            (record(State::Running, true), ended(crash()), on_failure, Some(4)),
            (record(State::Running, true), ended(Exit::Code(0)), on_failure, None),
            // An administrator may have stopped it: nobody saw.
            (record(State::Running, true), ended(Exit::Code(0)), Restart::Always, None),
            (record(State::Running, false), ended(crash()), Restart::Always, Some(4)),
            (record(State::Stopping, false), ended(crash()), Restart::Always, None),
            (None, None, Restart::Always, None),
        ];
        for (mut record, found, policy, pause) in cases {
            let text = format!("{record:?} {found:?} {policy:?}");
            let (vm, _) = put_together(&mut record, found, policy);
            assert_eq!(vm.restart_due().map(|pause| pause.as_secs()), pause, "{text}");
        }
    }
}
