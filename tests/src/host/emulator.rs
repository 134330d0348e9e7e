//! The emulator process behind a host: owns QEMU's command line and the process. TCG emulates AMD's SVM, so that Debian's
//! kernel inside has a working KVM whatever this machine has.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::cache::{self, Key};
use super::error::{HostError, io};
use crate::qmp::Qmp;

/// RAM of a host, MiB.
pub(crate) const MEMORY: u32 = 3072;

/// Processors of a host.
/// One: with two, KVM inside has lost guests' and hosts' kernels on the way in and out of a guest. Scenarios run side by side instead.
pub(crate) const CPUS: u32 = 1;

/// How long the emulator may take to come up and to answer its monitor, on a machine that does a lot else.
pub(crate) const ANSWER: Duration = Duration::from_secs(60);

const PROGRAM: &str = "qemu-system-x86_64";

/// `tsc=reliable no_timer_check`: a busy machine must not make the emulated clock look broken.
const COMMAND_LINE: &str = "root=/dev/vda rw console=ttyS0 quiet loglevel=3 systemd.show_status=0 mitigations=off nokaslr \
    random.trust_cpu=on nowatchdog audit=0 apparmor=0 selinux=0 tsc=reliable no_timer_check net.ifnames=0 \
    intel_iommu=on iommu=pt";

/// What to start.
pub(crate) struct Plan<'a> {
    pub(crate) name: &'a str,
    /// The run folder: sockets, logs.
    pub(crate) dir: &'a Path,
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    pub(crate) disk: &'a Path,
    pub(crate) guest: &'a Path,
    /// File that backs RAM.
    pub(crate) ram: &'a Path,
    /// Write RAM through to the file (to freeze), or keep changes private (to restore).
    pub(crate) share_ram: bool,
    /// Wait for a frozen state instead of booting.
    pub(crate) incoming: bool,
    /// Run folder of the host at the other end of the private link.
    pub(crate) peer: Option<&'a Path>,
    /// End with this process, however that ends.
    pub(crate) tied: bool,
    /// With what `lock.c` mends.
    pub(crate) mended: bool,
}

/// A running emulator.
pub(crate) struct Emulator {
    pub(crate) child: Child,
    pub(crate) monitor: Qmp,
}

