//! Addresses by DHCP, and NAT: real dnsmasq, real nft, and machines on cables that have the hardware addresses of VMs' cards.
//!
//! Needs what networks need, and `dnsmasq` (dnsmasq-base), `nft` (nftables) and `busybox` for its DHCP client.

use std::collections::HashMap;

use crate::lab::{Lab, Machine, name_of, none, pid};
use dbus_api::error::Error;
use dbus_api::network_path;
use dbus_api::proxy::NetworkProxy;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use zbus::Variant;

async fn lab() -> Lab {
    let mut lab = Lab::bare().await;
    lab.own_network();
    lab.ip("link set lo up");
    lab.start_daemon().await;
    lab
}

async fn network(lab: &Lab, name: &str, spec: Value) -> Result<(), Error> {
    let options = HashMap::from([("replace", Variant::from(true))]);
    lab.manager.define_network(name, &spec.to_string(), options).await.map(drop)
}

async fn problems(lab: &Lab, name: &str) -> Vec<String> {
    let builder = NetworkProxy::builder(lab.connection()).path(network_path(name));
    let network = builder.cache_properties(zbus::proxy::CacheProperties::No).build().await.unwrap();
    network.problems().await.unwrap()
}

async fn vm(lab: &Lab, name: &str, mac: &str) -> Result<(), Error> {
    lab.define(name, json!({"nics": [{"network": "lan", "mac": mac}]})).await
}

async fn address(lab: &Lab, name: &str) -> String {
    let all = lab.vm(name).await.addresses().await.unwrap();
    assert!(all.iter().all(|(card, _)| card == "nic0"), "{all:?}");
    all.into_iter().map(|(_, address)| address).collect()
}

/// A machine that is asked by its hardware address.
fn machine(lab: &Lab, port: &str, mac: &str) -> Machine {
    let machine = lab.machine(port, mac);
    lab.ok("ip", &["link", "set", port, "master", "flbr-lan"]);
    machine
}

fn server(lab: &Lab) -> Option<u32> {
    std::fs::read_to_string(lab.path("run/dhcp/lan.pid")).ok()?.trim().parse().ok()
}

const LAN: &str = "10.5.0.1/24";
const ONE: &str = "52:54:00:00:00:01";
const TWO: &str = "52:54:00:00:00:02";
const THREE: &str = "52:54:00:00:00:03";

fn dhcp() -> Value {
    json!({"addresses": [LAN], "dhcp": {"range": "10.5.0.10-10.5.0.12", "lease_seconds": 600,
        "dns": ["9.9.9.9"], "reservations": {ONE: "10.5.0.5"}}})
}

#[tokio::test]
async fn cards_are_told_the_address_that_the_daemon_shows() {
    let mut lab = lab().await;
    network(&lab, "lan", dhcp()).await.unwrap();
    vm(&lab, "kept", ONE).await.unwrap();
    vm(&lab, "web", TWO).await.unwrap();
    assert_eq!(
        (address(&lab, "kept").await, address(&lab, "web").await),
        ("10.5.0.5".into(), "10.5.0.10".into())
    );
    let rows = lab.manager.list_addresses().await.unwrap();
    let row = |vm: &str, at: &str| (vm.to_owned(), "nic0".to_owned(), at.to_owned());
    assert_eq!(rows, [row("kept", "10.5.0.5"), row("web", "10.5.0.10")]);
    let (one, two) = (machine(&lab, "one0", ONE), machine(&lab, "two0", TWO));
    let told = "10.5.0.10/24 router= dns=9.9.9.9 lease=600";
    assert_eq!(two.asks(&lab, 10).as_deref(), Some(told), "{}", lab.log());
    assert!(one.asks(&lab, 10).is_some_and(|told| told.starts_with("10.5.0.5/24 ")));
    let three = machine(&lab, "three0", THREE);
    assert_eq!(three.asks(&lab, 1), None, "nobody's");
    assert!(problems(&lab, "lan").await.is_empty());

    // The server is not the daemon's child, and is found again.
    let before = server(&lab).unwrap();
    lab.end_daemon(Signal::SIGKILL);
    assert_eq!(two.asks(&lab, 10).as_deref(), Some(told));
    lab.start_daemon().await;
    lab.settle(async || lab.log().matches("ready: ").count() == 2).await;
    assert_eq!(server(&lab), Some(before));
    assert_eq!(
        (address(&lab, "kept").await, address(&lab, "web").await),
        ("10.5.0.5".into(), "10.5.0.10".into())
    );

    // What one VM had is another's when it is gone, at once.
    lab.manager.undefine_vm("web", none()).await.unwrap();
    vm(&lab, "db", THREE).await.unwrap();
    assert_eq!(address(&lab, "db").await, "10.5.0.10");
    lab.settle(async || server(&lab).is_some_and(|now| now != before)).await;
    assert!(three.asks(&lab, 10).is_some_and(|told| told.starts_with("10.5.0.10/24 ")), "{}", lab.log());
    assert_eq!(two.asks(&lab, 1), None);

    // One that dies is missed, and comes back with the next change.
    kill(pid(server(&lab).unwrap()), Signal::SIGKILL).unwrap();
    lab.settle(async || problems(&lab, "lan").await.iter().any(|text| text.contains("does not run"))).await;
    vm(&lab, "mail", "52:54:00:00:00:04").await.unwrap();
    lab.settle(async || problems(&lab, "lan").await.is_empty()).await;
    assert!(three.asks(&lab, 10).is_some());
}

