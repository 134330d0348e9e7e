//! One `flotilla-vmm` with the default guest: quick tests of the machine and its devices, on this machine's own `/dev/kvm`; where there is
//! none, on a test host.

use std::sync::OnceLock;
use std::time::Duration;

use serde_json::json;

use tests::console::Console;
use tests::host::Host;
use tests::qmp::Qmp;
use tests::scenario::{Outcome, SOON, Vmm, check, here_or_on_a_host};

/// Where the VMs run: one place for all tests of this file.
struct Place {
    host: Host,
    /// `flotilla-vmm` there.
    vmm: String,
    /// The guest there.
    guest: String,
}

fn place() -> Outcome<&'static Place> {
    static PLACE: OnceLock<Result<Place, String>> = OnceLock::new();
    let make = || -> Outcome<Place> {
        let (host, vmm, guest) = here_or_on_a_host("vmm-guest")?;
        Ok(Place { host, vmm, guest })
    };
    PLACE
        .get_or_init(|| make().map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| error.as_str().into())
}

impl Place {
    fn start(&self, name: &str, append: &str, more: &str) -> Outcome<Vmm<'_>> {
        let name = format!("test-{}-{name}", std::process::id());
        let arguments = format!("-machine microvm -m 256M -kernel {} -append '{append}' {more}", self.guest);
        Vmm::start_as(&self.host, &self.vmm, &name, &arguments)
    }

    /// Starts with the console on a socket and waits for the banner.
    fn up(&self, name: &str, more: &str) -> Outcome<(Vmm<'_>, Console)> {
        let vmm =
            self.start(name, "", &format!("-serial socket,path={{dir}}/console.sock,server,nowait {more}"))?;
        let mut console = vmm.console()?;
        console.expect("is up.", SOON)?;
        Ok((vmm, console))
    }
}

#[test]
fn the_guest_sees_its_memory_its_processors_and_each_device_once() -> Outcome {
    let (vmm, mut console) = place()?.up("devices", "-smp 3")?;
    console.expect("cpus    3 x", SOON)?;
    console.expect("256 MiB", SOON)?;
    console.enter("devices")?;
    for line in ["vda empty", "vdb empty", "vdc empty", "vdd empty", "vde empty", "vdf empty", "eth0", "eth1"]
    {
        console.expect(line, SOON)?;
    }
    console.enter("echo nothing''more")?;
    console.expect("nothing''more", SOON)?;
    let cpus = vmm.qmp()?.ask("query-cpus")?;
    check(cpus.as_array().is_some_and(|cpus| cpus.len() == 3), || cpus.to_string())
}

/// The one segment of an ELF file, which is what `objcopy -O binary` would make of it.
const FLATTEN: &str = r#"word() { od -An -tu8 -j "$1" -N 8 "$elf" | tr -d ' '; }
    header=$(word 32) && from=$(word $((header + 8))) && size=$(word $((header + 32))) &&
    tail -c +$((from + 1)) "$elf" | head -c "$size" >"$raw""#;

#[test]
fn a_raw_kernel_starts_as_its_elf_file_does() -> Outcome {
    let Place { host, vmm, guest } = place()?;
    let name = format!("test-{}-raw", std::process::id());
    let raw = format!("/tmp/{name}.bin");
    host.ok(&format!("elf={guest} raw={raw}; {FLATTEN}"))?;
    let arguments = format!(
        "-machine microvm -m 256M -smp 2 -kernel {raw} -serial socket,path={{dir}}/console.sock,server,nowait"
    );
    let outcome = (|| {
        let vmm = Vmm::start_as(host, vmm, &name, &arguments)?;
        let mut console = vmm.console()?;
        console.expect("is up.", SOON)?;
        console.expect("cpus    2 x", SOON)?;
        console.enter("poweroff")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())
    })();
    host.ok(&format!("rm {raw}"))?;
    outcome
}

#[test]
fn every_way_a_guest_ends_has_its_event_and_exit_code() -> Outcome {
    let place = place()?;
    for (command, reason) in
        [("poweroff", "guest-shutdown"), ("reboot", "guest-reset"), ("fault", "guest-shutdown")]
    {
        let (vmm, mut console) = place.up(command, "")?;
        let mut qmp = vmm.qmp()?;
        console.enter(command)?;
        let event = qmp.wait(SOON, |name, _| name == "SHUTDOWN")?;
        check(event["data"]["reason"] == reason && event["data"]["guest"] == true, || {
            format!("{command}: {event}")
        })?;
        let code = vmm.exit(SOON)?;
        check(code == 0, || format!("{command}: exit code {code}"))?;
    }
    Ok(())
}

