//! Hot-plug without end in a real guest: five hundred rounds of a disk and a NIC, on a test host, while Debian reads and writes its
//! own disk and answers pings on both NICs. The VMM holds no more at the end than at the beginning, and the guest's log is clean.
//! (`vmm_guest_plug` does the same with the small guest, without a test host.)

use std::time::Instant;

use serde_json::json;
use tests::console::Console;
use tests::host::Host;
use tests::qmp::Qmp;
use tests::scenario::{BOOT, Guest, Outcome, SOON, Vmm, check, host_with_vmm, step};

const ROUNDS: u32 = 500;
/// Rounds before the first count: threads and buffers that come with the first use.
const WARM_UP: u32 = 20;
/// Every so many rounds the guest is asked what it sees.
const LOOK_EVERY: u32 = 125;
/// Bytes by which the VMM's own memory may differ; a page a round would be more.
const SLACK: u64 = 1 << 20;
/// glibc keeps the stacks of threads that have ended (2 MiB and a guard page each) for those to come: whether two overlap once more than in the
/// warm-up is chance, and such a stack is mapped, not resident.
const KEPT_STACK: u64 = (2 << 20) + 4096;
/// Size of the disk, in sectors of 512 bytes.
const SECTORS: &str = "2048";

/// What stays at the host when something leaks.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: u64,
    /// But for the kernel's own that do I/O for the VMM: they come and go.
    threads: u64,
    interfaces: u64,
    /// Threads of the kernel that serve a vhost device.
    vhosts: u64,
}

/// What the VMM holds, and the size of its own memory in bytes: resident, mapped. Guest RAM, in the one large mapping, is not the VMM's.
fn held(host: &Host, vmm: &Vmm<'_>) -> Outcome<(Held, [u64; 2])> {
    let text = host.ok(&format!(
        "pid=$(cat {}); ls /proc/$pid/fd | wc -l; grep -L '^iou-' /proc/$pid/task/*/comm 2> /dev/null | wc -l; ls /sys/class/net | wc -l; \
         pgrep -c -x vhost-$pid || :; \
         awk '/^Size:/ {{ guest = $2 >= 131072; if (!guest) mapped += $2 }} /^Rss:/ && !guest {{ rss += $2 }} END {{ print rss, mapped }}' /proc/$pid/smaps",
        vmm.path("pid")
    ))?;
    let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [descriptors, threads, interfaces, vhosts, rss, mapped] = numbers[..] else {
        return Err(text.into());
    };
    Ok((Held { descriptors, threads, interfaces, vhosts }, [rss << 10, mapped << 10]))
}

/// A disk and a NIC, which the kernel serves every other time, come and go. `look` runs while they are there.
fn round(qmp: &mut Qmp, vhost: bool, look: impl FnOnce() -> Outcome) -> Outcome {
    let file = json!({ "driver": "file", "filename": "/root/plugged" });
    let node = json!({ "node-name": "disk", "file": file, "cache": { "direct": false } });
    qmp.execute("blockdev-add", &node, SOON)?;
    qmp.execute("device_add", &json!({ "id": "disk", "driver": "virtio-blk-mmio", "addr": "0x1" }), SOON)?;
    let netdev = json!({ "id": "nic", "ifname": "tap-1", "vhost": vhost });
    qmp.execute("netdev_add", &netdev, SOON)?;
    let device = json!({ "id": "nic", "driver": "virtio-net-mmio", "netdev": "nic", "addr": "0x1" });
    qmp.execute("device_add", &device, SOON)?;
    look()?;
    qmp.execute("device_del", &json!({ "id": "nic" }), SOON)?;
    qmp.execute("device_del", &json!({ "id": "disk" }), SOON)?;
    Ok(())
}

/// Waits until the guest sees a disk of so many sectors, and a link or none.
fn sees(console: &mut Console, sectors: &str, link: &str) -> Outcome {
    // Without a process for each look: the guest is slow and busy.
    let look = "read size < /sys/class/block/vdb/size; read link < /sys/class/net/eth1/carrier";
    let line = format!(
        "i=0; while {look}; [ \"$size $link\" != '{sectors} {link}' ] && [ $((i += 1)) -lt 300 ]; do busybox usleep 50000; done; echo $size $link"
    );
    let text = console.shell(&line, SOON)?;
    check(text == format!("{sectors} {link}"), || format!("the guest sees {text}, not {sectors} {link}"))
}

/// Errors in the guest's log. A guest whose processor stood still for a second says so of its clocks ("Long readout interval"): that is
/// the emulated host's doing.
fn complaints(console: &mut Console) -> Outcome<String> {
    Ok(console.shell(
        "dmesg -l emerg,alert,crit,err; dmesg | grep -v 'Long readout interval' | grep -i 'watchdog\\|blocked for\\|unexpected\\|stall' || :",
        SOON,
    )?)
}

/// Packets sent, and answered, as `ping` says at its end.
fn pings(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().find(|line| line.contains("transmitted"))?;
    let mut words = line.split_whitespace();
    Some((words.next()?.parse().ok()?, words.nth(2)?.parse().ok()?))
}