#[tokio::test]
async fn addresses_come_and_go_with_cards_and_with_the_definition() {
    let lab = lab().await;
    network(&lab, "lan", dhcp()).await.unwrap();
    vm(&lab, "a", "52:54:00:00:00:0a").await.unwrap();
    let twice = vm(&lab, "b", "52:54:00:00:00:0a").await.unwrap_err();
    assert_eq!(name_of(&twice), "InvalidSpec", "{twice:?}");
    lab.define("b", json!({"nics": [{"network": "lan"}, {"network": "lan"}]})).await.unwrap();
    let full = vm(&lab, "c", "52:54:00:00:00:0c").await.unwrap_err();
    assert_eq!(name_of(&full), "ResourceExhausted", "{full:?}");
    assert!(!lab.ip("-o link show").contains("fl-c-"), "a tap is left");
    lab.manager.undefine_vm("b", none()).await.unwrap();

    // One that is plugged in has one for as long as it is there.
    lab.start("a").await.unwrap();
    let (id, ended) = lab.attach_nic("a", json!({"network": "lan"}), none()).await.unwrap();
    ended.unwrap();
    let shown = lab.vm("a").await.addresses().await.unwrap();
    assert_eq!(shown[1], (id.clone(), "10.5.0.11".to_owned()));
    lab.job(lab.manager.detach_nic("a", &id, none())).await.unwrap();
    assert_eq!(address(&lab, "a").await, "10.5.0.10");

    // Another range; none; one again: a VM that runs has what the network gives now.
    let other = json!({"addresses": [LAN], "dhcp": {"range": "10.5.0.20-10.5.0.29"}});
    network(&lab, "lan", other.clone()).await.unwrap();
    assert_eq!(address(&lab, "a").await, "10.5.0.20");
    network(&lab, "lan", json!({"addresses": [LAN]})).await.unwrap();
    assert_eq!(address(&lab, "a").await, "");
    assert_eq!(server(&lab), None);
    network(&lab, "lan", other).await.unwrap();
    assert_eq!(address(&lab, "a").await, "10.5.0.20");
    let a = machine(&lab, "a0", "52:54:00:00:00:0a");
    assert!(a.asks(&lab, 10).is_some_and(|told| told.starts_with("10.5.0.20/24 ")), "{}", lab.log());

    let last = server(&lab).unwrap();
    let options = HashMap::from([("force", Variant::from(true))]);
    lab.manager.undefine_vm("a", options).await.unwrap();
    lab.manager.delete_network("lan").await.unwrap();
    // What has ended and is not yet waited for has no command line.
    assert!(std::fs::read(format!("/proc/{last}/cmdline")).unwrap_or_default().is_empty());
    for dir in ["run/dhcp", "state/leases", "state/networks"] {
        assert_eq!(std::fs::read_dir(lab.path(dir)).unwrap().count(), 0, "{dir}");
    }
    assert!(!lab.ip("-o link show").contains("flbr-lan"));
}

