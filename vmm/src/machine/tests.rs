//! A machine with a guest of a few instructions, on the host's KVM. Without `/dev/kvm` there is nothing to test here.

use super::*;
use crate::chardev::FrontEnd;
use crate::event::EventLoop;
use std::io::Write as _;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

/// A terminal that keeps what it is shown.
struct Screen(std::sync::mpsc::Sender<u8>);
impl CharBackend for Screen {
    fn write(&self, data: &[u8]) {
        for byte in data {
            let _ = self.0.send(*byte);
        }
    }
    fn attach(&self, _: Arc<dyn FrontEnd>) {}
    fn front_end_ready(&self) {}
}

struct Rig {
    machine: Machine,
    events: Receiver<GuestEvent>,
    screen: Receiver<u8>,
    _event_loop: EventLoop,
    _kernel: tempfile::NamedTempFile,
}

/// An ELF file with one segment at 2 MiB; PVH if asked for.
fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    const BASE: u64 = 0x20_0000;
    let mut file = vec![];
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86_64
    file.extend(BASE.to_le_bytes());
    file.extend(64u64.to_le_bytes()); // program headers
    file.extend([0; 8]);
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, if pvh { 2 } else { 1 }, 0, 0, 0, 0, 0, 0, 0]);
    let mut segment = |kind: u32, offset: u64, size: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [offset, BASE, BASE, size, size, 4] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(1, 0x200, code.len() as u64);
    if pvh {
        segment(4, 0x100, 20);
        file.resize(0x100, 0);
        for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE as u32] {
            file.extend(word.to_le_bytes());
        }
    }
    file.resize(0x200, 0);
    file.extend(code);
    file
}

fn rig(code: &[u8], pvh: bool, cpus: u8) -> Option<Rig> {
    rig_on(MachineKind::Microvm, code, pvh, cpus)
}

fn rig_on(kind: MachineKind, code: &[u8], pvh: bool, cpus: u8) -> Option<Rig> {
    if !std::path::Path::new("/dev/kvm").exists() {
        eprintln!("no /dev/kvm: skipped");
        return None;
    }
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&elf(code, pvh)).unwrap();
    let mut config = VmConfig::default();
    config.boot.kernel = Some(kernel.path().into());
    config.machine.kind = kind;
    config.smp.cpus = cpus;
    config.smp.max_cpus = cpus;
    config.smp.cores = cpus;
    Some(rig_of(&config, kernel))
}

fn rig_of(config: &VmConfig, kernel: tempfile::NamedTempFile) -> Rig {
    let event_loop = EventLoop::new().unwrap();
    let (tx, events) = channel();
    let (screen_tx, screen) = channel();
    let environment = Environment {
        inherited: Arc::default(),
        main_loop: event_loop.handle(),
        guest_events: Arc::new(move |event| {
            let _ = tx.send(event);
        }),
        device_left: Arc::new(|_| {}),
        serial: Some(Arc::new(Screen(screen_tx))),
        chardevs: HashMap::new(),
    };
    let machine = Machine::build(config, environment).unwrap();
    Rig { machine, events, screen, _event_loop: event_loop, _kernel: kernel }
}

/// `mov dx, port; mov al, value; out dx, al` in 64-bit and in 32-bit mode.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `ud2`, with no interrupt table to go to: a triple fault.
const CRASH: [u8; 2] = [0x0f, 0x0b];

fn print_and(ending: &[u8]) -> Vec<u8> {
    [out(0x3f8, b'h'), out(0x3f8, b'i'), ending.to_vec(), SPIN.to_vec()].concat()
}

#[test]
fn a_guest_prints_and_ends_in_each_way() {
    for (pvh, ending, expected) in [
        (false, out(0x600, 0x34), GuestEvent::PowerOff),
        (true, out(0x600, 0x34), GuestEvent::PowerOff),
        (false, out(0x602, 1), GuestEvent::Reset),
        (true, out(0x64, 0xfe), GuestEvent::Reset),
        (false, CRASH.to_vec(), GuestEvent::TripleFault),
    ] {
        let Some(mut rig) = rig(&print_and(&ending), pvh, 1) else { return };
        rig.machine.start(false).unwrap();
        assert_eq!(rig.events.recv_timeout(LIMIT), Ok(expected));
        assert_eq!(rig.screen.try_iter().collect::<Vec<_>>(), b"hi");
        rig.machine.shut_down().unwrap();
    }
}

