//! `flotilla network`: define, show, list, rm.

use std::collections::HashMap;

use comfy_table::Cell;
use dbus_api::network::{Dhcp, NetworkSpec};
use dbus_api::network_path;
use dbus_api::proxy::NetworkProxy;
use serde::Serialize;
use zbus::proxy::CacheProperties;
use zbus::{OwnedObjectPath, Variant};

use crate::args::network::{DefineArgs, ListArgs, NetworkVerb, RmArgs, ShowArgs};
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
        NetworkVerb::Show(args) => show(client, args).await,
        NetworkVerb::List(args) => list(client, args).await,
        NetworkVerb::Rm(args) => rm(client, args).await,
    }
}

async fn define(client: &Client, args: DefineArgs) -> Result<(), Failure> {
    let name = args.name;
    let dhcp = args.dhcp.map(|range| Dhcp {
        range,
        lease_seconds: args.lease_seconds,
        router: args.router,
        dns: args.dns,
        reservations: args.reservations.into_iter().collect(),
    });
    let spec = NetworkSpec {
        description: args.description.unwrap_or_default(),
        bridge: args.bridge,
        addresses: args.addresses,
        isolated: args.isolated,
        mtu: args.mtu,
        nat: args.nat,
        dhcp,
    };
    let text = serde_json::to_string(&spec)
        .map_err(|error| Failure::new(Exit::Failed, format!("{name}: {error}")))?;
    let options = HashMap::from([("replace", Variant::from(args.replace))]);
    let defined = client.manager.define_network(&name, &text, options).await;
    defined.map_err(|error| client.failed(error).about(&name))?;
    output::print(&format!("network {name} defined\n"))?;
    // It is as it was asked to be; whether it does what it is for may depend on the host.
    for problem in problems(client, &name).await? {
        output::note(&format!("flotilla: {name}: {}", plain(&problem)));
    }
    Ok(())
}

async fn object(client: &Client, path: OwnedObjectPath) -> zbus::Result<NetworkProxy<'static>> {
    let builder = NetworkProxy::builder(&client.connection).path(path);
    builder.cache_properties(CacheProperties::No).build().await
}

async fn problems(client: &Client, name: &str) -> Result<Vec<String>, Failure> {
    let failed = |error| client.bus_failed(error).about(name);
    let path = OwnedObjectPath::try_from(network_path(name)).map_err(failed)?;
    object(client, path).await.map_err(failed)?.problems().await.map_err(failed)
}

/// What keeps networks from working, by name.
pub(crate) async fn all_problems(client: &Client) -> Result<Vec<(String, String)>, Failure> {
    let mut all = Vec::new();
    for (name, ..) in client.manager.list_networks().await.map_err(|error| client.failed(error))? {
        let problems = problems(client, &name).await?;
        all.extend(problems.into_iter().map(|problem| (name.clone(), problem)));
    }
    Ok(all)
}

async fn row(client: &Client, name: String, bridge: String, path: OwnedObjectPath) -> Result<Row, Failure> {
    let failed = |error| client.bus_failed(error);
    let object = object(client, path).await.map_err(failed)?;
    let spec = object.spec().await.map_err(failed)?;
    let spec = serde_json::from_str(&spec)
        .map_err(|error| Failure::new(Exit::Failed, format!("{name}: its definition: {error}")))?;
    Ok(Row { vms: object.vms().await.map_err(failed)?, name, bridge, spec })
}

/// All about a network, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    row: Row,
    addresses_given: Vec<Given>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Given {
    vm: String,
    card: String,
    address: String,
}

async fn show(client: &Client, args: ShowArgs) -> Result<(), Failure> {
    let name = args.name;
    let networks = client.manager.list_networks().await.map_err(|error| client.failed(error))?;
    let Some((_, bridge, _, path)) = networks.into_iter().find(|network| network.0 == name) else {
        return Err(Failure::new(Exit::NoSuchVm, format!("no network is named {name:?}")));
    };
    let row = row(client, name.clone(), bridge, path).await?;
    let all = client.manager.list_addresses().await.map_err(|error| client.failed(error))?;
    let mut addresses_given = Vec::new();
    for vm in &row.vms {
        let failed = |error| client.bus_failed(error).about(vm);
        let cards = client.vm(vm).await?.network_interfaces().await.map_err(failed)?;
        let on_it = |card: &str| cards.iter().any(|(id, _, _, place)| id == card && *place == name);
        let given = all.iter().filter(|(of, card, _)| of == vm && on_it(card));
        addresses_given.extend(given.map(|(vm, card, address)| Given {
            vm: vm.clone(),
            card: card.clone(),
            address: address.clone(),
        }));
    }
    let shown = Shown { row, addresses_given, problems: problems(client, &name).await? };
    if args.json {
        return output::json(&shown);
    }
    output::print(&show_text(&shown, output::coloured()))
}

