//! Snapshots of one `flotilla-vmm` with the default guest: what was under way goes on in a new process, in several at once, and in the one that
//! was saved. On this machine's own `/dev/kvm`; where there is none, on a test host.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

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
        let (host, vmm, guest) = here_or_on_a_host("vmm-snapshot")?;
        Ok(Place { host, vmm, guest })
    };
    PLACE
        .get_or_init(|| make().map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| error.as_str().into())
}

/// A folder of this test's own, removed with it.
struct Folder<'a>(&'a Host, String);

impl<'a> Folder<'a> {
    fn new(host: &'a Host, name: &str) -> Outcome<Self> {
        let path = format!("/var/tmp/flotilla-snapshot-{}-{name}", std::process::id());
        host.ok(&format!("mkdir -p {path}"))?;
        Ok(Self(host, path))
    }
}

impl Drop for Folder<'_> {
    fn drop(&mut self) {
        let _ = self.0.run(&format!("rm -rf {}", self.1));
    }
}

impl Place {
    fn arguments(&self, more: &str) -> String {
        format!(
            "-machine microvm -m 256M -kernel {} -serial socket,path={{dir}}/console.sock,server,nowait {more}",
            self.guest
        )
    }

    fn start(&self, name: &str, more: &str) -> Outcome<(Vmm<'_>, Console, Qmp)> {
        let name = format!("snap-{}-{name}", std::process::id());
        let vmm = Vmm::start_as(&self.host, &self.vmm, &name, &self.arguments(more))?;
        let (console, qmp) = (vmm.console()?, vmm.qmp()?);
        Ok((vmm, console, qmp))
    }
}

fn migrate(qmp: &mut Qmp, dir: &str) -> Outcome {
    qmp.execute("migrate", &json!({ "uri": format!("file:{dir}") }), SOON)?;
    let status = qmp.ask("query-migrate")?;
    check(status["status"] == "completed", || status.to_string())
}

fn is_running(qmp: &mut Qmp) -> Outcome<bool> {
    Ok(qmp.ask("query-status")?["running"] == true)
}

#[test]
fn a_computation_goes_on_in_clones_and_in_the_original() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "clones")?;
    let dir = format!("{}/template", folder.1);
    let (first, mut console, mut qmp) = place.start("first", "-smp 2")?;
    console.expect("is up.", SOON)?;
    // Memory that has something in it, then a computation in the middle of which it stops.
    console.enter("touch 40")?;
    console.expect("touch: 10240 pages", SOON)?;
    console.enter("spin 3000")?;
    console.expect("spin 3000", SOON)?;
    check(qmp.ask("query-migrate")?["status"] == "setup", || "a VM that has gone nowhere".into())?;
    qmp.ask("stop")?;
    migrate(&mut qmp, &dir)?;
    check(!is_running(&mut qmp)?, || "it runs after the snapshot".into())?;
    let files = place.host.ok(&format!("ls {dir}; stat -c %s {dir}/memory; ls {}", folder.1))?;
    check(files.split_whitespace().eq(["memory", "state", "268435456", "template"]), || files.clone())?;
    let kib: u64 = place.host.ok(&format!("du -k {dir}/memory | cut -f1"))?.trim().parse()?;
    check((39 << 10..60 << 10).contains(&kib), || format!("{kib} KiB for 40 MiB touched"))?;
    // Two at once from one directory, and the original after them.
    let sum = place.host.ok(&format!("sha256sum {dir}/memory"))?;
    let mut clones = Vec::new();
    for (name, how) in [("second", ""), ("third", ",mapped=false"), ("fourth", ",verify=on")] {
        clones.push(place.start(name, &format!("-smp 2 -incoming file:{dir}{how}"))?);
    }
    for (_, console, qmp) in &mut clones {
        let status = qmp.ask("query-migrate")?;
        check(status["status"] == "completed" && is_running(qmp)?, || status.to_string())?;
        console.expect("rounds", SOON)?;
        console.enter("echo still''here")?;
        console.expect("still''here", SOON)?;
        console.enter("touch 20")?;
        console.expect("touch: 5120 pages", SOON)?;
    }
    qmp.ask("cont")?;
    console.expect("rounds", SOON)?;
    console.enter("echo the''original")?;
    console.expect("the''original", SOON)?;
    check(place.host.ok(&format!("sha256sum {dir}/memory"))? == sum, || {
        "a clone wrote to the template".into()
    })?;
    for (vmm, mut console, _) in clones {
        console.enter("poweroff")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    }
    // A snapshot of a running VM, in place of the first one.
    migrate(&mut qmp, &dir)?;
    qmp.wait(SOON, |name, _| name == "STOP")?;
    check(!is_running(&mut qmp)?, || "it runs after the snapshot".into())?;
    qmp.ask("quit")?;
    check(first.exit(SOON)? == 0, || "not 0".into())?;
    let (vmm, mut console, mut qmp) = place.start("fifth", &format!("-smp 2 -S -incoming file:{dir}"))?;
    console.enter("echo hello")?;
    check(console.expect("hello", Duration::from_millis(300)).is_err(), || "it runs before cont".into())?;
    qmp.ask("cont")?;
    console.expect("hello", SOON)?;
    // A reset leads to a fresh boot, not back to the snapshot.
    qmp.ask("system_reset")?;
    console.expect("is up.", SOON)?;
    console.enter("poweroff")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