#[test]
fn a_q35_has_configuration_space_and_ends_in_each_way() {
    // mov dx, 0xcf8; mov eax, address; out dx, eax; mov dx, 0xcfc; in al, dx; mov dx, 0x3f8; out dx, al
    let read = |address: u32| {
        let mut code = vec![0x66, 0xba, 0xf8, 0x0c, 0xb8];
        code.extend(address.to_le_bytes());
        code.extend([0xef, 0x66, 0xba, 0xfc, 0x0c, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xee]);
        code
    };
    // mov ebx, address in ECAM; mov al, [rbx]; mov dx, 0x3f8; out dx, al
    let ecam = |address: u32| {
        let mut code = vec![0xbb];
        code.extend(address.to_le_bytes());
        code.extend([0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee]);
        code
    };
    for (ending, expected) in [
        (out(0x605, 0x34), GuestEvent::PowerOff),
        (out(0xce9, 0x34), GuestEvent::PowerOff),
        (out(0xcf9, 6), GuestEvent::Reset),
        (out(0x64, 0xfe), GuestEvent::Reset),
    ] {
        // The vendor of the host bridge, the device of LPC; by PVH, since paging would hide ECAM.
        let parts = [read(0x8000_0000), read(0x8000_f800), ecam(0xb00f_8002), ending, SPIN.to_vec()];
        let Some(mut rig) = rig_on(MachineKind::Q35, &parts.concat(), true, 1) else { return };
        rig.machine.start(false).unwrap();
        assert_eq!(rig.events.recv_timeout(LIMIT), Ok(expected.clone()));
        assert_eq!(rig.screen.try_iter().collect::<Vec<_>>(), [0x86, 0x86, 0x18]);
        rig.machine.pause().unwrap();
        rig.machine.reset().unwrap();
        rig.machine.resume();
        assert_eq!(rig.events.recv_timeout(LIMIT), Ok(expected), "again after a reset");
        rig.machine.shut_down().unwrap();
    }
}

/// Firmware of one sector, entered where a processor begins: in real mode, sixteen bytes below 4 GiB.
fn firmware() -> Vec<u8> {
    // mov dx, port; mov al, value; out dx, al
    let out = |port: u16, value: u8| {
        let [low, high] = port.to_le_bytes();
        vec![0xba, low, high, 0xb0, value, 0xee]
    };
    // mov dx, 0x3f8; out dx, al
    let print = vec![0xba, 0xf8, 0x03, 0xee];
    // mov byte cs:[0xe123], value
    let flash = |value: u8| vec![0x2e, 0xc6, 0x06, 0x23, 0xe1, value];
    // mov al, cs:[0xe123]
    let variable = vec![0x2e, 0xa0, 0x23, 0xe1];
    // mov dx, 0x510; xor ax, ax; out dx, ax; inc dx; in al, dx: the first byte of the signature.
    let fw_cfg = vec![0xba, 0x10, 0x05, 0x31, 0xc0, 0xef, 0x42, 0xec];
    let mut code = [
        out(0x3f8, b'f'),
        [fw_cfg, print.clone()].concat(),
        [variable.clone(), print.clone()].concat(),
        // It is programmed, the status is read, and then memory again.
        [flash(0x10), flash(b'v'), variable.clone(), print.clone()].concat(),
        [flash(0xff), variable, print].concat(),
        out(0x64, 0xfe),
        SPIN.to_vec(),
    ]
    .concat();
    code.resize(4096 - 16, 0xff);
    // jmp 0xf000
    code.extend([0xe9, 0x0d, 0xf0]);
    code.resize(4096, 0xff);
    code
}

#[test]
fn firmware_runs_from_flash_and_keeps_its_variables() {
    if !std::path::Path::new("/dev/kvm").exists() {
        return;
    }
    let image = |bytes: &[u8]| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    };
    let mut kept = vec![0xff; 4096];
    // The second is another process's, that comes later. It has files of its own: a child of another test may keep the locks of the first for a moment.
    for first in [*b"fQ\xff\x80v", *b"fQv\x80v"] {
        let (code, vars) = (image(&firmware()), image(&kept));
        let line = format!(
            "-machine q35 -drive if=pflash,unit=0,readonly=on,file={} -drive if=pflash,unit=1,file={}",
            code.path().display(),
            vars.path().display()
        );
        let request = crate::config::cmdline::parse(line.split_whitespace().map(Into::into)).unwrap();
        let crate::config::cmdline::Request::Run(config) = request else { panic!("no machine") };
        let mut rig = rig_of(&config, image(&[]));
        rig.machine.start(false).unwrap();
        assert_eq!(rig.events.recv_timeout(LIMIT), Ok(GuestEvent::Reset));
        assert_eq!(rig.screen.try_iter().collect::<Vec<_>>(), first);
        rig.machine.pause().unwrap();
        rig.machine.reset().unwrap();
        rig.machine.resume();
        assert_eq!(rig.events.recv_timeout(LIMIT), Ok(GuestEvent::Reset));
        assert_eq!(rig.screen.try_iter().collect::<Vec<_>>(), b"fQv\x80v");
        rig.machine.shut_down().unwrap();
        kept = std::fs::read(vars.path()).unwrap();
        assert_eq!((kept[0x123], kept[0x122]), (b'v', 0xff));
        assert_eq!(std::fs::read(code.path()).unwrap(), firmware());
    }
}

