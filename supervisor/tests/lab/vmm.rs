//! A VMM without a VM: the test program itself, started by the daemon under another name. Speaks QMP as `flotilla-vmm` does.
//!
//! With `-incoming` it looks whether what it was given is what such a VMM saved. Words on the guest's command line make it misbehave:
//! `fake=mute` never listens, `fake=die` ends at once with 3, `fake=lost` does so when it has an `-incoming`, `fake=balloon` cannot be saved,
//! `fake=refuse` has no room for devices, `fake=netless` takes no tap, `fake=keep` does not let go of them. Commands of its own: `x-poweroff` (the guest ends itself), `x-crash`,
//! `x-fds` (which handed descriptors are open), `x-let-go` (of a device).

use std::collections::VecDeque;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};

/// Nobody is left to end it after a test that failed.
const LIFETIME: Duration = Duration::from_secs(180);

/// The value of an option on the VMM's command line.
fn option<'a>(line: &'a [String], name: &str) -> Option<&'a str> {
    let at = line.iter().position(|word| word == name)?;
    line.get(at + 1).map(String::as_str)
}

/// Runs as the VMM if this process was started as one; returns at once if it is a test.
pub(crate) fn run_if_asked() {
    let line: Vec<String> = std::env::args().collect();
    let Some(qmp) = option(&line, "-qmp") else { return };
    let pids = std::env::var("FAKE_VMM_PIDS").unwrap();
    std::fs::write(format!("{pids}/{}", std::process::id()), "").unwrap();
    std::thread::spawn(|| {
        std::thread::sleep(LIFETIME);
        std::process::exit(9);
    });
    let append = option(&line, "-append").unwrap_or_default();
    if append.contains("fake=die") {
        std::process::exit(3);
    }
    if let Some(incoming) = option(&line, "-incoming") {
        if append.contains("fake=lost") {
            std::process::exit(3);
        }
        let dir = incoming.trim_start_matches("file:").split(',').next().unwrap();
        for (name, wanted) in SAVED {
            let mut text = String::new();
            handed(&format!("{dir}/{name}")).read_to_string(&mut text).unwrap();
            assert_eq!(text, wanted);
        }
    }
    if append.contains("fake=mute") {
        std::thread::sleep(LIFETIME);
    }
    let path = qmp.trim_start_matches("unix:").split(',').next().unwrap();
    // A VMM that was killed leaves its socket.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).unwrap();
    let mut paused = line.iter().any(|word| word == "-S");
    let saves = !append.contains("fake=balloon");
    // One client at a time; the next one waits.
    for client in listener.incoming() {
        // A client that is gone is no reason to end.
        let _ = serve(client.unwrap(), &mut paused, saves);
    }
}

/// What it saves of the VM that it has not.
const SAVED: [(&str, &str); 2] = [("state", "the state"), ("memory", "the memory")];

/// The descriptor that the daemon has handed over for a path.
fn handed(path: &str) -> std::fs::File {
    let table: Value = serde_json::from_str(&std::env::var("FLOTILLA_FDS").unwrap()).unwrap();
    let row = table.as_array().unwrap().iter().find(|row| row["path"] == path);
    std::fs::File::open(format!("/proc/self/fd/{}", row.unwrap()["fd"])).unwrap()
}

/// The lines that a client sends, with the descriptors that come along.
struct Lines {
    client: UnixStream,
    buffer: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Lines {
    fn next(&mut self) -> std::io::Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(String::from_utf8(line).unwrap()));
            }
            let mut piece = [0; 4096];
            let mut space = nix::cmsg_space!([RawFd; 8]);
            let count = {
                let mut slices = [IoSliceMut::new(&mut piece)];
                let message = recvmsg::<()>(
                    self.client.as_raw_fd(),
                    &mut slices,
                    Some(&mut space),
                    MsgFlags::MSG_CMSG_CLOEXEC,
                )?;
                for control in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(numbers) = control {
                        // SAFETY: the kernel has just made these descriptors for us.
                        self.descriptors
                            .extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                message.bytes
            };
            if count == 0 {
                return Ok(None);
            }
            self.buffer.extend_from_slice(&piece[..count]);
        }
    }
}