#[tokio::test]
async fn clones_have_addresses_of_their_own() {
    let lab = lab().await;
    network(&lab, "lan", dhcp()).await.unwrap();
    lab.define("web", json!({"nics": [{"network": "lan"}]})).await.unwrap();
    lab.start("web").await.unwrap();
    let after = HashMap::from([("after", Variant::from("resume"))]);
    lab.job(lab.manager.create_template("web", "base", after)).await.unwrap();
    lab.manager.clone_vms("base", 2, "w-%", none()).await.unwrap();
    lab.settle(async || lab.manager.list_jobs().await.unwrap().is_empty()).await;
    let mut given: Vec<_> =
        lab.manager.list_addresses().await.unwrap().into_iter().map(|row| row.2).collect();
    given.sort();
    assert_eq!(given, ["10.5.0.10", "10.5.0.11", "10.5.0.12"], "{}", lab.log());
}

#[tokio::test]
async fn a_bridge_that_was_taken_away_is_served_again() {
    let lab = lab().await;
    network(&lab, "lan", dhcp()).await.unwrap();
    vm(&lab, "web", TWO).await.unwrap();
    let before = server(&lab);
    lab.ip("link delete flbr-lan");
    // The next start of a VM makes it again.
    lab.start("web").await.unwrap();
    lab.settle(async || server(&lab).is_some_and(|now| Some(now) != before)).await;
    let two = machine(&lab, "two0", TWO);
    assert!(two.asks(&lab, 10).is_some_and(|told| told.starts_with("10.5.0.10/24 ")), "{}", lab.log());
}

#[tokio::test]
async fn machines_go_out_under_the_hosts_address() {
    let mut lab = lab().await;
    let forward = |on: &str| format!("echo {on} > /proc/sys/net/ipv4/ip_forward");
    lab.ok("sh", &["-c", &forward("0")]);
    lab.ok("nft", &["add", "table", "ip", "theirs"]);
    let plain = json!({"addresses": [LAN], "dhcp": {}});
    let out = json!({"addresses": [LAN], "nat": true, "isolated": true, "dhcp": {}});
    network(&lab, "lan", plain.clone()).await.unwrap();
    assert!(!lab.ok("nft", &["list", "tables"]).contains("flotilla"), "off by default");
    network(&lab, "lan", out.clone()).await.unwrap();
    let told = problems(&lab, "lan").await;
    assert!(told.iter().any(|text| text.contains("net.ipv4.ip_forward")), "{told:?}");
    lab.ok("sh", &["-c", &forward("1")]);
    assert!(problems(&lab, "lan").await.is_empty());

    vm(&lab, "web", TWO).await.unwrap();
    let two = machine(&lab, "two0", TWO);
    let told = two.asks(&lab, 10).unwrap();
    assert!(told.contains(" router=10.5.0.1 "), "{told}");
    let address = address(&lab, "web").await;
    two.ok(&format!("ip address add {address}/24 dev eth0"));
    two.ok("ip route add default via 10.5.0.1");
    // It has no way back but to the host's own address.
    let outside = lab.machine("up0", "52:54:00:00:00:ff");
    lab.ok("ip", &["address", "add", "192.0.2.1/24", "dev", "up0"]);
    outside.ok("ip address add 192.0.2.2/24 dev eth0");
    assert!(two.reaches("192.0.2.2"));

    // Somebody emptied all tables while no daemon was there.
    lab.end_daemon(Signal::SIGKILL);
    lab.ok("nft", &["flush", "ruleset"]);
    lab.ok("nft", &["add", "table", "ip", "theirs"]);
    lab.start_daemon().await;
    lab.settle(async || lab.ok("nft", &["list", "tables"]).contains("flotilla")).await;
    assert!(two.reaches("192.0.2.2"));

    // And while one is there: all of it, or some.
    let there = async || lab.ok("nft", &["list", "ruleset"]).contains("masquerade");
    lab.ok("nft", &["flush", "ruleset"]);
    lab.settle(there).await;
    lab.ok("nft", &["flush", "table", "ip", "flotilla"]);
    lab.settle(there).await;
    lab.ok("nft", &["add", "table", "ip", "theirs"]);
    assert!(two.reaches("192.0.2.2"));

    network(&lab, "lan", plain).await.unwrap();
    assert!(!lab.ok("nft", &["list", "tables"]).contains("flotilla"));
    network(&lab, "lan", out).await.unwrap();
    lab.manager.undefine_vm("web", none()).await.unwrap();
    lab.manager.delete_network("lan").await.unwrap();
    let tables = lab.ok("nft", &["list", "tables"]);
    assert!(!tables.contains("flotilla") && tables.contains("theirs"), "{tables}");
    assert!(!lab.path("run/nat").exists());
}