#[test]
fn starts_paused_and_pauses_a_spinning_guest() {
    let Some(mut rig) = rig(&print_and(&[]), false, 4) else { return };
    rig.machine.start(true).unwrap();
    rig.machine.pause().unwrap();
    assert!(rig.screen.try_recv().is_err(), "a paused guest has run");
    for _ in 0..3 {
        rig.machine.resume();
        rig.machine.pause().unwrap();
    }
    rig.machine.resume();
    assert_eq!(rig.screen.recv_timeout(LIMIT), Ok(b'h'));
    let cpus = rig.machine.cpus();
    assert_eq!(cpus.iter().map(|c| c.core_id).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for cpu in &cpus {
        let comm = std::fs::read_to_string(format!("/proc/self/task/{}/comm", cpu.host_tid)).unwrap();
        assert_eq!(comm.trim(), format!("vcpu{}", cpu.index));
    }
    rig.machine.pause().unwrap();
    rig.machine.shut_down().unwrap();
}

#[test]
fn a_reset_starts_the_guest_again_from_whatever_it_had_come_to() {
    for (pvh, cpus) in [(false, 1), (true, 3)] {
        let Some(mut rig) = rig(&print_and(&[]), pvh, cpus) else { return };
        rig.machine.start(false).unwrap();
        for _ in 0..3 {
            assert_eq!(rig.screen.recv_timeout(LIMIT), Ok(b'h'));
            assert_eq!(rig.screen.recv_timeout(LIMIT), Ok(b'i'));
            rig.machine.pause().unwrap();
            rig.machine.reset().unwrap();
            assert!(rig.screen.try_recv().is_err(), "it runs though it is paused");
            rig.machine.press_power_button();
            rig.machine.resume();
        }
        rig.machine.shut_down().unwrap();
    }
    // One that has crashed, too.
    let Some(mut rig) = rig(&print_and(&CRASH), false, 1) else { return };
    rig.machine.start(false).unwrap();
    for _ in 0..2 {
        assert_eq!(rig.events.recv_timeout(LIMIT), Ok(GuestEvent::TripleFault));
        rig.machine.pause().unwrap();
        rig.machine.reset().unwrap();
        rig.machine.resume();
    }
    assert_eq!(rig.events.recv_timeout(LIMIT), Ok(GuestEvent::TripleFault));
    rig.machine.shut_down().unwrap();
    assert_eq!(rig.screen.try_iter().collect::<Vec<_>>(), b"hihihi");
}

#[test]
fn the_smallest_and_the_missing_boards() {
    let environment = || Environment {
        inherited: Arc::default(),
        main_loop: EventLoop::new().unwrap().handle(),
        guest_events: Arc::new(|_| {}),
        device_left: Arc::new(|_| {}),
        serial: None,
        chardevs: HashMap::new(),
    };
    let mut config = VmConfig::default();
    config.machine.kind = MachineKind::None;
    let mut none = Machine::build(&config, environment()).unwrap();
    none.start(false).unwrap();
    none.pause().unwrap();
    none.resume();
    assert_eq!(none.cpus(), []);
    none.shut_down().unwrap();
    config.machine.kind = MachineKind::Virt;
    let error = Machine::build(&config, environment()).err().unwrap().to_string();
    assert!(error.contains("not supported in this version"), "{error}");
}

/// A q35 with a guest that spins, and what leaves it; none where there is no KVM.
fn q35(options: &str) -> Option<(Machine, Receiver<Departure>)> {
    if !std::path::Path::new("/dev/kvm").exists() {
        return None;
    }
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&elf(&SPIN, true)).unwrap();
    let line = format!("-machine q35 -kernel {} {options}", kernel.path().display());
    let request = crate::config::cmdline::parse(line.split_whitespace().map(Into::into)).unwrap();
    let crate::config::cmdline::Request::Run(config) = request else { panic!("no machine") };
    let (tell, left) = channel();
    let environment = Environment {
        inherited: Arc::default(),
        main_loop: EventLoop::new().unwrap().handle(),
        guest_events: Arc::new(|_| {}),
        device_left: Arc::new(move |what| tell.send(what).unwrap()),
        serial: None,
        chardevs: HashMap::new(),
    };
    Some((Machine::build(&config, environment).unwrap(), left))
}

