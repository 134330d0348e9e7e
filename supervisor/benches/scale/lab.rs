//! A host for the benchmark: private bus, the daemon with its process launcher, and what the kernel says of the daemon. All of it ends with
//! the value.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use dbus_api::proxy::{ManagerProxy, VmProxy};
use dbus_api::vm_path;
use futures_util::{StreamExt, TryStreamExt, stream};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use zbus::Connection;
use zbus::proxy::CacheProperties;

use crate::Outcome;
use crate::vm::LIFELINE;

/// Long enough for thousands of processes on a small machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// Calls under way at the same time: the bus allows more, PID 1 would not gain from it.
const AT_ONCE: usize = 16;

pub(crate) struct Lab {
    directory: TempDir,
    bus: Child,
    address: String,
    daemon: Option<Child>,
    program: PathBuf,
    pub(crate) connection: Connection,
    pub(crate) manager: ManagerProxy<'static>,
    /// Those that stand still do not see the end of the lifeline.
    frozen: Vec<Pid>,
    /// The simulated VMs end when this does.
    _lifeline: File,
}

/// How long a daemon took, from its process's start.
pub(crate) struct Start {
    /// To the first list that names all VMs.
    pub(crate) listed: Duration,
    /// Until every VM has answered, or is known not to.
    pub(crate) ready: Duration,
}

/// What a daemon has used.
#[derive(Clone, Copy)]
pub(crate) struct Used {
    /// Processor time, nanoseconds.
    pub(crate) cpu: u64,
    /// Its own memory that is there, KiB.
    pub(crate) memory: u64,
    /// Descriptors.
    pub(crate) descriptors: usize,
}

/// Ends with the thread that starts it: the benchmark's main one.
fn tied(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    // SAFETY: between fork and exec only prctl is called, which is a plain system call.
    unsafe {
        command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
    }
    command.stdin(Stdio::null());
    command
}

impl Lab {
    pub(crate) async fn new(program: &Path) -> Outcome<Lab> {
        // As /run is: otherwise every change of a state waits for a disk.
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? };
        fs::write(directory.path().join("kernel"), "no kernel, but no VMM looks")?;
        let fifo = directory.path().join("lifeline");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
        let lifeline = OpenOptions::new().read(true).write(true).open(&fifo)?;
        let mut bus = tied("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--print-address"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("dbus-daemon: {error}"))?;
        let mut address = String::new();
        BufReader::new(bus.stdout.take().ok_or("dbus-daemon says nothing")?).read_line(&mut address)?;
        let address = address.trim().to_owned();
        let connection = zbus::connection::Builder::address(address.as_str()).build().await?;
        let manager =
            ManagerProxy::builder(&connection).cache_properties(CacheProperties::No).build().await?;
        let (daemon, frozen, program) = (None, Vec::new(), program.to_owned());
        Ok(Lab { directory, bus, address, daemon, program, connection, manager, frozen, _lifeline: lifeline })
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    /// Starts the daemon and waits until it knows `count` VMs and their answers.
    pub(crate) async fn start_daemon(&mut self, count: usize) -> Outcome<Start> {
        let began = Instant::now();
        let configuration = self.path("flotillad.toml");
        fs::write(&configuration, "")?;
        let mut daemon = tied(&self.program)
            .args(["--bus", &self.address, "--launcher", "process"])
            .arg("--config")
            .arg(configuration)
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--runtime-dir")
            .arg(self.path("run"))
            .arg("--vmm")
            .arg(std::env::current_exe()?)
            .env(LIFELINE, self.path("lifeline"))
            .env_remove("NOTIFY_SOCKET")
            .env_remove("JOURNAL_STREAM")
            .env("FLOTILLA_LOG", "info,zbus=warn")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", self.program.display()))?;
        let ready = ready(daemon.stderr.take().ok_or("the daemon has no log")?);
        self.daemon = Some(daemon);
        loop {
            match self.manager.list_vms().await {
                Ok(rows) if rows.len() == count => break,
                _ if began.elapsed() > PATIENCE => return Err("the daemon does not come up".into()),
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
        let listed = began.elapsed();
        let ready = tokio::task::spawn_blocking(move || ready.recv_timeout(PATIENCE)).await??;
        Ok(Start { listed, ready: ready.duration_since(began) })
    }

    /// Kills the daemon; its VMs run on.
    pub(crate) fn kill_daemon(&mut self) -> Outcome<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill()?;
            daemon.wait()?;
        }
        Ok(())
    }

