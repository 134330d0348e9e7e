//! `flotilla template` and `flotilla clone`: what VMs are made of that run from their first moment, and the making of them.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::Cell;
use dbus_api::proxy::{CloneRow, Options, TemplateProxy};
use serde::Serialize;
use zbus::proxy::CacheProperties;
use zbus::{OwnedObjectPath, Variant};

use crate::args::template::{After, CloneArgs, CreateArgs, ListArgs, RmArgs, ShowArgs, TemplateVerb};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::jobs::Jobs;
use crate::output::{self, plain};
use crate::power::report;

/// Images may be large, and disks slow: this only catches a daemon that says nothing any more.
const COPY: Duration = Duration::from_secs(3600);
/// What one clone may take beside the others.
const CLONE: Duration = Duration::from_secs(90);

/// `flotilla template`.
pub(crate) async fn template(client: &Client, verb: TemplateVerb) -> Result<(), Failure> {
    match verb {
        TemplateVerb::Create(args) => create(client, args).await,
        TemplateVerb::List(args) => list(client, args).await,
        TemplateVerb::Show(args) => show(client, args).await,
        TemplateVerb::Verify(args) => verify(client, &args.name).await,
        TemplateVerb::Rm(args) => rm(client, args).await,
    }
}

async fn create(client: &Client, args: CreateArgs) -> Result<(), Failure> {
    let after = match args.after {
        After::Resume => "resume",
        After::Pause => "pause",
        After::Stop => "stop",
    };
    let mut options: Options<'_> = HashMap::from([("after", Variant::from(after))]);
    if let Some(text) = &args.description {
        options.insert("description", Variant::from(text.as_str()));
    }
    let mut jobs = Jobs::watch(client).await?;
    let begun = client.manager.create_template(&args.vm, &args.name, options).await;
    let job = begun.map_err(|error| client.failed(error).about(&args.vm))?;
    jobs.finish(client, "making a template of", &args.vm, job, COPY).await?;
    output::print(&format!("template {} made of {}\n", args.name, args.vm))
}

async fn verify(client: &Client, name: &str) -> Result<(), Failure> {
    let mut jobs = Jobs::watch(client).await?;
    let begun = client.manager.verify_template(name, Options::new()).await;
    let job = begun.map_err(|error| client.failed(error).about(name))?;
    jobs.finish(client, "verifying", name, job, COPY).await?;
    output::print(&format!("template {name} is as it was written\n"))
}

/// A row of the list, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    vm: String,
    created_usec: u64,
    bytes: u64,
    users: u32,
}

async fn list(client: &Client, args: ListArgs) -> Result<(), Failure> {
    let rows = client.manager.list_templates().await.map_err(|error| client.failed(error))?;
    let rows: Vec<Row> = rows
        .into_iter()
        .map(|(name, vm, created_usec, bytes, users, _)| Row { name, vm, created_usec, bytes, users })
        .collect();
    if args.json {
        return output::json(&rows);
    }
    if rows.is_empty() {
        output::note("No templates. `flotilla template create VM TEMPLATE` makes one of a VM that runs.");
        return Ok(());
    }
    output::print(&list_text(&rows, SystemTime::now(), output::coloured()))
}

fn list_text(rows: &[Row], now: SystemTime, coloured: bool) -> String {
    let cells = rows.iter().map(|row| {
        vec![
            Cell::new(plain(&row.name)),
            Cell::new(plain(&row.vm)),
            Cell::new(age(row.created_usec, now)),
            Cell::new(size(row.bytes)),
            Cell::new(row.users),
        ]
    });
    output::table(&["NAME", "VM", "AGE", "SIZE", "USED BY"], cells.collect(), coloured)
}

/// How long ago, in its largest unit.
fn age(usec: u64, now: SystemTime) -> String {
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .saturating_sub(Duration::from_micros(usec))
        .as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    let units = [(1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    match units.into_iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, letter)) if bytes < 10 * unit => format!("{:.1}{letter}", bytes as f64 / unit as f64),
        Some((unit, letter)) => format!("{}{letter}", bytes / unit),
        None => bytes.to_string(),
    }
}

/// All about a template, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    vm: String,
    description: String,
    created_usec: u64,
    vmm_version: String,
    place: String,
    files: Vec<File>,
    users: Vec<String>,
    spec: serde_json::Value,
}

#[derive(Debug, Serialize)]
struct File {
    name: String,
    bytes: u64,
    checksum: String,
}

async fn show(client: &Client, args: ShowArgs) -> Result<(), Failure> {
    let rows = client.manager.list_templates().await.map_err(|error| client.failed(error))?;
    let missing = || Failure::new(Exit::NoSuchVm, format!("no template is named \"{}\"", args.name));
    let path = rows.into_iter().find(|row| row.0 == args.name).ok_or_else(missing)?.5;
    let shown = fetch(client, path).await.map_err(|error| client.bus_failed(error).about(&args.name))?;
    if args.json {
        return output::json(&shown);
    }
    output::print(&show_text(&shown, SystemTime::now()))
}

