//! Hot-plug without end: what a VMM holds must not grow with the number of disks and NICs that have come and gone. Also its monitors:
//! on a socket of their own and on a character device. On this machine's own `/dev/kvm`; where there is none, on a test host.
//! (`vmm_rounds` does the same with Debian under load.)

use std::time::Duration;

use serde_json::json;

use tests::host::Host;
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