/// The emulator's version, for cache keys: a frozen state is good for the version that wrote it only.
pub(crate) fn version() -> Result<String, HostError> {
    let output = Command::new(PROGRAM).arg("--version").output().map_err(io(format!("run {PROGRAM}")))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

/// What `lock.c` makes, which says what for; built by the compiler that links Rust's programs.
fn lock() -> Result<PathBuf, HostError> {
    let source = include_str!("lock.c");
    let entry = cache::entry("emulator-lock", &Key::default().with(source), |dir| {
        let code = dir.join("lock.c");
        fs::write(&code, source).map_err(io(format!("write {}", code.display())))?;
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(dir.join("lock.so")).arg(&code);
        let output = compiler.output().map_err(io("run cc"))?;
        let text = || String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if output.status.success() { Ok(()) } else { Err(HostError::Usage(format!("cc lock.c: {}", text()))) }
    })?;
    Ok(entry.join("lock.so"))
}

/// Makes a disk on top of another one, which is not written.
pub(crate) fn overlay(path: &Path, base: &Path) -> Result<(), HostError> {
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(base)
        .arg(path)
        .output()
        .map_err(io("run qemu-img"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(HostError::Usage(format!("qemu-img create {}: {text}", path.display())))
}

/// Where the link socket of the host with this run folder is.
fn link(dir: &Path) -> PathBuf {
    dir.join("link.sock")
}

/// The image of the spare disk, all zeroes at first, which a frozen host has not touched.
fn spare(dir: &Path) -> PathBuf {
    dir.join("spare.img")
}

/// Bytes of it.
const SPARE: u64 = 16 << 20;

/// Starts the emulator and talks to its monitor.
pub(crate) fn spawn(plan: &Plan<'_>) -> Result<Emulator, HostError> {
    for stale in [link(plan.dir), plan.dir.join("console.sock")] {
        let _ = fs::remove_file(stale);
    }
    let blank = File::create(spare(plan.dir)).and_then(|file| file.set_len(SPARE));
    blank.map_err(io(format!("create {}", spare(plan.dir).display())))?;
    let log_path = plan.dir.join("emulator.log");
    let log = File::create(&log_path).map_err(io(format!("create {}", log_path.display())))?;
    let also = log.try_clone().map_err(io("copy a descriptor"))?;
    // The monitor is the emulator's standard input: a socket pair needs no path, and no other child inherits it.
    let (ours, theirs) = UnixStream::pair().map_err(io("socketpair"))?;
    let mut command = if plan.tied { Command::new("setpriv") } else { Command::new("setsid") };
    if plan.tied {
        command.args(["--pdeathsig", "KILL", "--"]);
    }
    if plan.mended {
        command.env("LD_PRELOAD", lock()?);
    }
    command
        .arg(PROGRAM)
        .args(arguments(plan))
        .stdin(std::os::fd::OwnedFd::from(theirs))
        .stdout(log)
        .stderr(also);
    let mut child = from_lasting_thread(command).map_err(io(format!("run {PROGRAM}")))?;
    match Qmp::new(ours, ANSWER) {
        Ok(monitor) => Ok(Emulator { child, monitor }),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(HostError::Emulator {
                host: plan.name.to_owned(),
                what: format!("the emulator did not come up: {error}"),
                console: super::tail(&log_path, 15),
            })
        }
    }
}

/// Spawns from a thread that lives as long as this process: the signal of `setpriv --pdeathsig` comes when the *thread*
/// that spawned ends, and a test's thread ends before the hosts that other tests share with it.
fn from_lasting_thread(command: Command) -> std::io::Result<Child> {
    type Job = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let gone = |_| std::io::Error::other("the spawning thread is gone");
    let jobs = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in queue {
                let _ = answer.send(command.spawn());
            }
        });
        jobs
    });
    let (answer, result) = mpsc::channel();
    jobs.send((command, answer)).map_err(|_| gone(()))?;
    result.recv().map_err(|_| gone(()))?
}

fn arguments(plan: &Plan<'_>) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    let share = if plan.share_ram { "on" } else { "off" };
    let nobody = plan.dir.join("nobody.sock");
    let peer = plan.peer.map_or(nobody, link);
    // Two cards: eth0 for commands (user mode, no way out), eth1 the private link. Addresses are the same in every host
    // until a link is set up, because a frozen host brings its own along. `romfile=`: iPXE would cost seconds.
    let mut arguments: Vec<String> = [
        "-name",
        plan.name,
        "-nodefaults",
        "-nographic",
        "-machine",
        "q35,memory-backend=ram,kernel-irqchip=off,hpet=off",
        "-accel",
        "tcg,thread=multi,tb-size=512",
        "-cpu",
        // Four levels of page tables: with five, hosts have lost their stack on the way out of a guest.
        "max,+svm,-la57",
        "-smp",
        &CPUS.to_string(),
        "-m",
        &format!("{MEMORY}M"),
        "-object",
        &format!("memory-backend-file,id=ram,size={MEMORY}M,mem-path={},share={share}", path(plan.ram)),
        "-kernel",
        &path(plan.kernel),
        "-initrd",
        &path(plan.initrd),
        "-append",
        COMMAND_LINE,
        // For what is handed to guests whole. It comes before the devices that it stands in front of.
        "-device",
        "intel-iommu,intremap=on",
        "-drive",
        &format!("file={},format=qcow2,if=none,id=root,cache=unsafe", path(plan.disk)),
        "-device",
        "virtio-blk-pci,drive=root,addr=2",
        "-drive",
        &format!("file={},format=raw,if=none,id=guest,readonly=on,file.locking=off", path(plan.guest)),
        "-device",
        "virtio-blk-pci,drive=guest,addr=3",
        // A disk to hand over: alone behind its port, and so in its group; `iommu_platform` has it go by the IOMMU, and not past it.
        "-drive",
        &format!("file={},format=raw,if=none,id=spare,cache=unsafe", path(&spare(plan.dir))),
        "-device",
        "pcie-root-port,id=spare-port,chassis=1,addr=7",
        "-device",
        "virtio-blk-pci,drive=spare,serial=spare,bus=spare-port,disable-legacy=on,iommu_platform=on",
        // Port 0: the kernel picks a free one, and the monitor tells which.
        "-netdev",
        &format!("user,id=control,restrict=on,hostfwd=tcp:127.0.0.1:0-:{}", super::wire::PORT),
        "-device",
        "virtio-net-pci,netdev=control,mac=52:54:00:aa:00:00,addr=4,romfile=",
        "-netdev",
        &format!(
            "dgram,id=link,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            path(&link(plan.dir)),
            path(&peer)
        ),
        "-device",
        "virtio-net-pci,netdev=link,mac=52:54:00:aa:01:00,addr=5,romfile=",
        "-object",
        "rng-random,id=random,filename=/dev/urandom",
        "-device",
        "virtio-rng-pci,rng=random,addr=6",
        "-chardev",
        "socket,id=monitor,fd=0",
        "-mon",
        "chardev=monitor,mode=control",
        "-chardev",
        &format!(
            "socket,id=console,path={},server=on,wait=off,logfile={}",
            path(&plan.dir.join("console.sock")),
            path(&plan.dir.join("console.log"))
        ),
        "-serial",
        "chardev:console",
    ]
    .map(str::to_owned)
    .into();
    if plan.incoming {
        arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
    }
    arguments
}

