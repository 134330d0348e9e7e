//! One `flotilla-vmm` with a hostile guest: the default guest's `hostile` command misuses every virtio device, case by case, on this
//! machine's own `/dev/kvm`; where there is none, on a test host. The table of cases and of what each may end in is the guest's; here
//! the VMM is watched from outside.

use std::path::Path;
use std::time::Duration;

use tests::console::Console;
use tests::host::Host;
use tests::scenario::{Outcome, SOON, Vmm, check, guest_program, program};

/// For all cases, on a machine that does other things too.
const ALL: Duration = Duration::from_secs(240);
/// Queues whose cases have to have run.
const TARGETS: [&str; 7] =
    ["blk", "net-tx", "net-rx", "console-tx", "rng", "balloon-inflate", "balloon-deflate"];
/// Lines that the VMM may log, however often the guest misbehaves.
const LINES: u64 = 200;
/// KiB by which the VMM may grow from one run of all cases to the next.
const GROWTH: u64 = 8 << 10;

/// What the VMM holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    rss_kib: u64,
    descriptors: u64,
    threads: u64,
}

/// A network of its own for the VMM: a tap, and a neighbour that sends a packet every 20 ms.
struct Net<'a> {
    host: &'a Host,
    name: String,
}

impl<'a> Net<'a> {
    fn new(host: &'a Host) -> Outcome<Self> {
        let name = format!("hostile-{}", std::process::id());
        let net = Self { host, name };
        let inside = "ip tuntap add tap0 mode tap vnet_hdr && ip address add 10.9.7.1/24 dev tap0 && ip link set tap0 up && \
                      ip neighbour add 10.9.7.2 lladdr 02:00:00:00:00:02 dev tap0 nud permanent";
        let packets = "while sleep 0.02; do echo packet > /dev/udp/10.9.7.2/9; done";
        net.host.ok(&format!(
            "ip netns add {0} && ip netns exec {0} sh -c '{inside}' && \
             (setsid ip netns exec {0} bash -c '{packets}' < /dev/null > /dev/null 2>&1 & echo $! > /run/{0}.pid)",
            net.name
        ))?;
        Ok(net)
    }
}

impl Drop for Net<'_> {
    fn drop(&mut self) {
        let _ = self
            .host
            .run(&format!("kill $(cat /run/{0}.pid); rm -f /run/{0}.pid; ip netns delete {0}", self.name));
    }
}

fn held(host: &Host, vmm: &Vmm<'_>) -> Outcome<Held> {
    let text = host.ok(&format!(
        "pid=$(cat {}); awk '/^VmRSS/ {{ print $2 }}' /proc/$pid/status; ls /proc/$pid/fd | wc -l; ls /proc/$pid/task | wc -l",
        vmm.path("pid")
    ))?;
    let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    match numbers[..] {
        [rss_kib, descriptors, threads] => Ok(Held { rss_kib, descriptors, threads }),
        _ => Err(format!("not three numbers: {text}").into()),
    }
}

/// Runs all cases and checks each one's line:
/// `case NAME: OUTCOME; allowed: OUTCOME...; again: served; others: work`.
fn run_all(console: &mut Console) -> Outcome<usize> {
    console.enter("hostile")?;
    let before = console.text().len();
    let last = console.expect_line(" bad", ALL)?;
    let text = console.text()[before..].replace('\r', "");
    let (mut count, mut bad) = (0, Vec::new());
    for line in text.lines().filter(|line| line.starts_with("case ")) {
        count += 1;
        let fine = line.split_once(": ").and_then(|(_, rest)| {
            let (outcome, rest) = rest.split_once("; allowed: ")?;
            let (allowed, rest) = rest.split_once("; ")?;
            Some(allowed.split(' ').any(|a| a == outcome) && rest == "again: served; others: work")
        });
        if fine != Some(true) {
            bad.push(line.to_owned());
        }
    }
    check(bad.is_empty(), || bad.join("\n"))?;
    check(last == format!("hostile: {count} cases, 0 bad"), || {
        format!("{count} cases seen, but \"{last}\"")
    })?;
    for target in TARGETS {
        let ran = text.lines().any(|line| line.starts_with(&format!("case {target}/")));
        check(ran, || format!("no case of {target} ran"))?;
    }
    Ok(count)
}

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
            "-drive file={images}.{id},id={id},readonly=off,discard=unmap -device virtio-blk-device,drive={id},id={id}"
        )
    };
    let arguments = format!(
        "-machine microvm -m 256M -kernel {kernel} -serial socket,path={{dir}}/console.sock,server,nowait {} {} \
         -netdev tap,id=n,ifname=tap0 -device virtio-net-device,netdev=n,id=n -object rng-random,id=r,filename=/dev/urandom \
         -device virtio-rng-device,rng=r,id=rng0 -chardev file,id=c,path={{dir}}/console -device virtio-serial-device,id=serial0 \
         -device virtconsole,chardev=c,id=console0 -device virtio-balloon-device,id=balloon0",
        disk("a"),
        disk("b")
    );
    let program = format!("ip netns exec {} {program}", net.name);
    let vmm = Vmm::start_as(&host, &program, &net.name, &arguments)?;
    let mut console = vmm.console()?;
    console.expect("is up.", SOON)?;

    let count = run_all(&mut console)?;
    check(count >= 150, || format!("only {count} cases"))?;
    let first = held(&host, &vmm)?;
    check(run_all(&mut console)? == count, || "the second run had other cases".into())?;
    let second = held(&host, &vmm)?;
    check(
        second.descriptors <= first.descriptors
            && second.threads <= first.threads
            && second.rss_kib <= first.rss_kib + GROWTH,
        || format!("it grows: {first:?}, then {second:?}"),
    )?;
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
