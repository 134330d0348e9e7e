//! Hot-plug without end: what a VMM holds must not grow with the number of disks that have come and gone. Also its monitors: on a
//! socket of their own and on a character device. On this machine's own `/dev/kvm`; where there is none, on a test host.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use tests::host::Host;
use tests::qmp::Qmp;
use tests::scenario::{Outcome, SOON, Vmm, check, guest_program, program};

const ROUNDS: u32 = 500;

/// Where the VMs run, and `flotilla-vmm` and the guest there.
fn place(name: &str) -> Outcome<(Host, String, String)> {
    let (vmm, guest) = (program("flotilla-vmm")?, guest_program()?);
    if Path::new("/dev/kvm").exists() {
        return Ok((Host::here(), vmm.display().to_string(), guest.display().to_string()));
    }
    let host = Host::start(name)?;
    host.push(&vmm, "/usr/bin/flotilla-vmm")?;
    host.push(&guest, "/root/guest.elf")?;
    Ok((host, "/usr/bin/flotilla-vmm".into(), "/root/guest.elf".into()))
}

fn plug(qmp: &mut Qmp, image: &str) -> Outcome {
    let file = json!({ "driver": "file", "filename": image });
    let node = json!({ "node-name": "disk", "file": file, "cache": { "direct": false } });
    qmp.execute("blockdev-add", &node, SOON)?;
    qmp.execute("device_add", &json!({ "id": "disk", "driver": "virtio-blk-mmio", "addr": "0x1" }), SOON)?;
    qmp.execute("device_del", &json!({ "id": "disk" }), SOON)?;
    Ok(())
}

#[test]
fn five_hundred_rounds_leave_nothing_behind() -> Outcome {
    let (host, program, guest) = place("plug")?;
    let arguments = format!("-machine microvm -m 256M -kernel {guest} -serial file,path={{dir}}/serial");
    let vmm = Vmm::start_as(&host, &program, &format!("plug-{}", std::process::id()), &arguments)?;
    let image = vmm.path("image");
    host.ok(&format!("truncate -s 16M {image}"))?;
    let mut qmp = vmm.qmp()?;
    let held = || -> Outcome<(u64, u64)> {
        let pid = format!("$(cat {})", vmm.path("pid"));
        let fds = host.ok(&format!("ls /proc/{pid}/fd | wc -l"))?.trim().parse()?;
        let threads = host.ok(&format!("ls /proc/{pid}/task | wc -l"))?.trim().parse()?;
        Ok((fds, threads))
    };
    for _ in 0..5 {
        plug(&mut qmp, &image)?;
    }
    let before = held()?;
    for _ in 0..ROUNDS {
        plug(&mut qmp, &image)?;
    }
    let after = held()?;
    check(before == after, || format!("descriptors and threads: {before:?} before, {after:?} after"))?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

#[test]
fn qmp_works_on_a_character_device_too() -> Outcome {
    let (host, program, guest) = place("monitors")?;
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
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}