/// The guest has filled all that it can see of its processor, and polls for a key while it is saved. It compares by itself.
#[test]
fn everything_of_a_processor_comes_back() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "processor")?;
    for machine in ["microvm", "q35"] {
        let dir = format!("{}/{machine}", folder.1);
        let line = |more: &str| place.arguments(more).replacen("microvm", machine, 1);
        let start = |name: &str, more: &str| -> Outcome<(Vmm<'_>, Console, Qmp)> {
            let name = format!("snap-{}-{name}-{machine}", std::process::id());
            let vmm = Vmm::start_as(&place.host, &place.vmm, &name, &line(more))?;
            let (console, qmp) = (vmm.console()?, vmm.qmp()?);
            Ok((vmm, console, qmp))
        };
        let (vmm, mut console, mut qmp) = start("full", "-smp 2")?;
        console.expect("is up.", SOON)?;
        console.enter("vcpu")?;
        let line = console.expect("others set", SOON)?;
        check(line.contains("14 general registers"), || line.clone())?;
        qmp.ask("stop")?;
        migrate(&mut qmp, &dir)?;
        let (restored, mut other, _qmp) = start("again", &format!("-smp 2 -incoming file:{dir}"))?;
        qmp.ask("cont")?;
        for console in [&mut other, &mut console] {
            console.enter("")?;
            let said = console.expect(" changed", SOON)?;
            check(said.contains("vcpu: 0 changed"), || format!("{machine}: {said}"))?;
            console.enter("poweroff")?;
        }
        check(restored.exit(SOON)? == 0 && vmm.exit(SOON)? == 0, || "not 0".into())?;
    }
    Ok(())
}

