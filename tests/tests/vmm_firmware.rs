//! One `flotilla-vmm -machine q35` on a test host under Debian's OVMF: it starts a kernel that it is given, and a Debian's own disk by the loader there,
//! which keeps its place in the firmware's list; devices come and go while that Debian works.

use std::time::Duration;

use serde_json::json;
use tests::console::Console;
use tests::host::Host;
use tests::plug::{SPARE, bind, gone, in_guest, on_host, until};
use tests::qmp::Qmp;
use tests::scenario::{BOOT, Outcome, SOON, Vmm, check, host_with_vmm_for_firmware, step};

/// What takes Debian's tools long on an emulated processor.
const TOOL: Duration = Duration::from_secs(120);
const DISK: &str = "/var/lib/images/debian.img";
const UP: &str = "guest debian up, uptime";

/// Makes the firmware's variables, as its package has them.
fn variables(host: &Host, name: &str) -> Outcome<String> {
    let path = format!("/var/lib/images/{name}.fd");
    host.ok(&format!("mkdir -p /var/lib/images && cp /srv/guest/OVMF_VARS_4M.fd {path}"))?;
    Ok(path)
}

/// A q35 that starts in firmware.
fn machine(variables: &str) -> String {
    format!(
        "-machine q35 -drive if=pflash,unit=0,readonly=on,file=/srv/guest/OVMF_CODE_4M.fd -drive if=pflash,unit=1,file={variables} \
         -serial socket,path={{dir}}/console.sock,server,nowait"
    )
}

/// Waits until the firmware starts something of this name from its list.
fn starts(console: &mut Console, name: &str) -> Outcome {
    let line = console.expect_line("BdsDxe: starting Boot", BOOT)?;
    check(line.contains(&format!("\"{name}\"")), || format!("no {name}: {line}"))
}

/// What Debian says it was started by.
fn started_by(console: &mut Console) -> Outcome<String> {
    let ask =
        "efibootmgr | sed -n \"s/^Boot$(efibootmgr | sed -n 's/^BootCurrent: //p')[* ]*//p\" | cut -f 1";
    Ok(console.shell(ask, SOON)?)
}

#[test]
fn ovmf_starts_the_kernel_it_is_given() -> Outcome {
    let host = host_with_vmm_for_firmware("vmm-firmware-kernel")?;
    let line = machine(&variables(&host, "kernel")?)
        + " -m 256M -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz -append 'console=ttyS0 mitigations=off noxsave guest.probe'";
    step("firmware and a kernel");
    let vmm = Vmm::start(&host, "kernel", &line)?;
    let mut console = vmm.console()?;
    console.expect("efi: EFI v", BOOT)?;
    console.expect("ACPI: RSDP", BOOT)?;
    console.expect("probe: block", BOOT)?;
    check(vmm.exit(BOOT)? == 0, || "not 0".into())
}

