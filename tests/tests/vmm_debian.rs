//! One `flotilla-vmm`, by hand, on a test host: Debian's unmodified cloud kernel to userspace, every way to its console,
//! its disks, its life over QMP.

use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;
use tests::host::Host;
use tests::scenario::{BOOT, EMULATED, Guest, Outcome, SOON, Vmm, check, host_with_vmm};

/// One host for all tests of this file; they run side by side on it.
fn host() -> Outcome<&'static Host> {
    static HOST: OnceLock<Result<Host, String>> = OnceLock::new();
    HOST.get_or_init(|| host_with_vmm("vmm-debian").map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| error.as_str().into())
}

const KERNEL: &str = "-machine microvm -m 256M -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz";
const CONSOLE: &str = "-serial socket,path={dir}/console.sock,server,nowait";

/// Arguments that boot a guest from its own disk.
fn booting(guest: &Guest) -> String {
    format!(
        "{KERNEL} -append '{}' -drive file={},id=disk0,readonly=off,direct=off -device virtio-blk-device,drive=disk0,id=disk0",
        guest.append(),
        guest.disk
    )
}

fn up(guest: &Guest) -> String {
    format!("guest {} up, uptime", guest.name)
}

#[test]
fn debian_boots_to_a_shell_on_two_processors_and_powers_off() -> Outcome {
    let host = host()?;
    let guest = Guest::new(host, "smp", 1)?;
    let vmm = Vmm::start(host, "smp", &format!("{} -smp 2 {CONSOLE}", booting(&guest)))?;
    let mut qmp = vmm.qmp()?;
    let mut console = vmm.console()?;
    console.expect(&up(&guest), BOOT)?;
    let cpus = qmp.ask("query-cpus")?;
    check(cpus.as_array().is_some_and(|cpus| cpus.len() == 2), || format!("query-cpus: {cpus}"))?;
    check(console.shell("nproc", SOON)? == "2", || "the guest has another number of processors".into())?;
    check(console.shell("cat /sys/class/block/vda/size", SOON)? == "1048576", || "another disk".into())?;
    // Every device once: through ACPI here, and not a second time from the command line.
    let drivers = console.shell("ls /sys/bus/virtio/devices | wc -l", SOON)?;
    let disks = console.shell("ls -d /sys/class/block/vd? | wc -l", SOON)?;
    check(drivers == "8" && disks == "6", || format!("{drivers} virtio devices, {disks} disks"))?;
    console.enter("busybox poweroff -f")?;
    let event = qmp.wait(SOON, |name, _| name == "SHUTDOWN")?;
    check(event["data"]["guest"] == true && event["data"]["reason"] == "guest-shutdown", || {
        event.to_string()
    })?;
    let code = vmm.exit(SOON)?;
    check(code == 0, || format!("exit code {code}"))
}

#[test]
fn reboot_ends_the_vm_with_its_own_reason() -> Outcome {
    let host = host()?;
    let guest = Guest::new(host, "reboot", 2)?;
    let vmm = Vmm::start(host, "reboot", &format!("{} {CONSOLE}", booting(&guest)))?;
    let mut qmp = vmm.qmp()?;
    let mut console = vmm.console()?;
    console.expect(&up(&guest), BOOT)?;
    console.enter("busybox reboot -f")?;
    let event = qmp.wait(SOON, |name, _| name == "SHUTDOWN")?;
    check(event["data"]["guest"] == true && event["data"]["reason"] == "guest-reset", || event.to_string())?;
    let code = vmm.exit(SOON)?;
    check(code == 0, || format!("exit code {code}"))
}

