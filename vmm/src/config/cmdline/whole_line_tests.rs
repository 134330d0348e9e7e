//! Whole command lines, word for word as the manual, test clients and orchestrators write them.

use super::tests::run;
use crate::config::DeviceDriver;

#[test]
fn the_whole_lines_of_a_test_client_and_of_kata() {
    let config = run(
        "-name microvm -qmp unix:/s,server,nowait -machine microvm,dump-guest-core=on,mem-share=on -S \
         -device virtio-serial-device -chardev socket,path=/c,id=virtioconsole0,server,nowait \
         -device virtconsole,chardev=virtioconsole0,id=console_0 \
         -object rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,rng=objrng0,max-bytes=1234,period=1000 \
         -device vhost-vsock-device,id=vsock-1,guest-cid=5 \
         -device virtio-balloon-device,deflate-on-oom=true,free-page-reporting=true \
         -object iothread,id=iothread1 -kernel /k -smp 4 -m 2048",
    );
    let drivers: Vec<&DeviceDriver> = config.devices.iter().map(|d| &d.driver).collect();
    assert_eq!(
        drivers,
        [
            &DeviceDriver::VirtioSerial { max_ports: 31 },
            &DeviceDriver::VirtConsole { chardev: "virtioconsole0".into(), nr: None },
            &DeviceDriver::VirtioRng {
                rng: "objrng0".into(),
                limit: Some(crate::config::RngLimit { max_bytes: 1234, period_ms: 1000 })
            },
            &DeviceDriver::VhostVsock { guest_cid: 5, vhost_fd: None },
            &DeviceDriver::VirtioBalloon { deflate_on_oom: true, free_page_reporting: true, auto: None },
        ]
    );
    assert_eq!(config.rngs[0].filename, std::path::Path::new("/dev/urandom"));
    assert_eq!(config.devices[2].id, "virtio-rng-device.1");

    let config = run("-kernel /k -chardev socket,id=charconsole0,path=/c,server,nowait \
         -chardev socket,id=agent,path=/a,server,nowait -device virtio-serial-device,id=virtio-serial0,max_ports=2 \
         -device virtserialport,chardev=agent,id=channel0,name=agent.channel.0 \
         -device virtconsole,chardev=charconsole0,id=console0,nr=0 -object rng-random,id=rng0,filename=/dev/urandom \
         -device virtio-rng-device,id=virtio-rng0,rng=rng0 -device vhost-vsock-device,id=v,guest-cid=0x10,vhostfd=7");
    let ports = config.serial_ports().unwrap();
    assert_eq!((ports[0].nr, ports[0].chardev.as_str(), ports[0].console), (0, "charconsole0", true));
    assert_eq!((ports[1].nr, ports[1].name.as_deref()), (1, Some("agent.channel.0")));
    assert_eq!(config.devices[4].driver, DeviceDriver::VhostVsock { guest_cid: 16, vhost_fd: Some(7) });
}

/// Every form that the manual, test clients and orchestrators send, word for word but for names; the order is theirs.
#[test]
fn whole_lines_that_must_work_unmodified() {
    let manual = "-machine microvm -kernel K -smp 1 -m 1024 \
        -append \"console=ttyS0 pci=off reboot=k quiet panic=1 root=/dev/vda\" \
        -drive file=R,id=rootfs,readonly=off,direct=off -device virtio-blk-device,drive=rootfs \
        -qmp unix:S,server,nowait -serial stdio";
    let console = "-device virtio-serial-device -chardev socket,path=C,id=virtioconsole0,server,nowait \
        -device virtconsole,chardev=virtioconsole0,id=console_0";
    let disk = "-drive id=rootfs,file=R,readonly=off,direct=on";
    let end = "-kernel K -append \"rw console=hvc0 lastbus=0 reboot=k panic=1 tsc=reliable ipv6.disable=1 root=/dev/vda\" \
        -smp 4 -m 2048";
    let least = format!(
        "-name microvm -D /var/log/stratovirt -qmp unix:S,server,nowait -daemonize {console} \
         -netdev tap,id=T,ifname=T -device virtio-net-device,netdev=T,id=T {end} {disk} \
         -device virtio-blk-device,drive=rootfs,id=rootfs"
    );
    let most = format!(
        "-name microvm -D /var/log/stratovirt -qmp unix:S,server,nowait -pidfile F \
         -machine microvm,dump-guest-core=on,mem-share=on -disable-seccomp -daemonize -S {console} \
         -netdev tap,id=T,ifname=T,vhost=on -device virtio-net-device,netdev=T,id=T,iothread=iothread1,mac=52:54:00:12:34:57 \
         -object rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,rng=objrng0,max-bytes=1000,period=1000 \
         -device vhost-vsock-device,id=vsock-7,guest-cid=7 \
         -device virtio-balloon-device,deflate-on-oom=true,free-page-reporting=false \
         -object iothread,id=iothread1 {end} -initrd I -mem-path P -cpu host {disk},throttling.iops-total=1000 \
         -device virtio-blk-device,drive=rootfs,id=rootfs,iothread=iothread1,serial=1234 \
         -drive id=more,file=M,readonly=on -device virtio-blk-device,drive=more,id=more,num-queues=4,queue-size=128,bootindex=1"
    );
    let kata = "-name sandbox-1 -uuid 6f1c2b1e-7d1a-4a58-9f0e-5b7c1f6f9a10 -smp 1 -m 2048M -kernel K \
        -append \"tsc=reliable no_timer_check pci=off iommu=off acpi=off\" -qmp unix:S,server,nowait -D -disable-seccomp \
        -machine type=microvm,dump-guest-core=off,mem-share=on -initrd I -object rng-random,id=objrng0,filename=/dev/urandom \
        -device virtio-rng-device,id=virtio-rng0,rng=objrng0 -device virtio-serial-device,id=virtio-serial0 \
        -chardev socket,id=charconsole0,path=C,server,nowait -device virtconsole,id=virtio-console0,chardev=charconsole0,nr=0 \
        -drive id=rootfs,file=R,readonly=on,direct=off -device virtio-blk-device,drive=rootfs,id=rootfs \
        -netdev tap,id=net0,fds=3:4 -device virtio-net-device,netdev=net0,id=net0,mac=02:42:ac:11:00:02 \
        -device vhost-vsock-device,id=vsock-3,guest-cid=3,vhostfd=5";
    let libvirt = "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg,usb=off -daemonize \
        -qmp unix:S,server,nowait -pidfile F";
    let (manual_again, least_again) = (
        format!("{manual} -incoming file:/path/to/template"),
        format!("-incoming file:/var/tmp/snapshot_template {least}"),
    );
    for (line, devices, drives, netdevs) in [
        (manual, 1, 1, 0),
        (manual_again.as_str(), 1, 1, 0),
        (least_again.as_str(), 4, 1, 1),
        (least.as_str(), 4, 1, 1),
        (most.as_str(), 8, 2, 1),
        (kata, 6, 1, 1),
        (libvirt, 0, 0, 0),
    ] {
        let config = run(line);
        let got = (config.devices.len(), config.drives.len(), config.netdevs.len());
        assert_eq!(got, (devices, drives, netdevs), "{line}");
        assert!(!config.monitors.is_empty(), "{line}");
    }
}