#[test]
fn vcpus_come_and_go_and_those_that_cannot_say_why() {
    let Some((mut machine, left)) = q35("-smp 1,maxcpus=3") else { return };
    machine.start(true).unwrap();
    let cpu = |id: &str, cpu_id: Option<u64>| {
        let driver = "generic-x86-cpu".to_owned();
        Hotplug::Plug(NewDevice { id: id.into(), driver, cpu_id, ..NewDevice::default() })
    };
    let online = |machine: &Machine| machine.cpus().iter().map(|cpu| cpu.index).collect::<Vec<_>>();
    let refused = |machine: &mut Machine, request, why: &str| {
        assert_eq!(machine.hotplug(request).unwrap_err().to_string(), why);
    };
    let m = &mut machine;
    refused(m, cpu("a", None), "Argument cpu-id is required.");
    refused(m, cpu("a", Some(0)), "Cpu-id 0 already exist.");
    refused(m, cpu("a", Some(3)), "Max cpu-id is 2");
    refused(m, cpu("a", Some(u64::MAX)), "Max cpu-id is 2");
    for round in 0..3 {
        assert_eq!(m.hotplug(cpu("a", Some(2))).unwrap(), Plugged::CpusResized);
        assert_eq!(online(m), [0, 2], "{round}");
        assert!(m.cpus().iter().all(|cpu| cpu.host_tid > 0));
        refused(m, cpu("b", Some(2)), "Cpu-id 2 is running, device id is a.");
        refused(m, cpu("a", Some(1)), "Device id a already existed.");
        assert!(m.devices().contains(&("a".into(), "generic-x86-cpu")));
        // It runs, and is reset, with the others.
        m.resume();
        m.pause().unwrap();
        m.reset().unwrap();
        assert!(left.try_recv().is_err());
        assert_eq!(m.hotplug(Hotplug::Unplug("a".into())).unwrap(), Plugged::CpusResized);
        refused(m, Hotplug::Unplug("a".into()), "Guest is still on the fly of another (un)plugging");
        m.reset().unwrap();
        let departure = left.try_recv().unwrap();
        assert_eq!(departure, Departure::Cpu(2));
        assert_eq!(m.device_left(&departure).as_deref(), Some("a"));
        assert_eq!(m.device_left(&departure), None);
        assert_eq!(online(m), [0]);
    }
    m.resume();
    m.pause().unwrap();
    machine.shut_down().unwrap();

    let Some((mut machine, _)) = q35("-smp 1") else { return };
    refused(&mut machine, cpu("a", Some(1)), "There is no hotpluggable cpu-id for this VM.");
}