    /// Defines and starts VMs; returns how long each of the two took.
    pub(crate) async fn fill(&self, count: usize) -> Outcome<(Duration, Duration)> {
        let spec = serde_json::json!({"kernel": self.path("kernel"), "balloon": true}).to_string();
        let began = Instant::now();
        let define = |at| {
            let spec = &spec;
            async move { self.manager.define_vm(&name(at), spec, Default::default()).await.map(drop) }
        };
        stream::iter((0..count).map(define)).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        let defined = began.elapsed();
        let began = Instant::now();
        let start =
            |at| async move { self.manager.start_vm(&name(at), "run", Default::default()).await.map(drop) };
        stream::iter((0..count).map(start)).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        while self.manager.n_running().await? as usize != count {
            if began.elapsed() > PATIENCE {
                return Err(format!("{} of {count} VMs run", self.manager.n_running().await?).into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok((defined, began.elapsed()))
    }

    pub(crate) async fn vm(&self, at: usize) -> Outcome<VmProxy<'static>> {
        let builder = VmProxy::builder(&self.connection).path(vm_path(&name(at)));
        Ok(builder.cache_properties(CacheProperties::No).build().await?)
    }

    /// The socket of the VM itself, and that of the daemon's proxy for it.
    pub(crate) fn sockets(&self, at: usize) -> (PathBuf, PathBuf) {
        let name = name(at);
        (self.path(&format!("run/vm/{name}/qmp.sock")), self.path(&format!("run/qmp/{name}.sock")))
    }

    /// Freezes one in a hundred VMs; says how many.
    pub(crate) async fn freeze_some(&mut self) -> Outcome<usize> {
        let rows = self.manager.list_vms().await?;
        let some: Vec<u32> =
            rows.iter().skip(7).step_by(100).map(|row| row.4).filter(|pid| *pid != 0).collect();
        for pid in some {
            let pid = Pid::from_raw(i32::try_from(pid)?);
            kill(pid, Signal::SIGSTOP)?;
            self.frozen.push(pid);
        }
        Ok(self.frozen.len())
    }

    pub(crate) fn used(&self) -> Outcome<Used> {
        let folder = PathBuf::from(format!("/proc/{}", self.daemon.as_ref().ok_or("no daemon")?.id()));
        let mut cpu = 0;
        for thread in fs::read_dir(folder.join("task"))? {
            // A thread may have ended meanwhile.
            let text = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            cpu += text.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        }
        let status = fs::read_to_string(folder.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
        let memory = line.trim().trim_end_matches(" kB").parse()?;
        Ok(Used { cpu, memory, descriptors: fs::read_dir(folder.join("fd"))?.count() })
    }
}

/// When the daemon says that it is ready; what else it says that matters goes to standard error.
fn ready(log: impl std::io::Read + Send + 'static) -> Receiver<Instant> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            if line.contains("ready: ") {
                let _ = sender.send(Instant::now());
            } else if line.contains("WARN") || line.contains("ERROR") {
                eprintln!("flotillad: {line}");
            }
        }
    });
    receiver
}

pub(crate) fn name(at: usize) -> String {
    format!("vm-{at:04}")
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.kill_daemon();
        for pid in &self.frozen {
            // It stands still, so the number is its own.
            let _ = kill(*pid, Signal::SIGKILL);
        }
        let _ = self.bus.kill();
        let _ = self.bus.wait();
    }
}