#[test]
fn a_disk_in_use_goes_on_and_time_does_too() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "disk")?;
    let dir = format!("{}/template", folder.1);
    let disk = format!("{}/disk.img", folder.1);
    place.host.ok(&format!("truncate -s 16M {disk}"))?;
    let options = |file: &str| {
        format!(
            "-drive file={file},id=d,direct=off -device virtio-blk-device,drive=d,id=d,serial=one -object rng-random,id=r,filename=/dev/urandom -device virtio-rng-device,rng=r,id=rng0"
        )
    };
    let (first, mut console, mut qmp) = place.start("disk1", &options(&disk))?;
    console.expect("is up.", SOON)?;
    console.enter("disk write 0 2000 7")?;
    console.expect("sectors in", SOON)?;
    // The driver writes while the VM stops.
    console.enter("disk write 2000 30000 9")?;
    console.expect("disk write 2000", SOON)?;
    qmp.ask("stop")?;
    migrate(&mut qmp, &dir)?;
    // Each goes on with a copy of its own, as of this moment.
    let copy = format!("{}/copy.img", folder.1);
    place.host.ok(&format!("cp {disk} {copy}"))?;
    let (second, mut other, mut qmp2) =
        place.start("disk2", &format!("{} -incoming file:{dir}", options(&copy)))?;
    qmp.ask("cont")?;
    for console in [&mut console, &mut other] {
        console.expect("sectors in", SOON)?;
        console.enter("disk check 0 2000 7")?;
        console.expect("2000 sectors as written", SOON)?;
        console.enter("disk check 2000 30000 9")?;
        console.expect("30000 sectors as written", SOON)?;
        console.enter("sleep 50")?;
        console.enter("uptime")?;
        console.expect("ticks a second", SOON)?;
    }
    for (vmm, qmp) in [(first, &mut qmp), (second, &mut qmp2)] {
        qmp.ask("quit")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    }
    Ok(())
}

/// As the manual says: what was plugged is given on the command line. In whatever order, and where other slots are empty.
#[test]
fn disks_that_were_plugged_come_back_to_their_slots() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "plugged")?;
    let dir = format!("{}/template", folder.1);
    let disk = |name: &str| format!("{}/{name}.img", folder.1);
    for name in ["first", "low", "high"] {
        place.host.ok(&format!("truncate -s 16M {}", disk(name)))?;
    }
    let on_the_line = |names: &[&str]| {
        let option = |name: &&str| {
            format!(
                "-drive file={},id={name},direct=off -device virtio-blk-device,drive={name},id={name} ",
                disk(name)
            )
        };
        names.iter().map(option).collect::<String>()
    };
    let (vmm, mut console, mut qmp) = place.start("plugged", &on_the_line(&["first"]))?;
    console.expect("is up.", SOON)?;
    for (name, addr) in [("high", "0x4"), ("low", "0x2")] {
        let file = json!({ "driver": "file", "filename": disk(name) });
        let node = json!({ "node-name": name, "file": file, "cache": { "direct": false } });
        qmp.execute("blockdev-add", &node, SOON)?;
        let device = json!({ "id": name, "driver": "virtio-blk-mmio", "addr": addr });
        qmp.execute("device_add", &device, SOON)?;
    }
    for (drive, seed) in [("vdc", 3), ("vde", 5)] {
        console.enter(&format!("disk {drive} write 0 64 {seed}"))?;
        console.expect("sectors in", SOON)?;
    }
    // What was there from the start has gone.
    qmp.execute("device_del", &json!({ "id": "first" }), SOON)?;
    migrate(&mut qmp, &dir)?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    for (name, names) in [("plugged2", ["high", "low"]), ("plugged3", ["low", "high"])] {
        let line = on_the_line(&names);
        let (vmm, mut console, mut qmp) = place.start(name, &format!("{line} -incoming file:{dir}"))?;
        for (drive, seed) in [("vdc", 3), ("vde", 5)] {
            console.enter(&format!("disk {drive} check 0 64 {seed}"))?;
            console.expect("64 sectors as written", SOON)?;
        }
        // They are ordinary devices, to be unplugged and saved again.
        qmp.execute("device_del", &json!({ "id": "low" }), SOON)?;
        migrate(&mut qmp, &format!("{dir}-{name}"))?;
        qmp.ask("quit")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
        let line = on_the_line(&["high"]);
        let (vmm, mut console, mut qmp) =
            place.start(&format!("{name}b"), &format!("{line} -incoming file:{dir}-{name}"))?;
        console.enter("disk vde check 0 64 5")?;
        console.expect("64 sectors as written", SOON)?;
        // The next one opens the same images.
        qmp.ask("quit")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    }
    Ok(())
}

