//! `flotilla network`: define, list, rm.

use std::collections::HashMap;

use comfy_table::Cell;
use dbus_api::network::NetworkSpec;
use dbus_api::proxy::NetworkProxy;
use serde::Serialize;
use zbus::Variant;
use zbus::proxy::CacheProperties;

use crate::args::network::{DefineArgs, ListArgs, NetworkVerb, RmArgs};
use crate::client::Client;
use crate::failure::{Exit, Failure};
use crate::output::{self, plain};

/// A row of the list, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    bridge: String,
    vms: Vec<String>,
    #[serde(flatten)]
    spec: NetworkSpec,
}

/// `flotilla network`.
pub(crate) async fn network(client: &Client, verb: NetworkVerb) -> Result<(), Failure> {
    match verb {
        NetworkVerb::Define(args) => define(client, args).await,
        NetworkVerb::List(args) => list(client, args).await,
        NetworkVerb::Rm(args) => rm(client, args).await,
    }
}

async fn define(client: &Client, args: DefineArgs) -> Result<(), Failure> {
    let name = args.name;
    let spec = NetworkSpec {
        description: args.description.unwrap_or_default(),
        bridge: args.bridge,
        addresses: args.addresses,
        isolated: args.isolated,
        mtu: args.mtu,
    };
    let text = serde_json::to_string(&spec)
        .map_err(|error| Failure::new(Exit::Failed, format!("{name}: {error}")))?;
    let options = HashMap::from([("replace", Variant::from(args.replace))]);
    let defined = client.manager.define_network(&name, &text, options).await;
    defined.map_err(|error| client.failed(error).about(&name))?;
    output::print(&format!("network {name} defined\n"))
}

async fn list(client: &Client, args: ListArgs) -> Result<(), Failure> {
    let failed = |error| client.bus_failed(error);
    let mut rows = Vec::new();
    for (name, bridge, _, path) in
        client.manager.list_networks().await.map_err(|error| client.failed(error))?
    {
        let object = NetworkProxy::builder(&client.connection)
            .path(path)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(failed)?;
        let spec = object.spec().await.map_err(failed)?;
        let spec = serde_json::from_str(&spec)
            .map_err(|error| Failure::new(Exit::Failed, format!("{name}: its definition: {error}")))?;
        rows.push(Row { vms: object.vms().await.map_err(failed)?, name, bridge, spec });
    }
    if args.json {
        return output::json(&rows);
    }
    if rows.is_empty() {
        output::note("No networks. `flotilla network define lan --address 10.5.0.1/24` makes one.");
        return Ok(());
    }
    output::print(&list_text(&rows, output::coloured()))
}

fn list_text(rows: &[Row], coloured: bool) -> String {
    let cells = rows.iter().map(|row| {
        let addresses: Vec<String> = row.spec.addresses.iter().map(ToString::to_string).collect();
        let or_none = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        vec![
            Cell::new(plain(&row.name)),
            Cell::new(plain(&row.bridge)),
            Cell::new(or_none(addresses.join(","))),
            Cell::new(row.spec.mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string())),
            Cell::new(if row.spec.isolated { "yes" } else { "no" }),
            Cell::new(plain(&or_none(row.vms.join(",")))),
        ]
    });
    output::table(&["NAME", "BRIDGE", "ADDRESSES", "MTU", "ISOLATED", "VMS"], cells.collect(), coloured)
}

async fn rm(client: &Client, args: RmArgs) -> Result<(), Failure> {
    let mut last = Ok(());
    for name in &args.names {
        let removed = client.manager.delete_network(name).await;
        let outcome = match removed {
            Ok(()) => output::print(&format!("network {name} removed\n")),
            Err(error) => Err(client.failed(error).about(name)),
        };
        if outcome.is_err()
            && let Err(failure) = std::mem::replace(&mut last, outcome)
        {
            output::note(&format!("flotilla: {failure}"));
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_the_network_is() {
        let spec = NetworkSpec {
            addresses: vec!["10.5.0.1/24".parse().unwrap()],
            isolated: true,
            ..NetworkSpec::default()
        };
        let row = Row {
            name: "lan".into(),
            bridge: "flbr-lan".into(),
            vms: vec!["web".into(), "db".into()],
            spec: spec.clone(),
        };
        let text = list_text(&[row], false);
        assert_eq!(text.lines().nth(1), Some("lan   flbr-lan  10.5.0.1/24  -    yes       web,db"), "{text}");
        assert!(serde_json::to_string(&spec).unwrap().contains("10.5.0.1/24"));
    }
}
