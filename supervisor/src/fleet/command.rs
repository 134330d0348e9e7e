//! The VMM's command line from a definition: a pure function. What it makes is what `ps` shows and what a person can run by hand.

use std::path::Path;

use dbus_api::spec::{Format, Machine, VmSpec};
use uuid::Uuid;

use super::spec::{Room, mac, room};
use crate::launch::{CONSOLE_SOCKET, QMP_SOCKET};

/// Kernel command line when the definition gives none: the serial console, and an end instead of a hang after a panic.
pub const DEFAULT_APPEND: &str = "console=ttyS0 reboot=k panic=1";

/// What the definition does not say.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The VMM program.
    pub vmm: &'a Path,
    /// The VM's name.
    pub name: &'a str,
    /// The VM's identity.
    pub uuid: Uuid,
    /// Directory of its sockets.
    pub sockets: &'a Path,
    /// Name of each card's tap, in the order of the cards.
    pub taps: &'a [String],
    /// The snapshot that the VM goes on from, as another VM than the one that was saved.
    pub incoming: Option<&'a Path>,
    /// Do not start the vCPUs.
    pub paused: bool,
}

/// A device's driver on a board.
pub fn driver(machine: Machine, device: &str) -> String {
    match machine {
        Machine::Microvm => format!("virtio-{device}-device"),
        Machine::Q35 => format!("virtio-{device}-pci"),
    }
}

/// The root port that a q35's place is.
pub fn port(place: u8) -> String {
    format!("port{place}")
}

/// The board of a VM that runs, by its command line.
pub fn machine(line: &[String]) -> Option<Machine> {
    let at = line.iter().position(|word| word == "-machine")?;
    line.get(at + 1)?.parse().ok()
}

/// The command line, program first.
pub fn build(spec: &VmSpec, place: &Place<'_>) -> Vec<String> {
    let mut line = vec![place.vmm.display().to_string()];
    let mut put = |option: &str, value: String| line.extend([option.to_owned(), value]);
    put("-name", place.name.to_owned());
    put("-uuid", place.uuid.to_string());
    put("-machine", spec.machine.word().to_owned());
    put("-smp", spec.cpus.to_string());
    put("-m", format!("{}M", spec.memory.0 >> 20));
    if let Some(firmware) = &spec.firmware {
        let image = |path: &Path| quote(&path.display().to_string());
        put("-drive", format!("if=pflash,unit=0,readonly=on,file={}", image(&firmware.code)));
        put("-drive", format!("if=pflash,unit=1,file={}", image(&firmware.vars)));
    }
    if let Some(kernel) = &spec.kernel {
        put("-kernel", kernel.display().to_string());
        if let Some(initrd) = &spec.initrd {
            put("-initrd", initrd.display().to_string());
        }
        put("-append", append(spec));
    }
    if let Room::Ports(ports) = room(spec.machine) {
        // A guest may take its time for a device that leaves, but need not wait for somebody to think better of it.
        put("-global", "pcie-root-port.fast-unplug=1".to_owned());
        for at in 0..ports {
            let (id, slot) = (port(at), at + 1);
            put("-device", format!("pcie-root-port,id={id},port={slot:#x},bus=pcie.0,addr={slot:#x}"));
        }
    }
    // In the order of the places.
    let mut places = 0..;
    let mut behind_port = || match spec.machine {
        Machine::Microvm => String::new(),
        Machine::Q35 => format!(",bus={},addr=0x0", port(places.next().unwrap_or(u8::MAX))),
    };
    let driver = |device: &str| driver(spec.machine, device);
    for (order, (disk, at)) in spec.disks.iter().zip(spec.disk_numbers()).enumerate() {
        let path = quote(&disk.path.display().to_string());
        let (readonly, direct) = (on_off(disk.readonly), on_off(disk.direct));
        let mut drive = format!("file={path},id=disk{at},readonly={readonly},direct={direct}");
        if disk.format != Format::Raw {
            drive += &format!(",format={}", disk.format.word());
        }
        if let Some(backing) = &disk.backing {
            let path = quote(&backing.display().to_string());
            drive += &format!(",backing={path},backing-format={}", disk.backing_format.word());
        }
        if let Some(aio) = disk.aio {
            drive += &format!(",aio={}", aio.word());
        }
        if let Some(iops) = disk.iops {
            drive += &format!(",throttling.iops-total={iops}");
        }
        if disk.discard {
            drive += ",discard=unmap";
        }
        put("-drive", drive);
        let serial = disk.serial.as_ref().map(|serial| format!(",serial={serial}")).unwrap_or_default();
        // Without numbers firmware tries what it finds, in an order of its own.
        let order = spec.firmware.as_ref().map(|_| format!(",bootindex={order}")).unwrap_or_default();
        put(
            "-device",
            format!("{},drive=disk{at},id=disk{at}{serial}{order}{}", driver("blk"), behind_port()),
        );
    }
    for ((nic, at), tap) in spec.nics.iter().zip(spec.nic_numbers()).zip(place.taps) {
        put("-netdev", format!("tap,id=nic{at},ifname={tap}"));
        let mac = mac(nic, place.uuid, at);
        put("-device", format!("{},netdev=nic{at},id=nic{at},mac={mac}{}", driver("net"), behind_port()));
    }
    // They stay for good: on a slot of the root bus, the first that is free.
    let fixed = match spec.machine {
        Machine::Microvm => "",
        Machine::Q35 => ",bus=pcie.0,addr=0x0",
    };
    if spec.balloon {
        put("-device", format!("{},id=balloon0,deflate-on-oom=on{fixed}", driver("balloon")));
    }
    if spec.rng {
        put("-object", "rng-random,id=random0,filename=/dev/urandom".to_owned());
        put("-device", format!("{},rng=random0,id=rng0{fixed}", driver("rng")));
    }
    let socket = |file: &str| quote(&place.sockets.join(file).display().to_string());
    put("-qmp", format!("unix:{},server,nowait", socket(QMP_SOCKET)));
    put("-serial", format!("socket,path={},server,nowait", socket(CONSOLE_SOCKET)));
    if let Some(incoming) = place.incoming {
        put("-incoming", format!("file:{},identity=new", quote(&incoming.display().to_string())));
    }
    if place.paused {
        line.push("-S".to_owned());
    }
    line
}

