//! One `flotilla-vmm -machine q35` on a test host, with Debian's unmodified cloud kernel: PCI Express, its life in place, and devices that come
//! and go through root ports while it runs.

use serde_json::{Value, json};
use tests::console::Console;
use tests::host::Host;
use tests::plug::{SPARE, UNPLUG, bind, gone, in_guest, on_host, until};
use tests::qmp::Qmp;
use tests::scenario::{BOOT, Guest, Outcome, SOON, Vmm, check, host_with_vmm, step};

/// Sends `words` to what listens in the guest, and wants them back.
fn echo(host: &Host, to: &str, words: &str) -> Outcome {
    let back = host.ok(&format!("echo {words} | timeout 20 socat -t 10 - {to}"))?;
    check(back.trim() == words, || format!("{to} answers {back:?}"))
}

/// Every small device, each driven by Debian.
fn small_devices(host: &Host, vmm: &Vmm<'_>, console: &mut Console) -> Outcome {
    let random = "cat /sys/class/misc/hw_random/rng_current | cut -d . -f 1; head -c 512 /dev/hwrng | wc -c";
    let said = console.shell(random, SOON)?;
    check(said == "virtio_rng\n512", || format!("random numbers: {said}"))?;
    // A function-level reset leaves a device as a driver wants to find it.
    let reset = "cd /sys/bus/pci/devices/0000:00:09.0; d=$(ls -d virtio*); cat reset_method; \
                 echo 0000:00:09.0 > driver/unbind; echo 1 > reset && echo 0000:00:09.0 > /sys/bus/pci/drivers/virtio-pci/bind; cd /";
    let method = console.shell(reset, SOON)?;
    check(method.starts_with("flr"), || format!("reset by {method}"))?;
    let said = console.shell(random, SOON)?;
    check(said.ends_with("\n512"), || format!("random numbers after a reset: {said}"))?;
    let drivers = console.shell("ls /sys/bus/virtio/drivers/virtio_balloon | grep -c ^virtio", SOON)?;
    check(drivers == "1", || format!("{drivers} balloons"))?;

    console.shell("(setsid -c /bin/sh -i < /dev/hvc0 > /dev/hvc0 2>&1 &)", SOON)?;
    let mut terminal = Console::new(host.dial(&vmm.path("hvc.sock"))?);
    let said = terminal.shell("echo over hvc0", SOON)?;
    check(said.ends_with("over hvc0"), || format!("hvc0 says {said}"))?;

    console.shell("(socat -t 20 VSOCK-LISTEN:9000,fork EXEC:cat > /dev/null 2>&1 &)", SOON)?;
    host.eventually(SOON, "echo | timeout 5 socat -t 2 - VSOCK-CONNECT:42:9000")?;
    echo(host, "VSOCK-CONNECT:42:9000", "over-vsock")
}

/// vCPUs come, do some work, and go. Linux leaves it to its user to put a new one online.
fn cpus(qmp: &mut Qmp, console: &mut Console) -> Outcome {
    let present = |qmp: &mut Qmp| -> Outcome<String> {
        let list = qmp.ask("query-hotpluggable-cpus")?;
        let list = list.as_array().ok_or("no list")?;
        Ok(list.iter().map(|cpu| if cpu.get("qom-path").is_some() { '+' } else { '-' }).collect())
    };
    check(present(qmp)? == "++--", || "two of four at the start".into())?;
    for (id, number) in [("vcpu-2", 2), ("vcpu-3", 3), ("vcpu-2-again", 2)] {
        let cpu = json!({ "id": id, "driver": "generic-x86-cpu", "cpu-id": number });
        qmp.execute("device_add", &cpu, SOON)?;
        qmp.wait(SOON, |name, _| name == "CPU_RESIZE")?;
        let path = format!("/sys/devices/system/cpu/cpu{number}");
        until(console, &format!("ls -d {path} 2>&1"), &path)?;
        let ran = format!(
            "echo 1 > {path}/online && busybox taskset -c {number} sh -c 'cut -d \" \" -f 39 /proc/self/stat'"
        );
        let ran = console.shell(&ran, SOON)?;
        check(ran == number.to_string(), || format!("work for vCPU {number} was done on {ran}"))?;
        if number == 3 {
            check(present(qmp)? == "++-+", || "the last of four has come".into())?;
            continue;
        }
        qmp.execute("device_del", &json!({ "id": id }), SOON)?;
        qmp.wait(UNPLUG, |name, data| name == "DEVICE_DELETED" && data["device"] == id)?;
        until(console, &format!("ls -d {path} 2>&1 | grep -c cannot"), "1")?;
        check(!present(qmp)?.starts_with("+++"), || "it is still there".into())?;
    }
    Ok(())
}