#[test]
fn stop_and_cont_hold_and_free_the_guest() -> Outcome {
    let place = place()?;
    let vmm = place.start("stop", "", "-S -serial socket,path={dir}/console.sock,server,nowait")?;
    let mut qmp = vmm.qmp()?;
    let mut console = vmm.console()?;
    check(console.expect("is up.", Duration::from_millis(500)).is_err(), || "it runs before cont".into())?;
    qmp.ask("cont")?;
    console.expect("is up.", SOON)?;
    for round in 0..5 {
        qmp.ask("stop")?;
        let status = qmp.ask("query-status")?;
        check(status["status"] == "paused" && status["running"] == false, || status.to_string())?;
        console.enter(&format!("echo round {round}"))?;
        check(console.expect("> echo", Duration::from_millis(100)).is_err(), || {
            "it runs while stopped".into()
        })?;
        qmp.ask("cont")?;
        console.expect(&format!("round {round}"), SOON)?;
    }
    qmp.ask("quit")?;
    let event = qmp.wait(SOON, |name, _| name == "SHUTDOWN")?;
    check(event["data"]["reason"] == "host-qmp-quit", || event.to_string())?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

#[test]
fn disks_take_and_keep_what_the_guest_writes() -> Outcome {
    let place = place()?;
    place.host.ok("mkdir -p /var/tmp")?;
    let image = format!("/var/tmp/flotilla-test-{}.img", std::process::id());
    // Each engine with and without O_DIRECT, except the two that are refused: `native` needs it, `off` does not go with it.
    for (aio, direct) in [
        ("off", "off"),
        ("threads", "off"),
        ("threads", "on"),
        ("io_uring", "off"),
        ("io_uring", "on"),
        ("native", "on"),
    ] {
        place.host.ok(&format!("rm -f {image}; truncate -s 16M {image}"))?;
        let disk = |readonly: &str| {
            format!(
                "-drive file={image},id=disk0,readonly={readonly},direct={direct},aio={aio} -device virtio-blk-device,drive=disk0,id=disk0"
            )
        };
        let (vmm, mut console) = place.up(&format!("disk-{aio}-{direct}"), &disk("off"))?;
        for command in ["disk write 5 1000 7", "disk check 5 1000 7", "disk flush"] {
            console.enter(command)?;
            console.expect("sectors in", SOON)?;
        }
        // How the image is open is seen from outside: O_DIRECT is 040000 on x86, and `off` alone does without a ring.
        let open = place.host.ok(&format!(
            "cd /proc/$(cat {pid})/fd; for fd in *; do [ \"$(readlink $fd)\" != {image} ] || sed -n 's/^flags:/image/p' ../fdinfo/$fd; \
             done; ls -l . | grep -o io_uring | head -n 1",
            pid = vmm.path("pid")
        ))?;
        let bits =
            open.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("image")?.trim(), 8).ok());
        check(bits.is_some_and(|bits| (bits & 0o40000 != 0) == (direct == "on")), || open.clone())?;
        check(open.contains("io_uring") == (aio != "off"), || format!("aio={aio}: {open}"))?;
        vmm.qmp()?.ask("quit")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
        let (vmm, mut console) = place.up(&format!("disk-ro-{aio}-{direct}"), &disk("on"))?;
        console.enter("disk check 5 1000 7")?;
        console.expect("check 1000 sectors in", SOON)?;
        console.enter("disk write 0 1 1")?;
        console.expect("disk: ", SOON)?;
        vmm.qmp()?.ask("quit")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
        let first = place.host.ok(&format!("head -c 512 {image} | tr -d '\\0' | wc -c"))?;
        check(first == "0", || "a read-only disk was written to".into())?;
    }
    place.host.ok(&format!("rm -f {image}"))?;
    Ok(())
}

