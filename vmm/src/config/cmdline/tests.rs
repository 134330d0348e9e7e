//! Command lines that scripts and orchestrators send, and what becomes of bad ones.

use proptest::prelude::*;

use super::*;
use crate::config::{ChardevKind, DeviceDriver, Monitor, NetBackend, TapSource, Trace};

/// Splits at blanks, but not inside double quotes, as a shell would.
fn words(line: &str) -> Vec<OsString> {
    let mut words = vec![];
    let (mut word, mut quoted, mut any) = (String::new(), false, false);
    for c in line.chars() {
        match c {
            '"' => (quoted, any) = (!quoted, true),
            c if c.is_whitespace() && !quoted => {
                if any {
                    words.push(std::mem::take(&mut word).into());
                }
                any = false;
            }
            c => {
                word.push(c);
                any = true;
            }
        }
    }
    if any {
        words.push(word.into());
    }
    words
}

pub(super) fn run(line: &str) -> VmConfig {
    match parse(words(line)) {
        Ok(Request::Run(config)) => *config,
        other => panic!("{line}: {other:?}"),
    }
}

pub(super) fn error(line: &str) -> String {
    match parse(words(line)) {
        Err(e) => e.to_string(),
        Ok(request) => panic!("{line}: {request:?}"),
    }
}

#[test]
fn the_line_of_the_snapshot_manual() {
    let config = run("-machine microvm -kernel /k -smp 1 -m 1024 \
         -append \"console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda\" \
         -drive file=/r,id=rootfs,readonly=off,direct=off -device virtio-blk-device,drive=rootfs \
         -qmp unix:/s,server,nowait -serial stdio");
    assert_eq!(config.memory.size, 1 << 30);
    assert_eq!(config.boot.append, "console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda");
    assert_eq!(config.serial, Some(ChardevKind::Stdio));
    assert_eq!(config.monitors, [Monitor::Unix("/s".into())]);
    assert_eq!(config.devices[0].id, "virtio-blk-device.0");
    assert!(!config.drives[0].direct);
}

#[test]
fn a_limit_for_memory_to_come_is_one_that_is_kept() {
    for memory in ["1G", "1G,maxmem=1G", "1G,maxmem=64G", "size=1024,maxmem=2048"] {
        assert_eq!(run(&format!("-kernel /k -m {memory}")).memory.size, 1 << 30, "{memory}");
    }
}