#[test]
fn a_q35_takes_devices_into_root_ports_and_says_why_it_does_not() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let Some((mut machine, left)) = q35("-device pcie-root-port,id=pcie.1,bus=pcie.0,addr=0x1,port=1 \
         -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci,rng=r,id=rng,bus=pcie.0,addr=0x2")
    else {
        return;
    };
    let drive = || {
        let drive = crate::config::Drive::new("d", image.path());
        let drive = crate::config::Drive { direct: false, aio: Some(crate::config::Aio::Off), ..drive };
        Hotplug::AddDrive { drive: Box::new(drive), node: None, files: Vec::new() }
    };
    let plug = |id: &str, driver: &str, bus: &str, addr: Option<&str>| {
        Hotplug::Plug(NewDevice {
            id: id.into(),
            driver: driver.into(),
            drive: Some("d".into()),
            netdev: Some("n".into()),
            bus: Some(bus.into()),
            addr: addr.map(Into::into),
            ..NewDevice::default()
        })
    };
    let disk = |id: &str| plug(id, "virtio-blk-pci", "pcie.1", Some("0x0"));
    let unplug = |id: &str| Hotplug::Unplug(id.into());
    let ask = |machine: &mut Machine, request, expected: &str| match machine.hotplug(request) {
        Ok(done) => assert_eq!((expected, done), ("", Plugged::Done)),
        Err(e) => assert!(!expected.is_empty() && e.to_string().contains(expected), "{e}"),
    };
    let m = &mut machine;
    ask(m, disk("a"), "No drive configured matched for blk device");
    ask(m, plug("a", "virtio-net-pci", "pcie.1", Some("0")), "Netdev: \"n\" not found for net device");
    ask(m, drive(), "");
    ask(m, drive(), "already registered");
    ask(m, plug("a", "virtio-rng-pci", "pcie.1", Some("0")), "Driver virtio-rng-pci is not support");
    for driver in ["virtio-mem-pci", "virtio-pmem-pci"] {
        let why = format!("Driver {driver} is not support: give the VM the device with -device");
        ask(m, plug("a", driver, "pcie.1", Some("0")), &why);
    }
    ask(m, plug("rng", "virtio-blk-pci", "pcie.1", Some("0")), "Device id rng existed");
    ask(m, plug("a", "virtio-blk-pci", "pcie.1", None), "Should set addr.");
    ask(m, plug("a", "virtio-blk-pci", "pcie.1", Some("1")), "not supported for device with devfn 8");
    ask(m, plug("a", "virtio-blk-pci", "pcie.0", Some("7")), "No hot plug controller found for bus pcie.0");
    ask(m, plug("a", "virtio-blk-pci", "pcie.7", Some("0")), "Failed to add virtio pci device");
    ask(m, unplug("a"), "Can not find parent device");
    ask(m, unplug("rng"), "for bus pcie.0 when unplug request");
    let port = Departure::Port("pcie.1".to_owned());
    for round in 0..2 {
        ask(m, disk("a"), "");
        ask(m, disk("b"), "pcie.1 is occupied");
        ask(m, Hotplug::RemoveDrive("d".into()), "in use by device a");
        assert_eq!(m.block_devices()[0].device.as_deref(), Some("a"), "round {round}");
        // No guest has taken the device: it leaves at once, and another has its place.
        ask(m, unplug("a"), "");
        assert_eq!(left.try_recv(), Ok(port.clone()));
        ask(m, unplug("a"), "Guest is still on the fly");
        assert_eq!(m.device_left(&port).as_deref(), Some("a"));
        ask(m, disk("a"), "");
        m.reset().unwrap();
        assert!(left.try_recv().is_err(), "nobody has asked it to leave");
        ask(m, unplug("a"), "");
        ask(m, unplug("a"), "Guest is still on the fly");
        assert_eq!(m.device_left(&port), None, "it is still there");
        m.reset().unwrap();
        assert_eq!(left.try_recv(), Ok(port.clone()));
        ask(m, disk("b"), "pcie.1 is occupied");
        assert_eq!(m.device_left(&port).as_deref(), Some("a"));
        assert_eq!(m.block_devices()[0].device, None);
    }
    ask(m, Hotplug::RemoveDrive("d".into()), "");
    let devices: Vec<String> = m.devices().into_iter().map(|(id, _)| id).collect();
    assert_eq!(devices, ["pcie.1", "rng"]);
    machine.shut_down().unwrap();
}