/// The kernel command line of a definition, given or by default.
pub fn append(spec: &VmSpec) -> String {
    match &spec.append {
        Some(append) => append.clone(),
        None if spec.initrd.is_none() && !spec.disks.is_empty() => {
            let mode = if spec.disks[0].readonly { "ro" } else { "rw" };
            format!("{DEFAULT_APPEND} root=/dev/vda {mode}")
        }
        None => DEFAULT_APPEND.to_owned(),
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// In an option's value a comma is written twice.
fn quote(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(spec: &str, taps: &[String], paused: bool) -> String {
        let place = Place {
            vmm: Path::new("/usr/bin/flotilla-vmm"),
            name: "web",
            uuid: Uuid::from_u128(1),
            sockets: Path::new("/run/flotilla-vm/web"),
            taps,
            incoming: paused.then_some(Path::new("/t,1")),
            paused,
        };
        build(&super::super::spec::parse(spec).unwrap(), &place).join(" ")
    }

    #[test]
    fn a_kernel_alone() {
        assert_eq!(
            line(r#"{"kernel":"/boot/k"}"#, &[], false),
            "/usr/bin/flotilla-vmm -name web -uuid 00000000-0000-0000-0000-000000000001 -machine microvm -smp 1 -m 256M \
             -kernel /boot/k -append console=ttyS0 reboot=k panic=1 \
             -qmp unix:/run/flotilla-vm/web/qmp.sock,server,nowait -serial socket,path=/run/flotilla-vm/web/console.sock,server,nowait"
        );
    }

    #[test]
    fn everything() {
        let spec = r#"{"kernel":"/k","initrd":"/i","cpus":2,"memory":"1G","append":"quiet",
            "disks":[{"path":"/a,b.img","readonly":true,"serial":"S1"},
                {"path":"/c","direct":true,"format":"qcow2","backing":"/b,1","backing_format":"qcow2","aio":"native","iops":500,"discard":true}],
            "balloon":true,"rng":true,
            "nics":[{"bridge":"br0","mac":"52:54:00:00:00:01"}]}"#;
        let line = line(spec, &["fl-web-0".into()], true);
        for part in [
            "-smp 2 -m 1024M -kernel /k -initrd /i -append quiet",
            "-drive file=/a,,b.img,id=disk0,readonly=on,direct=off -device virtio-blk-device,drive=disk0,id=disk0,serial=S1",
            "-device virtio-balloon-device,id=balloon0,deflate-on-oom=on -object rng-random,id=random0,filename=/dev/urandom \
             -device virtio-rng-device,rng=random0,id=rng0 -qmp",
            "-drive file=/c,id=disk1,readonly=off,direct=on,format=qcow2,backing=/b,,1,backing-format=qcow2,aio=native,throttling.iops-total=500,discard=unmap -device virtio-blk-device,drive=disk1,id=disk1 ",
            "-netdev tap,id=nic0,ifname=fl-web-0 -device virtio-net-device,netdev=nic0,id=nic0,mac=52:54:00:00:00:01",
        ] {
            assert!(line.contains(part), "{part}\n{line}");
        }
        assert!(line.ends_with(" -incoming file:/t,,1,identity=new -S"));
    }

    #[test]
    fn a_q35_has_its_devices_behind_root_ports() {
        let spec = r#"{"kernel":"/k","initrd":"/i","machine":"q35","disks":[{"path":"/a"},{"path":"/b","number":5}],
            "balloon":true,"rng":true,"nics":[{"bridge":"br0","mac":"52:54:00:00:00:01"}]}"#;
        let line = line(spec, &["fl-web-0".into()], false);
        for part in [
            "-machine q35 ",
            " -global pcie-root-port.fast-unplug=1 -device pcie-root-port,id=port0,port=0x1,bus=pcie.0,addr=0x1 -device ",
            " -device pcie-root-port,id=port15,port=0x10,bus=pcie.0,addr=0x10 -drive ",
            " -device virtio-blk-pci,drive=disk0,id=disk0,bus=port0,addr=0x0 ",
            " -device virtio-blk-pci,drive=disk5,id=disk5,bus=port1,addr=0x0 ",
            " -device virtio-net-pci,netdev=nic0,id=nic0,mac=52:54:00:00:00:01,bus=port2,addr=0x0 ",
            " -device virtio-balloon-pci,id=balloon0,deflate-on-oom=on,bus=pcie.0,addr=0x0 ",
            " -device virtio-rng-pci,rng=random0,id=rng0,bus=pcie.0,addr=0x0 ",
        ] {
            assert!(line.contains(part), "{part}\n{line}");
        }
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        assert_eq!((machine(&words), machine(&words[..3])), (Some(Machine::Q35), None));
    }

    #[test]
    fn firmware_looks_at_the_disks_in_their_order() {
        let spec = r#"{"machine":"q35","firmware":{"code":"/c,1","vars":"/v"},
            "disks":[{"path":"/a","number":4},{"path":"/b"}]}"#;
        let line = line(spec, &[], false);
        for part in [
            " -drive if=pflash,unit=0,readonly=on,file=/c,,1 -drive if=pflash,unit=1,file=/v -global ",
            ",drive=disk4,id=disk4,bootindex=0,bus=port0,",
            ",drive=disk0,id=disk0,bootindex=1,bus=port1,",
        ] {
            assert!(line.contains(part), "{part}\n{line}");
        }
        assert!(!line.contains("-kernel") && !line.contains("-append"), "{line}");
    }

    #[test]
    fn a_root_disk_without_initrd_is_mounted() {
        assert!(line(r#"{"kernel":"/k","disks":[{"path":"/d"}]}"#, &[], false).contains("root=/dev/vda rw"));
        assert!(
            line(r#"{"kernel":"/k","disks":[{"path":"/d","readonly":true}]}"#, &[], false)
                .contains("root=/dev/vda ro")
        );
        assert!(
            !line(r#"{"kernel":"/k","initrd":"/i","disks":[{"path":"/d"}]}"#, &[], false).contains("root=")
        );
    }
}