#[test]
fn the_line_of_a_fleet_vm() {
    let config = run(
        "-name web -uuid 6f1c2b1e-7d1a-4a58-9f0e-5b7c1f6f9a10 -machine microvm -smp 1 -m 256M -kernel /k -initrd /i \
         -append \"console=ttyS0\" -drive file=/x.img,id=disk0,readonly=off,direct=off \
         -device virtio-blk-device,drive=disk0,id=disk0 -netdev tap,id=nic0,ifname=fl-web-0 \
         -device virtio-net-device,netdev=nic0,id=nic0,mac=52:54:00:12:34:56 \
         -qmp unix:/run/flotilla-vm/web/qmp.sock,server,nowait \
         -serial socket,path=/run/flotilla-vm/web/console.sock,server,nowait -S",
    );
    assert_eq!(config.name.as_deref(), Some("web"));
    assert!(config.start_paused && config.uuid.is_some());
    let DeviceDriver::VirtioNet { mac, .. } = &config.devices[1].driver else { panic!("{config:?}") };
    assert_eq!(*mac, Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
}

#[test]
fn the_line_of_a_test_client_without_the_devices_to_come() {
    let config = run("-name microvm -D /var/log/stratovirt -qmp unix:/s,server,nowait -pidfile /p \
         -machine microvm,dump-guest-core=on,mem-share=on -disable-seccomp -daemonize -S \
         -netdev tap,id=t,ifname=tap0 -device virtio-net-device,netdev=t,id=t,iothread=iothread1 \
         -object iothread,id=iothread1 -kernel /k \
         -append \"rw console=hvc0 lastbus=0 reboot=k panic=1 tsc=reliable ipv6.disable=1 root=/dev/vda\" -initrd /i \
         -smp 4 -m 2048 -mem-path /dev/hugepages -cpu pmu=on -drive id=rootfs,file=/r,readonly=off,direct=on \
         -device virtio-blk-device,drive=rootfs,id=rootfs,iothread=iothread1,serial=1");
    assert!(config.machine.mem_share && config.process.daemonize && config.process.disable_seccomp);
    assert_eq!((config.smp.cpus, config.smp.cores, config.smp.sockets), (4, 4, 1));
}

#[test]
fn the_line_of_kata_without_the_devices_to_come() {
    let config = run("-name sandbox -uuid 6f1c2b1e-7d1a-4a58-9f0e-5b7c1f6f9a10 -smp 1 -m 2048M -kernel /k \
         -append \"tsc=reliable pci=off iommu=off acpi=off\" -qmp unix:/s,server,nowait -D -disable-seccomp \
         -machine type=microvm,dump-guest-core=off,mem-share=on -initrd /i \
         -drive id=rootfs,file=/r,readonly=on,direct=off -device virtio-blk-device,drive=rootfs,id=rootfs \
         -netdev tap,id=network-0,fds=3 -device virtio-net-device,netdev=network-0,id=network-0,mac=02:00:00:00:00:01");
    assert_eq!(config.process.log_file, None);
    assert!(!config.machine.dump_guest_core);
    let NetBackend::Tap { source, queues, .. } = &config.netdevs[0].backend else { panic!("{config:?}") };
    assert_eq!((source, *queues), (&TapSource::Fds(vec![3]), 1));
}

#[test]
fn libvirt_options_are_accepted_without_effect() {
    let config = run(
        "-no-user-config -nodefaults -sandbox on,obsolete=deny -msg timestamp=on -rtc base=utc -boot strict=on \
         -nographic -realtime mlock=off -display none -usb -overcommit mem-lock=off -kernel /k \
         -chardev socket,id=mon0,path=/m,server,nowait -mon chardev=mon0,id=monitor,mode=control",
    );
    assert_eq!(config.monitors, [Monitor::Chardev("mon0".to_owned())]);
}

#[test]
fn defaults() {
    let config = run("-kernel /k");
    assert_eq!(
        config,
        VmConfig {
            boot: crate::config::BootConfig { kernel: Some("/k".into()), ..Default::default() },
            ..Default::default()
        }
    );
}

#[test]
fn an_append_of_many_words_is_joined() {
    for line in
        ["-kernel /k -append a b=c -S", "-kernel /k -append a -append b=c -S", "-append \"a b=c\" -kernel /k"]
    {
        assert_eq!(run(line).boot.append, "a b=c", "{line}");
    }
}

#[test]
fn help_and_version_need_nothing_else() {
    for (line, want) in [
        ("-h", Request::Help),
        ("-help", Request::Help),
        ("-V", Request::Version),
        ("-version", Request::Version),
        ("-machine nonsense -help", Request::Help),
    ] {
        assert_eq!(parse(words(line)), Ok(want), "{line}");
    }
    for spec in options::OPTIONS.iter().filter(|spec| spec.class == Class::Used) {
        assert!(help().contains(&format!("\n  {}", spec.name)), "{}", spec.name);
    }
}

#[test]
fn a_machine_for_probing_needs_no_kernel() {
    let config = run(
        "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg -qmp unix:/s,server,nowait -daemonize",
    );
    assert_eq!(config.machine.kind, crate::config::MachineKind::None);
}

#[test]
fn freeze_is_a_spelling_of_s() {
    assert!(run("-kernel /k -freeze").start_paused);
    assert_eq!(
        error("-kernel /k -freeze -S"),
        "-S was provided more than once, but cannot be used multiple times"
    );
}

#[test]
fn processors() {
    for (text, want) in [
        ("2", (2, 2, 1, 1, 1, 2, 1)),
        ("cpus=2", (2, 2, 1, 1, 1, 2, 1)),
        ("2,maxcpus=4", (2, 4, 1, 1, 1, 4, 1)),
        ("4,sockets=2", (4, 4, 2, 1, 1, 2, 1)),
        ("8,sockets=2,cores=2,threads=2", (8, 8, 2, 1, 1, 2, 2)),
        ("sockets=2,cores=2,cpus=1", (1, 4, 2, 1, 1, 2, 1)),
        ("254", (254, 254, 1, 1, 1, 254, 1)),
    ] {
        let smp = run(&format!("-kernel /k -smp {text}")).smp;
        let got = (smp.cpus, smp.max_cpus, smp.sockets, smp.dies, smp.clusters, smp.cores, smp.threads);
        assert_eq!(got, want, "{text}");
    }
}

#[test]
fn each_bad_line_gets_one_clear_line() {
    for (line, want) in [
        ("--unsupported", "unknown option '--unsupported'; see -help"),
        ("--kernel /k", "unknown option '--kernel'; see -help"),
        ("-bogus", "unknown option '-bogus'; see -help"),
        ("stray", "unexpected argument 'stray'; see -help"),
        ("-name a b", "unexpected argument 'b'; see -help"),
        ("-kernel /k -- x", "unexpected argument 'x'; see -help"),
        ("-kernel", "-kernel needs a value; see -help"),
        ("-kernel -S", "-kernel needs a value; see -help"),
        ("-kernel /a -kernel /b", "-kernel was provided more than once, but cannot be used multiple times"),
        ("-smp 1", "a kernel is needed: add -kernel FILE"),
        ("-kernel /k -smp 0", "-smp: '0' is not in 1..=254: write a number of vCPUs"),
        ("-kernel /k -smp 255", "-smp: '255' is not in 1..=254: write a number of vCPUs"),
        (
            "-kernel /k -smp 4,maxcpus=2",
            "-smp: 4 vCPUs at boot and 2 at most: write 1 to 254, and no more than maxcpus",
        ),
        (
            "-kernel /k -smp 4,sockets=3",
            "-smp: sockets * dies * clusters * cores * threads must be equal to max_cpus, but 3 * 1 * 1 * 1 * 1 is not 4",
        ),
        (
            "-kernel /k -m 64M",
            "-m: memory size 67108864 should be in the range of [134217728, 549755813888] bytes (128M to 512G)",
        ),
        (
            "-kernel /k -m 513G",
            "-m: memory size 550829555712 should be in the range of [134217728, 549755813888] bytes (128M to 512G)",
        ),
        (
            "-kernel /k -m lots",
            "-m: memory size 'lots' should be a whole number with K, M or G, in the range of [134217728, 549755813888] bytes",
        ),
        ("-kernel /k -m 2G,maxmem=1G", "-m: maxmem=1G is less than the memory at boot"),
        (
            "-machine virt -kernel /k",
            "-machine: machine type virt (use microvm or q35) is not supported in this version",
        ),
        ("-machine pc -kernel /k", "-machine: unknown machine type 'pc': use microvm or q35"),
        (
            "-machine microvm,foo=on -kernel /k",
            "-machine: unknown key 'foo' (known: accel, dump-guest-core, mem-share, usb)",
        ),
        ("-accel tcg -kernel /k", "-accel: unknown accelerator 'tcg': use kvm"),
        ("-cpu qemu64 -kernel /k", "-cpu: unknown CPU model 'qemu64': use host"),
        ("-incoming tcp:1.2.3.4:5 -kernel /k", "-incoming: tcp is not supported in this version"),
        (
            "-incoming exec:cat -kernel /k",
            "-incoming: invalid uri 'exec:cat': write file:/absolute/path/of/a/snapshot",
        ),
        (
            "-incoming file:x -kernel /k",
            "-incoming: 'x' is no absolute path: write file:/absolute/path/of/a/snapshot",
        ),
        ("-incoming file:/x,identity=old -kernel /k", "-incoming: identity=old: write new or same"),
        ("-incoming file:/x,mapped=maybe -kernel /k", "-incoming: mapped=maybe: write on or off"),
        (
            "-incoming file:/x,compress=on -kernel /k",
            "-incoming: unknown key 'compress' (known: identity, mapped, verify)",
        ),
        (
            "-incoming file:/x -kernel /k -mem-path /y",
            "-incoming: -mem-path cannot be used with snapshots: leave it out",
        ),
        (
            "-incoming file:/x -kernel /k -machine microvm,mem-share=on",
            "-incoming: -machine mem-share=on cannot be used with snapshots: leave it out",
        ),
        (
            "-incoming file:/x -kernel /k -device virtio-balloon-device,id=b",
            "-incoming: device \"b\": virtio-balloon-device cannot be used with snapshots: leave it out",
        ),
        (
            "-incoming file:/x -kernel /k -netdev tap,id=n,ifname=t,vhost=on -device virtio-net-device,netdev=n,id=e",
            "-incoming: device \"e\": vhost=on cannot be used with snapshots: leave it out",
        ),
        ("-numa node,nodeid=0 -kernel /k", "-numa: 'cpus' is missing: add cpus=VALUE"),
        ("-numa dist,src=0,dst=1,val=9 -kernel /k", "-numa: val=9: write a whole number from 10 to 254"),
        (
            "-numa node,nodeid=0,cpus=3-1,memdev=m -kernel /k",
            "-numa: cpus=3-1: write numbers and ranges such as 0-3:8, up to 253",
        ),
        (
            "-numa dist,src=0,dst=1,val=20 -kernel /k",
            "-numa dist: there are no nodes: add -numa node,nodeid=0,cpus=…,memdev=…",
        ),
        (
            "-machine q35 -kernel /k -smp 2 -numa node,nodeid=0,cpus=0,memdev=m",
            "-numa: vCPU 1 is in 0 nodes: each of the 2 vCPUs must be in exactly one",
        ),
        (
            "-machine q35 -kernel /k -numa node,nodeid=0,cpus=0,memdev=m",
            "-numa node 0: memdev \"m\" not found: add -object memory-backend-ram,id=m,size=…",
        ),
        (
            "-machine q35 -kernel /k -object memory-backend-ram,id=m,size=128M -numa node,nodeid=0,cpus=0,memdev=m",
            "-numa: the nodes have 134217728 bytes together, and guest memory (-m) 268435456: make them equal",
        ),
        ("-smbios type=5,x=y -kernel /k", "-smbios: write type=N with N one of 0, 1, 2, 3, 4 and 17"),
        ("-smbios type=1,uuid=7 -kernel /k", "-smbios: uuid=7 is not a UUID"),
        (
            "-global pcie-root-port.fast-unplug=2 -kernel /k",
            "-global: pcie-root-port.fast-unplug=2: write a whole number from 0 to 1",
        ),
        (
            "-global pcie-root-port.slow=1 -kernel /k",
            "-global: unknown key 'pcie-root-port.slow' (known: pcie-root-port.fast-unplug)",
        ),
        (
            "-kernel /k -device virtio-rng-device,rng=r",
            "device \"virtio-rng-device.0\": rng \"r\" not found: add -object rng-random,id=r,filename=/dev/urandom",
        ),
        ("-kernel /k -device pvpanic,id=x", "-device: device pvpanic is not supported in this version"),
        (
            "-kernel /k -device virtio-rng-pci,rng=r",
            "-device: virtio-rng-pci needs 'bus' and 'addr': add bus=pcie.0,addr=0x0 for the first free slot",
        ),
        (
            "-kernel /k -device nonsense,id=x",
            "-device: unknown driver 'nonsense': use virtio-blk-device, virtio-net-device, virtio-serial-device, \
             virtconsole, virtserialport, virtio-balloon-device, virtio-rng-device, vhost-vsock-device, \
             vhost-user-fs-device, vhost-user-blk-device, virtio-mem-device, virtio-pmem-device, virtio-blk-pci, virtio-net-pci, virtio-serial-pci, virtio-balloon-pci, virtio-rng-pci, \
             vhost-vsock-pci, vhost-user-fs-pci, vhost-user-blk-pci, virtio-mem-pci, virtio-pmem-pci, pcie-root-port, vfio-pci",
        ),
        (
            "-kernel /k -drive file=/x,id=d -device virtio-blk-pci,drive=d,bus=pcie.0,addr=0x1",
            "device \"virtio-blk-pci.0\": 'bus', 'addr' and 'multifunction' belong to PCI devices: \
             leave them out on a microvm",
        ),
        (
            "-machine q35 -kernel /k -drive file=/x,id=d -device virtio-blk-device,drive=d",
            "device \"virtio-blk-device.0\": a q35 has PCI devices only: use the -pci driver, \
             with bus=pcie.0,addr=0x0 for the first free slot",
        ),
        ("-kernel /k -drive file=/x", "-drive: 'id' is missing: add id=NAME"),
        ("-kernel /k -drive id=a", "-drive: 'file' is missing: add file=VALUE"),
        (
            "-kernel /k -drive id=a,file=/x -drive id=a,file=/y",
            "drive \"a\" has been added already: ids must differ",
        ),
        ("-kernel /k -drive id=a,file=/x,direct=maybe", "-drive: direct=maybe: write on or off"),
        (
            "-kernel /k -drive id=a,file=/x,direct=off,aio=native",
            "drive \"a\": aio=native should be used with direct=on: add direct=on, or leave out aio",
        ),
        (
            "-kernel /k -device virtio-blk-device,drive=none",
            "device \"virtio-blk-device.0\": drive \"none\" not found: add -drive id=none,file=…",
        ),
        (
            "-kernel /k -drive id=a,file=/x -device virtio-blk-device,drive=a,bus=pcie.0,addr=0x1",
            "device \"virtio-blk-device.0\": 'bus', 'addr' and 'multifunction' belong to PCI devices: \
             leave them out on a microvm",
        ),
        (
            "-kernel /k -netdev tap,id=a",
            "-netdev: the tap device is missing: use 'ifname' or 'fd' to name one",
        ),
        (
            "-kernel /k -netdev tap,id=a,ifname=abcdefghijklmnop",
            "netdev \"a\": \"abcdefghijklmnop\" is no interface name of 1 to 15 bytes",
        ),
        ("-kernel /k -netdev user,id=a", "-netdev: unknown kind 'user': use tap or vhost-user"),
        (
            "-kernel /k -chardev socket,id=c,path=/s -device vhost-user-fs-device,chardev=c,tag=t,id=f",
            "device \"f\": another process serves it and needs guest memory: add mem-share=on to -machine",
        ),
        (
            "-kernel /k -machine microvm,mem-share=on -chardev socket,id=c,path=/s,server,nowait -device vhost-user-blk-device,chardev=c,id=f",
            "device \"f\": chardev \"c\": the back end is the server: leave out 'server' and 'nowait'",
        ),
        (
            "-kernel /k -machine microvm,mem-share=on -chardev pty,id=c -netdev vhost-user,id=n,chardev=c",
            "netdev \"n\": chardev \"c\" is no unix socket, which a vhost-user back end needs: write socket,id=c,path=PATH",
        ),
        (
            "-kernel /k -machine microvm,mem-share=on -chardev socket,id=c,path=/s -device vhost-user-fs-device,chardev=c,id=f,tag=0123456789012345678901234567890123456",
            "device \"f\": tag=0123456789012345678901234567890123456: write 1 to 36 bytes",
        ),
        (
            "-kernel /k -machine microvm,mem-share=on -chardev socket,id=c,path=/s -device vhost-user-blk-device,chardev=c,id=f -netdev vhost-user,id=n,chardev=c",
            "netdev \"n\": chardev \"c\" is used by something else already",
        ),
        (
            "-kernel /k -netdev vhost-user,id=n,chardev=c",
            "netdev \"n\": chardev \"c\" not found: add -chardev …,id=c",
        ),
        (
            "-kernel /k -qmp unix:/s",
            "-qmp: 'server' and 'nowait' must both be there: write unix:PATH,server,nowait or tcp:IP:PORT,server,nowait",
        ),
        ("-kernel /k -mon chardev=x,mode=control", "-mon: chardev \"x\" not found: add -chardev …,id=x"),
        ("-kernel /k -pidfile /p", "-pidfile must be used with -daemonize together"),
        (
            "-kernel /k -daemonize -serial stdio",
            "stdio and -daemonize can't be set together: use a socket, a pty or a file",
        ),
        (
            "-kernel /k -serial stdio -chardev stdio,id=x",
            "stdio can be used by one chardev or serial port only",
        ),
        (
            "-kernel /k -serial vc",
            "-serial: unknown kind 'vc': use stdio, pty, file, socket or redirect-to-log",
        ),
        (
            "-kernel /k -qmp unix:/s,server,nowait -serial socket,path=/s,server,nowait",
            "two sockets have the path /s: each needs its own",
        ),
        ("-kernel /k -trace type=all,file=/f", "-trace: write either type=all or file=FILE"),
        ("-kernel /k -trace type=none", "-trace: type=none: use all"),
        (
            "-kernel /k -netdev tap,id=a,ifname=t,script=/etc/ifup",
            "-netdev: script=/etc/ifup: nothing is run here: write script=no",
        ),
        (
            "-kernel /k -netdev tap,id=a,ifname=t,macnat=on",
            "-netdev: macnat=on is not supported in this version",
        ),
        ("-kernel /k -uuid 12", "-uuid: '12' is not a UUID such as 6f1c2b1e-7d1a-4a58-9f0e-5b7c1f6f9a10"),
    ] {
        assert_eq!(error(line), want, "{line}");
    }
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    use std::os::unix::ffi::OsStringExt;
    let args = vec!["-kernel".into(), OsString::from_vec(vec![0xff])];
    assert_eq!(parse(args), Err(CmdlineError::NotText(2)));
}

fn fragment() -> impl Strategy<Value = String> {
    let names: Vec<String> = options::OPTIONS
        .iter()
        .map(|s| s.name.to_owned())
        .chain(["--".to_owned(), "-freeze".to_owned()])
        .collect();
    prop_oneof![
        3 => proptest::sample::select(names),
        2 => "[a-z]{1,6}(,[a-z_-]{1,9}(=[a-z0-9:./,-]{0,9})?){0,4}",
        1 => "[0-9]{1,25}[kKmMgGtT]?",
        1 => "\\PC{0,12}",
    ]
}

proptest! {
    #[test]
    fn no_argument_vector_panics(args in proptest::collection::vec(fragment(), 0..12)) {
        if let Err(e) = parse(args.into_iter().map(OsString::from)) {
            prop_assert!(!e.to_string().is_empty());
        }
    }

    #[test]
    fn no_value_panics(
        option in proptest::sample::select(vec!["-machine", "-smp", "-m", "-drive", "-netdev", "-device", "-chardev", "-serial", "-qmp", "-mon", "-object", "-cpu"]),
        head in proptest::sample::select(vec!["", "microvm", "tap", "virtio-blk-device", "virtio-net-device", "socket", "unix:/x", "iothread", "1"]),
        tail in "(,(id|file|cores|sockets|drive|netdev|mac|fds|queues|port|host|addr|queue-size|maxmem)=[0-9a-fx:.KMG-]{0,10}){0,4}",
    ) {
        let _ = parse(["-kernel", "/k", option, &format!("{head}{tail}")].map(OsString::from));
    }
}

#[test]
fn options_that_name_a_thread_without_need_must_name_one_that_is_there() {
    let config =
        run("-kernel /k -object iothread,id=a -object iothread,id=b -qmp unix:/s,server,nowait,iothread=a \
         -netdev tap,id=n,ifname=t -device virtio-net-device,netdev=n,rx-iothread=b,tx-iothread=a \
         -drive id=iso,file=/i,media=cdrom");
    let DeviceDriver::VirtioNet { iothread, .. } = &config.devices[0].driver else { panic!("{config:?}") };
    assert_eq!(iothread.as_deref(), Some("b"));
    assert!(config.drives[0].readonly);
    for (line, want) in [
        (
            "-qmp unix:/s,server,nowait,iothread=a",
            "-qmp: iothread \"a\" not found: add -object iothread,id=a",
        ),
        (
            "-netdev tap,id=n,ifname=t -device virtio-net-device,netdev=n,tx-iothread=a",
            "-device: tx-iothread \"a\" not found: add -object iothread,id=a",
        ),
    ] {
        assert_eq!(error(&format!("-kernel /k {line}")), want);
    }
}

#[test]
fn memory_objects() {
    use crate::config::MemoryBackendKind;
    let object = |text: &str| {
        run(&format!("-kernel /k -m 512M -object {text},id=m,size=512M")).memory.backends.remove(0)
    };
    assert_eq!(object("memory-backend-ram").kind, MemoryBackendKind::Ram);
    let file =
        object("memory-backend-file,mem-path=/dev/hugepages,share=on,mem-prealloc=on,dump-guest-core=off");
    assert_eq!(file.kind, MemoryBackendKind::File("/dev/hugepages".into()));
    assert!(file.share && file.prealloc && !file.dump_guest_core);
    assert!(object("memory-backend-memfd").share && !object("memory-backend-memfd,share=off").share);
}

#[test]
fn small_devices_that_make_no_sense() {
    for (line, want) in [
        ("-device virtio-rng-device,rng=r,max-bytes=1", "'max-bytes' and 'period' belong together"),
        (
            "-device virtio-rng-device,rng=r,max-bytes=63,period=1000",
            "is 63 bytes per second: it must be from 64",
        ),
        ("-device virtio-rng-device,rng=r,max-bytes=1000001,period=1", "is 1000001000 bytes per second"),
        ("-device virtio-balloon-device,auto-balloon=on,membuf-percent=19", "a whole number from 20 to 80"),
        (
            "-device virtio-balloon-device,auto-balloon=on,monitor-interval=301",
            "a whole number from 5 to 300",
        ),
        ("-device virtio-balloon-device -device virtio-balloon-device", "a VM has one balloon only"),
        ("-device virtio-serial-device -device virtio-serial-device", "one virtio-serial device only"),
        ("-device virtio-serial-device,max_ports=32", "max-ports=32: write a whole number from 1 to 31"),
        ("-chardev pty,id=c -device virtconsole,chardev=c", "add -device virtio-serial-device"),
        ("-device virtio-serial-device -device virtconsole,chardev=c", "chardev \"c\" not found"),
        (
            "-chardev pty,id=c -serial chardev:c -device virtio-serial-device -device virtconsole,chardev=c",
            "chardev \"c\" is used by something else already",
        ),
        ("-device vhost-vsock-device", "'guest-cid' is missing"),
        ("-device vhost-vsock-device,guest-cid=2", "guest-cid=2: write a whole number from 3"),
        ("-device vhost-vsock-device,guest-cid=4294967295", "write a whole number from 3 to 4294967294"),
        (
            "-device vhost-vsock-device,guest-cid=3 -device vhost-vsock-device,guest-cid=3",
            "guest-cid=3 is used by another device already",
        ),
        (
            "-netdev tap,id=n,fd=9 -device vhost-vsock-device,guest-cid=3,vhostfd=9",
            "descriptor 9 is used already",
        ),
        ("-netdev tap,id=n,ifname=t,vhostfd=9", "not needed for a virtio-net device: add vhost=on"),
        (
            "-netdev tap,id=n,ifname=t,queues=2,vhost=on,vhostfd=9",
            "1 vhost descriptors for 2 queue pairs: give one for each",
        ),
        ("-netdev tap,id=n,fd=9,vhost=on,vhostfd=9", "descriptor 9 is used by another netdev already"),
        ("-device virtio-balloon-device,addr=0x1", "'bus', 'addr' and 'multifunction' belong to PCI devices"),
        ("-object rng-random", "'id' is missing"),
        ("-object rng-random,id=a -object rng-random,id=a", "rng object \"a\" has been added already"),
        (
            "-object memory-backend-ram,id=m,size=128M",
            "must be that of the guest memory (-m), 268435456 bytes",
        ),
        ("-object memory-backend-ram,id=m", "'size' is missing"),
        ("-object memory-backend-file,id=m,size=256M", "'mem-path' is missing"),
        (
            "-object memory-backend-ram,id=m,size=256M,mem-path=/x",
            "'mem-path' belongs to memory-backend-file",
        ),
        ("-object memory-backend-ram,id=m,size=256M -mem-path /x", "and -mem-path exclude each other"),
        (
            "-object memory-backend-ram,id=m,size=256M -object memory-backend-ram,id=n,size=256M",
            "comes from \"m\" already",
        ),
        ("-object memory-backend-ram,id=m,size=256M,host-nodes=0-1", "'host-nodes' needs a policy"),
        ("-object memory-backend-ram,id=m,size=256M,policy=bind", "'host-nodes' is missing"),
        (
            "-object memory-backend-ram,id=m,size=256M,policy=bind,host-nodes=64",
            "write a number from 0 to 63",
        ),
    ] {
        let error = error(&format!("-kernel /k {line}"));
        assert!(error.contains(want), "{line}: {error}");
    }
}

#[test]
fn drives_say_what_lies_under_them_and_how_they_are_kept() {
    use crate::config::{Aio, BackingImage, DetectZeroes, Drive, ImageFormat};
    let config = run(
        "-kernel /k -drive id=a,file=/x,format=qcow2,direct=off,aio=iouring,backing=/b,backing-format=raw,\
         l2-cache-size=4M,refcount-cache-size=512K,throttling.iops-total=100,discard=unmap,detect-zeroes=unmap",
    );
    let want = Drive {
        format: ImageFormat::Qcow2,
        direct: false,
        aio: Some(Aio::IoUring),
        backing: vec![BackingImage { file: "/b".into(), format: ImageFormat::Raw }],
        l2_cache_size: Some(4 << 20),
        refcount_cache_size: Some(512 << 10),
        iops_total: Some(100),
        discard: true,
        detect_zeroes: DetectZeroes::Unmap,
        ..Drive::new("a", "/x")
    };
    assert_eq!(config.drives, [want]);
    for (options, problem) in [
        ("l2-cache-size=33M", "l2-cache-size=33M: write a size of at most 32M"),
        ("format=qcow2,backing=/b,backing-format=vmdk", "backing-format=vmdk: use raw or qcow2"),
        ("backing=/b", "a raw image has no backing file: add format=qcow2"),
    ] {
        let text = error(&format!("-kernel /k -drive id=a,file=/x,{options}"));
        assert!(text.contains(problem), "{text}");
    }
}

#[test]
fn spellings_of_others_mean_the_same() {
    let config =
        run("-kernel /k -chardev socket,id=a,path=/a -chardev socket,id=b,path=/b,server=on,wait=off \
        -netdev tap,id=n,ifname=t,macnat=off,script=no,downscript=no -trace file=/points");
    let socket = |path: &str, server| ChardevKind::UnixSocket { path: path.into(), server, nowait: server };
    assert_eq!(
        (&config.chardevs[0].kind, &config.chardevs[1].kind),
        (&socket("/a", false), &socket("/b", true))
    );
    let tap = run("-kernel /k -netdev tap,id=n,ifname=t,path=/dev/tun2").netdevs.remove(0).backend;
    let NetBackend::Tap { path, .. } = tap else { panic!("{tap:?}") };
    assert_eq!(path.as_deref(), Some(std::path::Path::new("/dev/tun2")));
    let given = error("-kernel /k -netdev tap,id=n,fd=9,path=/dev/tun2");
    assert!(given.contains("'path' is where a tap of a name is opened"), "{given}");
    assert_eq!(config.process.trace, Some(Trace::File("/points".into())));
    assert_eq!(run("-kernel /k -trace type=events").process.trace, Some(Trace::All));
}