#[test]
fn a_vm_started_with_minus_s_waits_for_cont_then_stops_and_quits_on_command() -> Outcome {
    let host = host()?;
    let guest = Guest::new(host, "paused", 3)?;
    let vmm = Vmm::start(host, "paused", &format!("{} -S {CONSOLE}", booting(&guest)))?;
    let mut qmp = vmm.qmp()?;
    let status = qmp.ask("query-status")?;
    check(status["running"] == false, || status.to_string())?;
    let mut console = vmm.console()?;
    check(console.expect("Linux", Duration::from_secs(2)).is_err(), || "the guest runs before cont".into())?;
    qmp.ask("cont")?;
    qmp.wait(SOON, |name, _| name == "RESUME")?;
    console.expect(&up(&guest), BOOT)?;
    qmp.ask("stop")?;
    qmp.wait(SOON, |name, _| name == "STOP")?;
    let status = qmp.ask("query-status")?;
    check(status["status"] == "paused", || status.to_string())?;
    console.enter("echo still''there")?;
    check(console.expect("stillthere", Duration::from_secs(2)).is_err(), || {
        "the guest runs while stopped".into()
    })?;
    qmp.ask("cont")?;
    console.expect("stillthere", SOON)?;
    qmp.ask("quit")?;
    let event = qmp.wait(SOON, |name, _| name == "SHUTDOWN")?;
    check(event["data"]["guest"] == false && event["data"]["reason"] == "host-qmp-quit", || {
        event.to_string()
    })?;
    let code = vmm.exit(SOON)?;
    check(code == 0, || format!("exit code {code}"))
}

#[test]
fn a_signal_ends_the_vm_in_order() -> Outcome {
    let host = host()?;
    let vmm = Vmm::start(host, "signal", &format!("{KERNEL} -append console=ttyS0 -S {CONSOLE}"))?;
    let mut qmp = vmm.qmp()?;
    host.ok(&format!("kill $(cat {})", vmm.path("pid")))?;
    let event = qmp.wait(SOON, |name, _| name == "SHUTDOWN")?;
    let reason = event["data"]["reason"].as_str().unwrap_or_default();
    check(event["data"]["guest"] == false && reason.contains("signal"), || event.to_string())?;
    let code = vmm.exit(SOON)?;
    check(code == 0, || format!("exit code {code}"))?;
    host.ok(&format!("! test -e {} && ! test -e {}", vmm.path("qmp.sock"), vmm.path("console.sock")))?;
    Ok(())
}

/// Debian's kernel takes no `virtio_mmio.device=` from the command line, so without ACPI it must see no device at all:
/// neither window may show up by other ways. (What a kernel that does take it sees is unit-tested in the VMM.)
#[test]
fn without_acpi_debian_boots_and_sees_no_devices() -> Outcome {
    let host = host()?;
    let guest = Guest::new(host, "noacpi", 4)?;
    let arguments = booting(&guest).replace("console=ttyS0", "console=ttyS0 acpi=off guest.probe");
    let vmm = Vmm::start(host, "noacpi", &format!("{arguments} {CONSOLE}"))?;
    let seen = vmm.console()?.expect_line("probe: block", BOOT)?;
    check(!seen.contains("vda") && !seen.contains("eth0") && seen.contains("cpus 1"), || seen.clone())
}

#[test]
fn the_serial_line_goes_to_standard_output_a_file_and_a_pty() -> Outcome {
    let host = host()?;
    let probe = format!("{KERNEL} -append '{EMULATED} guest.probe'");
    let vmm = Vmm::start(host, "stdio", &format!("{probe} -serial stdio"))?;
    check(vmm.exit(BOOT)? == 0, || "not 0".into())?;
    check(vmm.output()?.contains("probe: block"), || vmm.output().unwrap_or_default())?;

    let vmm = Vmm::start(host, "file", &format!("{probe} -serial file,path={{dir}}/serial"))?;
    check(vmm.exit(BOOT)? == 0, || "not 0".into())?;
    host.ok(&format!("grep 'probe: block' {}", vmm.path("serial")))?;

    let vmm = Vmm::start(host, "pty", &format!("{probe} -S -serial pty"))?;
    let mut qmp = vmm.qmp()?;
    let line = host.eventually(SOON, &format!("grep -o '/dev/pts/[0-9]*' {}", vmm.path("out")))?;
    let pty = line.lines().next().unwrap_or_default();
    let mut console = tests::console::Console::new(host.talk(&format!("exec socat - {pty},raw,echo=0"))?);
    qmp.ask("cont")?;
    console.expect("probe: block", BOOT)?;
    Ok(())
}

