//! `flotilla nic` and `flotilla disk`: devices that come to a VM and leave it while it runs.

use std::collections::HashMap;
use std::time::Duration;

use comfy_table::Cell;
use dbus_api::proxy::Options;
use dbus_api::spec::Nic;
use serde::Serialize;
use zbus::Variant;

use crate::args::device::{AddDiskArgs, AddNicArgs, DiskVerb, ListDevicesArgs, NicVerb, RmDeviceArgs};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::jobs::Jobs;
use crate::output::{self, plain};

/// The daemon's own deadlines, for a few commands to the VMM, are below this.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize)]
struct NicRow {
    id: String,
    tap: String,
    mac: String,
    network: String,
}

#[derive(Debug, Serialize)]
struct DiskRow {
    id: String,
    path: String,
    format: String,
    readonly: bool,
}

/// `flotilla nic`.
pub(crate) async fn nic(client: &Client, verb: NicVerb) -> Result<(), Failure> {
    match verb {
        NicVerb::Add(args) => add_nic(client, args).await,
        NicVerb::Rm(args) => remove(client, args, true).await,
        NicVerb::List(args) => list_nics(client, args).await,
    }
}

/// `flotilla disk`.
pub(crate) async fn disk(client: &Client, verb: DiskVerb) -> Result<(), Failure> {
    match verb {
        DiskVerb::Add(args) => add_disk(client, args).await,
        DiskVerb::Rm(args) => remove(client, args, false).await,
        DiskVerb::List(args) => list_disks(client, args).await,
    }
}

async fn add_nic(client: &Client, args: AddNicArgs) -> Result<(), Failure> {
    let nic = Nic {
        bridge: args.bridge.unwrap_or_default(),
        network: args.network,
        mac: args.mac,
        number: args.number,
    };
    let text = json(&args.name, &nic)?;
    let mut jobs = Jobs::watch(client).await?;
    let added = client.manager.attach_nic(&args.name, &text, persist(args.persist)).await;
    let (id, job) = added.map_err(|error| client.failed(error).about(&args.name))?;
    jobs.finish(client, "adding a card to", &args.name, job, LIMIT).await?;
    output::print(&format!("{id} added to {}\n", args.name))
}

async fn add_disk(client: &Client, args: AddDiskArgs) -> Result<(), Failure> {
    let mut disk = args.disk;
    disk.number = args.number;
    disk.path = std::path::absolute(&disk.path)
        .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", disk.path.display())))?;
    let text = json(&args.name, &disk)?;
    let mut jobs = Jobs::watch(client).await?;
    let added = client.manager.attach_disk(&args.name, &text, persist(args.persist)).await;
    let (id, job) = added.map_err(|error| client.failed(error).about(&args.name))?;
    jobs.finish(client, "adding a disk to", &args.name, job, LIMIT).await?;
    output::print(&format!("{id} added to {}\n", args.name))
}

async fn remove(client: &Client, args: RmDeviceArgs, nic: bool) -> Result<(), Failure> {
    let usec = u64::try_from(args.timeout.as_micros()).unwrap_or(u64::MAX);
    let mut options = persist(args.persist);
    options.insert("timeout_usec", Variant::from(usec));
    let mut jobs = Jobs::watch(client).await?;
    let removed = if nic {
        client.manager.detach_nic(&args.name, &args.id, options).await
    } else {
        client.manager.detach_disk(&args.name, &args.id, options).await
    };
    let job = removed.map_err(|error| client.failed(error).about(&args.name))?;
    let doing = format!("removing {} from", plain(&args.id));
    jobs.finish(client, &doing, &args.name, job, args.timeout + LIMIT).await?;
    output::print(&format!("{} removed from {}\n", plain(&args.id), args.name))
}

fn persist(persist: bool) -> Options<'static> {
    HashMap::from([("persist", Variant::from(persist))])
}

fn json(name: &str, device: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(device).map_err(|error| Failure::new(Exit::Failed, format!("{name}: {error}")))
}

async fn list_nics(client: &Client, args: ListDevicesArgs) -> Result<(), Failure> {
    let nics = client.vm(&args.name).await?.network_interfaces().await;
    let nics = nics.map_err(|error| client.bus_failed(error))?;
    let rows: Vec<NicRow> =
        nics.into_iter().map(|(id, tap, mac, network)| NicRow { id, tap, mac, network }).collect();
    if args.json {
        return output::json(&rows);
    }
    let cells = rows.iter().map(|row| {
        [&row.id, &row.tap, &row.mac, &row.network].into_iter().map(|text| Cell::new(plain(text))).collect()
    });
    output::print(&output::table(&["ID", "TAP", "MAC", "NETWORK"], cells.collect(), output::coloured()))
}

async fn list_disks(client: &Client, args: ListDevicesArgs) -> Result<(), Failure> {
    let disks = client.vm(&args.name).await?.disks().await.map_err(|error| client.bus_failed(error))?;
    let rows: Vec<DiskRow> = disks
        .into_iter()
        .map(|(id, path, format, readonly)| DiskRow { id, path, format, readonly })
        .collect();
    if args.json {
        return output::json(&rows);
    }
    let cells = rows.iter().map(|row| {
        let mode = if row.readonly { "read-only" } else { "read-write" };
        [&*row.id, &*row.format, mode, &*row.path].into_iter().map(|text| Cell::new(plain(text))).collect()
    });
    output::print(&output::table(&["ID", "FORMAT", "MODE", "PATH"], cells.collect(), output::coloured()))
}