/// Refusals of a processor that lacks what the guest has seen of the one that it was saved on.
const OTHER_PROCESSOR: [&str; 4] = ["processor", "CPUID leaf", "time-stamp counter", "MSR"];

/// What a release has saved is restored by this one and by every later one. Each release adds its own to `tests/snapshots`: a guest with two
/// vCPUs and 128 MiB that was told `spin 3000` a moment before (`tar --sparse -czf VERSION-MACHINE.tar.gz DIRECTORY`).
#[test]
fn what_earlier_releases_have_saved_is_restored() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "kept")?;
    let mut kept: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/snapshots"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Outcome<_>>()?;
    kept.sort();
    check(kept.len() >= 2, || format!("{kept:?}"))?;
    for path in kept {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let (release, machine) = name
            .strip_suffix(".tar.gz")
            .and_then(|name| name.split_once('-'))
            .ok_or_else(|| format!("{name}: not VERSION-MACHINE.tar.gz"))?;
        let dir = format!("{}/{release}/{machine}", folder.1);
        place.host.push(&path, &format!("{}/{release}/{name}", folder.1))?;
        place.host.ok(&format!("cd {}/{release} && tar --sparse -xzf {name}", folder.1))?;
        let arguments = place
            .arguments(&format!("-smp 2 -incoming file:{dir},verify=on"))
            .replace("-machine microvm -m 256M", &format!("-machine {machine} -m 128M"));
        let vmm = format!("snap-{}-{machine}", std::process::id());
        let vmm = Vmm::start_as(&place.host, &place.vmm, &vmm, &arguments)?;
        let goes_on = || -> Outcome<Console> {
            let mut console = vmm.console()?;
            console.expect("rounds", SOON)?;
            Ok(console)
        };
        let mut console = match goes_on() {
            Ok(console) => console,
            Err(error) => {
                let said = vmm.output()?;
                check(OTHER_PROCESSOR.iter().any(|words| said.contains(words)), || {
                    format!("{name}: {error}: {said}")
                })?;
                // A host with another processor cannot run it, and says so.
                tests::scenario::step(format!("{name}: {said}"));
                continue;
            }
        };
        console.enter("echo of''old")?;
        console.expect("of''old", SOON)?;
        let mut qmp = vmm.qmp()?;
        check(is_running(&mut qmp)?, || format!("{name}: it does not run"))?;
        // Saved again, by this one.
        migrate(&mut qmp, &format!("{dir}-again"))?;
        qmp.ask("quit")?;
        check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    }
    Ok(())
}

/// Kills in a row, each at another moment of a save.
const KILLS: u32 = 24;

