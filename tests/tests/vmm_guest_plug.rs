//! Hot-plug without end: what a VMM holds must not grow with the number of disks and NICs that have come and gone. Also its monitors:
//! on a socket of their own and on a character device; and `flotilla disk` and `flotilla nic`, from the command to the guest. On this machine's own `/dev/kvm`; where there is none, on a test host.
//! (`vmm_rounds` does the same with Debian under load.)

use std::time::Duration;

use serde_json::json;

use tests::console::Console;
use tests::host::Host;
use tests::own_daemon::OwnDaemon;
use tests::qmp::Qmp;
use tests::scenario::{Outcome, SOON, Vmm, check, here_or_on_a_host};

const ROUNDS: u32 = 500;
/// In a network of the VM's own.
const TAP: &str = "plug0";
/// Kibibytes by which the VMM's own memory may grow: half a kibibyte a round would be more.
const SLACK: u64 = 200;

fn plug(qmp: &mut Qmp, image: &str) -> Outcome {
    let file = json!({ "driver": "file", "filename": image });
    let node = json!({ "node-name": "disk", "file": file, "cache": { "direct": false } });
    qmp.execute("blockdev-add", &node, SOON)?;
    qmp.execute("device_add", &json!({ "id": "disk", "driver": "virtio-blk-mmio", "addr": "0x1" }), SOON)?;
    qmp.execute("netdev_add", &json!({ "id": "nic", "ifname": TAP }), SOON)?;
    let nic = json!({ "id": "nic", "driver": "virtio-net-mmio", "netdev": "nic", "addr": "0x1" });
    qmp.execute("device_add", &nic, SOON)?;
    qmp.execute("device_del", &json!({ "id": "nic" }), SOON)?;
    qmp.execute("device_del", &json!({ "id": "disk" }), SOON)?;
    Ok(())
}

/// Descriptors and threads of a VMM; kibibytes of memory that are its own, not the guest's.
fn held(host: &Host, vmm: &Vmm<'_>) -> Outcome<([u64; 2], u64)> {
    let text = host.ok(&format!(
        "cd /proc/$(cat {}) && ls fd | wc -l && ls task | wc -l && \
         awk '/^Size:/ {{ guest = $2 >= 131072 }} /^Rss:/ && !guest {{ rss += $2 }} END {{ print rss }}' smaps",
        vmm.path("pid")
    ))?;
    let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [descriptors, threads, memory] = numbers[..] else { return Err(text.into()) };
    Ok(([descriptors, threads], memory))
}

