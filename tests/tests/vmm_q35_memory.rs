//! One `flotilla-vmm -machine q35` on a test host, with Debian's unmodified cloud kernel: memory that comes and goes, a file that is memory, and disks that
//! another process serves.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tests::console::Console;
use tests::host::Host;
use tests::qmp::Qmp;
use tests::scenario::{BOOT, Guest, Outcome, SOON, Vmm, check, host_with_vmm, step};

/// How long Linux may take to move what lies in a stretch of memory, or to let a device go.
const SLOW: Duration = Duration::from_secs(120);
/// What is handed out, at most.
const MORE: u64 = 256 << 20;
/// The program that serves disks, and where a host gets it.
const SERVER: &str = "/usr/bin/qemu-storage-daemon";
const SERVED: &str = "/var/lib/served";

/// Waits until `command` prints `wanted` in the guest.
fn until(console: &mut Console, command: &str, wanted: &str) -> Outcome {
    let line = format!(
        "i=0; while [ $((i=i+1)) -lt 150 ]; do r=$({command}); [ \"$r\" = '{wanted}' ] && break; busybox sleep 0.2; done; echo \"$r\""
    );
    let got = console.shell(&line, SLOW)?;
    check(got == wanted, || format!("{command}: {got:?} and not {wanted:?}"))
}

/// KiB of memory that Debian has, and of it on the second node.
fn total(console: &mut Console) -> Outcome<(u64, u64)> {
    let show =
        "busybox awk '/MemTotal/ { print $(NF - 1) }' /proc/meminfo /sys/devices/system/node/node1/meminfo";
    let said = console.shell(show, SOON)?;
    let (all, node) = said.split_once('\n').ok_or_else(|| format!("MemTotal: {said:?}"))?;
    Ok((all.trim().parse()?, node.trim().parse()?))
}

/// Asks for so many bytes, and waits until Debian has taken or given them: until so many KiB more than `before` are there, of all and of the node.
fn hand_out(qmp: &mut Qmp, console: &mut Console, bytes: u64, before: (u64, u64)) -> Outcome {
    qmp.execute("set-viomem", &json!({ "id": "mem0", "requested-size": bytes }), SOON)?;
    let (mut stands, mut now) = (Value::Null, before);
    // Linux keeps some of it for what it has to know of the rest, and counts what it had given away for a moment.
    let near = |now: u64, before: u64| now.abs_diff(before + (bytes >> 10)) <= 6144;
    for _ in 0..120 {
        stands = qmp.execute("get-viomem", &json!({ "id": "mem0" }), SOON)?;
        // It has the blocks before it counts them.
        now = total(console)?;
        if stands["plugged-size"] == bytes && near(now.0, before.0) && near(now.1, before.1) {
            return Ok(());
        }
        console.shell("busybox sleep 1", SOON)?;
    }
    Err(format!("asked for {bytes} bytes: {stands}, MemTotal {before:?} kB and then {now:?}").into())
}

/// Memory of the second node grows, is used, and goes back.
fn memory(qmp: &mut Qmp, console: &mut Console) -> Outcome {
    // The tables have said where something may come.
    let said = console.shell("busybox dmesg | grep 'SRAT: Node 1 PXM 1 .*hotplug' | wc -l", SOON)?;
    check(said == "1", || format!("{said} lines of SRAT name memory that may come"))?;
    check(console.shell("cat /sys/devices/system/node/online", SOON)? == "0-1", || "no two nodes".into())?;
    // Only what holds nothing of the kernel's can go back for sure.
    console.shell("echo online_movable > /sys/devices/system/memory/auto_online_blocks", SOON)?;
    let before = total(console)?;
    for round in 0..2 {
        hand_out(qmp, console, MORE, before)?;
        if round == 0 {
            // More than fits into what there was before.
            let fill = "mount -o remount,size=90% /tmp && head -c 200M /dev/zero > /tmp/much && busybox du -m /tmp/much | cut -f 1; rm /tmp/much";
            let filled = console.shell(fill, SLOW)?;
            check(filled == "200", || format!("{filled} MiB fit"))?;
        }
        hand_out(qmp, console, 0, before)?;
    }
    Ok(())
}

