//! The conversations of the manual, one file each in `tests/conversations`, played against `flotilla-vmm` with a Debian guest on a test host:
//! every line that the VMM says is compared with the file, in order, and the guest is asked what it sees of it.
//!
//! In an expected line `"<int>"`, `"<string>"`, `"<bool>"` and `"<object>"` stand for any value of that type, and a member `"..."`
//! says that more members may come.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use tests::console::Console;
use tests::host::Host;
use tests::scenario::{BOOT, Guest, Outcome, SOON, Vmm, check, host_with_vmm, step};

/// One file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Conversation {
    /// The board.
    #[serde(default = "microvm")]
    machine: String,
    /// Further arguments of the VMM.
    options: String,
    steps: Vec<Step>,
}

fn microvm() -> String {
    "microvm".to_owned()
}

/// One step; exactly one kind.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Step {
    /// Text for the VMM, as it stands in the manual.
    Send { send: String },
    /// The next line that the VMM says.
    Receive { receive: Value },
    /// Lines that fit `before`, as many as come, and then one that fits `until`: how far something is depends on the guest's pace.
    Until { until: Value, before: Value },
    /// A command for the guest's shell that must succeed.
    Guest { guest: String },
    /// A command for the host's shell that must succeed; `{name}` in it is the VM's.
    Host { host: String },
    /// Two commands that must say the same.
    Same {
        #[serde(rename = "guest-tells")]
        guest: String,
        #[serde(rename = "host-tells")]
        host: String,
    },
    /// The guest boots again.
    Boots {
        #[serde(rename = "boots")]
        _boots: bool,
    },
    /// The VMM ends with this code.
    Exit { exit: i32 },
    /// Another VMM, with the arguments of the first and these.
    Restore { restore: String },
}

fn host() -> Outcome<&'static Host> {
    static HOST: OnceLock<Result<Host, String>> = OnceLock::new();
    HOST.get_or_init(|| host_with_vmm("conversations").map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| error.as_str().into())
}

/// Whether `got` is what the file expects.
fn fits(want: &Value, got: &Value) -> bool {
    match (want, got) {
        (Value::String(marker), got) if marker.starts_with('<') => match marker.as_str() {
            "<int>" => got.is_u64(),
            "<string>" => got.is_string(),
            "<bool>" => got.is_boolean(),
            "<object>" => got.is_object(),
            _ => false,
        },
        (Value::Object(want), Value::Object(got)) => {
            let open = want.contains_key("...");
            want.iter().all(|(key, value)| key == "..." || got.get(key).is_some_and(|g| fits(value, g)))
                && (open || got.len() == want.len())
        }
        (Value::Array(want), Value::Array(got)) => {
            want.len() == got.len() && want.iter().zip(got).all(|(w, g)| fits(w, g))
        }
        (want, got) => want == got,
    }
}

