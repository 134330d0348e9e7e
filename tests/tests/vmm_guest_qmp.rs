//! The clients that people use, against one `flotilla-vmm` with the default guest: the Python package `qemu.qmp`, and `ncat`; over a unix
//! socket, TCP, and a character device. On this machine's own `/dev/kvm`; where there is none, on a test host.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::Duration;

use serde_json::{Value, json};

use tests::host::Host;
use tests::qmp::Qmp;
use tests::scenario::{Outcome, SOON, Vmm, check, here_or_on_a_host};

/// Where the VMs run, and `flotilla-vmm` and the guest there.
struct Place {
    host: Host,
    vmm: String,
    guest: String,
    here: bool,
}

fn place() -> Outcome<&'static Place> {
    static PLACE: OnceLock<Result<Place, String>> = OnceLock::new();
    let make = || -> Outcome<Place> {
        let (host, vmm, guest) = here_or_on_a_host("vmm-guest-qmp")?;
        Ok(Place { host, vmm, guest, here: Path::new("/dev/kvm").exists() })
    };
    PLACE
        .get_or_init(|| make().map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| error.as_str().into())
}

impl Place {
    fn start(&'static self, name: &str, more: &str) -> Outcome<Vmm<'static>> {
        let name = format!("test-{}-{name}", std::process::id());
        let serial = if more.contains("-serial") { "" } else { "-serial file,path={dir}/serial" };
        let arguments = format!("-machine microvm -m 256M -kernel {} {serial} {more}", self.guest);
        let vmm = Vmm::start_as(&self.host, &self.vmm, &name, &arguments)?;
        // It listens from now on.
        drop(vmm.qmp()?);
        Ok(vmm)
    }

    /// A socket on this machine that leads to `path` where the VM is.
    fn near(&'static self, path: &str, folder: &Path) -> Outcome<PathBuf> {
        if self.here {
            return Ok(path.into());
        }
        let (near, far) = (folder.join("near.sock"), path.to_owned());
        let listener = UnixListener::bind(&near)?;
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(vmm)) = (client, self.host.dial(&far)) else { continue };
                let copy = |from: &UnixStream, to: &UnixStream| {
                    let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else { return };
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                };
                copy(&client, &vmm);
                copy(&vmm, &client);
            }
        });
        Ok(near)
    }
}