#[test]
fn memory_that_is_given_back_is_not_there_any_more() -> Outcome {
    let options = "-object memory-backend-ram,id=m,size=512M -device virtio-mem-device,id=mem0,memdev=m,requested-size=256M";
    let (vmm, mut console) = place()?.up("more", options)?;
    let mut qmp = vmm.qmp()?;
    let plugged = |qmp: &mut Qmp, blocks: u64| -> Outcome {
        let shown = qmp.execute("get-viomem", &json!({ "id": "mem0" }), SOON)?;
        check(shown["plugged-size"] == blocks << 21, || format!("{shown}, not {blocks} blocks"))
    };
    let all = |console: &mut Console, steps: &[(&str, &str)]| -> Outcome {
        for (command, answer) in steps {
            console.enter(&format!("more {command}"))?;
            let said = console.expect_line("more: ", SOON)?;
            check(said.contains(answer), || format!("more {command}: {said}, not {answer}"))?;
        }
        Ok(())
    };
    // 64 blocks of 2 MiB are a chunk; in each block 32 words are looked at.
    all(
        &mut console,
        &[
            ("state 0 256", "none there"),
            ("look 0 1", "0 kept, 0 zero, 32 absent"),
            ("plug 0 64", "done"),
            ("look 0 2", "64 zero"),
            ("fill 0 64", "wrote 2048 words"),
            ("look 0 64", "2048 kept"),
            ("look 64 1", "32 absent"),
            ("state 63 2", "some there"),
            ("plug 64 65", "refused"),
            ("plug 63 1", "nonsense"),
            ("plug 256 1", "nonsense"),
            ("unplug 64 1", "nonsense"),
            ("state 0 0", "nonsense"),
        ],
    )?;
    plugged(&mut qmp, 64)?;
    // What is left of a chunk stays as it was; with its last block it goes.
    all(
        &mut console,
        &[
            ("unplug 0 63", "done"),
            ("look 62 2", "32 kept, 32 zero"),
            ("unplug 63 1", "done"),
            ("look 62 2", "64 absent"),
            ("fill 0 1", "wrote 32 words"),
            ("plug 60 8", "done"),
            ("look 0 1", "32 zero"),
            ("look 60 8", "256 zero"),
            ("none", "done"),
            ("look 60 8", "256 absent"),
        ],
    )?;
    plugged(&mut qmp, 0)?;
    for (size, good) in
        [(512u64 << 20, true), (513 << 20, false), (514 << 20, false), (0, true), (64 << 20, true)]
    {
        let set = qmp.execute("set-viomem", &json!({ "id": "mem0", "requested-size": size }), SOON);
        check(set.is_ok() == good, || format!("set-viomem {size}: {set:?}"))?;
    }
    all(&mut console, &[("plug 0 33", "refused"), ("plug 0 32", "done"), ("fill 0 32", "wrote 1024 words")])?;
    let saved = qmp.execute("migrate", &json!({ "uri": "file:/var/tmp/never" }), SOON);
    let why = saved.err().map(|e| e.to_string()).unwrap_or_default();
    check(why.contains("mem0") && why.contains("virtio-mem-device cannot be used"), || {
        format!("migrate: {why}")
    })?;
    // What runs after a reset knows of no block, and finds nothing of what was there.
    qmp.ask("system_reset")?;
    console.expect("is up.", SOON)?;
    plugged(&mut qmp, 0)?;
    all(&mut console, &[("look 0 32", "1024 absent"), ("plug 0 32", "done"), ("look 0 32", "1024 zero")])?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

#[test]
fn a_disk_that_another_process_serves_is_one_like_any_other() -> Outcome {
    let place = place()?;
    if place.host.run("command -v qemu-storage-daemon")?.code != 0 {
        println!("SKIPPED: no qemu-storage-daemon to serve a disk");
        return Ok(());
    }
    let dir = format!("/var/tmp/flotilla-test-{}-served", std::process::id());
    let (image, socket) = (format!("{dir}/image"), format!("{dir}/disk.sock"));
    place.host.ok(&format!("rm -rf {dir}; mkdir -p {dir}; truncate -s 16M {image}"))?;
    let serve = || -> Outcome {
        place.host.ok(&format!(
            "(setsid qemu-storage-daemon --blockdev driver=file,node-name=f,filename={image},locking=off \
             --blockdev driver=raw,node-name=d,file=f \
             --export type=vhost-user-blk,id=e,addr.type=unix,addr.path={socket},node-name=d,writable=on \
             < /dev/null > {dir}/out 2>&1 & echo $! > {dir}/pid)"
        ))?;
        place.host.eventually(SOON, &format!("test -S {socket}"))?;
        Ok(())
    };
    let stop = || {
        place.host.ok(&format!("kill $(cat {dir}/pid); while kill -0 $(cat {dir}/pid) 2>/dev/null; do sleep 0.1; done; rm -f {socket}"))
    };
    serve()?;
    let disk = format!(
        "-object memory-backend-memfd,id=ram,size=256M -chardev socket,id=c,path={socket} -device vhost-user-blk-device,chardev=c,id=served"
    );
    let (vmm, mut console) = place.up("served", &disk)?;
    console.enter("devices")?;
    console.expect("vdg 16 MiB", SOON)?;
    for command in ["disk vdg write 5 1000 7", "disk vdg check 5 1000 7", "disk vdg flush"] {
        console.enter(command)?;
        console.expect("sectors in", SOON)?;
    }
    let mut qmp = vmm.qmp()?;
    for command in ["stop", "cont"] {
        qmp.ask(command)?;
    }
    console.enter("disk vdg check 5 1000 7")?;
    console.expect("1000 sectors as written", SOON)?;
    // Another driver of the same device: the guest starts again.
    qmp.ask("system_reset")?;
    console.expect("is up.", SOON)?;
    console.enter("disk vdg check 5 1000 7")?;
    console.expect("1000 sectors as written", SOON)?;

    // Its process goes: one line says so, the VM lives, and with the next driver the device works again.
    stop()?;
    place
        .host
        .eventually(SOON, &format!("grep -c 'the device stands still' {} | grep -x 1", vmm.path("out")))?;
    check(qmp.ask("query-status")?["status"] == "running", || "the VM has died with its disk".into())?;
    serve()?;
    qmp.ask("system_reset")?;
    console.expect("is up.", SOON)?;
    console.enter("disk vdg check 5 1000 7")?;
    console.expect("1000 sectors as written", SOON)?;
    let refused = qmp.execute("migrate", &json!({ "uri": format!("file:{dir}/snapshot") }), SOON);
    check(refused.is_err(), || "a snapshot of what another process serves".into())?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    stop()?;
    place.host.ok(&format!("rm -rf {dir}"))?;
    Ok(())
}

#[test]
fn a_disk_that_another_process_serves_comes_to_a_standard_machine() -> Outcome {
    let place = place()?;
    if place.host.run("command -v qemu-storage-daemon")?.code != 0 {
        println!("SKIPPED: no qemu-storage-daemon to serve a disk");
        return Ok(());
    }
    let dir = format!("/var/tmp/flotilla-test-{}-comes", std::process::id());
    let socket = format!("{dir}/disk.sock");
    place.host.ok(&format!(
        "rm -rf {dir}; mkdir -p {dir}; truncate -s 16M {dir}/image; (setsid qemu-storage-daemon \
         --blockdev driver=file,node-name=f,filename={dir}/image,locking=off --blockdev driver=raw,node-name=d,file=f \
         --export type=vhost-user-blk,id=e,addr.type=unix,addr.path={socket},node-name=d,writable=on \
         < /dev/null > {dir}/out 2>&1 & echo $! > {dir}/pid)"
    ))?;
    place.host.eventually(SOON, &format!("test -S {socket}"))?;
    // No vCPU runs: what a guest would let go leaves when it is reset.
    let arguments = format!(
        "-machine q35,mem-share=on -m 256M -S -kernel {} -device pcie-root-port,id=port,bus=pcie.0,addr=0x5,port=5",
        place.guest
    );
    let name = format!("test-{}-comes", std::process::id());
    let vmm = Vmm::start_as(&place.host, &place.vmm, &name, &arguments)?;
    let mut qmp = vmm.qmp()?;
    let addr = json!({ "type": "unix", "data": { "path": socket } });
    let chardev =
        json!({ "id": "c", "backend": { "type": "socket", "data": { "addr": addr, "server": false } } });
    let disk = |id: &str| json!({ "id": id, "driver": "vhost-user-blk-pci", "chardev": "c", "bus": "port", "addr": "0x0" });
    for id in ["a", "b", "c"] {
        qmp.execute("chardev-add", &chardev, SOON)?;
        qmp.execute("device_add", &disk(id), SOON)?;
        qmp.ask("system_reset")?;
        qmp.execute("device_del", &json!({ "id": id }), SOON)?;
        qmp.ask("system_reset")?;
        qmp.wait(SOON, |event, data| event == "DEVICE_DELETED" && data["device"] == id)?;
        qmp.execute("chardev-remove", &json!({ "id": "c" }), SOON)?;
    }
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    place.host.ok(&format!(
        "kill $(cat {dir}/pid); while kill -0 $(cat {dir}/pid) 2>/dev/null; do sleep 0.1; done; rm -rf {dir}"
    ))?;
    Ok(())
}

#[test]
fn the_serial_line_goes_to_standard_output_and_a_file() -> Outcome {
    let place = place()?;
    for (name, to, file) in [("stdio", "stdio", "out"), ("file", "file,path={dir}/serial", "serial")] {
        let vmm = place.start(name, "cmd=echo,here;poweroff", &format!("-serial {to}"))?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
        place.host.ok(&format!("grep -q here {}", vmm.path(file)))?;
    }
    Ok(())
}

#[test]
fn bad_arguments_end_at_once_in_one_line() -> Outcome {
    let place = place()?;
    for (arguments, words) in [
        (format!("-kernel {} -frobnicate", place.guest), "frobnicate"),
        ("-kernel /none".into(), "/none"),
        (format!("-kernel {} -m 64M", place.guest), "128"),
        (
            format!("-kernel {} -drive file=/none,id=d -device virtio-blk-device,drive=d,id=d", place.guest),
            "/none",
        ),
    ] {
        let output = place
            .host
            .refused(&format!("timeout 20 {} -machine microvm {arguments} </dev/null", place.vmm))?;
        let text = output.stderr.trim();
        check(output.code == 1 && text.lines().count() == 1 && text.contains(words), || {
            format!("{arguments}: exit {}, stderr {text:?}", output.code)
        })?;
    }
    Ok(())
}