fn play(file: &str, number: u8) -> Outcome {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("conversations").join(file);
    let conversation: Conversation = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    let host = host()?;
    let name = format!("talk{number}");
    let guest = Guest::new(host, &name, number)?;
    let machine = &conversation.machine;
    let disk = match machine.as_str() {
        "q35" => "virtio-blk-pci,bus=pcie.0,addr=0x1",
        _ => "virtio-blk-device",
    };
    let arguments = format!(
        "-machine {machine} -m 256M -kernel /srv/guest/vmlinuz -initrd /srv/guest/initrd.gz \
         -append '{}' -drive file={},id=rootfs,readonly=off,direct=off -device {disk},drive=rootfs,id=rootfs \
         -serial socket,path={{dir}}/console.sock,server,nowait {}",
        guest.append().replace(&format!("guest.ip={}/24", guest.address), ""),
        guest.disk,
        conversation.options
    );
    let mut vmm = Vmm::start(host, &name, &arguments)?;
    let mut console: Console = vmm.console()?;
    let up = format!("guest {name} up");
    console.expect(&up, BOOT)?;
    let dial = |vmm: &Vmm| -> Outcome<_> {
        let stream = host.dial(&vmm.path("qmp.sock"))?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(BufReader::new(stream))
    };
    let mut qmp = dial(&vmm)?;
    for (at, part) in conversation.steps.iter().enumerate() {
        let failed = |error: String| format!("{file}, step {at}: {error}");
        match part {
            Step::Send { send } => {
                step(format!("<- {send}"));
                qmp.get_mut().write_all(send.as_bytes())?;
            }
            Step::Receive { receive } => {
                let mut line = String::new();
                qmp.read_line(&mut line).map_err(|e| failed(format!("no answer: {e}")))?;
                step(format!("-> {}", line.trim_end()));
                let got: Value = serde_json::from_str(&line)?;
                check(fits(receive, &got), || failed(format!("expected {receive}, got {line}")))?;
            }
            Step::Until { until, before } => loop {
                let mut line = String::new();
                qmp.read_line(&mut line).map_err(|e| failed(format!("no answer: {e}")))?;
                step(format!("-> {}", line.trim_end()));
                let got: Value = serde_json::from_str(&line)?;
                if fits(until, &got) {
                    break;
                }
                check(fits(before, &got), || failed(format!("expected {before}, got {line}")))?;
            },
            Step::Guest { guest } => {
                step(format!("guest: {guest}"));
                console.shell(guest, SOON).map_err(|e| failed(format!("guest: {guest}: {e}")))?;
            }
            Step::Host { host: command } => {
                step(format!("host: {command}"));
                host.ok(&command.replace("{name}", &name))?;
            }
            Step::Same { guest, host: command } => {
                let (theirs, ours) = (console.shell(guest, SOON)?, host.ok(command)?);
                let same = theirs.trim().lines().last() == ours.trim().lines().last();
                check(same, || failed(format!("the guest says {theirs}, the host {ours}")))?;
            }
            Step::Boots { .. } => {
                console.expect(&up, BOOT)?;
            }
            Step::Exit { exit } => {
                let code = vmm.exit(Duration::from_secs(30))?;
                check(code == *exit, || failed(format!("exit code {code}")))?;
            }
            Step::Restore { restore } => {
                step(format!("restored with {restore}"));
                vmm = Vmm::start(host, &format!("{name}-restored"), &format!("{arguments} {restore}"))?;
                console = vmm.console()?;
                qmp = dial(&vmm)?;
            }
        }
    }
    Ok(())
}

#[test]
fn queries() -> Outcome {
    play("microvm/1-query.json", 1)
}

#[test]
fn lifecycle() -> Outcome {
    play("microvm/2-lifecycle.json", 2)
}

#[test]
fn disk_hot_plug() -> Outcome {
    play("microvm/3-disk.json", 3)
}

#[test]
fn nic_hot_plug() -> Outcome {
    play("microvm/4-nic.json", 4)
}

/// The button reaches the guest's ACPI code; what follows is up to the guest, which here has nobody to act on it.
#[test]
fn power_button() -> Outcome {
    play("microvm/5-powerdown.json", 5)
}

/// The guest's `free`, the memory that the host gives the VMM, and a target above what the guest booted with.
#[test]
fn balloon() -> Outcome {
    play("microvm/6-balloon.json", 6)
}

/// The standard machine: its nodes and its name, a disk and a NIC that come, and go when the guest lets them, a balloon, and its life.
#[test]
fn standard_machine() -> Outcome {
    play("standard/1-devices.json", 8)
}

/// What the guest does goes on in another process, with the disk that was plugged before; what it did after the snapshot was never done.
#[test]
fn snapshot() -> Outcome {
    play("microvm/7-snapshot.json", 7)
}

/// The same on the standard machine, in the middle of a copy to a plugged disk, of a sleep, and with a TCP connection over a plugged NIC.
#[test]
fn snapshot_of_the_standard_machine() -> Outcome {
    play("standard/2-snapshot.json", 9)
}