/// The interpreter that has qemu.qmp.
fn python() -> Outcome<String> {
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/install");
    let output = Command::new(install).stderr(Stdio::inherit()).output()?;
    check(output.status.success(), || "no qemu.qmp: run tests/run packages".into())?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[test]
fn the_python_package_drives_a_vm() -> Outcome {
    let python = python()?;
    let place = place()?;
    let vmm = place.start("python", "")?;
    place.host.ok(&format!("truncate -s 16M {}", vmm.path("image")))?;
    let folder = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/qemu_qmp.py");
    let output = Command::new(python)
        .arg(script)
        .arg(place.near(&vmm.path("qmp.sock"), folder.path())?)
        .arg(vmm.path("image"))
        .output()?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    check(output.status.success() && text.contains("all as it should be"), || text)?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

/// `ncat -U` as a person uses it, one line after the other.
#[test]
fn ncat_drives_a_vm() -> Outcome {
    let place = place()?;
    let vmm = place.start("ncat", "")?;
    let folder = tempfile::tempdir()?;
    let socket = place.near(&vmm.path("qmp.sock"), folder.path())?;
    let mut ncat = Command::new("ncat")
        .arg("-U")
        .arg(socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("ncat: {error}; run tests/run packages"))?;
    let (line_came, lines) = channel();
    let output = ncat.stdout.take().ok_or("no output")?;
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let _ = line_came.send(line);
        }
    });
    let next = || -> Outcome<Value> { Ok(serde_json::from_str(&lines.recv_timeout(SOON)?)?) };
    let mut input = ncat.stdin.take().ok_or("no input")?;
    check(next()?["QMP"]["capabilities"] == json!([]), || "no greeting".into())?;
    let empty = json!({ "return": {} });
    for (text, event) in [
        (r#"{"execute":"stop"}"#, "STOP"),
        (r#"{"execute":"cont"}"#, "RESUME"),
        (r#"{ "execute": "query-status" }"#, ""),
        (r#"{"execute":"quit"}"#, "SHUTDOWN"),
    ] {
        // In one piece, as a shell's `echo` writes it: a newline after the VMM has gone would meet nobody.
        input.write_all(format!("{text}\n").as_bytes())?;
        let first = next()?;
        match event {
            "" => check(first["return"]["status"] == "running", || first.to_string())?,
            // The end is told after the answer, everything else before it.
            "SHUTDOWN" => check(first == empty && next()?["event"] == event, || first.to_string())?,
            _ => check(first["event"] == event && next()? == empty, || first.to_string())?,
        }
    }
    check(vmm.exit(SOON)? == 0, || "not 0".into())?;
    // It ends by itself: the VMM has hung up.
    drop(input);
    check(ncat.wait()?.success(), || "ncat failed".into())
}

/// One monitor on TCP, one on a character device on TCP; what one is told by the guest's end, all are told.
#[test]
fn qmp_over_tcp() -> Outcome {
    let place = place()?;
    let free = || -> Outcome<u16> { Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()) };
    let (first, second) = (free()?, free()?);
    let name = format!("test-{}-tcp", std::process::id());
    let arguments = format!(
        "-machine microvm -m 256M -kernel {} -serial file,path={{dir}}/serial -qmp tcp:127.0.0.1:{first},server,nowait \
         -chardev socket,id=m,host=127.0.0.1,port={second},server,nowait -mon chardev=m,id=mon,mode=control",
        place.guest
    );
    let vmm = Vmm::start_as(&place.host, &place.vmm, &name, &arguments)?;
    // A client in one line of shell, on the machine where the VM is.
    let ask = |port: u16, text: &str, lines: u32| {
        let open = format!(
            "exec 3<>/dev/tcp/127.0.0.1/{port} && printf \"%s\" \"$0\" >&3 && timeout 20 head -n {lines} <&3"
        );
        place.host.eventually(SOON, &format!("bash -c '{open}' '{text}' 2>/dev/null"))
    };
    let said = ask(first, r#"{"execute":"query-name","id":[1]}"#, 2)?;
    check(said.contains(&format!(r#"{{"return":{{"name":"{name}"}},"id":[1]}}"#)), || said.clone())?;
    let said = ask(second, r#"{"execute":"stop"}"#, 3)?;
    check(said.contains(r#"{"event":"STOP","#) && said.contains(r#"{"return":{}}"#), || said.clone())?;
    let said = ask(first, r#"{"execute":"query-status"}"#, 2)?;
    check(said.contains(r#""status":"paused""#), || said.clone())?;
    let said = ask(second, r#"{"execute":"quit"}"#, 3)?;
    check(said.contains("host-qmp-quit"), || said.clone())?;
    check(vmm.exit(Duration::from_secs(20))? == 0, || "not 0".into())
}

/// The thread that serves a hot-plugged disk is the one that `device_add` names, also when the guest drives the slot already.
#[test]
fn a_disk_is_served_by_the_iothread_that_it_is_plugged_with() -> Outcome {
    let place = place()?;
    let vmm = place.start(
        "iothread",
        "-object iothread,id=io1 -object iothread,id=io2 -serial socket,path={dir}/console.sock,server,nowait",
    )?;
    let image = vmm.path("image");
    place.host.ok(&format!("truncate -s 16M {image}"))?;
    let mut qmp = vmm.qmp()?;
    let mut console = vmm.console()?;
    let file = json!({ "driver": "file", "filename": image });
    let node = json!({ "node-name": "disk", "file": file, "cache": { "direct": false } });
    for (round, iothread) in ["io1", "io2", "", "io1"].into_iter().enumerate() {
        qmp.execute("blockdev-add", &node, SOON)?;
        let mut device = json!({ "id": "disk", "driver": "virtio-blk-mmio", "addr": "0x0" });
        if !iothread.is_empty() {
            device["iothread"] = iothread.into();
        }
        qmp.execute("device_add", &device, SOON)?;
        for command in [format!("disk write 5 1000 {round}"), format!("disk check 5 1000 {round}")] {
            console.enter(&command)?;
            console.expect("sectors in", SOON)?;
        }
        let threads = qmp.ask("query-iothreads")?;
        let runs = |id: &str| {
            let list = threads.as_array().into_iter().flatten();
            list.filter(|t| t["id"] == id).any(|t| t["thread-id"] != 0)
        };
        // A thread runs from its first use on.
        let used = (runs("io1"), runs("io2"));
        check(used == (true, round > 0), || format!("round {round}: {threads}"))?;
        qmp.execute("device_del", &json!({ "id": "disk" }), SOON)?;
    }
    qmp.execute("blockdev-add", &node, SOON)?;
    let device = json!({ "id": "disk", "driver": "virtio-blk-mmio", "iothread": "none" });
    let refused = qmp.execute("device_add", &device, SOON);
    check(refused.is_err_and(|e| e.to_string().contains("iothread none not found")), || {
        "not refused".into()
    })?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}

/// An image over another one that is a node of its own, or is described with it: the guest reads through, and writes above.
#[test]
fn images_lie_on_nodes_and_on_images() -> Outcome {
    let place = place()?;
    let vmm = place.start("backing", "-serial socket,path={dir}/console.sock,server,nowait")?;
    let (base, top) = (vmm.path("base"), vmm.path("top"));
    place.host.ok(&format!("truncate -s 16M {base}"))?;
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("top");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/elsewhere"]).arg(&image).arg("16M");
    check(make.status()?.success(), || "qemu-img failed".into())?;
    place.host.push(&image, &top)?;
    let mut qmp = vmm.qmp()?;
    let mut console = vmm.console()?;
    let file = |path: &str| json!({ "driver": "file", "filename": path });
    let cache = json!({ "direct": false });
    let mut with = |qmp: &mut Qmp, node: Value, guest: &[&str]| -> Outcome {
        qmp.execute("blockdev-add", &node, SOON)?;
        let device = json!({ "id": "d", "driver": "virtio-blk-mmio", "drive": node["node-name"] });
        qmp.execute("device_add", &device, SOON)?;
        for command in guest {
            console.enter(command)?;
            console.expect("sectors in", SOON)?;
        }
        qmp.execute("device_del", &json!({ "id": "d" }), SOON)?;
        Ok(())
    };
    let raw = json!({ "node-name": "raw", "file": file(&base), "cache": cache });
    with(&mut qmp, raw.clone(), &["disk write 0 100 3", "disk check 0 100 3"])?;
    let written = place.host.ok(&format!("sha256sum < {base}"))?;

    let over = |under: Value| json!({ "node-name": "top", "driver": "qcow2", "file": file(&top), "cache": cache, "backing": under });
    with(&mut qmp, over(json!({ "file": file(&base) })), &["disk check 0 100 3", "disk write 10 10 9"])?;
    let missing = qmp.execute("blockdev-add", &over("raw".into()), SOON);
    check(missing.is_err_and(|e| e.to_string().contains("Drive raw not found")), || {
        "a node that is gone".into()
    })?;
    qmp.execute("blockdev-add", &raw, SOON)?;
    with(&mut qmp, over("raw".into()), &["disk check 10 10 9", "disk check 50 50 3"])?;
    // Nothing of it reached the image below.
    let below = place.host.ok(&format!("sha256sum < {base}"))?;
    check(below == written, || "the lower image was written to".into())?;
    qmp.execute("blockdev-del", &json!({ "node-name": "raw" }), SOON)?;
    qmp.ask("quit")?;
    check(vmm.exit(SOON)? == 0, || "not 0".into())
}
