//! Devices that come and go, as the Manager and a VM's object take them: JSON and options become what the fleet understands.

use std::time::Duration;

use dbus_api::ACTION_MANAGE;
use dbus_api::error::Error;
use serde::de::DeserializeOwned;
use zbus::OwnedObjectPath;
use zbus::message::Header;

use super::{MAX_TIMEOUT, Options, Shared, Taken, named, path};
use crate::fleet::seats::{Hardware, Kind};
use crate::fleet::{Ask, FleetError, How};

/// How long a guest has to let go of a device when the caller does not say.
const PATIENCE: Duration = Duration::from_secs(30);

/// Options of these calls: "persist" b, "timeout_usec" t.
fn how(options: Options) -> Result<How, Error> {
    let mut options = Taken(options);
    let persist = options.flag("persist", false)?;
    let patience = options.get::<u64>("timeout_usec", "t")?.map_or(PATIENCE, Duration::from_micros);
    options.finish()?;
    Ok(How { persist, patience: patience.min(MAX_TIMEOUT) })
}

/// A device as it stands in a definition.
fn read<T: DeserializeOwned>(what: &str, text: &str) -> Result<T, Error> {
    // A list would do for serde, as a struct without the names of its fields.
    if text.trim_start().starts_with('[') {
        return Err(Error::InvalidSpec(format!("{what}: a list, not an object")));
    }
    serde_json::from_str(text).map_err(|error| Error::InvalidSpec(format!("{what}: {error}")))
}

impl Shared {
    async fn plug(
        &self,
        header: &Header<'_>,
        name: &str,
        ask: Ask,
        options: Options,
    ) -> Result<(String, OwnedObjectPath), Error> {
        self.access.check(header, ACTION_MANAGE, name).await?;
        let (id, job) = self.fleet.plug(name, ask, how(options)?).await.map_err(named)?;
        // The job's object is there before its path is told.
        self.fleet.flush().await;
        Ok((id, path(dbus_api::job_path(job))?))
    }

    pub(super) async fn attach_nic(
        &self,
        header: &Header<'_>,
        name: &str,
        nic: &str,
        options: Options,
    ) -> Result<(String, OwnedObjectPath), Error> {
        self.plug(header, name, Ask::Attach(Hardware::Nic(read("nic", nic)?)), options).await
    }

    pub(super) async fn attach_disk(
        &self,
        header: &Header<'_>,
        name: &str,
        disk: &str,
        options: Options,
    ) -> Result<(String, OwnedObjectPath), Error> {
        self.plug(header, name, Ask::Attach(Hardware::Disk(read("disk", disk)?)), options).await
    }

    pub(super) async fn detach(
        &self,
        header: &Header<'_>,
        name: &str,
        kind: Kind,
        id: &str,
        options: Options,
    ) -> Result<OwnedObjectPath, Error> {
        if kind.number(id).is_none() {
            let word = kind.word();
            let text = format!("VM \"{name}\": {id:?} is no id of a {word}: they are {word}0, {word}1, …");
            return Err(named(FleetError::InvalidSpec(text)));
        }
        let ask = Ask::Detach(kind, id.to_owned());
        self.plug(header, name, ask, options).await.map(|(_, job)| job)
    }
}
