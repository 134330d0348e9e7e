//! One `flotilla-vmm` with a hostile guest: the default guest's `hostile` command misuses every virtio device, case by case, on this
//! machine's own `/dev/kvm`; where there is none, on a test host. The table of cases and of what each may end in is the guest's; here
//! the VMM is watched from outside.

use std::path::Path;

use tests::host::Host;
use tests::hostile::{Net, held, run_all, vsock};
use tests::scenario::{Outcome, SOON, Vmm, check, guest_program, program};

/// Queues whose cases have to have run.
const TARGETS: [&str; 16] = [
    "board",
    "blk",
    "blk-second",
    "net-tx",
    "net-rx",
    "net-control",
    "console-tx",
    "console-rx",
    "serial-control-rx",
    "serial-control-tx",
    "serial-port-tx",
    "rng",
    "balloon-inflate",
    "balloon-deflate",
    "balloon-stats",
    "balloon-reporting",
];
/// Where the console's client connects to, in the VMM's own network.
const PORT: u16 = 4321;
/// Lines that the VMM may log, however often the guest misbehaves.
const LINES: u64 = 200;

#[test]
fn no_misuse_of_a_device_hurts_the_vmm_or_its_neighbours() -> Outcome {
    let (vmm, guest) = (program("flotilla-vmm")?, guest_program()?);
    let here = Path::new("/dev/kvm").exists();
    let host = if here { Host::here() } else { Host::start("vmm-hostile")? };
    let (mut program, mut kernel) = (vmm.display().to_string(), guest.display().to_string());
    if !here {
        host.push(&vmm, "/usr/bin/flotilla-vmm")?;
        host.push(&guest, "/root/guest.elf")?;
        (program, kernel) = ("/usr/bin/flotilla-vmm".into(), "/root/guest.elf".into());
    }
    let net = Net::new(&host)?;
    let images = format!("/var/tmp/flotilla-{}", net.name);
    host.ok(&format!(
        "mkdir -p /var/tmp && truncate -s 16M {images}.a && head -c 1M /dev/urandom > {images}.b"
    ))?;
    let disk = |id: &str| {
        format!(
            "-drive file={images}.{id},id={id},readonly=off,discard=unmap -device virtio-blk-device,drive={id},id={id},num-queues=2"
        )
    };
    let vsock = vsock(&host, 0x4000_0000 + std::process::id());
    let arguments = format!(
        "{vsock} -machine microvm -m 256M -kernel {kernel} -serial socket,path={{dir}}/console.sock,server,nowait {} {} \
         -netdev tap,id=n,ifname=tap0 -device virtio-net-device,netdev=n,id=n -object rng-random,id=r,filename=/dev/urandom \
         -device virtio-rng-device,rng=r,id=rng0 -chardev socket,id=c,host=127.0.0.1,port={PORT},server,nowait -chardev file,id=s,path={{dir}}/stream \
         -device virtio-serial-device,id=serial0 -device virtconsole,chardev=c,id=console0,nr=0 \
         -device virtserialport,chardev=s,id=port1,nr=1,name=port1 \
         -device virtio-balloon-device,id=balloon0,free-page-reporting=on",
        disk("a"),
        disk("b")
    );
    let program = format!("ip netns exec {} {program}", net.name);
    let vmm = Vmm::start_as(&host, &program, &net.name, &arguments)?;
    let mut console = vmm.console()?;
    console.expect("is up.", SOON)?;
    // A client of the console that sends as fast as the guest takes it; it ends when the VMM does.
    let flood = format!("exec 3<>/dev/tcp/127.0.0.1/{PORT}; cat <&3 > /dev/null & yes packet >&3");
    host.ok(&format!("setsid ip netns exec {} bash -c '{flood}' < /dev/null > /dev/null 2>&1 &", net.name))?;

    let count = run_all(&mut console, "", &TARGETS)?;
    check(count >= 150, || format!("only {count} cases"))?;
    let first = held(&host, &vmm)?;
    check(run_all(&mut console, "", &TARGETS)? == count, || "the second run had other cases".into())?;
    let second = held(&host, &vmm)?;
    second.no_more_than(&first)?;
    let lines: u64 = host.ok(&format!("wc -l < {}", vmm.path("out")))?.parse()?;
    check(lines <= LINES, || format!("{lines} lines of log"))?;
    let size = host.ok(&format!("stat -c %s {images}.a"))?;
    check(size == (16 << 20).to_string(), || format!("the disk has {size} bytes now"))?;
    let mut qmp = vmm.qmp()?;
    let status = qmp.ask("query-status")?;
    check(status["running"] == true, || status.to_string())?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    host.ok(&format!("rm -f {images}.a {images}.b"))?;
    println!("{count} cases; {first:?}, then {second:?}; {lines} lines of log");
    Ok(())
}