fn show_text(shown: &Shown, coloured: bool) -> String {
    let spec = &shown.row.spec;
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let mut rows = vec![
        ("Name", shown.row.name.clone()),
        ("Bridge", shown.row.bridge.clone()),
        ("Description", spec.description.clone()),
    ];
    rows.extend(spec.addresses.iter().map(|address| ("Address", address.to_string())));
    rows.push(("MTU", spec.mtu.map(|mtu| mtu.to_string()).unwrap_or_default()));
    rows.push(("Isolated", yes(spec.isolated)));
    rows.push(("NAT", yes(spec.nat)));
    if let Some(dhcp) = &spec.dhcp {
        let range = dhcp.range.map_or_else(|| "the whole subnet".to_owned(), |range| range.to_string());
        rows.push(("DHCP", range));
        rows.push(("Lease", dhcp.lease_seconds.map(|seconds| format!("{seconds} s")).unwrap_or_default()));
        rows.push(("Router", dhcp.router.map(|router| router.to_string()).unwrap_or_default()));
        rows.extend(dhcp.dns.iter().map(|server| ("DNS", server.to_string())));
        rows.extend(dhcp.reservations.iter().map(|(mac, at)| ("Reserved", format!("{at} for {mac}"))));
    } else {
        rows.push(("DHCP", "no".to_owned()));
    }
    for vm in &shown.row.vms {
        let given: Vec<String> = shown
            .addresses_given
            .iter()
            .filter(|given| given.vm == *vm)
            .map(|given| format!("{} {}", given.card, given.address))
            .collect();
        rows.push(("VM", if given.is_empty() { vm.clone() } else { format!("{vm}: {}", given.join(", ")) }));
    }
    rows.extend(shown.problems.iter().map(|problem| ("PROBLEM", problem.clone())));
    let cells = rows.into_iter().filter(|(_, value)| !value.is_empty());
    let cells = cells.map(|(key, value)| vec![Cell::new(key), Cell::new(plain(&value))]).collect();
    // Without its empty header line.
    output::table(&["", ""], cells, coloured).trim_start_matches(['\n', ' ']).to_owned()
}

async fn list(client: &Client, args: ListArgs) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for (name, bridge, _, path) in
        client.manager.list_networks().await.map_err(|error| client.failed(error))?
    {
        rows.push(row(client, name, bridge, path).await?);
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
            Cell::new(if row.spec.nat { "yes" } else { "no" }),
            Cell::new(row.spec.dhcp.as_ref().map_or_else(
                || "no".to_owned(),
                |dhcp| dhcp.range.map_or_else(|| "yes".to_owned(), |range| range.to_string()),
            )),
            Cell::new(plain(&or_none(row.vms.join(",")))),
        ]
    });
    output::table(
        &["NAME", "BRIDGE", "ADDRESSES", "MTU", "ISOLATED", "NAT", "DHCP", "VMS"],
        cells.collect(),
        coloured,
    )
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
            dhcp: Some(Dhcp { range: "10.5.0.9-10.5.0.20".parse().ok(), ..Dhcp::default() }),
            ..NetworkSpec::default()
        };
        let row = Row {
            name: "lan".into(),
            bridge: "flbr-lan".into(),
            vms: vec!["web".into(), "db".into()],
            spec: spec.clone(),
        };
        let text = list_text(std::slice::from_ref(&row), false);
        assert_eq!(
            text.lines().nth(1),
            Some("lan   flbr-lan  10.5.0.1/24  -    yes       no   10.5.0.9-10.5.0.20  web,db"),
            "{text}"
        );
        let given = Given { vm: "web".into(), card: "nic0".into(), address: "10.5.0.9".into() };
        let text = show_text(
            &Shown { row, addresses_given: vec![given], problems: vec!["it does not run".into()] },
            false,
        );
        for (key, value) in [
            ("DHCP", "10.5.0.9-10.5.0.20"),
            ("VM", "web: nic0 10.5.0.9"),
            ("VM", "db"),
            ("PROBLEM", "it does not run"),
        ] {
            let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(text.lines().any(|line| words(line) == format!("{key} {value}")), "{key}: {text}");
        }
        assert!(serde_json::to_string(&spec).unwrap().contains("10.5.0.1/24"));
    }
}
