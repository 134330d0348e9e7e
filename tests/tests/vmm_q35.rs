//! One `flotilla-vmm -machine q35` on a test host, with Debian's unmodified cloud kernel: PCI Express, its life in place, and devices that come
//! and go through root ports while it runs.

use std::time::Duration;

use serde_json::json;
use tests::console::Console;
use tests::qmp::Qmp;
use tests::scenario::{BOOT, Guest, Outcome, SOON, Vmm, check, host_with_vmm};

/// The guest lets its indicator blink for five seconds before it lets a device go.
const UNPLUG: Duration = Duration::from_secs(60);

/// Waits until `command` prints `wanted` in the guest.
fn until(console: &mut Console, command: &str, wanted: &str) -> Outcome {
    let line = format!(
        "i=0; while [ $((i=i+1)) -lt 150 ]; do r=$({command}); [ \"$r\" = '{wanted}' ] && break; busybox sleep 0.2; done; echo \"$r\""
    );
    let got = console.shell(&line, UNPLUG)?;
    check(got == wanted, || format!("{command}: {got:?} and not {wanted:?}"))
}

fn gone(qmp: &mut Qmp, device: &str) -> Outcome {
    let event = qmp.wait(UNPLUG, |name, data| name == "DEVICE_DELETED" && data["device"] == device)?;
    check(event["data"]["path"] == format!("/machine/peripheral/{device}"), || event.to_string())
}

#[test]
fn debian_boots_on_pcie_reboots_in_place_takes_devices_and_powers_down() -> Outcome {
    let host = host_with_vmm("vmm-q35")?;
    let guest = Guest::new(&host, "q35", 1)?;
    host.ok(
        "ip tuntap add tap-q35 mode tap vnet_hdr && ip address add 10.9.0.1/24 dev tap-q35 && ip link set tap-q35 up; \
         ip tuntap add tap-hot mode tap vnet_hdr; head -c 4M /dev/urandom > /var/lib/images/hot.img",
    )?;
    let arguments = format!(
        "-machine q35 -m 256M -smp 2 -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz -append '{}' \
         -serial socket,path={{dir}}/console.sock,server,nowait \
         -device pcie-root-port,port=0x5,addr=0x5,bus=pcie.0,id=pcie.5 -device pcie-root-port,port=0x6,addr=0x6,bus=pcie.0,id=pcie.6 \
         -drive file={},id=rootfs,readonly=off,direct=off -device virtio-blk-pci,drive=rootfs,id=rootfs,bus=pcie.0,addr=0 \
         -netdev tap,id=nic0,ifname=tap-q35 -device virtio-net-pci,netdev=nic0,id=nic0,bus=pcie.0,addr=0x18.0x0",
        guest.append(),
        guest.disk
    );
    let vmm = Vmm::start(&host, "q35", &arguments)?;
    let mut console = vmm.console()?;
    let up = "guest q35 up, uptime";
    console.expect(up, BOOT)?;
    let mut qmp = vmm.qmp()?;

    // Everything where the command line put it, each with its interrupts as messages.
    let listing = console.shell(
        "cd /sys/bus/pci/devices; for d in *; do echo -n \"$d=$(cat $d/vendor $d/device | tr -d '\\n') \"; done; echo",
        SOON,
    )?;
    for function in [
        "0000:00:00.0=0x80860x29c0",
        "0000:00:01.0=0x1af40x1042",
        "0000:00:05.0=0x1b360x000c",
        "0000:00:06.0=0x1b360x000c",
        "0000:00:18.0=0x1af40x1041",
        "0000:00:1f.0=0x80860x2918",
    ] {
        check(listing.contains(function), || format!("no {function} in {listing}"))?;
    }
    let messages = console.shell("grep -c 'MSI.*virtio' /proc/interrupts", SOON)?;
    check(messages.parse().unwrap_or(0) >= 5, || format!("{messages} message interrupts of virtio devices"))?;
    check(console.shell("cat /sys/class/block/vda/size", SOON)? == "1048576", || "another disk".into())?;
    guest.answers(&host)?;

    // A reboot is one in place: the same process, and a client that stays connected.
    console.enter("busybox reboot -f")?;
    qmp.wait(SOON, |name, _| name == "RESET")?;
    console.expect(up, BOOT)?;
    guest.answers(&host)?;

    // A disk.
    let add = |qmp: &mut Qmp, command: &str, arguments| qmp.execute(command, &arguments, SOON);
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
    add(&mut qmp, "blockdev-del", json!({ "node-name": "hot" }))?;

    // A NIC.
    add(&mut qmp, "netdev_add", json!({ "id": "net1", "type": "tap", "ifname": "tap-hot" }))?;
    let nic = json!({ "id": "net1", "driver": "virtio-net-pci", "netdev": "net1", "mac": "52:54:00:12:34:99", "bus": "pcie.6", "addr": "0x0" });
    add(&mut qmp, "device_add", nic)?;
    until(&mut console, "cat /sys/class/net/eth1/address 2>&1", "52:54:00:12:34:99")?;
    add(&mut qmp, "device_del", json!({ "id": "net1" }))?;
    gone(&mut qmp, "net1")?;
    until(&mut console, "ls /sys/class/net | grep -c eth1", "0")?;
    add(&mut qmp, "netdev_del", json!({ "id": "net1" }))?;

    // The power button is an event of the kernel's; what a session manager would do is one line here. Open before it is pressed.
    let listen = "exec 9< /dev/input/event0; (head -c 24 <&9 > /dev/null; busybox poweroff -f) > /dev/null 2>&1 & true";
    console.shell(listen, SOON)?;
    qmp.ask("system_powerdown")?;
    let event = qmp.wait(BOOT, |name, _| name == "SHUTDOWN")?;
    check(event["data"]["guest"] == true && event["data"]["reason"] == "guest-shutdown", || {
        event.to_string()
    })?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}