/// Queues, each with an interrupt of its own.
fn queues(console: &mut Console) -> Outcome {
    let tx = console.shell("ls -d /sys/class/net/eth0/queues/tx-* | wc -l", SOON)?;
    check(tx == "2", || format!("{tx} queues of the NIC"))?;
    let count = "d=$(ls -d /sys/bus/pci/devices/0000:00:18.0/virtio*); grep -c \"MSI.*${d##*/}-[io].*put\" /proc/interrupts";
    let messages = console.shell(count, SOON)?;
    check(messages == "4", || format!("{messages} interrupts of the NIC's queues"))?;
    let disk = console.shell("ls /sys/block/vda/mq | wc -l", SOON)?;
    check(disk == "2", || format!("{disk} queues of the disk"))
}

/// A disk of the host's that was there at the start, and over a reboot: it goes back, comes again while the guest runs, and goes back.
fn handed_over(host: &Host, qmp: &mut Qmp, console: &mut Console, holds: &str) -> Outcome {
    let wrote = in_guest(console, holds, "MSI")?;
    qmp.execute("device_del", &json!({ "id": "spare" }), SOON)?;
    gone(qmp, "spare")?;
    // It is the host's at once, with what the guest has written.
    bind(host, "virtio-pci")?;
    check(on_host(host, false)? == wrote, || {
        "the host finds something else than the guest has written".into()
    })?;

    let add =
        |id: &str| json!({ "id": id, "driver": "vfio-pci", "host": SPARE, "bus": "pcie.7", "addr": "0x0" });
    let refused =
        qmp.execute("device_add", &add("taken"), SOON).err().map(|e| e.to_string()).unwrap_or_default();
    check(refused.contains("bind each device in it to vfio-pci"), || format!("the host's own: {refused}"))?;
    let holds = on_host(host, true)?;
    bind(host, "vfio-pci")?;
    // This time by its pin.
    console.shell("echo 0 > /sys/bus/pci/devices/0000:00:07.0/msi_bus", SOON)?;
    qmp.execute("device_add", &add("spare-again"), SOON)?;
    let wrote = in_guest(console, &holds, "IO-APIC")?;
    qmp.execute("device_del", &json!({ "id": "spare-again" }), SOON)?;
    gone(qmp, "spare-again")?;
    bind(host, "virtio-pci")?;
    check(on_host(host, false)? == wrote, || {
        "the host finds something else than the guest has written".into()
    })?;
    until(console, "ls /sys/class/block | grep -c vdb", "0")
}

/// Of the card in port 6.
const MAC: &str = "52:54:00:12:34:99";

fn nic(id: &str) -> Value {
    json!({ "id": id, "driver": "virtio-net-pci", "netdev": "net1", "mac": MAC, "bus": "pcie.6", "addr": "0x0" })
}

/// A card comes to a guest that does not run yet, goes without its word, and its place takes another, which waits for the guest.
fn early(qmp: &mut Qmp) -> Outcome {
    let tap = json!({ "id": "net1", "type": "tap", "ifname": "tap-hot" });
    qmp.execute("netdev_add", &tap, SOON)?;
    qmp.execute("device_add", &nic("early1"), SOON)?;
    let away = json!({ "id": "early1" });
    qmp.execute("device_del", &away, SOON)?;
    gone(qmp, "early1")?;
    check(qmp.execute("device_del", &away, SOON).is_err(), || "it has left".into())?;
    qmp.execute("device_add", &nic("early2"), SOON)?;
    qmp.ask("cont")?;
    Ok(())
}