#[test]
fn five_hundred_rounds_leave_nothing_behind() -> Outcome {
    let (host, program, guest) = here_or_on_a_host("plug")?;
    let arguments = format!("-machine microvm -m 256M -kernel {guest} -serial file,path={{dir}}/serial");
    let in_a_network =
        format!("unshare -n sh -c \"ip tuntap add {TAP} mode tap && exec {program} \\\"\\$@\\\"\" vmm");
    let vmm = Vmm::start_as(&host, &in_a_network, &format!("plug-{}", std::process::id()), &arguments)?;
    let image = vmm.path("image");
    host.ok(&format!("truncate -s 16M {image}"))?;
    let mut qmp = vmm.qmp()?;
    for _ in 0..20 {
        plug(&mut qmp, &image)?;
    }
    let (before, memory) = held(&host, &vmm)?;
    for _ in 0..ROUNDS {
        plug(&mut qmp, &image)?;
    }
    let (after, memory_after) = held(&host, &vmm)?;
    check(before == after, || format!("descriptors and threads: {before:?} before, {after:?} after"))?;
    check(memory_after <= memory + SLACK, || format!("memory: {memory} KiB before, {memory_after} after"))?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

#[test]
fn qmp_works_on_a_character_device_too() -> Outcome {
    let (host, program, guest) = here_or_on_a_host("monitors")?;
    let arguments = format!(
        "-machine microvm -m 256M -kernel {guest} -serial file,path={{dir}}/serial \
         -chardev socket,id=more,path={{dir}}/more.sock,server,nowait -mon chardev=more,id=m,mode=control"
    );
    let vmm = Vmm::start_as(&host, &program, &format!("mon-{}", std::process::id()), &arguments)?;
    let mut first = vmm.qmp()?;
    let mut second = Qmp::new(host.dial(&vmm.path("more.sock"))?, SOON)?;
    second.ask("stop")?;
    first.wait(Duration::from_secs(10), |name, _| name == "STOP")?;
    first.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    drop(vmm);

    // Without nowait there is no machine before the first client.
    let waits =
        |vmm: &Vmm<'_>| host.eventually(SOON, &format!("grep 'waiting for a client' {}", vmm.path("out")));
    let arguments = arguments.replace(",server,nowait -mon", ",server -mon");
    let vmm = Vmm::start_as(&host, &program, &format!("mon-{}", std::process::id()), &arguments)?;
    waits(&vmm)?;
    let mut second = Qmp::new(host.dial(&vmm.path("more.sock"))?, SOON)?;
    second.ask("query-status")?;
    vmm.qmp()?.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    drop(vmm);

    let vmm = Vmm::start_as(&host, &program, &format!("mon-{}", std::process::id()), &arguments)?;
    waits(&vmm)?;
    host.ok(&format!("kill -TERM $(cat {})", vmm.path("pid")))?;
    check(vmm.exit(SOON)? == 0, || "a signal is no failure".into())?;
    host.ok(&format!("test ! -e {}", vmm.path("more.sock")))?;
    Ok(())
}

/// Rounds of coming and going through the daemon: what it and the VMM have open does not grow.
const FLEET_ROUNDS: u32 = 10;

/// Types a command of the guest and waits for each of the answers, in order.
fn guest(console: &mut Console, command: &str, answers: &[&str]) -> Outcome {
    console.enter(command)?;
    for answer in answers {
        console.expect(answer, SOON)?;
    }
    Ok(())
}

/// Descriptors that the daemon and a VM's VMM have open.
fn open_files(daemon: &OwnDaemon, vmm: &str) -> Outcome<String> {
    let pid = daemon.path("pid");
    Ok(daemon.host().ok(&format!("ls /proc/$(cat {pid})/fd | wc -l; ls /proc/{vmm}/fd | wc -l"))?)
}

#[test]
fn the_fleet_gives_a_guest_disks_and_cards_and_takes_them_back() -> Outcome {
    let daemon = OwnDaemon::start("fleet-plug")?;
    daemon.flotilla("network define lan --address 10.78.0.1/24")?;
    let mut console = daemon.run("web", &json!({}))?;
    let (raw, qcow2) = (daemon.path("d.img"), daemon.path("q.qcow2"));
    daemon.host().ok(&format!("truncate -s 16M {raw}"))?;
    let made = tempfile::NamedTempFile::new()?;
    let mut make = std::process::Command::new("qemu-img");
    let output = make.args(["create", "-q", "-f", "qcow2"]).arg(made.path()).arg("32M").output()?;
    check(output.status.success(), || String::from_utf8_lossy(&output.stderr).into_owned())?;
    daemon.host().push(made.path(), &qcow2)?;

    // The VMM opens none of it: each is opened by the daemon and handed over.
    daemon.flotilla(&format!("disk add web {raw},serial=S1"))?;
    daemon.flotilla(&format!("disk add web {qcow2},format=qcow2,discard"))?;
    guest(&mut console, "devices", &["vda 16 MiB", "vdb 32 MiB", "vdc empty"])?;
    for disk in ["vda", "vdb"] {
        guest(&mut console, &format!("disk {disk} write 5 1000 7"), &["write 1000 sectors"])?;
        guest(&mut console, &format!("disk {disk} flush"), &["disk: flush"])?;
        guest(&mut console, &format!("disk {disk} check 5 1000 7"), &["check 1000 sectors"])?;
    }
    daemon.flotilla("nic add web --network lan --mac 52:54:00:00:00:0a")?;
    daemon.flotilla("nic add web --network lan")?;
    guest(&mut console, "devices", &["eth0 52:54:00:00:00:0a at", "eth1 52:54:00"])?;
    guest(&mut console, "net up 10.78.0.2/24", &["net: 10.78.0.2/24"])?;
    guest(&mut console, "net ping 10.78.0.1 3", &["net: 3 of 3 answered"])?;
    daemon.in_its_network("ping -c 1 -W 10 10.78.0.2")?;

    // There is no third place for a card, and what is no image is no disk: nothing of either stays.
    let refused = daemon.refused("nic add web --network lan")?;
    check(refused.contains("all 2 places"), || refused.clone())?;
    let refused = daemon.refused(&format!("disk add web {raw}.none"))?;
    check(refused.contains("no such file"), || refused.clone())?;
    let bad = daemon.path("web.json");
    let refused = daemon.refused(&format!("disk add web {bad},format=qcow2"))?;
    check(refused.contains("qcow2"), || refused.clone())?;

    for device in ["disk rm web disk1", "nic rm web nic0", "disk rm web disk0", "nic rm web nic1"] {
        daemon.flotilla(device)?;
    }
    let gone = ["vda empty", "vdb empty", "eth0 52:54:00:00:00:0a no link", "eth1 52:54:00"];
    guest(&mut console, "devices", &gone)?;
    for list in ["disk list web", "nic list web"] {
        let left = daemon.json(list)?;
        check(left.as_array().is_some_and(Vec::is_empty), || left.to_string())?;
    }
    let links = daemon.in_its_network("ip -o link show")?;
    check(!links.contains("fl-web"), || links.clone())?;
    let pid = daemon.json("show web")?["pid"].to_string();
    let held = daemon.host().ok(&format!("ls -l /proc/{pid}/fd"))?;
    check(!held.contains(&raw) && !held.contains(&qcow2), || held.clone())?;

    let before = open_files(&daemon, &pid)?;
    for _ in 0..FLEET_ROUNDS {
        daemon.flotilla(&format!("disk add web {raw}"))?;
        daemon.flotilla("nic add web --network lan")?;
        daemon.flotilla("nic rm web nic0")?;
        daemon.flotilla("disk rm web disk0")?;
    }
    let after = open_files(&daemon, &pid)?;
    check(before == after, || format!("descriptors: {before:?} before, {after:?} after"))?;

    // What was written is in the image, for the next one who has it.
    daemon.flotilla(&format!("disk add web {qcow2},format=qcow2 --persist"))?;
    guest(&mut console, "disk vda check 5 1000 7", &["check 1000 sectors"])?;
    daemon.flotilla("stop --now web")?;
    let spec = daemon.json("show web")?["spec"].to_string();
    check(spec.contains("q.qcow2"), || spec.clone())
}
