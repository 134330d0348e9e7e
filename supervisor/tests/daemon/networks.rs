//! Networks: defined, used, changed and deleted over D-Bus, on real links; and what is not ours stays as it is.

use std::collections::HashMap;

use crate::lab::{Lab, name_of, none};
use dbus_api::error::Error;
use dbus_api::network_path;
use dbus_api::proxy::NetworkProxy;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use zbus::Variant;

async fn define(lab: &Lab, name: &str, spec: Value, replace: bool) -> Result<(), Error> {
    let options = HashMap::from([("replace", Variant::from(replace))]);
    lab.manager.define_network(name, &spec.to_string(), options).await.map(drop)
}

async fn refused(lab: &Lab, name: &str, spec: Value, replace: bool) -> String {
    name_of(&define(lab, name, spec, replace).await.unwrap_err())
}

async fn network(lab: &Lab, name: &str) -> NetworkProxy<'static> {
    NetworkProxy::builder(lab.manager.inner().connection())
        .path(network_path(name))
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await
        .unwrap()
}

#[tokio::test]
async fn networks_are_defined_used_changed_and_deleted() {
    let mut lab = Lab::bare().await;
    lab.own_network();
    lab.start_daemon().await;
    define(&lab, "lan", json!({"addresses": ["10.5.0.1/24", "10.6.0.1/24"], "mtu": 1400}), false)
        .await
        .unwrap();
    let shown = lab.ip("address show flbr-lan");
    assert!(shown.contains("10.5.0.1/24") && shown.contains("mtu 1400"), "{shown}");

    lab.define("web", json!({"nics": [{"network": "lan"}]})).await.unwrap();
    lab.define("db", json!({"nics": [{"network": "lan"}, {"bridge": "flbr-lan"}]})).await.unwrap();
    lab.start("web").await.unwrap();
    let ports = lab.ip("-d link show master flbr-lan");
    assert!(ports.contains("fl-web-0") && ports.contains("mtu 1400"), "{ports}");
    assert!(!ports.contains("isolated on"), "{ports}");
    let nic = lab.vm("web").await.network_interfaces().await.unwrap().remove(0);
    assert_eq!((nic.1.as_str(), nic.3.as_str()), ("fl-web-0", "lan"));
    let rows = lab.manager.list_networks().await.unwrap();
    assert_eq!((rows[0].0.as_str(), rows[0].1.as_str(), rows[0].2), ("lan", "flbr-lan", 2));
    assert_eq!(network(&lab, "lan").await.vms().await.unwrap(), ["db", "web"]);

    // Changes hold at once, for VMs that run too.
    define(&lab, "lan", json!({"addresses": ["10.5.0.1/24"], "isolated": true}), true).await.unwrap();
    let shown = lab.ip("address show flbr-lan");
    assert!(shown.contains("10.5.0.1/24") && !shown.contains("10.6.0.1"), "{shown}");
    assert!(lab.ip("-d link show fl-web-0").contains("isolated on"));
    assert!(
        lab.ip("-d link show fl-db-1").contains("isolated off"),
        "a card on the bare bridge is as it was"
    );

    // What cannot be is refused, and nothing of it stays.
    for (name, spec, replace, error) in [
        ("lan", json!({}), false, "NetworkExists"),
        ("lan", json!({"bridge": "br5"}), true, "InvalidState"),
        ("two", json!({"bridge": "flbr-lan"}), false, "NetworkExists"),
        ("two", json!({"bridge": "lo"}), false, "NetworkFailed"),
        ("two", json!({"addresses": ["10.5.0.0/24"]}), false, "InvalidSpec"),
        ("two", json!({"mtu": 1}), false, "InvalidSpec"),
        ("two", json!({"nat": "yes"}), false, "InvalidSpec"),
        ("two", json!({"nat": true}), false, "InvalidSpec"),
        ("two", json!({"dhcp": {}}), false, "InvalidSpec"),
        ("two", json!({"addresses": ["10.5.0.9/16"]}), false, "InvalidSpec"),
        ("no name", json!({}), false, "InvalidSpec"),
    ] {
        assert_eq!(refused(&lab, name, spec.clone(), replace).await, error, "{name} {spec}");
    }
    assert!(!lab.ip("-o link show").contains("flbr-two"));
    let missing = lab.define("mail", json!({"nics": [{"network": "nowhere"}]})).await.unwrap_err();
    assert_eq!(name_of(&missing), "NoSuchNetwork");
    assert_eq!(name_of(&lab.manager.delete_network("lan").await.unwrap_err()), "InvalidState");
    assert_eq!(name_of(&lab.manager.delete_network("nowhere").await.unwrap_err()), "NoSuchNetwork");

    // The next daemon knows it, and mends what somebody broke meanwhile.
    lab.end_daemon(Signal::SIGKILL);
    lab.ip("address del 10.5.0.1/24 dev flbr-lan");
    lab.start_daemon().await;
    assert_eq!(lab.manager.list_networks().await.unwrap().len(), 1);
    lab.settle(async || lab.ip("address show flbr-lan").contains("10.5.0.1/24")).await;
    for name in ["web", "db"] {
        let options = HashMap::from([("force", Variant::from(true))]);
        lab.manager.undefine_vm(name, options).await.unwrap();
    }
    assert!(lab.ip("-o link show").contains("flbr-lan"), "a network keeps its bridge");
    lab.manager.delete_network("lan").await.unwrap();
    let links = lab.ip("-o link show");
    assert!(!links.contains("flbr-lan") && !links.contains("fl-"), "{links}");
    assert!(lab.manager.list_networks().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_bridge_of_the_host_is_used_and_never_changed() {
    let mut lab = Lab::bare().await;
    lab.own_network();
    lab.ip("link add br0 type bridge");
    lab.ip("address add 10.9.0.1/24 dev br0");
    lab.start_daemon().await;
    let before = lab.ip("-d address show br0");
    define(&lab, "office", json!({"bridge": "br0", "addresses": ["10.9.0.1/24"]}), false).await.unwrap();
    let missing = refused(&lab, "office", json!({"bridge": "br0", "addresses": ["10.9.1.1/24"]}), true).await;
    assert_eq!(missing, "NetworkFailed");
    assert_eq!(refused(&lab, "office", json!({"bridge": "br0", "mtu": 9000}), true).await, "NetworkFailed");
    lab.define("web", json!({"nics": [{"network": "office"}]})).await.unwrap();
    assert!(lab.ip("link show master br0").contains("fl-web-0"));
    // Another bridge, once nobody needs the old one.
    assert_eq!(refused(&lab, "office", json!({"bridge": "br1"}), true).await, "InvalidState");
    lab.manager.undefine_vm("web", none()).await.unwrap();
    define(&lab, "office", json!({"bridge": "br1"}), true).await.unwrap();
    assert_eq!(network(&lab, "office").await.bridge().await.unwrap(), "br1");
    lab.manager.delete_network("office").await.unwrap();
    let links = lab.ip("-o link show");
    assert!(links.contains("br0") && !links.contains("br1"), "{links}");
    // Its state apart, which a port that came and went may change.
    let stable =
        |text: &str| text.lines().filter(|line| line.contains("inet ")).collect::<Vec<_>>().join("\n");
    assert_eq!(stable(&lab.ip("-d address show br0")), stable(&before));
}