/// A file of the host's holds a file system, which Debian mounts as memory.
fn file(host: &Host, console: &mut Console) -> Outcome {
    let read = console
        .shell("mkdir -p /run/pmem && mount -t ext4 /dev/pmem0 /run/pmem && cat /run/pmem/hello", SOON)?;
    check(read == "from the host", || format!("the guest reads {read:?}"))?;
    console.shell("echo from the guest > /run/pmem/back && umount /run/pmem", SOON)?;
    let back = host.ok("debugfs -R 'cat /back' /var/lib/images/pmem.img 2>/dev/null")?;
    check(back.trim() == "from the guest", || format!("the host reads {back:?}"))
}

/// Takes the server to the host, with the libraries that it needs there. False: this machine has none.
fn take_server(host: &Host) -> Outcome<bool> {
    if !Path::new(SERVER).exists() {
        println!("SKIPPED: no qemu-storage-daemon to serve a disk");
        return Ok(false);
    }
    let pack = format!(
        "tar -chf - -C / $(for f in {SERVER} $(ldd {SERVER} | grep -o '/[^ ]*'); do echo ${{f#/}}; done)"
    );
    let packed = Command::new("sh").args(["-c", &pack]).output()?;
    check(packed.status.success(), || String::from_utf8_lossy(&packed.stderr).into_owned())?;
    host.write("/var/lib/server.tar", packed.stdout)?;
    host.ok(&format!("mkdir -p {SERVED} && tar -xf /var/lib/server.tar -C {SERVED}"))?;
    Ok(true)
}

/// Serves a new image of 16 MiB under `name`; returns when it listens.
fn serve(host: &Host, name: &str) -> Outcome {
    let run = format!(
        "{SERVED}/lib64/ld-linux-x86-64.so.2 --library-path {SERVED}/lib/x86_64-linux-gnu:{SERVED}/usr/lib/x86_64-linux-gnu {SERVED}{SERVER}"
    );
    host.ok(&format!(
        "cd {SERVED} && head -c 16M /dev/urandom > {name}.img && (setsid {run} \
         --blockdev driver=file,node-name=f,filename={name}.img,locking=off --blockdev driver=raw,node-name=d,file=f \
         --export type=vhost-user-blk,id=e,addr.type=unix,addr.path={name}.sock,node-name=d,writable=on,num-queues=2 \
         < /dev/null > {name}.out 2>&1 & echo $! > {name}.pid)"
    ))?;
    host.eventually(SOON, &format!("test -S {SERVED}/{name}.sock"))?;
    Ok(())
}

/// Debian reads what is in the image, and writes something that the host finds there.
fn drives(host: &Host, console: &mut Console, disk: &str, name: &str) -> Outcome {
    let sum = || host.ok(&format!("md5sum < {SERVED}/{name}.img | cut -d ' ' -f 1"));
    until(console, &format!("cat /sys/class/block/{disk}/size 2>&1"), "32768")?;
    let (read, holds) = (console.shell(&format!("busybox md5sum < /dev/{disk}"), SLOW)?, sum()?);
    check(read.starts_with(holds.trim()), || format!("{disk}: the guest reads {read}, not {holds}"))?;
    let write = format!(
        "head -c 1M /dev/urandom | dd of=/dev/{disk} bs=1M seek=7 conv=notrunc,fsync iflag=fullblock 2>/dev/null; \
         echo 3 > /proc/sys/vm/drop_caches; busybox md5sum < /dev/{disk}"
    );
    let (wrote, found) = (console.shell(&write, SLOW)?, sum()?);
    check(wrote.starts_with(found.trim()) && found != holds, || {
        format!("{disk}: the guest wrote {wrote}, and the host finds {found} where {holds} was")
    })
}