#[test]
fn what_another_process_serves_comes_to_a_root_port_and_goes() {
    use crate::vhost::user::double::{BackEnd, Skills};
    let features = 1 << 32 | 1 << 30 | 1 << 22;
    let skills = || Skills { features, protocol: 1 | 1 << 3 | 1 << 9, queues: 2, config: vec![0; 60] };
    let (back, other) = (BackEnd::start(skills()), BackEnd::start(skills()));
    let options = "-object memory-backend-memfd,id=ram,size=256M -chardev file,id=log,path=/dev/null \
        -device pcie-root-port,id=pcie.1,bus=pcie.0,addr=0x1,port=1 -device pcie-root-port,id=pcie.2,bus=pcie.0,addr=0x2,port=2";
    let Some((mut machine, left)) = q35(options) else { return };
    let add = |id: &str, back: &BackEnd| Hotplug::AddChardev { id: id.into(), path: back.path.clone() };
    let remove = |id: &str| Hotplug::RemoveChardev(id.into());
    let netdev_of = |id: &str, chardev: &str, queues| {
        let backend = crate::config::NetBackend::VhostUser { chardev: chardev.into(), queues };
        let netdev = crate::config::Netdev { id: id.into(), backend };
        Hotplug::AddNetdev { netdev, fds: Vec::new(), vhost_fds: Vec::new() }
    };
    let netdev = |id: &str, chardev: &str| netdev_of(id, chardev, 2);
    let plug = |id: &str, driver: &str, back: &str, port: &str| {
        Hotplug::Plug(NewDevice {
            id: id.into(),
            driver: driver.into(),
            chardev: Some(back.into()),
            netdev: Some(back.into()),
            bus: Some(port.into()),
            addr: Some("0x0".into()),
            num_queues: Some(2),
            multi_queue: true,
            ..NewDevice::default()
        })
    };
    let ask = |machine: &mut Machine, request, expected: &str| match machine.hotplug(request) {
        Ok(done) => assert_eq!((expected, done), ("", Plugged::Done)),
        Err(e) => assert!(!expected.is_empty() && e.to_string().contains(expected), "{e}"),
    };
    let disk = || plug("a", "vhost-user-blk-pci", "c", "pcie.1");
    let m = &mut machine;
    ask(m, disk(), "Chardev c not found");
    ask(m, netdev("n", "c"), "Chardev c not found");
    ask(m, netdev("n", "log"), "chardev log is in use by the command line");
    ask(m, add("log", &back), "Chardev log is already registered.");
    ask(m, remove("log"), "chardev log is in use by the command line");
    ask(m, add("c", &back), "");
    ask(m, add("c", &other), "Chardev c is already registered.");
    ask(m, remove("c"), "");
    ask(m, remove("c"), "Chardev c not found");
    for round in 1..3 {
        ask(m, add("c", &back), "");
        ask(m, add("d", &other), "");
        ask(m, disk(), "");
        assert_eq!(back.clients.load(std::sync::atomic::Ordering::SeqCst), round);
        ask(m, plug("b", "vhost-user-blk-pci", "c", "pcie.2"), "chardev c is in use by device a");
        ask(m, netdev("n", "c"), "chardev c is in use by device a");
        ask(m, remove("c"), "chardev c is in use by device a");
        ask(m, netdev_of("n", "d", 3), "");
        ask(m, plug("b", "virtio-net-pci", "n", "pcie.2"), "has 2 pairs of queues, and 3 are wanted");
        ask(m, Hotplug::RemoveNetdev("n".into()), "");
        ask(m, netdev("n", "d"), "");
        ask(m, netdev("n", "d"), "already registered");
        ask(m, remove("d"), "chardev d is in use by netdev n");
        ask(m, plug("b", "virtio-net-pci", "n", "pcie.1"), "pcie.1 is occupied");
        ask(m, plug("b", "virtio-net-pci", "n", "pcie.2"), "");
        ask(m, Hotplug::RemoveNetdev("n".into()), "in use by device b");
        let nics = m.net_devices();
        assert_eq!(
            nics[0].device.as_ref().map(|(id, driver, _)| (id.as_str(), *driver)),
            Some(("b", "virtio-net-pci"))
        );
        // The guest starts anew with both of them, and lets them go.
        m.reset().unwrap();
        for id in ["a", "b"] {
            ask(m, Hotplug::Unplug(id.into()), "");
        }
        m.reset().unwrap();
        for (port, id) in [("pcie.1", "a"), ("pcie.2", "b")] {
            assert_eq!(left.try_recv(), Ok(Departure::Port(port.into())));
            assert_eq!(m.device_left(&Departure::Port(port.into())).as_deref(), Some(id));
        }
        ask(m, remove("c"), "");
        ask(m, Hotplug::RemoveNetdev("n".into()), "");
        ask(m, remove("d"), "");
    }
    // A back end that is not there leaves all as it was.
    ask(m, add("c", &back), "");
    std::fs::remove_file(&back.path).unwrap();
    ask(m, disk(), "start the vhost-user back end first");
    ask(m, remove("c"), "");
    machine.shut_down().unwrap();

    let Some((mut machine, _)) = q35("-device pcie-root-port,id=pcie.1,bus=pcie.0,addr=0x1,port=1") else {
        return;
    };
    ask(&mut machine, add("d", &other), "");
    ask(&mut machine, plug("a", "vhost-user-blk-pci", "d", "pcie.1"), "guest memory is not shared");
    ask(&mut machine, netdev("n", "d"), "guest memory is not shared");
    ask(
        &mut machine,
        Hotplug::Plug(NewDevice {
            id: "a".into(),
            driver: "vhost-user-blk-pci".into(),
            bus: Some("pcie.1".into()),
            addr: Some("0".into()),
            ..NewDevice::default()
        }),
        "'chardev' is missing",
    );
}