#[test]
fn data_disks_hold_what_is_written_and_read_only_ones_do_not_take_it() -> Outcome {
    let host = host()?;
    let guest = Guest::new(host, "disks", 5)?;
    host.ok(
        "cd /var/lib/images && head -c 8M /dev/urandom > direct.img && head -c 4M /dev/urandom > locked.img && \
         sha256sum direct.img locked.img > before",
    )?;
    let disk = |file: &str, n: u8, options: &str| {
        format!(
            " -drive file=/var/lib/images/{file},id=disk{n},{options} -device virtio-blk-device,drive=disk{n},id=disk{n}"
        )
    };
    let arguments = booting(&guest)
        + &disk("direct.img", 1, "readonly=off,direct=on")
        + &disk("locked.img", 2, "readonly=on,direct=off");
    let vmm = Vmm::start(host, "disks", &format!("{arguments} {CONSOLE}"))?;
    let mut console = vmm.console()?;
    console.expect(&up(&guest), BOOT)?;
    let sum = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
    let before = host.ok("cat /var/lib/images/before")?;
    let mut before = before.lines().map(sum);
    for device in ["/dev/vdb", "/dev/vdc"] {
        let read = sum(&console.shell(&format!("sha256sum {device}"), SOON)?);
        check(Some(&read) == before.next().as_ref(), || format!("{device} reads as {read}"))?;
    }
    console.shell("! dd if=/dev/zero of=/dev/vdc bs=4k count=1 conv=fsync 2>/dev/null", SOON)?;
    // Odd sizes and places: O_DIRECT wants aligned buffers, and the guest knows nothing of it.
    console
        .shell("dd if=/bin/bash of=/dev/vdb bs=512 seek=3 count=501 conv=notrunc,fsync 2>/dev/null", SOON)?;
    let written = sum(&console.shell("sync; sha256sum /dev/vdb", SOON)?);
    console.shell("echo kept > /root/note; sync", SOON)?;
    vmm.qmp()?.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    let after = host.ok("sha256sum /var/lib/images/direct.img")?;
    check(sum(&after) == written, || format!("the guest wrote {written}, the file has {after}"))?;
    host.ok("cd /var/lib/images && grep locked before | sha256sum -c")?;
    host.ok(&format!(
        "mkdir -p /mnt/disks && mount -o loop {} /mnt/disks && grep kept /mnt/disks/root/note",
        guest.disk
    ))?;
    Ok(())
}

#[test]
fn the_network_card_works_on_a_tap_by_name() -> Outcome {
    let host = host()?;
    let guest = Guest::new(host, "net", 6)?;
    host.ok("ip tuntap add tap-net mode tap vnet_hdr && ip address add 10.9.0.1/24 dev tap-net && ip link set tap-net up")?;
    let nic = "-netdev tap,id=nic0,ifname=tap-net -device virtio-net-device,netdev=nic0,id=nic0,mac=52:54:00:12:34:56";
    let vmm = Vmm::start(host, "net", &format!("{} {nic} {CONSOLE}", booting(&guest)))?;
    vmm.console()?.expect(&up(&guest), BOOT)?;
    guest.answers(host)?;
    let neighbour = host.ok(&format!("ip neigh show {}", guest.address))?;
    check(neighbour.contains("52:54:00:12:34:56"), || neighbour.clone())?;
    // Full frames both ways, and more than a ring of them.
    // One at a time (-A): answers that come in a burst while ping has no processor overflow ping's own socket. No deadline (-w): with
    // one ping goes on sending, and the last request counts as lost.
    host.ok(&format!("ping -q -A -c 300 -s 1400 -W 20 {} | grep ' 0% packet loss'", guest.address))?;
    let first = guest.uptime(host)?;
    let mut qmp = vmm.qmp()?;
    let status: Value = qmp.ask("query-status")?;
    check(status["status"] == "running", || status.to_string())?;
    check(guest.uptime(host)? >= first, || "uptime went back".into())
}

#[test]
fn daemonize_returns_when_the_vm_is_up_and_leaves_its_pid() -> Outcome {
    let host = host()?;
    let folder = "/run/vmm/daemon";
    host.ok(&format!(
        "mkdir -p {folder} && flotilla-vmm -name daemon {KERNEL} -append console=ttyS0 -S -daemonize -pidfile {folder}/pid \
         -D {folder}/log -qmp unix:{folder}/qmp.sock,server,nowait -serial file,path={folder}/serial"
    ))?;
    // The command has returned, so all of it must be there already.
    host.ok(&format!("test -S {folder}/qmp.sock && grep -q flotilla-vmm /proc/$(cat {folder}/pid)/cmdline"))?;
    let mut qmp = tests::qmp::Qmp::new(host.dial(&format!("{folder}/qmp.sock"))?, SOON)?;
    qmp.ask("quit")?;
    host.eventually(SOON, &format!("! test -e {folder}/qmp.sock"))?;
    Ok(())
}

