//! The publisher: one task that turns the fleet's news, in their order, into objects, signals and property changes.

use std::collections::HashMap;
use std::sync::Arc;

use dbus_api::{MANAGER_PATH, job_path, network_path, template_path, vm_path};
use tokio::sync::mpsc;
use tracing::{error, warn};
use zbus::object_server::{InterfaceRef, SignalEmitter};
use zbus::{Connection, DBusError, OwnedObjectPath};

use super::folder;
use super::job::Job;
use super::manager::Manager;
use super::network::Network;
use super::template::Template;
use super::vm::Vm;
use super::{Shared, named};
use crate::fleet::FleetError;
use crate::fleet::view::{News, View};

struct Publisher {
    connection: Connection,
    shared: Shared,
    vms: HashMap<Arc<str>, InterfaceRef<Vm>>,
    /// The jobs under way of each VM: one, or two while a power-off overtakes another.
    jobs: HashMap<Arc<str>, Vec<(u32, InterfaceRef<Job>)>>,
    fleet_state: &'static str,
}

pub(super) async fn run(connection: Connection, shared: Shared, mut news: mpsc::UnboundedReceiver<News>) {
    let fleet_state = shared.fleet.state();
    let mut publisher =
        Publisher { connection, shared, vms: HashMap::new(), jobs: HashMap::new(), fleet_state };
    while let Some(item) = news.recv().await {
        // A signal that cannot be sent is lost for its listeners; they notice by the sequence numbers.
        if let Err(error) = publisher.publish(item).await {
            warn!("D-Bus: {error}");
        }
    }
    error!("the fleet tells no more news");
}