/// A disk that another process serves comes to a root port and goes.
fn comes_and_goes(host: &Host, qmp: &mut Qmp, console: &mut Console) -> Outcome {
    let addr = json!({ "type": "unix", "data": { "path": format!("{SERVED}/hot.sock") } });
    let chardev =
        json!({ "id": "c", "backend": { "type": "socket", "data": { "addr": addr, "server": false } } });
    qmp.execute("chardev-add", &chardev, SOON)?;
    for id in ["served1", "served2"] {
        let disk = json!({ "id": id, "driver": "vhost-user-blk-pci", "chardev": "c", "num-queues": 2, "bus": "pcie.5", "addr": "0x0" });
        qmp.execute("device_add", &disk, SOON)?;
        drives(host, console, "vdc", "hot")?;
        qmp.execute("device_del", &json!({ "id": id }), SOON)?;
        qmp.wait(SLOW, |name, data| name == "DEVICE_DELETED" && data["device"] == id)?;
        until(console, "ls /sys/class/block | grep -c vdc", "0")?;
    }
    qmp.execute("chardev-remove", &json!({ "id": "c" }), SOON)?;
    Ok(())
}

#[test]
fn debian_takes_memory_and_gives_it_back_mounts_a_file_and_drives_served_disks() -> Outcome {
    let host = host_with_vmm("vmm-q35-memory")?;
    let guest = Guest::new(&host, "memory", 1)?;
    host.ok(
        "mkdir -p /run/tree && echo from the host > /run/tree/hello && truncate -s 64M /var/lib/images/pmem.img && \
         mke2fs -q -F -t ext4 -b 4096 -d /run/tree /var/lib/images/pmem.img",
    )?;
    let is_served = take_server(&host)?;
    let served = if is_served {
        ["cold", "hot"].into_iter().try_for_each(|name| serve(&host, name))?;
        format!(
            "-chardev socket,id=cold,path={SERVED}/cold.sock \
             -device vhost-user-blk-pci,id=cold,chardev=cold,num-queues=2,bus=pcie.0,addr=0x7"
        )
    } else {
        String::new()
    };
    let arguments = format!(
        "-machine q35,mem-share=on -m 256M -smp 2 -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz -append '{}' \
         -object memory-backend-ram,id=ram0,size=128M -numa node,nodeid=0,cpus=0,memdev=ram0 \
         -object memory-backend-ram,id=ram1,size=128M -numa node,nodeid=1,cpus=1,memdev=ram1 \
         -object memory-backend-ram,id=more,size=256M -device virtio-mem-pci,id=mem0,memdev=more,node=1,bus=pcie.0,addr=0x3 \
         -object memory-backend-file,id=file,size=64M,mem-path=/var/lib/images/pmem.img,share=on \
         -device virtio-pmem-pci,id=pmem0,memdev=file,bus=pcie.0,addr=0x4 \
         -device pcie-root-port,port=0x5,addr=0x5,bus=pcie.0,id=pcie.5 \
         -drive file={},id=rootfs,readonly=off,direct=off -device virtio-blk-pci,drive=rootfs,id=rootfs,bus=pcie.0,addr=0x1 \
         -serial socket,path={{dir}}/console.sock,server,nowait {served}",
        guest.append(),
        guest.disk
    );
    step("boot");
    let vmm = Vmm::start(&host, "memory", &arguments)?;
    let mut console = vmm.console()?;
    console.expect("guest memory up, uptime", BOOT)?;
    let mut qmp = vmm.qmp()?;
    // What the kernel has to say would get into answers.
    console.shell("busybox dmesg -n 1", SOON)?;

    step("memory that comes and goes");
    memory(&mut qmp, &mut console)?;
    let refused = qmp.execute("device_del", &json!({ "id": "mem0" }), SOON).err().map(|e| e.to_string());
    check(refused.as_ref().is_some_and(|why| why.contains("No hot plug controller")), || {
        format!("device_del of memory: {refused:?}")
    })?;
    step("a file that is memory");
    file(&host, &mut console)?;
    if is_served {
        step("disks that another process serves");
        drives(&host, &mut console, "vdb", "cold")?;
        comes_and_goes(&host, &mut qmp, &mut console)?;
    }
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}
