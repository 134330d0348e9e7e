//! What the Manager's CreateVm takes and gives.

use std::path::Path;

use dbus_api::error::Error;
use dbus_api::spec::Format;
use dbus_api::{job_path, vm_path};
use zbus::OwnedObjectPath;

use super::{Options, Shared, Taken, invalid, named, path};
use crate::template::CreateOptions;

fn create_options(options: Options) -> Result<CreateOptions, Error> {
    let mut options = Taken(options);
    let format = match options.get::<String>("format", "s")?.as_deref() {
        None => None,
        Some("raw") => Some(Format::Raw),
        Some("qcow2") => Some(Format::Qcow2),
        Some(other) => return Err(invalid(format!("format {other:?}: use \"raw\" or \"qcow2\""))),
    };
    let taken = CreateOptions {
        size: options.get("size", "t")?,
        format,
        whole: options.flag("whole", false)?,
        user_data: options.get("user_data", "s")?,
        network_config: options.get("network_config", "s")?,
        ssh_keys: options.get::<Vec<String>>("ssh_keys", "as")?.unwrap_or_default(),
        start: options.flag("start", true)?,
    };
    options.finish()?;
    Ok(taken)
}

pub(super) async fn create(
    shared: &Shared,
    name: &str,
    spec: &str,
    image: &str,
    options: Options,
) -> Result<(OwnedObjectPath, OwnedObjectPath), Error> {
    let options = create_options(options)?;
    let creating = shared.templates.create_vm(name, spec, Path::new(image), options).await.map_err(named)?;
    shared.fleet.flush().await;
    Ok((path(vm_path(&creating.name))?, path(job_path(creating.job))?))
}
