//! The ways into a guest, on a test host: a tap with several queues, vhost-net, a plain tap plugged into the same slot while the
//! guest runs, and vsock. Stock Debian drives them: what it has negotiated, its address, its link, what it asks of the control
//! queue. A checksummed megabyte goes through each, both ways.

use std::time::Duration;

use serde_json::{Value, json};
use tests::console::Console;
use tests::host::Host;
use tests::qmp::Qmp;
use tests::scenario::{BOOT, Guest, Outcome, SOON, Vmm, check, host_with_vmm, step};

/// How long a megabyte may take there and back under emulation.
const TRANSFER: Duration = Duration::from_secs(40);
/// Packets of a flood: fewer than a tap keeps for a guest that has no processor just then.
const PACKETS: u64 = 800;
const CID: u32 = 42;
/// Addresses of the second NIC: from the command line, from `device_add`, from the guest.
const GIVEN: &str = "52:54:00:ab:cd:01";
const PLUGGED: &str = "52:54:00:ab:cd:02";
const OWN: &str = "52:54:00:ab:cd:03";

/// Sends a megabyte to an echo in the guest and compares what comes back.
fn echo(host: &Host, address: &str) -> Outcome {
    step(format!("a megabyte there and back: {address}"));
    let command =
        format!("cd /root && timeout 35 socat -t 20 - {address} < sent > back && cmp sent back && rm back");
    host.ok_for(TRANSFER, &command)?;
    Ok(())
}

/// Fifty pings and their answers, one at a time (-A): answers that come in a burst while ping has no processor overflow ping's own
/// socket. No deadline (-w): with one ping goes on sending, and the last request counts as lost.
fn ping(host: &Host, address: &str) -> Outcome {
    host.eventually(SOON, &format!("ping -c 1 -W 1 {address}"))?;
    host.ok(&format!("ping -q -A -c 50 -s 1400 -W 20 {address} | grep ' 0% packet loss'"))?;
    Ok(())
}

/// What Linux and the device have agreed on (virtio 1.2 §5.1.3, §6): checksums and TCP segmentation both ways, mergeable
/// buffers, link status, address and receive modes by the control queue, both ways to save notifications.
const AGREED: [usize; 16] = [0, 1, 2, 5, 7, 8, 11, 12, 15, 16, 17, 18, 23, 28, 29, 32];
/// Several queues.
const MQ: usize = 22;

fn negotiated(console: &mut Console, nic: &str, several: bool) -> Outcome {
    let bits = console.shell(&format!("cat /sys/class/net/{nic}/device/features"), SOON)?;
    let has = |bit: usize| bits.as_bytes().get(bit) == Some(&b'1');
    let missing: Vec<usize> = AGREED.into_iter().filter(|bit| !has(*bit)).collect();
    check(missing.is_empty(), || format!("{nic} lacks features {missing:?}: {bits}"))?;
    check(has(MQ) == several, || format!("{nic}: {bits}"))
}

/// Both directions carry TCP segments that are larger than a packet on a wire: nobody cuts them, nobody fills in checksums. One direction
/// at a time, so that answers do not count.
fn segments_are_large(host: &Host, console: &mut Console, nic: &str, address: &str) -> Outcome {
    let network = address.rsplit_once('.').map_or("", |(network, _)| network);
    let to_guest = format!("timeout 35 socat -t 20 - TCP:{address}:9001 < /root/sent");
    let from_guest = format!("head -c 1M /dev/zero | socat -t 20 - TCP:{network}.1:9002");
    for direction in ["rx", "tx"] {
        let files = ["bytes", "packets"]
            .map(|what| format!("/sys/class/net/{nic}/statistics/{direction}_{what}"))
            .join(" ");
        let counts = |console: &mut Console| -> Outcome<(u64, u64)> {
            let text = console.shell(&format!("cat {files}"), SOON)?;
            let (bytes, packets) = text.split_once('\n').ok_or_else(|| text.clone())?;
            Ok((bytes.trim().parse()?, packets.trim().parse()?))
        };
        let before = counts(console)?;
        let arrived = if direction == "rx" {
            host.ok_for(TRANSFER, &to_guest)?
        } else {
            console.shell(&from_guest, TRANSFER)?
        };
        check(arrived.trim() == "1048576", || format!("{nic} {direction}: {arrived} bytes arrived"))?;
        let after = counts(console)?;
        let (bytes, packets) = (after.0 - before.0, after.1 - before.1);
        check(bytes / packets.max(1) > 1514, || {
            format!("{nic} {direction}: {bytes} bytes in {packets} packets")
        })?;
    }
    Ok(())
}