impl Emulator {
    /// The port on 127.0.0.1 that leads to the agent.
    pub(crate) fn port(&mut self) -> std::io::Result<u16> {
        let ask = json!({ "command-line": "info usernet" });
        let table = self.monitor.execute("human-monitor-command", &ask, ANSWER)?;
        let table = table.as_str().unwrap_or_default();
        // TCP[HOST_FORWARD]  12       127.0.0.1 35017       10.0.2.15  7777     0     0
        table
            .lines()
            .filter(|line| line.contains("HOST_FORWARD"))
            .find_map(|line| line.split_whitespace().nth(3)?.parse().ok())
            .ok_or_else(|| std::io::Error::other(format!("no forwarded port in: {table}")))
    }

    /// Writes the machine's state, without RAM (its file holds it), to a file, and ends the emulator.
    pub(crate) fn freeze(mut self, state: &Path) -> std::io::Result<()> {
        self.monitor.execute("stop", &json!({}), ANSWER)?;
        self.migration_options()?;
        let target = json!({ "uri": format!("exec:cat > '{}'", state.display()) });
        self.monitor.execute("migrate", &target, ANSWER)?;
        self.migrated()?;
        self.monitor.execute("quit", &json!({}), ANSWER)?;
        self.child.wait().map(drop)
    }

    /// Takes a state that [`Emulator::freeze`] wrote, and runs on from there.
    pub(crate) fn thaw(&mut self, state: &Path) -> std::io::Result<()> {
        self.migration_options()?;
        let source = json!({ "uri": format!("exec:cat '{}'", state.display()) });
        self.monitor.execute("migrate-incoming", &source, ANSWER)?;
        self.migrated()?;
        // A host that was stopped when it was frozen comes back stopped.
        self.monitor.execute("cont", &json!({}), ANSWER).map(drop)
    }

    fn migrated(&mut self) -> std::io::Result<()> {
        let over = |name: &str, data: &serde_json::Value| {
            name == "MIGRATION" && ["completed", "failed"].iter().any(|end| data["status"] == *end)
        };
        let event = self.monitor.wait(ANSWER, over)?;
        if event["data"]["status"] == "completed" {
            Ok(())
        } else {
            Err(std::io::Error::other(event.to_string()))
        }
    }

    fn migration_options(&mut self) -> std::io::Result<()> {
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.monitor.execute("migrate-set-capabilities", &capabilities, ANSWER).map(drop)
    }
}
