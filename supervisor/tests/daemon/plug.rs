//! Devices that come and go while a VM runs: on real links, with a VMM that is none; what fails is undone, and the next daemon knows.

use std::collections::HashMap;

use crate::lab::{Lab, name_of, none};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use zbus::Variant;

/// What the VMM was asked that is no question, in order: the commands, with what of their arguments matters.
fn heard(lab: &Lab, name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(lab.path(&format!("run/vm/{name}/qmp.sock.heard"))).unwrap();
    let requests = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let shown = requests.filter_map(|request| {
        let command = request["execute"].as_str().unwrap().to_owned();
        let arguments = &request["arguments"];
        let id =
            arguments["id"].as_str().or(arguments["node-name"].as_str()).or(arguments["fdname"].as_str());
        (!command.starts_with("q")).then(|| format!("{command} {}", id.unwrap_or_default()))
    });
    shown.collect()
}

fn persist<'a>() -> dbus_api::proxy::Options<'a> {
    HashMap::from([("persist", Variant::from(true))])
}

fn patience<'a>(usec: u64) -> dbus_api::proxy::Options<'a> {
    HashMap::from([("timeout_usec", Variant::from(usec))])
}

async fn lab() -> Lab {
    let mut lab = Lab::bare().await;
    lab.own_network();
    lab.start_daemon().await;
    lab.manager.define_network("lan", "{}", none()).await.unwrap();
    lab
}