#[test]
fn a_kill_at_any_moment_of_a_save_leaves_a_whole_snapshot() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "kills")?;
    let dir = format!("{}/template", folder.1);
    let (vmm, mut console, mut qmp) = place.start("kill", "")?;
    console.expect("is up.", SOON)?;
    console.enter("touch 40")?;
    console.expect("touch: 10240 pages", SOON)?;
    let start = Instant::now();
    migrate(&mut qmp, &dir)?;
    let takes = start.elapsed();
    drop(vmm);
    let mut interrupted = 0;
    for round in 1..=KILLS {
        // What the last one left is whole: it is compared with its checksum, and the guest goes on.
        let (vmm, mut console, mut qmp) =
            place.start(&format!("kill{round}"), &format!("-incoming file:{dir},verify=on"))?;
        let answers = console
            .enter(&format!("echo round''{round}"))
            .and_then(|()| console.expect(&format!("round''{round}"), SOON).map(drop));
        answers.map_err(|error| {
            let said = place.host.run(&format!("cat {} {}", vmm.path("out"), vmm.path("exit")));
            format!("round {round}: {error}: {said:?}")
        })?;
        let after = (takes * round / (KILLS - 4)).as_secs_f64();
        place
            .host
            .ok(&format!("(sleep {after:.4}; kill -9 $(cat {})) >/dev/null 2>&1 &", vmm.path("pid")))?;
        let saved = qmp.execute("migrate", &json!({ "uri": format!("file:{dir}") }), SOON);
        interrupted += u32::from(saved.is_err());
        check(vmm.exit(SOON)? == 137, || "it was not killed".into())?;
        let left = place.host.ok(&format!("ls {}", folder.1))?;
        let [draft, "template"] = left.split_whitespace().rev().take(2).collect::<Vec<_>>()[..] else {
            continue;
        };
        check(draft.starts_with("template.partial-"), || left.clone())?;
    }
    tests::scenario::step(format!("{interrupted} of {KILLS} saves were interrupted; one takes {takes:?}"));
    // The next one that is not disturbed takes away what the others have left.
    let (_vmm, _, mut qmp) = place.start("kill-last", &format!("-incoming file:{dir}"))?;
    migrate(&mut qmp, &dir)?;
    let left = place.host.ok(&format!("ls {0} {0}/template", folder.1))?;
    let template = format!("{}/template:", folder.1);
    let folder = format!("{}:", folder.1);
    check(left.split_whitespace().eq([&folder, "template", &template, "memory", "state"]), || left.clone())
}

#[test]
fn a_full_disk_leaves_the_old_snapshot_and_the_vm_as_they_were() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "full")?;
    let program = format!(
        "unshare -m sh -c \"mount -t tmpfs -o size=24M none {} && exec {} \\\"\\$@\\\"\" vmm",
        folder.1, place.vmm
    );
    let name = format!("snap-{}-full", std::process::id());
    let vmm = Vmm::start_as(&place.host, &program, &name, &place.arguments(""))?;
    let (mut console, mut qmp) = (vmm.console()?, vmm.qmp()?);
    console.expect("is up.", SOON)?;
    // As others see the file system of this VM.
    let pid = place.host.ok(&format!("cat {}", vmm.path("pid")))?;
    let inside = format!("/proc/{}/root{}", pid.trim(), folder.1);
    let (dir, seen) = (format!("{}/template", folder.1), format!("{inside}/template"));
    migrate(&mut qmp, &dir)?;
    qmp.ask("cont")?;
    let sum = place.host.ok(&format!("sha256sum {seen}/*"))?;
    console.enter("touch 60")?;
    console.expect("touch: 15360 pages", SOON)?;
    let error = qmp.execute("migrate", &json!({ "uri": format!("file:{dir}") }), SOON);
    let error = error.map_or_else(|e| e.to_string(), |v| v.to_string());
    check(error.contains("No space left on device"), || error)?;
    check(qmp.ask("query-migrate")?["status"] == "failed", || "not failed".into())?;
    check(is_running(&mut qmp)?, || "it does not run on".into())?;
    console.enter("echo going''on")?;
    console.expect("going''on", SOON)?;
    check(place.host.ok(&format!("ls {inside}"))?.trim() == "template", || "something was left".into())?;
    check(place.host.ok(&format!("sha256sum {seen}/*"))? == sum, || "the snapshot has changed".into())?;
    // No page is left on that file system: a clone needs none of it, whatever it reads and writes.
    place.host.ok(&format!(
        "! dd if=/dev/zero of={inside}/rest bs=64k 2>/dev/null; test $(stat -f -c %f {inside}) = 0"
    ))?;
    let (clone, mut console, _) = place.start("full-clone", &format!("-incoming file:{seen}"))?;
    console.enter("touch 150")?;
    console.expect("touch: 38400 pages", SOON)?;
    console.enter("poweroff")?;
    check(clone.exit(SOON)? == 0, || "not 0".into())?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

