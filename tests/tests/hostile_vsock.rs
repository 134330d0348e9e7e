//! A hostile guest and its vsock device on a test host: few developers' machines have /dev/vhost-vsock. The kernel serves the
//! rings, so this is also about what it says of them, and about the VMM that has to hear it.

use tests::host::Host;
use tests::hostile::{held, run_all, vsock};
use tests::scenario::{Outcome, SOON, Vmm, check, guest_program, program, step};

#[test]
fn no_misuse_of_vsock_hurts_the_vmm_or_its_neighbours() -> Outcome {
    let (vmm, guest) = (program("flotilla-vmm")?, guest_program()?);
    step("start a host");
    let host = Host::start("hostile-vsock")?;
    host.push(&vmm, "/usr/bin/flotilla-vmm")?;
    host.push(&guest, "/root/guest.elf")?;
    host.ok("truncate -s 1M /root/a && head -c 1M /dev/urandom > /root/b")?;
    let device = vsock(&host, 77);
    check(!device.is_empty(), || "a Debian kernel has vhost_vsock".into())?;
    let disk = |id: &str| {
        format!("-drive file=/root/{id},id={id},readonly=off -device virtio-blk-device,drive={id},id={id}")
    };
    let arguments = format!(
        "-machine microvm -m 256M -kernel /root/guest.elf -serial socket,path={{dir}}/console.sock,server,nowait {} {} {device}",
        disk("a"),
        disk("b")
    );
    let vmm = Vmm::start_as(&host, "/usr/bin/flotilla-vmm", "hostile-vsock", &arguments)?;
    let mut console = vmm.console()?;
    console.expect("is up.", SOON)?;
    step("all cases");
    let targets = ["vsock-tx", "vsock-rx"];
    let count = run_all(&mut console, "vsock", &targets)?;
    let first = held(&host, &vmm)?;
    step("half of them once more");
    run_all(&mut console, "vsock-rx", &targets[1..])?;
    let second = held(&host, &vmm)?;
    second.no_more_than(&first)?;
    let mut qmp = vmm.qmp()?;
    let status = qmp.ask("query-status")?;
    check(status["running"] == true, || status.to_string())?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    println!("{count} cases; {first:?}, then {second:?}");
    Ok(())
}