/// Many ordinary packets at once, in either direction: all of them arrive.
fn flood(host: &Host, vmm: &Vmm<'_>, console: &mut Console, [nic, tap]: [&str; 2], address: &str) -> Outcome {
    step(format!("a flood: {nic}"));
    let network = address.rsplit_once('.').map_or("", |(network, _)| network);
    let send = |to: &str| format!("head -c {PACKETS}000 /dev/zero | socat -u -b 1000 - UDP-SENDTO:{to}:9");
    let counter = |nic: &str| format!("cat /sys/class/net/{nic}/statistics/rx_packets");
    let arrived = |nic: &str, wanted: u64| {
        format!(
            "i=0; until read -r n < /sys/class/net/{nic}/statistics/rx_packets; [ $n -ge {wanted} ] || [ $((i += 1)) -gt 100 ]; \
             do sleep 0.1; done; [ $n -ge {wanted} ]"
        )
    };
    let before: u64 = console.shell(&counter(nic), SOON)?.trim().parse()?;
    host.ok(&send(address))?;
    console.shell(&arrived(nic, before + PACKETS), SOON)?;
    let before: u64 = host.ok(&counter(tap))?.trim().parse()?;
    console.shell(&send(&format!("{network}.1")), SOON)?;
    host.ok(&arrived(tap, before + PACKETS))?;
    let rings = host.ok(&format!("ls -l /proc/$(cat {})/fd | grep -c io_uring", vmm.path("pid")))?;
    step(format!("{} io_urings", rings.trim()));
    Ok(())
}

/// Waits until the guest sees a link, or none. By `ip`: the file `carrier` says it earlier, before the kernel has looked at the
/// link's state for everything else (its watch runs at most once a second).
fn carrier(console: &mut Console, up: bool) -> Outcome {
    let negation = if up { "!" } else { "" };
    let line = format!(
        "i=0; until {negation} busybox ip link show eth1 | busybox grep -q NO-CARRIER || [ $((i += 1)) -gt 200 ]; do busybox usleep 50000; done; \
         busybox ip link show eth1"
    );
    let shown = console.shell(&line, SOON)?;
    check(shown.contains("NO-CARRIER") != up, || shown.clone())
}

/// A request that must fail, and why.
fn refused(qmp: &mut Qmp, command: &str, arguments: &Value, why: &str) -> Outcome {
    let text = match qmp.execute(command, arguments, SOON) {
        Ok(value) => value.to_string(),
        Err(error) => error.to_string(),
    };
    check(text.contains(why), || format!("{command} {arguments}: {text}"))
}

/// Brings a NIC to slot 1 and gives the guest's end its address.
fn plug(qmp: &mut Qmp, id: &str, netdev: &Value) -> Outcome {
    qmp.execute("netdev_add", netdev, SOON)?;
    let device =
        json!({ "id": id, "driver": "virtio-net-mmio", "netdev": id, "addr": "0x1", "mac": PLUGGED });
    qmp.execute("device_add", &device, SOON)?;
    Ok(())
}