#[test]
fn what_does_not_fit_is_refused_and_named() -> Outcome {
    let place = place()?;
    let folder = Folder::new(&place.host, "refused")?;
    let dir = format!("{}/template", folder.1);
    let disk = format!("{}/disk.img", folder.1);
    place.host.ok(&format!(
        "truncate -s 16M {disk}; truncate -s 8M {disk}2; mkdir {0}/full; touch {0}/full/x",
        folder.1
    ))?;
    let with = |serial: &str, disk: &str| {
        format!("-drive file={disk},id=d,direct=off -device virtio-blk-device,drive=d,id=d,serial={serial}")
    };
    let (vmm, mut console, mut qmp) = place.start("refused", &with("one", &disk))?;
    console.expect("is up.", SOON)?;
    for (uri, words) in [
        (format!("file:{}/full", folder.1), "holds other files"),
        ("file:/proc/none/x".into(), "cannot make a directory"),
        ("file:relative".into(), "Invalid uri"),
        ("tcp:127.0.0.1:4446".into(), "does not support migration"),
    ] {
        let error = qmp
            .execute("migrate", &json!({ "uri": uri }), SOON)
            .map_or_else(|e| e.to_string(), |v| v.to_string());
        check(error.contains(words), || format!("{uri}: {error}"))?;
        check(is_running(&mut qmp)?, || format!("{uri}: it does not run on"))?;
    }
    migrate(&mut qmp, &dir)?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    let fits = with("one", &disk);
    place.host.ok(&format!("cp -r {dir} {dir}-cut; truncate -s -4096 {dir}-cut/memory; cp -r {dir} {dir}-state; printf x | dd of={dir}-state/state bs=1 seek=100 conv=notrunc status=none"))?;
    let refused = |arguments: &str, words: &str| -> Outcome {
        let arguments = arguments.replace("{dir}", &folder.1);
        let output = place.host.refused(&format!("timeout 20 {} {arguments} </dev/null", place.vmm))?;
        let text = output.stderr.trim();
        check(output.code == 1 && text.lines().count() == 1 && text.contains(words), || {
            format!("{arguments}: exit {}, stderr {text:?}", output.code)
        })
    };
    for (more, words) in [
        (format!("{fits} -smp 2 -incoming file:{dir}"), "-smp cpus differs: 1 in the snapshot, 2 in this VM"),
        (format!("{} -incoming file:{dir}", with("two", &disk)), "serial differs"),
        (format!("{} -incoming file:{dir}", with("one", &format!("{disk}2"))), "the size of the disk"),
        (format!("-incoming file:{dir}"), "what is in the slot differs"),
        (format!("{fits} -incoming file:{dir}-none"), "no such directory"),
        (format!("{fits} -incoming file:{dir}-cut"), "truncated"),
        (format!("{fits} -incoming file:{dir}-state"), "checksum does not match"),
        (
            format!("{fits} -mem-path /dev/shm -incoming file:{dir}"),
            "-mem-path cannot be used with snapshots",
        ),
    ] {
        refused(&place.arguments(&more), words)?;
    }
    let arguments = place.arguments(&format!("-incoming file:{dir}"));
    for (from, to, words) in [
        ("microvm", "q35", "-machine differs: \"microvm\" in the snapshot, \"q35\" in this VM"),
        ("-m 256M", "-m 512M", "-m differs: 268435456 in the snapshot, 536870912 in this VM"),
    ] {
        refused(&arguments.replacen(from, to, 1), words)?;
    }
    // A VM with what no snapshot holds.
    let (vmm, mut console, mut qmp) = place.start("balloon", "-device virtio-balloon-device,id=b")?;
    console.expect("is up.", SOON)?;
    let error = qmp.execute("migrate", &json!({ "uri": format!("file:{dir}2") }), SOON);
    let error = error.map_or_else(|e| e.to_string(), |v| v.to_string());
    check(error.contains("device \\\"b\\\": virtio-balloon-device cannot be used"), || error)?;
    check(qmp.ask("query-migrate")?["status"] == "failed", || "not failed".into())?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}