#[test]
fn five_hundred_rounds_under_load_leave_nothing_in_vmm_host_or_guest() -> Outcome {
    let host = host_with_vmm("vmm-rounds")?;
    let guest = Guest::new(&host, "rounds", 1)?;
    host.ok(
        "modprobe vhost_net && head -c 1M /dev/urandom > /root/plugged && for n in 0 1; do ip tuntap add tap-$n mode tap && \
         ip address add 10.9.$n.1/24 dev tap-$n && ip link set tap-$n up || exit 1; done",
    )?;
    let sum = host.ok("sha256sum < /root/plugged")?.trim().to_owned();
    let vmm = Vmm::start(
        &host,
        "rounds",
        &format!(
            "-machine microvm -m 256M -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz -append '{}' \
             -drive file={},id=disk0,readonly=off,direct=off -device virtio-blk-device,drive=disk0,id=disk0 \
             -netdev tap,id=net0,ifname=tap-0 -device virtio-net-device,netdev=net0,id=net0 \
             -serial socket,path={{dir}}/console.sock,server,nowait",
            guest.append(),
            guest.disk
        ),
    )?;
    let mut console = vmm.console()?;
    step("boot");
    console.expect("guest rounds up, uptime", BOOT)?;
    let mut qmp = vmm.qmp()?;
    console.shell("busybox ip link set eth1 up && busybox ip addr add 10.9.1.2/24 dev eth1", SOON)?;

    step("load");
    console.shell(
        "(while :; do dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct; \
         dd if=/dev/zero of=/root/load bs=64k count=16 conv=fsync; done > /dev/null 2>&1 &)",
        SOON,
    )?;
    for (n, address) in [(0, guest.address.as_str()), (1, "10.9.1.2")] {
        host.ok(&format!("(setsid ping -q -A -s 1000 {address} < /dev/null > /root/ping-{n} 2>&1 & echo $! > /root/ping-{n}.pid)"))?;
    }
    for n in 0..WARM_UP {
        round(&mut qmp, n % 2 == 1, || Ok(()))?;
    }
    sees(&mut console, "0", "0")?;
    let (before, memory_before) = held(&host, &vmm)?;
    let complaints_before = complaints(&mut console)?;
    step(format!("{ROUNDS} rounds; {before:?}, {memory_before:?}"));
    let began = Instant::now();
    for n in 1..=ROUNDS {
        round(&mut qmp, n % 2 == 1, || {
            if n % LOOK_EVERY > 1 {
                return Ok(());
            }
            // Both kinds of NIC.
            sees(&mut console, SECTORS, "1")?;
            let seen = console.shell("dd if=/dev/vdb bs=64k iflag=direct 2> /dev/null | sha256sum", SOON)?;
            check(seen == sum, || format!("round {n}: {seen} of the disk, not {sum}"))?;
            host.eventually(SOON, "ping -c 1 -W 1 10.9.1.2")?;
            step(format!("round {n}: {:?} a round", began.elapsed() / n));
            Ok(())
        })?;
        if n % LOOK_EVERY <= 1 {
            sees(&mut console, "0", "0")?;
        }
    }
    let (after, memory_after) = held(&host, &vmm)?;
    step(format!("done; {after:?}, {memory_after:?}"));
    check(before == after, || format!("{before:?} before, {after:?} after"))?;
    for (n, slack) in [SLACK, SLACK + KEPT_STACK].into_iter().enumerate() {
        check(memory_after[n] <= memory_before[n] + slack, || {
            format!("memory: {memory_before:?} before, {memory_after:?} after")
        })?;
    }
    let left = host.ok(&format!("ls -l /proc/$(cat {})/fd", vmm.path("pid")))?;
    check(!left.contains("/root/plugged") && !left.contains("vhost-net"), || left.clone())?;
    // Nobody holds the tap: it has no carrier.
    host.ok("test $(cat /sys/class/net/tap-1/carrier) = 0 && test $(cat /sys/class/net/tap-0/carrier) = 1")?;

    step("the load went on, and the guest complains about nothing");
    host.ok("kill -INT $(cat /root/ping-0.pid) $(cat /root/ping-1.pid)")?;
    // Nothing is lost on the NIC that stays, but for what was under way at the end; the other comes and goes.
    for (n, least, lost) in [(0, 100, 5), (1, 10, u64::MAX)] {
        let file = format!("/root/ping-{n}");
        host.eventually(SOON, &format!("grep transmitted {file}"))?;
        let text = host.ok(&format!("cat {file}"))?;
        let (sent, answered) = pings(&text).ok_or_else(|| text.clone())?;
        step(format!("NIC {n}: {sent} sent, {answered} answered"));
        check(answered > least && sent.saturating_sub(answered) < lost, || text)?;
    }
    // Its disk's counters go on: a process of the load may just have ended, or hang.
    console.shell(
        "read -r old < /sys/class/block/vda/stat; i=0; while read -r new < /sys/class/block/vda/stat; \
         [ \"$new\" = \"$old\" ] && [ $((i += 1)) -lt 200 ]; do busybox usleep 50000; done; [ $i -lt 200 ]",
        SOON,
    )?;
    let complaints_after = complaints(&mut console)?;
    check(complaints_before == complaints_after, || {
        format!("in the guest's log:\n{complaints_after}\nbefore the rounds:\n{complaints_before}")
    })?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || vmm.output().unwrap_or_default())
}
