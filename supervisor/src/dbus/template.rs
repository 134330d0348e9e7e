//! `org.flotilla.Flotilla1.Template`: a template's properties, from the daemon's memory; and what the Manager's verbs on templates take and give.

use std::collections::HashMap;
use std::sync::Arc;

use dbus_api::error::Error;
use dbus_api::proxy::{CloneRow, TemplateRow};
use dbus_api::{job_path, template_path, vm_path};
use zbus::{OwnedObjectPath, fdo, interface};

use super::{Options, Shared, Taken, invalid, named, path};
use crate::template::{After, CloneOptions, MakeOptions, Record};

pub(super) fn rows(shared: &Shared) -> Result<Vec<TemplateRow>, Error> {
    let row = |record: Arc<Record>| {
        let users = u32::try_from(shared.templates.users(&record.name).len()).unwrap_or(u32::MAX);
        let object = path(template_path(&record.name))?;
        Ok((record.name.clone(), record.vm.clone(), record.created, record.size(), users, object))
    };
    shared.templates.list().into_iter().map(row).collect()
}

pub(super) async fn create(
    shared: &Shared,
    vm: &str,
    template: &str,
    options: Options,
) -> Result<OwnedObjectPath, Error> {
    let mut options = Taken(options);
    let after = match options.get::<String>("after", "s")?.as_deref() {
        None | Some("resume") => After::Resume,
        Some("pause") => After::Pause,
        Some("stop") => After::Stop,
        Some(other) => {
            return Err(invalid(format!("after {other:?}: use \"resume\", \"pause\" or \"stop\"")));
        }
    };
    let description = options.get::<String>("description", "s")?.unwrap_or_default();
    options.finish()?;
    let job = shared.templates.create(vm, template, MakeOptions { after, description }).map_err(named)?;
    shared.fleet.flush().await;
    path(job_path(job))
}

pub(super) async fn verify(shared: &Shared, template: &str) -> Result<OwnedObjectPath, Error> {
    let job = shared.templates.verify(template).map_err(named)?;
    shared.fleet.flush().await;
    path(job_path(job))
}

fn clone_options(options: Options) -> Result<CloneOptions, Error> {
    let mut options = Taken(options);
    let labels = options.get::<HashMap<String, String>>("labels", "a{ss}")?.unwrap_or_default();
    let taken = CloneOptions {
        paused: options.flag("paused", false)?,
        labels: labels.into_iter().collect(),
        user_data: options.get("user_data", "s")?,
        network_config: options.get("network_config", "s")?,
    };
    options.finish()?;
    Ok(taken)
}

pub(super) async fn clone_one(
    shared: &Shared,
    template: &str,
    name: &str,
    options: Options,
) -> Result<(OwnedObjectPath, OwnedObjectPath), Error> {
    let cloning = shared.templates.clone_vm(template, name, &clone_options(options)?).map_err(named)?;
    shared.fleet.flush().await;
    Ok((path(vm_path(&cloning.name))?, path(job_path(cloning.job))?))
}

pub(super) async fn clone_many(
    shared: &Shared,
    template: &str,
    count: u32,
    pattern: &str,
    options: Options,
) -> Result<Vec<CloneRow>, Error> {
    let options = clone_options(options)?;
    let begun = shared.templates.clone_vms(template, count, pattern, &options).map_err(named)?;
    shared.fleet.flush().await;
    begun
        .into_iter()
        .map(|cloning| {
            Ok((cloning.name.clone(), path(vm_path(&cloning.name))?, path(job_path(cloning.job))?))
        })
        .collect()
}

pub(super) struct Template {
    shared: Shared,
    name: String,
}

impl Template {
    pub(super) fn new(shared: Shared, name: String) -> Self {
        Self { shared, name }
    }

    fn record(&self) -> fdo::Result<Arc<Record>> {
        self.shared.templates.get(&self.name).map_err(|error| fdo::Error::UnknownObject(error.to_string()))
    }
}

/// One template.
#[interface(name = "org.flotilla.Flotilla1.Template")]
impl Template {
    /// Name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.name.clone()
    }

    /// The VM that it was made of.
    #[zbus(property(emits_changed_signal = "const"))]
    fn vm(&self) -> fdo::Result<String> {
        Ok(self.record()?.vm.clone())
    }

    /// For people.
    #[zbus(property(emits_changed_signal = "const"))]
    fn description(&self) -> fdo::Result<String> {
        Ok(self.record()?.description.clone())
    }

    /// When it was made, microseconds since the epoch.
    #[zbus(property(emits_changed_signal = "const"))]
    fn created(&self) -> fdo::Result<u64> {
        Ok(self.record()?.created)
    }

    /// Version of the VMM that saved it.
    #[zbus(property(emits_changed_signal = "const"))]
    fn vmm_version(&self) -> fdo::Result<String> {
        Ok(self.record()?.vmm.clone())
    }

    /// The definition, JSON, without what tells VMs apart.
    #[zbus(property(emits_changed_signal = "const"))]
    fn spec(&self) -> fdo::Result<String> {
        serde_json::to_string(&self.record()?.spec).map_err(|error| fdo::Error::Failed(error.to_string()))
    }

    /// Its files: name, bytes with holes and all, checksum.
    #[zbus(property(emits_changed_signal = "const"))]
    fn files(&self) -> fdo::Result<Vec<(String, u64, String)>> {
        let row = |part: &crate::template::Part| (part.name.clone(), part.size, part.checksum.clone());
        Ok(self.record()?.parts.iter().map(row).collect())
    }

    /// Directory of its files.
    #[zbus(property(emits_changed_signal = "const"))]
    fn place(&self) -> String {
        self.shared.templates.place(&self.name).display().to_string()
    }

    /// What needs it: VMs by name, and templates that were made of clones.
    #[zbus(property(emits_changed_signal = "false"))]
    fn users(&self) -> Vec<String> {
        self.shared.templates.users(&self.name)
    }
}
