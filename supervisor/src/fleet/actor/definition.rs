//! The actor's part that changes and removes a VM's definition: what is checked, made and written in which order.

use std::sync::Arc;

use dbus_api::spec::VmSpec;

use super::{Actor, named};
use crate::fleet::{FleetError, network};
use crate::store::Definition;

impl Actor {
    /// `held`: what runs is already as this definition says, as far as it differs from the one before.
    pub(super) async fn redefine(
        &mut self,
        mut spec: VmSpec,
        if_generation: Option<u64>,
        held: bool,
    ) -> Result<u64, FleetError> {
        if if_generation.is_some_and(|wanted| wanted != self.generation) {
            return Err(FleetError::GenerationMismatch(format!(
                "VM \"{}\" is at generation {} now: read it again",
                self.name, self.generation
            )));
        }
        if spec.uuid.is_some_and(|uuid| uuid != self.uuid) {
            return Err(FleetError::InvalidSpec(format!(
                "uuid: VM \"{}\" is {}, and keeps it until it is undefined",
                self.name, self.uuid
            )));
        }
        spec.uuid = Some(self.uuid);
        if *self.spec == spec {
            return Ok(self.generation);
        }
        self.context.network.ensure(&self.name, self.uuid, &spec).await?;
        let running = !self.vm.state().idle();
        if running && self.spec.limits != spec.limits {
            let limited = self.context.launcher.limit(&self.instance, &spec.limits).await;
            limited.map_err(|error| FleetError::LaunchFailed(format!("limits: {error}")))?;
        }
        let current =
            running && self.applied_generation == self.generation && (held || self.spec.same_machine(&spec));
        let definition = Definition::new(self.name.to_string(), self.uuid, self.generation + 1, spec);
        let (store, saved) = (Arc::clone(&self.context.store), definition.clone());
        let outcome = tokio::task::spawn_blocking(move || store.save_definition(&saved)).await;
        if let Ok(Err(error)) = outcome {
            return Err(FleetError::StoreFailed(error.to_string()));
        }
        let before = std::mem::replace(&mut self.spec, Arc::new(definition.spec));
        self.generation = definition.generation;
        self.vm.set_policy(self.spec.restart);
        self.devices.prune(&self.spec);
        if current {
            // Everything that changed holds already.
            self.applied_generation = self.generation;
            self.record().await;
        }
        if self.vm.state().idle() {
            let keep = network::taps(&self.name, &self.spec);
            let taps = network::taps(&self.name, &before);
            self.context.network.remove_taps(self.uuid, taps, &keep).await;
        }
        Ok(self.generation)
    }

    /// Removes everything of a VM that does not run. The record goes first: what a crash leaves then is found by its tag.
    pub(super) async fn undefine(&mut self) -> Result<(), FleetError> {
        self.vm.admit_undefine().map_err(|error| named(&self.name, error))?;
        if self.plugging.is_some() {
            let busy = FleetError::Busy("a device of its last process is being removed still".to_owned());
            return Err(named(&self.name, busy));
        }
        let (store, name) = (Arc::clone(&self.context.store), Arc::clone(&self.name));
        let outcome = tokio::task::spawn_blocking(move || {
            store.remove_definition(&name).and_then(|()| store.remove_runtime(&name))?;
            store.remove_clone(&name)
        });
        if let Ok(Err(error)) = outcome.await {
            return Err(FleetError::StoreFailed(error.to_string()));
        }
        self.link.cut();
        self.context.network.remove_taps(self.uuid, network::taps(&self.name, &self.spec), &[]).await;
        self.context.launcher.clean(&self.name).await;
        self.link.remove();
        Ok(())
    }
}