/// Presses the power button: an event of the kernel's. What a session manager would do is one line here; it listens before the button is pressed.
fn power_down(vmm: &Vmm<'_>, qmp: &mut Qmp, console: &mut Console) -> Outcome {
    let listen = "exec 9< /dev/input/event0; (head -c 24 <&9 > /dev/null; busybox poweroff -f) > /dev/null 2>&1 & true";
    console.shell(listen, SOON)?;
    qmp.ask("system_powerdown")?;
    let event = qmp.wait(BOOT, |name, _| name == "SHUTDOWN")?;
    check(event["data"]["guest"] == true && event["data"]["reason"] == "guest-shutdown", || {
        event.to_string()
    })?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

#[test]
fn debian_boots_on_pcie_reboots_in_place_takes_devices_and_powers_down() -> Outcome {
    let host = host_with_vmm("vmm-q35")?;
    let guest = Guest::new(&host, "q35", 1)?;
    host.ok(
        "modprobe vhost_vsock && ip tuntap add tap-q35 mode tap multi_queue vnet_hdr && ip address add 10.9.0.1/24 dev tap-q35 && ip link set tap-q35 up; \
         ip tuntap add tap-hot mode tap vnet_hdr; head -c 4M /dev/urandom > /var/lib/images/hot.img",
    )?;
    let holds = on_host(&host, true)?;
    bind(&host, "vfio-pci")?;
    let arguments = format!(
        "-machine q35 -m 256M -smp 2,maxcpus=4 -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz -append '{}' \
         -S -serial socket,path={{dir}}/console.sock,server,nowait \
         -device pcie-root-port,port=0x5,addr=0x5,bus=pcie.0,id=pcie.5 -device pcie-root-port,port=0x6,addr=0x6,bus=pcie.0,id=pcie.6 \
         -device pcie-root-port,port=0x7,addr=0x7,bus=pcie.0,id=pcie.7 -device vfio-pci,host={SPARE},id=spare,bus=pcie.7,addr=0x0 \
         -drive file={},id=rootfs,readonly=off,direct=off -device virtio-blk-pci,drive=rootfs,id=rootfs,bus=pcie.0,addr=0 \
         -netdev tap,id=nic0,ifname=tap-q35,queues=2 -device virtio-net-pci,netdev=nic0,id=nic0,mq=on,bus=pcie.0,addr=0x18.0x0 \
         -device virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x2 -device vhost-vsock-pci,id=vsock0,guest-cid=42,bus=pcie.0,addr=0x3 \
         -object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng,id=rng0,bus=pcie.0,addr=0x9 \
         -device virtio-serial-pci,id=serial0,bus=pcie.0,addr=0xa -chardev socket,id=hvc,path={{dir}}/hvc.sock,server,nowait \
         -device virtconsole,chardev=hvc,id=console0",
        guest.append(),
        guest.disk
    );
    step("boot");
    let vmm = Vmm::start(&host, "q35", &arguments)?;
    let mut qmp = vmm.qmp()?;
    early(&mut qmp)?;
    let mut console = vmm.console()?;
    let up = "guest q35 up, uptime";
    console.expect(up, BOOT)?;
    let mac = console.shell("cat /sys/class/net/eth1/address", SOON)?;
    check(mac == MAC, || format!("no card that came before the start: {mac}"))?;

    // Everything where the command line put it, each with its interrupts as messages.
    let listing = console.shell(
        "cd /sys/bus/pci/devices; for d in *; do echo -n \"$d=$(cat $d/vendor $d/device | tr -d '\\n') \"; done; echo",
        SOON,
    )?;
    for function in [
        "0000:00:00.0=0x80860x29c0",
        "0000:00:01.0=0x1af40x1042",
        "0000:00:02.0=0x1af40x1045",
        "0000:00:03.0=0x1af40x1053",
        "0000:00:05.0=0x1b360x000c",
        "0000:00:06.0=0x1b360x000c",
        "0000:00:09.0=0x1af40x1044",
        "0000:00:0a.0=0x1af40x1043",
        "0000:00:18.0=0x1af40x1041",
        "0000:00:1f.0=0x80860x2918",
    ] {
        check(listing.contains(function), || format!("no {function} in {listing}"))?;
    }
    let messages = console.shell("grep -c 'MSI.*virtio' /proc/interrupts", SOON)?;
    check(messages.parse().unwrap_or(0) >= 5, || format!("{messages} message interrupts of virtio devices"))?;
    check(console.shell("cat /sys/class/block/vda/size", SOON)? == "1048576", || "another disk".into())?;
    guest.answers(&host)?;
    step("queues and small devices");
    queues(&mut console)?;
    small_devices(&host, &vmm, &mut console)?;
    let holds = in_guest(&mut console, &holds, "MSI")?;

    // A reboot is one in place: the same process, and a client that stays connected.
    step("reboot");
    let add = |qmp: &mut Qmp, command: &str, arguments| qmp.execute(command, &arguments, SOON);
    console.enter("busybox reboot -f")?;
    qmp.wait(SOON, |name, _| name == "RESET")?;
    // Asked for before the system looks at the port, which throws away what it finds there.
    add(&mut qmp, "device_del", json!({ "id": "early2" }))?;
    console.expect(up, BOOT)?;
    guest.answers(&host)?;
    gone(&mut qmp, "early2")?;
    until(&mut console, "ls /sys/class/net | grep -c eth1", "0")?;

    step("a disk of the host's");
    handed_over(&host, &mut qmp, &mut console, &holds)?;

    step("a disk");
    let file = json!({ "driver": "file", "filename": "/var/lib/images/hot.img" });
    add(
        &mut qmp,
        "blockdev-add",
        json!({ "node-name": "hot", "driver": "raw", "file": file, "cache": { "direct": false } }),
    )?;
    for round in ["hot1", "hot2"] {
        // A name of its own in each round: events that came earlier count for `gone`.
        let disk = json!({ "id": round, "driver": "virtio-blk-pci", "drive": "hot", "bus": "pcie.5", "addr": "0x0" });
        add(&mut qmp, "device_add", disk.clone())?;
        until(&mut console, "cat /sys/class/block/vdb/size 2>&1", "8192")?;
        check(add(&mut qmp, "device_add", disk).is_err(), || "plugged twice".into())?;
        let sum = host.ok("md5sum < /var/lib/images/hot.img")?;
        let read = console.shell("busybox md5sum < /dev/vdb", SOON)?;
        check(read.trim() == sum.trim(), || format!("round {round}: read {read}, not {sum}"))?;
        add(&mut qmp, "device_del", json!({ "id": round }))?;
        gone(&mut qmp, round)?;
        until(&mut console, "ls /sys/class/block | grep -c vdb", "0")?;
    }
    // One that the guest throws out by itself is told of as well, and the slot can be used again.
    let disk =
        json!({ "id": "hot3", "driver": "virtio-blk-pci", "drive": "hot", "bus": "pcie.5", "addr": "0x0" });
    add(&mut qmp, "device_add", disk)?;
    until(&mut console, "cat /sys/class/block/vdb/size 2>&1", "8192")?;
    console.shell("echo 0 > /sys/bus/pci/slots/5/power", SOON)?;
    gone(&mut qmp, "hot3")?;
    check(add(&mut qmp, "device_del", json!({ "id": "hot3" })).is_err(), || "it has left".into())?;
    add(&mut qmp, "blockdev-del", json!({ "node-name": "hot" }))?;

    step("a NIC");
    add(&mut qmp, "device_add", nic("net1"))?;
    until(&mut console, "cat /sys/class/net/eth1/address 2>&1", MAC)?;
    add(&mut qmp, "device_del", json!({ "id": "net1" }))?;
    gone(&mut qmp, "net1")?;
    until(&mut console, "ls /sys/class/net | grep -c eth1", "0")?;
    add(&mut qmp, "netdev_del", json!({ "id": "net1" }))?;

    step("vCPUs");
    cpus(&mut qmp, &mut console)?;

    step("the power button");
    power_down(&vmm, &mut qmp, &mut console)
}