/// A disk, a NIC and a disk of the host's come to a guest that works, are used, and go.
fn devices(host: &Host, qmp: &mut Qmp, console: &mut Console) -> Outcome {
    let execute = |qmp: &mut Qmp, command: &str, arguments| qmp.execute(command, &arguments, SOON);
    console.shell(
        "(while :; do dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct; dd if=/dev/zero of=/root/load bs=64k count=4 conv=fsync; \
         busybox sleep 0.1; done > /dev/null 2>&1 & echo $! > /run/load)",
        SOON,
    )?;

    step("a disk, under load");
    let file = json!({ "driver": "file", "filename": "/var/lib/images/hot.img" });
    let node = json!({ "node-name": "hot", "driver": "raw", "file": file, "cache": { "direct": false } });
    execute(qmp, "blockdev-add", node)?;
    let disk =
        json!({ "id": "hot", "driver": "virtio-blk-pci", "drive": "hot", "bus": "pcie.5", "addr": "0x0" });
    execute(qmp, "device_add", disk)?;
    until(console, "cat /sys/class/block/vdb/size 2>&1", "8192")?;
    let sum = host.ok("md5sum < /var/lib/images/hot.img")?;
    let read = console.shell("md5sum < /dev/vdb", SOON)?;
    check(read.trim() == sum.trim(), || format!("read {read}, not {sum}"))?;
    execute(qmp, "device_del", json!({ "id": "hot" }))?;
    gone(qmp, "hot")?;
    execute(qmp, "blockdev-del", json!({ "node-name": "hot" }))?;
    until(console, "ls /sys/class/block | grep -c vdb", "0")?;

    step("a NIC, under load");
    execute(qmp, "netdev_add", json!({ "id": "nic", "type": "tap", "ifname": "tap-hot" }))?;
    let nic = json!({ "id": "nic", "driver": "virtio-net-pci", "netdev": "nic", "mac": "52:54:00:12:34:99", "bus": "pcie.6", "addr": "0x0" });
    execute(qmp, "device_add", nic)?;
    // Whatever it is called.
    let find = "grep -sl 52:54:00:12:34:99 /sys/class/net/*/address | cut -d / -f 5";
    until(console, &format!("{find} | grep -c ."), "1")?;
    console.shell(&format!("n=$({find}); ip link set $n up && ip address add 10.9.0.2/24 dev $n"), SOON)?;
    host.eventually(SOON, "ping -c 3 -W 2 10.9.0.2")?;
    execute(qmp, "device_del", json!({ "id": "nic" }))?;
    gone(qmp, "nic")?;
    execute(qmp, "netdev_del", json!({ "id": "nic" }))?;

    step("a disk of the host's, under load");
    let holds = on_host(host, true)?;
    bind(host, "vfio-pci")?;
    let spare = json!({ "id": "spare", "driver": "vfio-pci", "host": SPARE, "bus": "pcie.7", "addr": "0x0" });
    execute(qmp, "device_add", spare)?;
    let wrote = in_guest(console, &holds, "MSI")?;
    execute(qmp, "device_del", json!({ "id": "spare" }))?;
    gone(qmp, "spare")?;
    bind(host, "virtio-pci")?;
    check(on_host(host, false)? == wrote, || {
        "the host finds something else than the guest has written".into()
    })?;

    let said = console.shell(
        "read -r old < /sys/class/block/vda/stat; busybox sleep 3; read -r new < /sys/class/block/vda/stat; [ \"$old\" != \"$new\" ] && \
         kill $(cat /run/load) && dmesg -l emerg,alert,crit,err | grep -i 'pci\\|virtio\\|vd[ab]\\|i/o' || :",
        SOON,
    )?;
    check(said.is_empty(), || format!("Debian says: {said}"))
}

#[test]
fn a_debian_disk_boots_by_its_own_loader_and_keeps_its_place_in_the_list() -> Outcome {
    let host = host_with_vmm_for_firmware("vmm-firmware-disk")?;
    let variables = variables(&host, "disk")?;
    host.ok(&format!(
        "cp --sparse=always /srv/guest/debian.img {DISK}; head -c 4M /dev/urandom > /var/lib/images/hot.img; \
         ip tuntap add tap-hot mode tap vnet_hdr && ip address add 10.9.0.1/24 dev tap-hot && ip link set tap-hot up"
    ))?;
    let line = machine(&variables)
        + &format!(
            " -m 512M -smp 1 -drive file={DISK},id=disk,readonly=off,direct=off -device virtio-blk-pci,drive=disk,id=disk,bus=pcie.0,addr=0x2,bootindex=1 \
             -device pcie-root-port,port=0x5,addr=0x5,bus=pcie.0,id=pcie.5 -device pcie-root-port,port=0x6,addr=0x6,bus=pcie.0,id=pcie.6 \
             -device pcie-root-port,port=0x7,addr=0x7,bus=pcie.0,id=pcie.7"
        );
    step("a disk that the firmware does not know");
    let vmm = Vmm::start(&host, "disk", &line)?;
    let mut console = vmm.console()?;
    starts(&mut console, "UEFI Misc Device")?;
    console.expect(UP, BOOT)?;
    let mut qmp = vmm.qmp()?;
    devices(&host, &mut qmp, &mut console)?;

    step("the loader goes onto the list, as an installer puts it there");
    console
        .shell("grub-install --no-uefi-secure-boot > /run/said 2>&1 || { cat /run/said; exit 1; }", TOOL)?;
    check(started_by(&mut console)? == "UEFI Misc Device", || "started otherwise".into())?;

    step("reboot");
    console.enter("reboot")?;
    qmp.wait(TOOL, |name, _| name == "RESET")?;
    starts(&mut console, "debian")?;
    console.expect(UP, BOOT)?;
    let by = started_by(&mut console)?;
    check(by == "debian", || format!("started by {by:?}"))?;

    step("the power button");
    qmp.ask("system_powerdown")?;
    let event = qmp.wait(TOOL, |name, _| name == "SHUTDOWN")?;
    check(event["data"]["guest"] == true && event["data"]["reason"] == "guest-shutdown", || {
        event.to_string()
    })?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    drop(vmm);

    step("another process finds the list as it was left");
    let vmm = Vmm::start(&host, "disk", &line)?;
    starts(&mut vmm.console()?, "debian")?;
    vmm.qmp()?.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}