#[test]
fn bad_arguments_are_refused_in_one_clear_line() -> Outcome {
    let host = host()?;
    host.ok("mkdir -p /root/bad/dir && seq 100000 > /root/bad/text && : > /root/bad/empty")?;
    let boot = "-machine microvm -m 256M -serial stdio";
    for (arguments, words) in [
        ("-machine microvm -frobnicate", &["frobnicate"][..]),
        (&format!("{boot} -kernel /root/bad/none"), &["/root/bad/none", "no such file"]),
        (&format!("{boot} -kernel /root/bad/dir"), &["/root/bad/dir"]),
        (&format!("{boot} -kernel /root/bad/text"), &["/root/bad/text"]),
        (&format!("{boot} -kernel /root/bad/empty"), &["/root/bad/empty"]),
        ("-machine microvm -m 64M -kernel /srv/guest/vmlinuz", &["128"]),
        ("-machine microvm -m 1024G -kernel /srv/guest/vmlinuz", &["512"]),
        ("-machine microvm -m 900G -kernel /srv/guest/vmlinuz", &["512"]),
        ("-machine nonsense -m 256M -kernel /srv/guest/vmlinuz", &["nonsense"]),
        ("-machine microvm -smp 0 -kernel /srv/guest/vmlinuz", &["smp"]),
        (
            &format!(
                "{boot} -kernel /srv/guest/vmlinuz -drive file=/root/bad/none,id=d -device virtio-blk-device,drive=d,id=d"
            ),
            &["/root/bad/none", "no such file"],
        ),
        (
            &format!(
                "{boot} -kernel /srv/guest/vmlinuz -drive file=/root/bad/dir,id=d -device virtio-blk-device,drive=d,id=d"
            ),
            &["/root/bad/dir", "directory"],
        ),
        (
            &format!(
                "{boot} -kernel /srv/guest/vmlinuz -netdev tap,id=n,ifname=nonesuch -device virtio-net-device,netdev=n,id=n"
            ),
            &["nonesuch"],
        ),
    ] {
        let output = host.refused(&format!("timeout 20 flotilla-vmm {arguments} < /dev/null"))?;
        let text = output.stderr.trim();
        let told = words.iter().all(|word| text.to_lowercase().contains(&word.to_lowercase()));
        check(told && text.lines().count() == 1 && output.code == 1, || {
            format!("flotilla-vmm {arguments}: exit {}, stderr: {text:?}", output.code)
        })?;
    }
    host.ok("! ip link show nonesuch 2>/dev/null")?;
    Ok(())
}

#[test]
fn busy_things_and_missing_rights_are_refused_too() -> Outcome {
    let host = host()?;
    let guest = Guest::new(host, "busy", 7)?;
    let first = Vmm::start(host, "busy", &format!("{} -S {CONSOLE}", booting(&guest)))?;
    first.qmp()?;
    let blk = format!(
        "-drive file={},id=disk0,readonly=off,direct=off -device virtio-blk-device,drive=disk0,id=disk0",
        guest.disk
    );
    let run = "timeout 20 flotilla-vmm";
    for (command, words) in [
        (format!("{run} {KERNEL} -serial stdio {blk}"), &["/var/lib/images/busy.img", "use"][..]),
        (
            format!("{run} {KERNEL} -serial stdio -qmp unix:{},server,nowait", first.path("qmp.sock")),
            &["qmp.sock", "already"],
        ),
        (
            format!("{run} {KERNEL} -serial socket,path={},server,nowait", first.path("console.sock")),
            &["console.sock", "already"],
        ),
        (
            format!("setpriv --reuid=65534 --regid=65534 --clear-groups {run} {KERNEL} -serial stdio"),
            &["/dev/kvm"],
        ),
    ] {
        let output = host.refused(&format!("{command} < /dev/null"))?;
        let text = output.stderr.trim();
        check(words.iter().all(|word| text.contains(word)) && text.lines().count() == 1, || {
            format!("{command}: exit {}, stderr: {text:?}", output.code)
        })?;
    }
    // The one that had them first keeps them.
    let status = first.qmp()?.ask("query-status")?;
    check(status["running"] == false, || status.to_string())
}