async fn fetch(client: &Client, path: OwnedObjectPath) -> zbus::Result<Shown> {
    let object = TemplateProxy::builder(&client.connection)
        .path(path)
        .cache_properties(CacheProperties::No)
        .build()
        .await?;
    let file = |(name, bytes, checksum): (String, u64, String)| File { name, bytes, checksum };
    Ok(Shown {
        name: object.name().await?,
        vm: object.vm().await?,
        description: object.description().await?,
        created_usec: object.created().await?,
        vmm_version: object.vmm_version().await?,
        place: object.place().await?,
        files: object.files().await?.into_iter().map(file).collect(),
        users: object.users().await?,
        spec: serde_json::from_str(&object.spec().await?).unwrap_or_default(),
    })
}

fn show_text(shown: &Shown, now: SystemTime) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        if !value.is_empty() {
            text += &format!("{label:12}{}\n", plain(value));
        }
    };
    line("Name", &shown.name);
    line("Made of", &shown.vm);
    line("Description", &shown.description);
    line("Age", &age(shown.created_usec, now));
    line("VMM", &shown.vmm_version);
    line("Place", &shown.place);
    for file in &shown.files {
        line("File", &format!("{}, {}, {}", file.name, size(file.bytes), file.checksum));
    }
    line("Used by", &shown.users.join(", "));
    text
}

async fn rm(client: &Client, args: RmArgs) -> Result<(), Failure> {
    let mut failures = Vec::new();
    for name in &args.names {
        match client.manager.delete_template(name, Options::new()).await {
            Ok(()) => output::print(&format!("template {name} removed\n"))?,
            Err(error) => failures.push(client.failed(error).about(name)),
        }
    }
    report(failures)
}

/// A clone, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Made {
    name: String,
    uuid: String,
    state: String,
    qmp_socket: String,
}

/// `flotilla clone`.
pub(crate) async fn clone(client: &Client, args: CloneArgs) -> Result<(), Failure> {
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .map_err(|error| Failure::new(Exit::Failed, format!("{}: {error}", path.display())))
    };
    let labels: HashMap<&str, &str> =
        args.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let mut options: Options<'_> =
        HashMap::from([("paused", Variant::from(args.paused)), ("labels", Variant::from(labels))]);
    if let Some(path) = &args.user_data {
        options.insert("user_data", Variant::from(read(path)?));
    }
    if let Some(path) = &args.network_config {
        options.insert("network_config", Variant::from(read(path)?));
    }

    let mut jobs = Jobs::watch(client).await?;
    let begun = begin(client, &args, options).await?;
    if args.wait.no_wait {
        let names = begun.iter().map(|(name, _)| format!("{name}\n")).collect::<String>();
        return if args.json {
            output::json(&begun.iter().map(|(name, _)| name).collect::<Vec<_>>())
        } else {
            output::print(&names)
        };
    }
    let limit = CLONE + Duration::from_secs(begun.len() as u64);
    let (mut made, mut failures) = (Vec::new(), Vec::new());
    for (name, outcome) in jobs.wait(client, "cloning", begun, limit).await {
        match outcome {
            Ok(()) if args.json => made.push(look(client, name).await?),
            Ok(()) => output::print(&format!("{name} cloned from {}\n", args.template))?,
            Err(failure) => failures.push(failure),
        }
    }
    if args.json {
        output::json(&made)?;
    }
    report(failures)
}

/// The clones' names, and the jobs that make them.
async fn begin(
    client: &Client,
    args: &CloneArgs,
    options: Options<'_>,
) -> Result<Vec<(String, OwnedObjectPath)>, Failure> {
    let failed = |error| client.failed(error).about(&args.template);
    match &args.name {
        // One that is named is that one, or none.
        Some(name) if args.count == 1 && !name.contains('%') => {
            let (_, job) = client.manager.clone_vm(&args.template, name, options).await.map_err(failed)?;
            Ok(vec![(name.clone(), job)])
        }
        pattern => {
            let pattern = pattern.clone().unwrap_or_else(|| format!("{}-%", args.template));
            let rows = client.manager.clone_vms(&args.template, args.count, &pattern, options).await;
            Ok(rows.map_err(failed)?.into_iter().map(|(name, _, job): CloneRow| (name, job)).collect())
        }
    }
}

async fn look(client: &Client, name: String) -> Result<Made, Failure> {
    let vm = client.vm(&name).await?;
    let failed = |error| client.bus_failed(error).about(&name);
    Ok(Made {
        uuid: vm.uuid().await.map_err(failed)?,
        state: vm.state().await.map_err(failed)?,
        qmp_socket: vm.qmp_socket().await.map_err(failed)?,
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_the_template_is() {
        let now = UNIX_EPOCH + Duration::from_secs(7300);
        let row = Row {
            name: "base".into(),
            vm: "web".into(),
            created_usec: 100_000_000,
            bytes: 264 << 20,
            users: 3,
        };
        let text = list_text(&[row], now, false);
        assert_eq!(text, "NAME  VM   AGE  SIZE  USED BY\nbase  web  2h   264M  3\n");
    }

    #[test]
    fn sizes_and_ages() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1536, "1.5K"),
            (10 << 10, "10K"),
            (3 << 29, "1.5G"),
            (2 << 40, "2.0T"),
        ] {
            assert_eq!(size(bytes), text);
        }
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (seconds, text) in
            [(1_000_000, "0s"), (999_941, "59s"), (999_940, "1m"), (900_000, "1d"), (2_000_000, "0s")]
        {
            assert_eq!(age(seconds * 1_000_000, now), text);
        }
    }
}