impl Publisher {
    fn emitter(&self) -> zbus::Result<SignalEmitter<'static>> {
        SignalEmitter::new(&self.connection, MANAGER_PATH)
    }

    async fn publish(&mut self, news: News) -> zbus::Result<()> {
        match news {
            News::VmNew(view) => {
                let path = owned(vm_path(&view.name))?;
                let server = self.connection.object_server();
                server.at(&path, Vm::new(self.shared.clone(), Arc::clone(&view.name))).await?;
                folder::over(server, &self.shared, &path).await?;
                self.vms.insert(Arc::clone(&view.name), server.interface(&path).await?);
                Manager::vm_new(&self.emitter()?, &view.name, path).await
            }
            News::VmRemoved(name) => {
                let path = owned(vm_path(&name))?;
                self.vms.remove(&name);
                self.connection.object_server().remove::<Vm, _>(&path).await?;
                Manager::vm_removed(&self.emitter()?, &name, path).await?;
                self.fleet_changed().await
            }
            News::VmChanged { before, after, sequence } => self.vm_changed(&before, &after, sequence).await,
            News::QmpEvent { sequence, name, usec, event, data } => match self.vms.get(&name) {
                Some(vm) => Vm::event(vm.signal_emitter(), sequence, usec, &event, &data).await,
                None => Ok(()),
            },
            News::JobNew { id, kind, name } => {
                let path = owned(job_path(id))?;
                let job = Job { shared: self.shared.clone(), id, kind, name: Arc::clone(&name) };
                let server = self.connection.object_server();
                server.at(&path, job).await?;
                folder::over(server, &self.shared, &path).await?;
                let object = server.interface(&path).await?;
                self.jobs.entry(Arc::clone(&name)).or_default().push((id, object));
                Manager::job_new(&self.emitter()?, id, path, kind, &name).await
            }
            News::JobRemoved { id, kind, name, result } => {
                let path = owned(job_path(id))?;
                if self.forget_job(&name, id) {
                    self.connection.object_server().remove::<Job, _>(&path).await?;
                }
                let (word, error_name, message) = match result {
                    Ok(()) => ("done", String::new(), String::new()),
                    Err(error) => {
                        let word =
                            if matches!(error, FleetError::Cancelled(_)) { "cancelled" } else { "failed" };
                        let message = error.to_string();
                        (word, named(error).name().to_string(), message)
                    }
                };
                Manager::job_removed(&self.emitter()?, id, path, kind, &name, word, &error_name, &message)
                    .await
            }
            News::NetworkNew(name) => {
                let path = owned(network_path(&name))?;
                let network = Network::new(self.shared.clone(), name.clone());
                let server = self.connection.object_server();
                server.at(&path, network).await?;
                folder::over(server, &self.shared, &path).await?;
                Manager::network_new(&self.emitter()?, &name, path).await
            }
            News::NetworkChanged(name) => {
                let path = owned(network_path(&name))?;
                let network = self.connection.object_server().interface::<_, Network>(&path).await?;
                let object = network.get().await;
                object.bridge_changed(network.signal_emitter()).await?;
                object.spec_invalidate(network.signal_emitter()).await
            }
            News::NetworkRemoved(name) => {
                let path = owned(network_path(&name))?;
                self.connection.object_server().remove::<Network, _>(&path).await?;
                Manager::network_removed(&self.emitter()?, &name, path).await
            }
            News::JobChanged { id, name } => {
                let jobs = self.jobs.get(&name).into_iter().flatten();
                for (_, job) in jobs.filter(|(job, _)| *job == id) {
                    let object = job.get().await;
                    object.phase_changed(job.signal_emitter()).await?;
                    object.progress_changed(job.signal_emitter()).await?;
                }
                Ok(())
            }
            News::TemplateNew(name) => {
                let path = owned(template_path(&name))?;
                let template = Template::new(self.shared.clone(), name.clone());
                let server = self.connection.object_server();
                server.at(&path, template).await?;
                folder::over(server, &self.shared, &path).await?;
                Manager::template_new(&self.emitter()?, &name, path).await
            }
            News::TemplateRemoved(name) => {
                let path = owned(template_path(&name))?;
                self.connection.object_server().remove::<Template, _>(&path).await?;
                Manager::template_removed(&self.emitter()?, &name, path).await
            }
            News::FleetChanged => self.fleet_changed().await,
            News::Flush(answer) => {
                let _ = answer.send(());
                Ok(())
            }
        }
    }

    /// Says whether the job was known.
    fn forget_job(&mut self, name: &Arc<str>, id: u32) -> bool {
        let Some(jobs) = self.jobs.get_mut(name) else { return false };
        let before = jobs.len();
        jobs.retain(|(job, _)| *job != id);
        let known = jobs.len() != before;
        if jobs.is_empty() {
            self.jobs.remove(name);
        }
        known
    }

    async fn vm_changed(&mut self, before: &View, after: &View, sequence: Option<u64>) -> zbus::Result<()> {
        let Some(vm) = self.vms.get(&after.name).cloned() else { return Ok(()) };
        let emitter = vm.signal_emitter();
        let object = vm.get().await;
        // Properties first: who hears the signal reads them as they are now.
        if before.main_pid != after.main_pid {
            object.main_p_i_d_changed(emitter).await?;
        }
        if before.unit != after.unit {
            object.unit_changed(emitter).await?;
        }
        if before.command_line != after.command_line {
            object.command_line_changed(emitter).await?;
        }
        if before.exit != after.exit {
            object.exit_status_changed(emitter).await?;
        }
        if before.generation != after.generation {
            object.generation_changed(emitter).await?;
        }
        if before.applied_generation != after.applied_generation {
            object.applied_generation_changed(emitter).await?;
        }
        if before.spec != after.spec {
            object.spec_invalidate(emitter).await?;
        }
        if before.nics != after.nics {
            object.network_interfaces_changed(emitter).await?;
        }
        if before.disks != after.disks {
            object.disks_changed(emitter).await?;
        }
        if before.last_log != after.last_log {
            object.last_log_changed(emitter).await?;
        }
        if before.restarts != after.restarts {
            object.n_restarts_changed(emitter).await?;
        }
        if before.devices != after.devices {
            object.removed_devices_changed(emitter).await?;
            object.added_devices_changed(emitter).await?;
        }
        if before.responsive != after.responsive {
            object.qmp_responsive_changed(emitter).await?;
        }
        if before.intent != after.intent {
            object.intent_changed(emitter).await?;
        }
        if before.since != after.since {
            object.state_change_timestamp_changed(emitter).await?;
        }
        if before.reason != after.reason {
            object.state_reason_changed(emitter).await?;
        }
        if before.state != after.state {
            object.state_changed(emitter).await?;
            for (_, job) in self.jobs.get(&after.name).into_iter().flatten() {
                job.get().await.phase_changed(job.signal_emitter()).await?;
            }
        }
        if let Some(sequence) = sequence {
            let (old, new) = (before.state.word(), after.state.word());
            Vm::changed_state(emitter, sequence, old, new, &after.reason).await?;
            let path = owned(vm_path(&after.name))?;
            let manager = self.emitter()?;
            let name = &after.name;
            Manager::vm_state_changed(
                &manager,
                sequence,
                name,
                path,
                old,
                new,
                &after.reason,
                HashMap::new(),
            )
            .await?;
            self.fleet_changed().await?;
        }
        Ok(())
    }

    async fn fleet_changed(&mut self) -> zbus::Result<()> {
        let state = self.shared.fleet.state();
        if state == self.fleet_state {
            return Ok(());
        }
        self.fleet_state = state;
        let manager = self.connection.object_server().interface::<_, Manager>(MANAGER_PATH).await?;
        let object = manager.get().await;
        object.state_changed(manager.signal_emitter()).await?;
        object.draining_changed(manager.signal_emitter()).await?;
        object.corrupt_records_changed(manager.signal_emitter()).await
    }
}

fn owned(path: String) -> zbus::Result<OwnedObjectPath> {
    OwnedObjectPath::try_from(path)
}
