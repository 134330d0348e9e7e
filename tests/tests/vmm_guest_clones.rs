//! `flotilla template` and `flotilla clone`, from the command to the guest, under the real VMM with its sandbox on: VMs that go on where their template
//! was, each with an identity of its own. On this machine's own `/dev/kvm`; where there is none, on a test host.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use tests::console::Console;
use tests::own_daemon::OwnDaemon;
use tests::scenario::{Outcome, SOON, check};

/// Types a command of the guest and waits for the answer.
fn guest(console: &mut Console, command: &str, answer: &str) -> Outcome {
    console.enter(command)?;
    console.expect(answer, SOON)?;
    Ok(())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[test]
fn clones_of_a_running_vm_go_on_as_vms_of_their_own() -> Outcome {
    let daemon = OwnDaemon::start("clones")?;
    daemon.flotilla("network define lan --address 10.79.0.1/24")?;
    let (disk, second) = (daemon.path("disk.img"), daemon.path("second.img"));
    daemon.host().ok(&format!("truncate -s 16M {disk} {second}"))?;
    let members =
        json!({ "cpus": 2, "disks": [{ "path": disk }], "nics": [{ "network": "lan" }], "rng": true });
    let mut console = daemon.run("web", &members)?;
    // A disk that came while it ran, and is in the definition, is a part of the template.
    daemon.flotilla(&format!("disk add web {second} --persist"))?;
    guest(&mut console, "touch 20", "touch: 5120 pages")?;
    guest(&mut console, "disk vda write 0 200 7", "write 200 sectors")?;
    guest(&mut console, "disk vdb write 0 200 8", "write 200 sectors")?;
    // In the middle of this it becomes a template.
    guest(&mut console, "spin 8000", "spin 8000")?;
    let made = daemon.flotilla("template create web base --description warm")?;
    check(made.contains("template base made of web"), || made.clone())?;
    daemon.flotilla("template verify base")?;
    console.expect("rounds", SOON)?;
    guest(&mut console, "disk vda write 0 200 9", "write 200 sectors")?;
    let shown = daemon.json("template show base")?;
    check(text(&shown, "description") == "warm" && text(&shown, "vm") == "web", || shown.to_string())?;

    let clones = daemon.json("clone base --count 3 --name c-%")?;
    let clones = clones.as_array().cloned().unwrap_or_default();
    let names: Vec<&str> = clones.iter().map(|clone| text(clone, "name")).collect();
    check(names == ["c-1", "c-2", "c-3"], || format!("{clones:?}"))?;
    let mut identities = BTreeSet::from([daemon.json("nic list web")?[0]["mac"].to_string()]);
    for clone in &clones {
        check(text(clone, "state") == "running", || clone.to_string())?;
        identities.insert(text(clone, "uuid").to_owned());
        let name = text(clone, "name");
        let mac = daemon.json(&format!("nic list {name}"))?[0]["mac"].as_str().unwrap_or_default().to_owned();
        let mut console = daemon.console(name)?;
        console.expect("rounds", SOON)?;
        guest(&mut console, "disk vda check 0 200 7", "200 sectors as written")?;
        guest(&mut console, "disk vdb check 0 200 8", "200 sectors as written")?;
        guest(&mut console, "disk vda write 0 200 1", "write 200 sectors")?;
        // Its card is another one, and the disk with its identity has come.
        guest(&mut console, "devices", "disk    vdc ")?;
        console.expect(&format!("eth0 {mac}"), SOON)?;
        let disks = daemon.json(&format!("disk list {name}"))?;
        let seed = text(&disks[2], "path").to_owned();
        daemon
            .host()
            .ok(&format!("grep -a '\"local-hostname\": \"{name}\"' {seed} && grep -aq {mac} {seed}"))?;
        identities.insert(mac);
    }
    check(identities.len() == 7, || format!("{identities:?}"))?;
    // None of them has written to another one's disk, or to the template's.
    guest(&mut console, "disk vda check 0 200 9", "200 sectors as written")?;
    daemon.flotilla("template verify base")?;
    let refused = daemon.refused("template rm base")?;
    check(refused.contains("needed by c-1, c-2, c-3"), || refused.clone())?;

    // A clone is a VM like any other: it stops, it boots, a template is made of it, and that one is cloned.
    daemon.flotilla("stop --now c-1")?;
    daemon.flotilla("start c-1")?;
    daemon.console("c-1")?.expect("is up.", SOON)?;
    daemon.flotilla("template create c-2 again --after stop")?;
    let state = daemon.json("show c-2")?;
    check(text(&state, "state") == "stopped", || state.to_string())?;
    daemon.flotilla("clone again --name last")?;
    guest(&mut daemon.console("last")?, "disk vda check 0 200 1", "200 sectors as written")?;
    let taken = daemon.refused("clone again --name last")?;
    check(taken.contains("is defined already"), || taken.clone())?;

    daemon.flotilla("rm --force last c-1 c-2 c-3")?;
    daemon.flotilla("template rm again base")?;
    let state = daemon.path("state");
    let left = daemon.host().ok(&format!("ls {state}/templates {state}/clones"))?;
    check(left.lines().all(|line| line.is_empty() || line.ends_with(':')), || left.clone())?;
    let links = daemon.in_its_network("ip -o link show")?;
    check(links.contains("fl-web-0") && !links.contains("fl-c-") && !links.contains("fl-last"), || {
        links.clone()
    })
}

/// The default guest does not look behind root ports, so it is the VMM that tells of the disks.
#[test]
fn a_q35_is_cloned_and_its_identity_comes_while_it_runs() -> Outcome {
    let daemon = OwnDaemon::start("q35-clones")?;
    daemon.flotilla("network define lan --address 10.78.0.1/24")?;
    let disk = daemon.path("disk.img");
    daemon.host().ok(&format!("truncate -s 16M {disk}"))?;
    let members = json!({ "machine": "q35", "append": "pci", "disks": [{ "path": disk }], "nics": [{ "network": "lan" }], "rng": true });
    let mut console = daemon.run("web", &members)?;
    // In the middle of this it becomes a template.
    guest(&mut console, "spin 4000", "spin 4000")?;
    daemon.flotilla("template create web base")?;
    console.expect("rounds", SOON)?;
    daemon.flotilla("clone base --count 2 --name c-%")?;
    let has_seed = |name: &str| -> Outcome {
        let disks = daemon.json(&format!("disk list {name}"))?;
        check(disks.as_array().is_some_and(|disks| disks.len() == 2), || disks.to_string())?;
        let seed = text(&disks[1], "path");
        daemon.host().ok(&format!("grep -a '\"local-hostname\": \"{name}\"' {seed}"))?;
        let list = json!({ "execute": "qom-list", "arguments": { "path": "/machine/peripheral" } });
        let list = daemon.flotilla(&format!("qmp {name} '{list}'"))?;
        check(["disk0", "disk1", "nic0"].iter().all(|id| list.contains(id)), || list.clone())
    };
    for name in ["c-1", "c-2"] {
        let mut console = daemon.console(name)?;
        console.expect("rounds", SOON)?;
        guest(&mut console, "echo on''ward", "on''ward")?;
        has_seed(name)?;
    }
    // Its next start has the seed from the beginning; before that a clone of it would have its devices elsewhere.
    let refused = daemon.refused("template create c-1 again")?;
    check(refused.contains("restart it first"), || refused.clone())?;
    daemon.flotilla("stop --now c-1")?;
    daemon.flotilla("start c-1")?;
    daemon.console("c-1")?.expect("is up.", SOON)?;
    daemon.flotilla("template create c-1 again --after stop")?;
    daemon.flotilla("clone again --name last")?;
    guest(&mut daemon.console("last")?, "echo on''ward", "on''ward")?;
    has_seed("last")?;
    daemon.flotilla("rm --force last c-1 c-2")?;
    daemon.flotilla("template rm again base")?;
    Ok(())
}