#[test]
fn every_way_into_a_guest_carries_what_is_sent() -> Outcome {
    let host = host_with_vmm("vmm-net")?;
    let guest = Guest::new(&host, "ways", 1)?;
    host.ok("modprobe -a vhost_net vhost_vsock && ls -l /dev/vhost-net /dev/vhost-vsock /dev/net/tun")?;
    host.ok(
        "ip tuntap add tap-mq mode tap multi_queue vnet_hdr && ip address add 10.9.0.1/24 dev tap-mq && ip link set tap-mq up && \
         for n in 1 2; do ip tuntap add tap-$n mode tap && ip address add 10.9.$n.1/24 dev tap-$n && ip link set tap-$n up; done && \
         head -c 1M /dev/urandom > /root/sent",
    )?;
    let kernel = "-machine microvm -m 256M -smp 2 -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz";
    let arguments = format!(
        "{kernel} -append '{}' -drive file={},id=disk0,readonly=off,direct=off -device virtio-blk-device,drive=disk0,id=disk0 \
         -netdev tap,id=several,ifname=tap-mq,queues=2 -device virtio-net-device,netdev=several,id=several,mq=on \
         -netdev tap,id=kernel,ifname=tap-1,vhost=on -device virtio-net-device,netdev=kernel,id=kernel,mac={GIVEN} \
         -device vhost-vsock-device,id=vsock,guest-cid={CID} -serial socket,path={{dir}}/console.sock,server,nowait",
        guest.append(),
        guest.disk
    );
    let vmm = Vmm::start(&host, "ways", &arguments)?;
    let mut console = vmm.console()?;
    step("boot");
    console.expect("guest ways up, uptime", BOOT)?;
    let mut qmp = vmm.qmp()?;
    for listener in ["TCP-LISTEN:9000,fork,reuseaddr", "VSOCK-LISTEN:9000,fork"] {
        console.shell(&format!("(socat -t 20 {listener} EXEC:cat > /dev/null 2>&1 &)"), SOON)?;
    }

    console.shell("(socat -t 20 TCP-LISTEN:9001,fork,reuseaddr EXEC:'wc -c' > /dev/null 2>&1 &)", SOON)?;
    host.ok(
        "(setsid socat -t 20 TCP-LISTEN:9002,fork,reuseaddr EXEC:'wc -c' < /dev/null > /dev/null 2>&1 &)",
    )?;

    step("several queues");
    let queues = console.shell("ls -d /sys/class/net/eth0/queues/tx-* | wc -l", SOON)?;
    check(queues == "2", || format!("{queues} queues"))?;
    negotiated(&mut console, "eth0", true)?;
    ping(&host, &guest.address)?;
    echo(&host, &format!("TCP:{}:9000", guest.address))?;
    segments_are_large(&host, &mut console, "eth0", &guest.address)?;
    flood(&host, &vmm, &mut console, ["eth0", "tap-mq"], &guest.address)?;

    step("vhost-net");
    host.ok("ls -l /proc/$(pgrep -n flotilla-vmm)/fd | grep -c vhost-net")?;
    console.shell("busybox ip link set eth1 up; busybox ip addr add 10.9.1.2/24 dev eth1", SOON)?;
    let mac = console.shell("cat /sys/class/net/eth1/address", SOON)?;
    check(mac == GIVEN, || format!("eth1 has {mac}"))?;
    negotiated(&mut console, "eth1", false)?;
    ping(&host, "10.9.1.2")?;
    echo(&host, "TCP:10.9.1.2:9000")?;
    segments_are_large(&host, &mut console, "eth1", "10.9.1.2")?;

    step("vsock");
    echo(&host, &format!("VSOCK-CONNECT:{CID}:9000"))?;
    host.ok("(setsid socat -u VSOCK-LISTEN:9001 CREATE:/root/from-guest < /dev/null > /dev/null 2>&1 &)")?;
    console.shell("head -c 100000 /bin/bash | socat -u - VSOCK-CONNECT:2:9001", SOON)?;
    host.eventually(SOON, "test $(stat -c %s /root/from-guest) = 100000")?;
    let second = host.refused(&format!(
        "timeout 20 flotilla-vmm {kernel} -serial stdio -device vhost-vsock-device,guest-cid={CID} < /dev/null"
    ))?;
    check(second.stderr.contains("guest-cid=42 is in use"), || second.stderr.clone())?;

    step("taps that are missing, taken or of another kind; a slot in use");
    let holder = Vmm::start(
        &host,
        "holder",
        &format!("{kernel} -S -netdev tap,id=n,ifname=tap-2 -device virtio-net-device,netdev=n,id=n"),
    )?;
    let mut holding = holder.qmp()?;
    for (tap, why) in [
        ("tap-none", "there is no interface tap-none"),
        ("tap-2", "tap tap-2 is in use"),
        ("tap-mq", "interface tap-mq is not a tap with one queue"),
        ("lo", "interface lo is not a tap"),
    ] {
        refused(&mut qmp, "netdev_add", &json!({ "id": "plain", "ifname": tap }), why)?;
    }
    let taken = host.refused(&format!(
        "timeout 20 flotilla-vmm {kernel} -serial stdio -netdev tap,id=n,ifname=tap-2 -device virtio-net-device,netdev=n,id=n < /dev/null"
    ))?;
    check(taken.stderr.contains("tap tap-2 is in use"), || taken.stderr.clone())?;
    holding.ask("quit")?;
    check(holder.exit(SOON)? == 0, || holder.output().unwrap_or_default())?;
    qmp.execute("netdev_add", &json!({ "id": "plain", "ifname": "tap-2" }), SOON)?;
    let device = json!({ "id": "plain", "driver": "virtio-net-mmio", "netdev": "plain", "addr": "0x1" });
    refused(&mut qmp, "device_add", &device, "The slot 1 is occupied already")?;
    qmp.execute("netdev_del", &json!({ "id": "plain" }), SOON)?;
    ping(&host, "10.9.1.2")?;

    step("a plain tap in place of vhost-net");
    qmp.execute("device_del", &json!({ "id": "kernel" }), SOON)?;
    carrier(&mut console, false)?;
    host.ok(&format!("! ls -l /proc/$(cat {})/fd | grep vhost-net", vmm.path("pid")))?;
    plug(&mut qmp, "plain", &json!({ "id": "plain", "ifname": "tap-2" }))?;
    carrier(&mut console, true)?;
    console.shell("busybox ip addr add 10.9.2.2/24 dev eth1", SOON)?;
    ping(&host, "10.9.2.2")?;
    echo(&host, "TCP:10.9.2.2:9000")?;
    segments_are_large(&host, &mut console, "eth1", "10.9.2.2")?;
    flood(&host, &vmm, &mut console, ["eth1", "tap-2"], "10.9.2.2")?;

    step("the link goes down and up on command, and the guest sees it");
    for up in [false, true] {
        qmp.execute("netlink_set", &json!({ "id": "plain", "up": up }), SOON)?;
        carrier(&mut console, up)?;
    }
    ping(&host, "10.9.2.2")?;

    step(
        "the control queue: receive modes, an address of the guest's own; the NIC's address when the driver binds anew",
    );
    console.shell("busybox ip link set eth1 promisc on", SOON)?;
    console.shell(
        &format!("busybox ip link set eth1 promisc off && busybox ip link set eth1 address {OWN}"),
        SOON,
    )?;
    host.ok("ip neighbour flush dev tap-2")?;
    ping(&host, "10.9.2.2")?;
    host.ok(&format!("ip neighbour show 10.9.2.2 | grep {OWN}"))?;
    console.shell(
        "d=$(busybox basename $(readlink -f /sys/class/net/eth1/device)) && cd /sys/bus/virtio/drivers/virtio_net && \
         echo $d > unbind && echo $d > bind; cd /",
        SOON,
    )?;
    let mac = console.shell("cat /sys/class/net/eth1/address", SOON)?;
    check(mac == PLUGGED, || format!("eth1 has {mac}"))?;
    console.shell(
        "busybox ip link set eth1 up && for n in 1 2; do busybox ip addr add 10.9.$n.2/24 dev eth1; done",
        SOON,
    )?;
    host.ok("ip neighbour flush dev tap-2")?;
    ping(&host, "10.9.2.2")?;
    echo(&host, "TCP:10.9.2.2:9000")?;

    step("and vhost-net again");
    qmp.execute("device_del", &json!({ "id": "plain" }), SOON)?;
    plug(&mut qmp, "again", &json!({ "id": "again", "ifname": "tap-1", "vhost": true }))?;
    ping(&host, "10.9.1.2")?;
    echo(&host, "TCP:10.9.1.2:9000")?;
    ping(&host, &guest.address)?;

    step("several queues that the kernel serves");
    qmp.execute("device_del", &json!({ "id": "several" }), SOON)?;
    qmp.execute(
        "netdev_add",
        &json!({ "id": "both", "ifname": "tap-mq", "queues": 2, "vhost": true }),
        SOON,
    )?;
    let device = json!({ "id": "both", "driver": "virtio-net-mmio", "netdev": "both", "addr": "0x0" });
    qmp.execute("device_add", &device, SOON)?;
    ping(&host, &guest.address)?;
    echo(&host, &format!("TCP:{}:9000", guest.address))?;

    let log = console.shell(
        "dmesg | grep -i 'virtio.*\\(error\\|fail\\)\\|unexpected txq\\|netdev watchdog' || :",
        SOON,
    )?;
    check(log.is_empty(), || format!("in the guest's log: {log}"))?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || vmm.output().unwrap_or_default())
}
