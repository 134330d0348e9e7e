//! The small devices of one `flotilla-vmm` on a test host, as Debian's unmodified kernel drives them: terminal and byte stream
//! over sockets, random numbers, balloon; and memory made of the host's huge pages.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::json;
use tests::console::Console;
use tests::host::Host;
use tests::scenario::{BOOT, Guest, Outcome, SOON, Vmm, check, host_with_vmm};

/// Bytes sent through the port in each direction.
const STREAM: usize = 256 << 10;

/// A shell on the terminal, whoever is connected.
fn talk(console: &mut Console, words: &str) -> Outcome {
    let answer = console.shell(&format!("echo {words}"), SOON)?;
    check(answer == words, || format!("hvc0 says {answer:?}"))
}

#[test]
fn terminal_stream_random_numbers_and_balloon_work_in_debian() -> Outcome {
    let host = host_with_vmm("vmm-devices")?;
    let guest = Guest::new(&host, "devices", 1)?;
    let arguments = format!(
        "-machine microvm -m 256M -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz -append '{}' \
         -drive file={},id=disk0,readonly=off,direct=off -device virtio-blk-device,drive=disk0,id=disk0 \
         -serial socket,path={{dir}}/console.sock,server,nowait \
         -chardev socket,id=hvc,path={{dir}}/hvc.sock,server,nowait -chardev socket,id=agent,path={{dir}}/agent.sock,server,nowait \
         -device virtio-serial-device -device virtconsole,chardev=hvc,id=console_0 \
         -device virtserialport,chardev=agent,id=channel0,name=org.example.agent \
         -object rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,rng=objrng0,max-bytes=4096,period=1000 \
         -device virtio-balloon-device,deflate-on-oom=true,free-page-reporting=true",
        guest.append(),
        guest.disk
    );
    let vmm = Vmm::start(&host, "devices", &arguments)?;
    let mut serial = vmm.console()?;
    serial.expect("guest devices up, uptime", BOOT)?;

    let source = serial.shell("cat /sys/class/misc/hw_random/rng_current", SOON)?;
    check(source.starts_with("virtio_rng"), || source.clone())?;
    let count = serial.shell("head -c 512 /dev/hwrng | wc -c", SOON)?;
    check(count == "512", || format!("{count} random bytes"))?;
    let drivers = serial.shell("ls /sys/bus/virtio/drivers/virtio_balloon | grep -c ^virtio", SOON)?;
    check(drivers == "1", || format!("{drivers} balloons"))?;

    // The terminal: its clients come and go, and each finds the same shell. (cttyhack would go to the serial line.)
    serial.shell("(setsid -c /bin/sh -i < /dev/hvc0 > /dev/hvc0 2>&1 &)", SOON)?;
    for words in ["first", "second"] {
        let mut terminal = Console::new(host.dial(&vmm.path("hvc.sock"))?);
        talk(&mut terminal, words)?;
    }

    // The stream: everything arrives, both ways, though neither side reads as fast as the other writes.
    let name = serial.shell("cat /sys/class/virtio-ports/*p1/name", SOON)?;
    check(name == "org.example.agent", || name.clone())?;
    let sent: Vec<u8> = (0..STREAM as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    host.write("/root/sent", sent.clone())?;
    let sum = host.ok("md5sum < /root/sent | cut -d ' ' -f 1")?;
    let mut port = host.dial(&vmm.path("agent.sock"))?;
    port.set_read_timeout(Some(Duration::from_secs(60)))?;
    serial.enter(&format!(
        "p=$(ls /dev/vport*p1); until head -c {STREAM} $p > /tmp/got; test -s /tmp/got; do busybox sleep 0.2; done; echo got''all $(md5sum < /tmp/got)"
    ))?;
    port.write_all(&sent)?;
    let line = serial.expect_line("gotall", BOOT)?;
    check(line.contains(sum.trim()), || format!("the guest got {line}, not {sum}"))?;
    serial.enter("cat /tmp/got > $p; echo sent''all")?;
    let mut back = vec![0; STREAM];
    port.read_exact(&mut back)?;
    check(back == sent, || "the stream came back changed".into())?;
    // Linux drops what it has not given to a reader when the port is closed: cat must have left before anything is sent.
    serial.expect("sentall", SOON)?;
    drop(port);
    // Another client on the same port. Until the guest's kernel has heard of it, a reader finds the end of the file.
    let mut port = host.dial(&vmm.path("agent.sock"))?;
    serial.enter(
        "until head -n 1 $p | grep . > /tmp/heard; do busybox sleep 0.2; done; sed s/^/heard-/ /tmp/heard",
    )?;
    let mut heard = || -> Outcome {
        port.write_all(b"hello\n")?;
        serial.expect("heard-hello", Duration::from_secs(5))?;
        Ok(())
    };
    // A line that comes as such a reader leaves is lost with it.
    if heard().is_err() {
        heard()?;
    }
    serial.enter("busybox poweroff -f")?;
    let code = vmm.exit(SOON)?;
    check(code == 0, || format!("exit code {code}"))?;
    huge_pages(&host, &guest)
}

/// How many huge pages of the host are free.
fn free_pages(host: &Host) -> Outcome<usize> {
    Ok(host.ok("sed -n 's/^HugePages_Free: *//p' /proc/meminfo")?.trim().parse()?)
}

/// A guest whose memory is huge pages has all of them before it runs, and gives them back; one that would not get them does not start.
fn huge_pages(host: &Host, guest: &Guest) -> Outcome {
    host.ok("echo 140 > /proc/sys/vm/nr_hugepages; mountpoint -q /dev/hugepages || mount -t hugetlbfs none /dev/hugepages")?;
    check(free_pages(host)? == 140, || "the host could not reserve 140 huge pages".into())?;
    let arguments = format!(
        "-machine microvm -m 256M -mem-path /dev/hugepages -mem-prealloc -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz \
         -append '{}' -drive file={},id=disk0,readonly=off,direct=off -device virtio-blk-device,drive=disk0,id=disk0 \
         -serial socket,path={{dir}}/console.sock,server,nowait",
        guest.append(),
        guest.disk
    );
    let vmm = Vmm::start(host, "huge", &arguments)?;
    let mut serial = vmm.console()?;
    serial.expect("guest devices up, uptime", BOOT)?;
    let left = free_pages(host)?;
    check(left == 12, || format!("{left} pages of 140 are left, not 12"))?;
    let saved = vmm.qmp()?.execute("migrate", &json!({ "uri": "file:/root/never" }), SOON);
    let why = saved.err().map(|e| e.to_string()).unwrap_or_default();
    check(why.contains("mem-path"), || format!("migrate: {why}"))?;
    let second = "-machine microvm -m 256M -mem-path /dev/hugepages -kernel /srv/guest/vmlinuz -serial stdio";
    let refused = host.refused(&format!("timeout 20 flotilla-vmm {second} < /dev/null"))?;
    check(refused.stderr.contains("not enough free huge pages"), || refused.stderr.clone())?;
    serial.enter("busybox poweroff -f")?;
    let code = vmm.exit(SOON)?;
    check(code == 0, || format!("exit code {code}"))?;
    let back = free_pages(host)?;
    check(back == 140, || format!("{back} pages of 140 came back"))
}
