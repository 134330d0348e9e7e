//! One `flotilla-vmm` with a hostile guest: the default guest's `hostile` command misuses every virtio device, case by case, on this
//! machine's own `/dev/kvm`; where there is none, on a test host. The table of cases and of what each may end in is the guest's; here
//! the VMM is watched from outside.

use std::path::Path;

use tests::host::Host;
use tests::hostile::{Net, held, run_all, vsock};
use tests::scenario::{Outcome, SOON, Vmm, check, guest_program, program};

/// Queues whose cases have to have run.
const TARGETS: [&str; 17] = [
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
    "mem",
    "pmem",
];
/// Where the console's client connects to, in the VMM's own network.
const PORT: u16 = 4321;
/// Lines that the VMM may log, however often the guest misbehaves.
const LINES: u64 = 200;

#[test]
fn no_misuse_of_a_device_hurts_the_vmm_or_its_neighbours() -> Outcome {
    misused("-machine microvm", |driver, _| format!("-device {driver}-device"), "board", "")
}

#[test]
fn nor_does_misuse_of_pci() -> Outcome {
    misused(
        "-machine q35 -append pci -device pcie-root-port,id=port,bus=pcie.0,addr=0x10,port=1",
        |driver, slot| format!("-device {driver}-pci,bus=pcie.0,addr={slot:#x}"),
        "pci",
        // The rest leaks no more than on the other machine.
        "pci",
    )
}

/// Runs all cases on this machine, whose devices are made by driver and place, and where its own cases are those of `board`; then those that start with
/// `again` once more.
fn misused(machine: &str, device: impl Fn(&str, u8) -> String, board: &str, again: &str) -> Outcome {
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
        "mkdir -p /var/tmp && truncate -s 16M {images}.a && truncate -s 4M {images}.c && head -c 1M /dev/urandom > {images}.b"
    ))?;
    let disk = |id: &str, slot| {
        let device = device("virtio-blk", slot);
        format!(
            "-drive file={images}.{id},id={id},readonly=off,discard=unmap {device},drive={id},id={id},num-queues=2"
        )
    };
    // Its rings are the kernel's, which the bus is nothing to.
    let mmio = machine.contains("microvm");
    let vsock = if mmio { vsock(&host, 0x4000_0000 + std::process::id()) } else { String::new() };
    // The second disk must go on working. On PCI nothing shares its interrupt line, which every fourth place has: a device under attack holds its line up.
    let (first, second) = (disk("a", 1), disk("b", 2));
    let (net_card, random) = (device("virtio-net", 3), device("virtio-rng", 4));
    let (serial, balloon) = (device("virtio-serial", 5), device("virtio-balloon", 7));
    let (more, file) = (device("virtio-mem", 8), device("virtio-pmem", 9));
    let arguments = format!(
        "{machine} {vsock} -m 256M -kernel {kernel} -serial socket,path={{dir}}/console.sock,server,nowait {first} {second} \
         -netdev tap,id=n,ifname=tap0 {net_card},netdev=n,id=n -object rng-random,id=r,filename=/dev/urandom \
         {random},rng=r,id=rng0 -chardev socket,id=c,host=127.0.0.1,port={PORT},server,nowait -chardev file,id=s,path={{dir}}/stream \
         {serial},id=serial0 -device virtconsole,chardev=c,id=console0,nr=0 \
         -device virtserialport,chardev=s,id=port1,nr=1,name=port1 \
         {balloon},id=balloon0,free-page-reporting=on \
         -object memory-backend-ram,id=more,size=256M {more},id=mem0,memdev=more,requested-size=8M \
         -object memory-backend-file,id=file,mem-path={images}.c,size=4M,share=on {file},id=pmem0,memdev=file"
    );
    let program = format!("ip netns exec {} {program}", net.name);
    let vmm = Vmm::start_as(&host, &program, &net.name, &arguments)?;
    let mut console = vmm.console()?;
    console.expect("is up.", SOON)?;
    // A client of the console that sends as fast as the guest takes it; it ends when the VMM does.
    let flood = format!("exec 3<>/dev/tcp/127.0.0.1/{PORT}; cat <&3 > /dev/null & yes packet >&3");
    host.ok(&format!("setsid ip netns exec {} bash -c '{flood}' < /dev/null > /dev/null 2>&1 &", net.name))?;

    let targets = [&TARGETS[..], &[board]].concat();
    let count = run_all(&mut console, "", &targets)?;
    check(count >= 1000, || format!("only {count} cases"))?;
    let first = held(&host, &vmm)?;
    let repeated = run_all(&mut console, again, &[board])?;
    check(repeated == count || !again.is_empty(), || "the second run had other cases".into())?;
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
    host.ok(&format!("rm -f {images}.a {images}.b {images}.c"))?;
    println!("{count} cases; {first:?}, then {second:?}; {lines} lines of log");
    Ok(())
}