#[tokio::test]
async fn cards_and_disks_come_and_go() {
    let lab = lab().await;
    let disk = lab.path("disk.img");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    lab.define("web", json!({"nics": [{"network": "lan"}]})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let (id, job) = lab.attach_nic("web", json!({"network": "lan"}), none()).await.unwrap();
    assert_eq!((id.as_str(), job), ("nic1", Ok(())));
    assert!(lab.ip("link show master flbr-lan").contains("fl-web-1"));
    let nics = vm.network_interfaces().await.unwrap();
    assert_eq!((nics.len(), nics[1].1.as_str(), nics[1].3.as_str()), (2, "fl-web-1", "lan"));
    assert_eq!(vm.added_devices().await.unwrap(), ["nic1"]);
    let (id, job) = lab.attach_disk("web", json!({"path": disk, "serial": "S"}), persist()).await.unwrap();
    assert_eq!((id.as_str(), job), ("disk0", Ok(())));
    assert_eq!(vm.disks().await.unwrap()[0].0, "disk0");
    // Written down, and nothing else is to be done for it to hold.
    assert!(vm.spec().await.unwrap().contains("disk.img"));
    assert_eq!(vm.generation().await.unwrap(), vm.applied_generation().await.unwrap());
    assert_eq!(vm.added_devices().await.unwrap(), ["nic1"]);
    assert_eq!(
        heard(&lab, "web"),
        [
            "getfd flotilla-nic1",
            "netdev_add nic1",
            "device_add nic1",
            "getfd flotilla-disk0",
            "blockdev-add disk0",
            "device_add disk0"
        ]
    );
    // A network with a card on it stays.
    assert_eq!(name_of(&lab.manager.delete_network("lan").await.unwrap_err()), "InvalidState");

    // No more room, no such device, not twice, and no nonsense.
    let refused = async |nic: Value| {
        name_of(&lab.manager.attach_nic("web", &nic.to_string(), none()).await.unwrap_err())
    };
    assert_eq!(refused(json!({"network": "lan"})).await, "ResourceExhausted");
    assert_eq!(refused(json!({"network": "lan", "number": 1})).await, "InvalidSpec");
    assert_eq!(refused(json!({"netwrok": "lan"})).await, "InvalidSpec");
    assert_eq!(refused(json!([])).await, "InvalidSpec");
    let twice = lab.manager.attach_disk("web", &json!({"path": disk}).to_string(), none()).await.unwrap_err();
    assert_eq!(name_of(&twice), "InvalidSpec");
    for id in ["nic7", "disk0", "", "nic", "../nic1"] {
        let error = lab.manager.detach_nic("web", id, none()).await.unwrap_err();
        assert_eq!(name_of(&error), "InvalidSpec", "{id}");
    }

    lab.job(lab.manager.detach_nic("web", "nic1", none())).await.unwrap();
    assert!(!lab.ip("-o link show").contains("fl-web-1"));
    assert_eq!(
        (vm.network_interfaces().await.unwrap().len(), vm.added_devices().await.unwrap().len()),
        (1, 0)
    );
    lab.job(vm.detach_disk("disk0", persist())).await.unwrap();
    assert!(!vm.spec().await.unwrap().contains("disk.img"));
    assert!(vm.disks().await.unwrap().is_empty() && vm.removed_devices().await.unwrap().is_empty());
    assert_eq!(
        heard(&lab, "web")[6..],
        ["device_del nic1", "netdev_del nic1", "device_del disk0", "blockdev-del disk0"]
    );
}

#[tokio::test]
async fn a_definition_changes_without_a_vm() {
    let lab = lab().await;
    lab.define("web", json!({"nics": [{"network": "lan"}, {"network": "lan"}]})).await.unwrap();
    let vm = lab.vm("web").await;
    let mac = vm.network_interfaces().await.unwrap()[1].2.clone();
    let error = lab.manager.detach_nic("web", "nic0", none()).await.unwrap_err();
    assert_eq!(name_of(&error), "InvalidState");
    lab.job(lab.manager.detach_nic("web", "nic0", persist())).await.unwrap();
    // The other one stays what it was.
    let nics = vm.network_interfaces().await.unwrap();
    assert_eq!((nics.len(), nics[0].0.as_str(), &nics[0].2), (1, "nic1", &mac));
    assert!(!lab.ip("-o link show").contains("fl-web-0"));
    lab.start("web").await.unwrap();
    assert!(vm.command_line().await.unwrap().join(" ").contains("ifname=fl-web-1"));
    let (id, job) = lab.attach_nic("web", json!({"network": "lan"}), persist()).await.unwrap();
    assert_eq!((id.as_str(), job), ("nic0", Ok(())));
}

#[tokio::test]
async fn what_fails_is_undone() {
    let lab = lab().await;
    lab.define("web", json!({"append": "fake=refuse"})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let before = lab.ip("-o link show").lines().count();
    let (_, job) = lab.attach_nic("web", json!({"network": "lan"}), persist()).await.unwrap();
    assert!(job.unwrap_err().contains("no room"));
    let (_, job) = lab.attach_disk("web", json!({"path": "/nowhere/x.img"}), none()).await.unwrap();
    assert!(job.unwrap_err().contains("no such file"));
    let (_, job) = lab.attach_nic("web", json!({"network": "nowhere"}), none()).await.unwrap();
    assert!(job.unwrap_err().contains("nowhere"));
    assert_eq!(lab.ip("-o link show").lines().count(), before, "{}", lab.ip("-o link show"));
    assert!(vm.network_interfaces().await.unwrap().is_empty() && !vm.spec().await.unwrap().contains("lan"));
    assert_eq!(
        heard(&lab, "web"),
        ["getfd flotilla-nic0", "netdev_add nic0", "device_add nic0", "netdev_del nic0"]
    );
}

#[tokio::test]
async fn a_guest_that_keeps_a_card_lets_go_of_it_later() {
    let mut lab = lab().await;
    lab.define("web", json!({"append": "fake=keep"})).await.unwrap();
    lab.start("web").await.unwrap();
    let job = lab.attach_nic("web", json!({"network": "lan"}), none()).await.unwrap().1;
    assert_eq!(job, Ok(()));
    let error = lab.job(lab.manager.detach_nic("web", "nic0", patience(50_000))).await.unwrap_err();
    assert!(error.starts_with("QmpTimeout") && error.contains("let go"), "{error}");
    assert!(lab.ip("-o link show").contains("fl-web-0"), "the guest uses it still");
    // The next daemon knows that it is to go.
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    lab.until_responsive("web").await;
    lab.qmp("web").await.ask_with("x-let-go", json!({"id": "nic0"})).await;
    lab.settle(async || !lab.ip("-o link show").contains("fl-web-0")).await;
    // Its number is free as soon as nothing of it is left.
    let again = json!({"network": "lan", "number": 0});
    lab.settle(async || lab.attach_nic("web", again.clone(), none()).await.is_ok_and(|(_, job)| job.is_ok()))
        .await;
    assert!(lab.ip("-o link show").contains("fl-web-0"), "nobody takes the next one's tap");
    // With its process everything goes that was not written down.
    lab.job(lab.manager.power_off_vm("web", none())).await.unwrap();
    lab.settle(async || !lab.ip("-o link show").contains("fl-web-0")).await;
}

#[tokio::test]
async fn a_client_of_the_socket_names_a_tap_and_finds_it_made() {
    let mut lab = lab().await;
    lab.define("web", json!({"nics": [{"network": "lan"}]})).await.unwrap();
    lab.start("web").await.unwrap();
    let add = |id: &str, name: &str| json!({"type": "tap", "id": id, "ifname": name});
    let mut qmp = lab.qmp("web").await;
    for (id, name) in [("n7", "tap7"), ("n3", "fl-web-3")] {
        let answer = qmp.ask_with("netdev_add", add(id, name)).await;
        assert!(answer["return"].is_object(), "{answer}");
        assert!(lab.ip("link show master flbr-lan").contains(name), "{name}");
        let heard = heard(&lab, "web");
        assert_eq!(heard[heard.len() - 2..], [format!("getfd flotilla-{name}"), format!("netdev_add {id}")]);
    }
    // By a single command as well.
    let command = json!({"execute": "netdev_add", "arguments": add("n8", "tap8")}).to_string();
    lab.vm("web").await.qmp_command(&command, none()).await.unwrap();
    assert!(lab.ip("link show master flbr-lan").contains("tap8"));
    for (id, name, word) in [
        ("n9", "fl-db-0", "no tap of VM"),
        ("n9", "lo", "lo"),
        ("n9", "flbr-lan", "no tap of VM"),
        ("n9", "a/b", "ifname"),
        ("n7", "tap9", "has the tap tap7"),
    ] {
        let answer = qmp.ask_with("netdev_add", add(id, name)).await;
        assert!(answer["error"]["desc"].as_str().is_some_and(|desc| desc.contains(word)), "{name}: {answer}");
    }
    assert!(lab.ip("link show lo").contains("lo") && !lab.ip("link").contains("tap9"));
    // A card that comes later has another number.
    lab.manager.define_network("other", "{}", none()).await.unwrap();
    let (id, job) = lab
        .attach_nic("web", json!({"network": "other", "number": 3}), none())
        .await
        .unwrap_or_else(|error| (name_of(&error), Ok(())));
    assert_eq!((id.as_str(), job), ("InvalidSpec", Ok(())));

    assert!(qmp.ask_with("netdev_del", json!({"id": "n7"})).await["return"].is_object());
    lab.settle(async || !lab.ip("link").contains("tap7")).await;
    // Another daemon knows which taps are whose, and they go with the process.
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    lab.until_responsive("web").await;
    let mut qmp = lab.qmp("web").await;
    assert!(qmp.ask_with("netdev_del", json!({"id": "n3"})).await["return"].is_object());
    lab.settle(async || !lab.ip("link").contains("fl-web-3")).await;
    assert!(lab.ip("link").contains("tap8"));
    lab.job(lab.manager.power_off_vm("web", none())).await.unwrap();
    lab.settle(async || !lab.ip("link").contains("tap8")).await;
    assert!(lab.ip("link").contains("fl-web-0"), "that of the definition stays");
}

#[tokio::test]
async fn a_tap_that_the_vmm_refuses_is_taken_back() {
    let lab = lab().await;
    let members = json!({"nics": [{"network": "lan"}], "append": "fake=netless"});
    lab.define("web", members).await.unwrap();
    lab.start("web").await.unwrap();
    let mut qmp = lab.qmp("web").await;
    let tap = json!({"type": "tap", "id": "n7", "ifname": "tap7"});
    assert_eq!(qmp.ask_with("netdev_add", tap).await["error"]["desc"], "no tap");
    lab.settle(async || !lab.ip("link").contains("tap7")).await;
    // A VM without a card has no network to put it on.
    lab.define("bare", json!({})).await.unwrap();
    lab.start("bare").await.unwrap();
    let mut qmp = lab.qmp("bare").await;
    let answer = qmp.ask_with("netdev_add", json!({"type": "tap", "id": "n7", "ifname": "tap7"})).await;
    assert!(answer["error"]["desc"].as_str().unwrap().contains("AttachNic"), "{answer}");
}
