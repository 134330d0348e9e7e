//! Cold boots, and the frozen host: one booted host kept as a RAM file, a device state and a disk, from which hosts start
//! in seconds. Owns the cache entry `frozen-KEY`; for `host` only.
//!
//! The restored host maps the RAM file privately and writes to a fresh disk on top of the frozen one, so any number run
//! from one frozen host at a time.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::agent::Place;
use super::emulator::{self, Emulator, Plan};
use super::error::{HostError, io};
use super::image::{Images, images};
use super::{BOOT, Host, Start, cache};

/// Boots a host from the images.
pub(super) fn boot(name: &str, dir: &Path, start: &Start) -> Result<(Emulator, u16), HostError> {
    let images = images()?;
    let (disk, initrd) = (dir.join("disk.qcow2"), dir.join("initrd"));
    emulator::overlay(&disk, &images.disk)?;
    with_agent(&images.initrd, &initrd)?;
    let plan = Plan {
        name,
        dir,
        kernel: &images.kernel,
        initrd: &initrd,
        disk: &disk,
        guest: &images.guest,
        ram: &dir.join("ram"),
        share_ram: true,
        incoming: false,
        peer: start.peer.as_deref(),
        tied: !start.detached,
        mended: start.mended,
    };
    let mut emulator = emulator::spawn(&plan)?;
    let port = port(name, &mut emulator)?;
    Ok((emulator, port))
}

/// Starts a host from the frozen one, which is made first when it is not there.
pub(super) fn thaw(name: &str, dir: &Path, start: &Start) -> Result<(Emulator, u16), HostError> {
    let images = images()?;
    let frozen = frozen(&images)?;
    let disk = dir.join("disk.qcow2");
    emulator::overlay(&disk, &frozen.join("disk.qcow2"))?;
    let plan = Plan {
        name,
        dir,
        kernel: &images.kernel,
        initrd: &frozen.join("initrd"),
        disk: &disk,
        guest: &images.guest,
        ram: &frozen.join("ram"),
        share_ram: false,
        incoming: true,
        peer: start.peer.as_deref(),
        tied: !start.detached,
        mended: start.mended,
    };
    let mut emulator = emulator::spawn(&plan)?;
    if let Err(error) = emulator.thaw(&frozen.join("state")) {
        return Err(broken(name, dir, emulator, &format!("the frozen host does not thaw: {error}")));
    }
    let port = port(name, &mut emulator)?;
    Ok((emulator, port))
}

fn port(name: &str, emulator: &mut Emulator) -> Result<u16, HostError> {
    emulator.port().map_err(|error| HostError::Emulator {
        host: name.to_owned(),
        what: error.to_string(),
        console: String::new(),
    })
}

fn broken(name: &str, dir: &Path, mut emulator: Emulator, what: &str) -> HostError {
    let _ = emulator.child.kill();
    let _ = emulator.child.wait();
    let console = super::tail(&dir.join("emulator.log"), 15);
    HostError::Emulator { host: name.to_owned(), what: what.to_owned(), console }
}

/// The frozen host's folder. Its key holds everything that went into it: images, the agent's and the emulator's side.
fn frozen(images: &Images) -> Result<PathBuf, HostError> {
    let key = images
        .key
        .clone()
        .with(include_str!("server.rs"))
        .with(include_str!("wire.rs"))
        .with(include_str!("emulator.rs"))
        .with(include_str!("freeze.rs"))
        .with(emulator::version()?);
    cache::entry("frozen", &key, |dir| {
        let name = "frozen";
        let (mut emulator, port) = boot(name, dir, &Start::default())?;
        let host = Host { name: name.to_owned(), dir: dir.to_owned(), place: Place::Port(port), child: None };
        let ready = host.answers(BOOT).and_then(|()| {
            host.eventually(BOOT, "systemctl is-system-running | grep -Eq 'running|degraded'")?;
            host.ok("test -c /dev/kvm && mountpoint -q /srv/guest")?;
            host.ok("sync; echo 3 > /proc/sys/vm/drop_caches")
        });
        if let Err(error) = ready {
            let _ = emulator.child.kill();
            let _ = emulator.child.wait();
            return Err(error);
        }
        // The agent's connection must be gone on both sides: a half-closed one would come back with every thaw.
        std::thread::sleep(std::time::Duration::from_secs(1));
        emulator.freeze(&dir.join("state")).map_err(io("freeze the host"))
    })
}

/// Appends an archive with the agent to the initramfs: the kernel unpacks one after the other.
fn with_agent(initrd: &Path, out: &Path) -> Result<(), HostError> {
    let agent = agent_program()?;
    let mut bytes = Vec::new();
    let mut file = File::open(initrd).map_err(io(format!("read {}", initrd.display())))?;
    file.read_to_end(&mut bytes).map_err(io(format!("read {}", initrd.display())))?;
    // Archives start on a multiple of four.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(archive("host-agent", &agent)?);
    fs::write(out, bytes).map_err(io(format!("write {}", out.display())))
}

/// The program to run inside: this one when it is `host`, else the `host` beside the tests.
fn agent_program() -> Result<PathBuf, HostError> {
    let me = std::env::current_exe().map_err(io("find this program"))?;
    let beside = |dir: Option<&Path>| dir.map(|dir| dir.join("host")).filter(|path| path.is_file());
    beside(me.parent()).or_else(|| beside(me.parent().and_then(Path::parent))).ok_or_else(|| {
        HostError::Usage(format!("no program `host` beside {}: cargo build -p tests --bins", me.display()))
    })
}

fn archive(name: &str, program: &Path) -> Result<Vec<u8>, HostError> {
    let dir = tempfile::tempdir().map_err(io("make a temporary folder"))?;
    fs::copy(program, dir.path().join(name)).map_err(io(format!("copy {}", program.display())))?;
    let mut cpio = Command::new("cpio")
        .args(["-o", "-H", "newc", "--quiet"])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(io("run cpio"))?;
    if let Some(mut names) = cpio.stdin.take() {
        names.write_all(name.as_bytes()).map_err(io("talk to cpio"))?;
    }
    let output = cpio.wait_with_output().map_err(io("run cpio"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(HostError::Usage(format!("cpio failed: {}", output.status)))
}