fn serve(client: UnixStream, paused: &mut bool, saves: bool) -> std::io::Result<()> {
    let mut out = client.try_clone()?;
    let mut lines = Lines { client, buffer: Vec::new(), descriptors: VecDeque::new() };
    let mut named = Vec::new();
    let greeting = json!({"QMP": {"version": {"qemu": {"micro": 1, "minor": 0, "major": 5}, "package": "fake"}, "capabilities": []}});
    write!(out, "{greeting}\r\n")?;
    while let Some(line) = lines.next()? {
        let request: Value = serde_json::from_str(&line).unwrap();
        let id = request["id"].clone();
        let event = |name: &str, data: Value| {
            format!(
                "{}\r\n",
                json!({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})
            )
        };
        let answer = |value: Value| format!("{}\r\n", json!({"return": value, "id": id}));
        let done = answer(json!({}));
        let refusal = |desc: &str| {
            format!("{}\r\n", json!({"error": {"class": "GenericError", "desc": desc}, "id": id}))
        };
        heard(&request);
        let end = |guest: bool, reason: &str| {
            format!("{done}{}", event("SHUTDOWN", json!({"guest": guest, "reason": reason})))
        };
        let text = match request["execute"].as_str().unwrap() {
            "qmp_capabilities" => done.clone(),
            "query-status" => {
                answer(json!({"running": !*paused, "status": if *paused { "paused" } else { "running" }}))
            }
            "query-balloon" => answer(json!({"actual": 256 << 20})),
            "query-blockstats" => answer(
                json!([{"device": "disk0", "stats": {"rd_bytes": 512, "wr_bytes": 4096, "rd_operations": 1}}]),
            ),
            "stop" => {
                *paused = true;
                event("STOP", json!({})) + &done
            }
            "cont" => {
                *paused = false;
                event("RESUME", json!({})) + &done
            }
            "netdev_add" if append().contains("fake=netless") => refusal("no tap"),
            "netdev_add" | "blockdev-add" => {
                named.clear();
                done.clone()
            }
            "netdev_del" | "blockdev-del" => done.clone(),
            "device_add" if append().contains("fake=refuse") => refusal("no room"),
            "getfd" => {
                named.push(lines.descriptors.pop_front().unwrap());
                done.clone()
            }
            "migrate" if !saves => refusal("balloon: cannot be part of a snapshot"),
            "migrate" => {
                assert!(request["arguments"]["uri"].as_str().unwrap().starts_with("fd:"));
                for (file, (_, text)) in named.drain(..).zip(SAVED) {
                    std::fs::File::from(file).write_all(text.as_bytes())?;
                }
                done.clone()
            }
            "device_add" => done.clone(),
            // The guest thinks about it.
            "device_del" if append().contains("fake=keep") => done.clone(),
            "device_del" | "x-let-go" => {
                let device = &request["arguments"]["id"];
                event("DEVICE_DELETED", json!({"device": device, "path": device})) + &done
            }
            "x-fds" => answer(open_descriptors()),
            "quit" | "x-poweroff" => {
                let guest = request["execute"] == "x-poweroff";
                out.write_all(end(guest, if guest { "guest-shutdown" } else { "host-qmp-quit" }).as_bytes())?;
                std::process::exit(0);
            }
            "x-crash" => {
                eprintln!("fake: I die");
                std::process::abort()
            }
            other => {
                let desc = format!("The command {other} has not been found");
                format!("{}\r\n", json!({"error": {"class": "CommandNotFound", "desc": desc}, "id": id}))
            }
        };
        out.write_all(text.as_bytes())?;
    }
    Ok(())
}

fn append() -> String {
    let line: Vec<String> = std::env::args().collect();
    option(&line, "-append").unwrap_or_default().to_owned()
}

/// Writes down what was asked, for tests that look at the order.
fn heard(request: &Value) {
    let line: Vec<String> = std::env::args().collect();
    let Some(path) = option(&line, "-qmp").and_then(|qmp| qmp.trim_start_matches("unix:").split(',').next())
    else {
        return;
    };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(format!("{path}.heard"));
    let mut request = request.clone();
    request.as_object_mut().unwrap().remove("id");
    writeln!(file.unwrap(), "{request}").unwrap();
}

/// What the daemon handed over, and whether it is really there.
fn open_descriptors() -> Value {
    let table: Value =
        serde_json::from_str(&std::env::var("FLOTILLA_FDS").unwrap_or_default()).unwrap_or_default();
    let rows = table.as_array().cloned().unwrap_or_default();
    let link = |row: &Value| std::fs::read_link(format!("/proc/self/fd/{}", row["fd"])).ok();
    rows.iter()
        .map(|row| {
            let name = row["path"].as_str().or(row["tap"].as_str()).unwrap_or_default();
            json!([name, link(row).map(|path| path.display().to_string())])
        })
        .collect()
}
