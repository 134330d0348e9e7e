//! Test hosts: owns what a scenario sees of an emulated Debian machine with systemd, D-Bus and KVM inside.
//!
//! States of a host: absent → (cold boot | thaw of the frozen host) → answering → gone (dropped: killed, folder removed but for
//! its logs). The first start on a machine builds images and freezes a booted host (minutes); later ones thaw it (seconds).
//!
//! Rooms, highest first: `mod` (this) → `freeze` → `emulator`, `agent` → `wire`; `emulator`, `image` → `cache`; `error`.
//! `server` is the agent that runs inside.

mod agent;
pub mod cache;
mod emulator;
mod error;
mod freeze;
mod image;
pub mod server;
pub mod wire;

use std::fs::{self, File};
use std::io::{self, Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::Place;
pub use error::HostError;
pub use image::{Images, images};
use wire::Kind;

/// A command's deadline unless another is given.
pub const COMMAND: Duration = Duration::from_secs(120);

/// How long a conversation may last.
const TALK: Duration = Duration::from_secs(900);

/// How long a host may take until its agent answers.
const BOOT: Duration = Duration::from_secs(300);

/// What a command did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; 128 + signal when it was killed, 124 when it took too long.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A running host. Dropping it switches it off.
#[derive(Debug)]
pub struct Host {
    name: String,
    dir: PathBuf,
    place: Place,
    child: Option<Child>,
}

/// How to start a host.
#[derive(Debug, Clone, Default)]
pub struct Start {
    /// Boot instead of thawing the frozen host.
    pub cold: bool,
    /// Live on when this process ends; for the `host` command.
    pub detached: bool,
    /// Run folder of the host at the other end of the private link.
    pub peer: Option<PathBuf>,
    /// Guests there start in firmware, whose way with interrupts the emulator does not stand (`lock.c`). Not for others: under it a guest's
    /// reboot has stood still.
    pub mended: bool,
}

fn runs() -> PathBuf {
    cache::folder().join("run")
}

/// The last lines of a text file, or why there are none.
fn tail(path: &Path, lines: usize) -> String {
    match fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            format!("--- {}:\n{}", path.display(), all[all.len().saturating_sub(lines)..].join("\n"))
        }
        Err(error) => format!("--- {}: {error}", path.display()),
    }
}

impl Host {
    /// Starts a throw-away host from the frozen one. The name is for messages; any number may share it.
    ///
    /// # Errors
    /// When an image cannot be built or the host does not answer in time; with the end of its console.
    pub fn start(name: &str) -> Result<Self, HostError> {
        Self::start_as(&unique(name), &Start::default())
    }

    /// As [`Host::start`], for guests that start in firmware.
    ///
    /// # Errors
    /// As for [`Host::start`].
    pub fn start_for_firmware(name: &str) -> Result<Self, HostError> {
        Self::start_as(&unique(name), &Start { mended: true, ..Start::default() })
    }

    /// Starts two hosts whose `link0` cards are one private link, addressed 10.77.0.1/24 and 10.77.0.2/24.
    ///
    /// # Errors
    /// As for [`Host::start`].
    pub fn pair(first: &str, second: &str) -> Result<(Self, Self), HostError> {
        let (first, second) = (unique(first), unique(second));
        let towards = |peer: &str| Start { peer: Some(runs().join(peer)), ..Start::default() };
        let pair = (Self::start_as(&first, &towards(&second))?, Self::start_as(&second, &towards(&first))?);
        for (host, n) in [(&pair.0, 1), (&pair.1, 2)] {
            host.ok(&format!(
                "ip link set link0 down && ip link set link0 address 52:54:00:aa:01:0{n} && ip link set link0 up && \
                 ip address add 10.77.0.{n}/24 dev link0"
            ))?;
        }
        Ok(pair)
    }

    /// Starts a host under exactly this name.
    ///
    /// # Errors
    /// As for [`Host::start`]; also when one of that name runs.
    pub fn start_as(name: &str, start: &Start) -> Result<Self, HostError> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') || name.len() > 40 {
            return Err(HostError::Usage(format!(
                "\"{name}\" is no name for a host: 1 to 40 characters without \"/\""
            )));
        }
        let dir = runs().join(name);
        if Self::attach(name).is_ok() {
            return Err(HostError::Usage(format!("host {name} is already running")));
        }
        sweep();
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(error::io(format!("create {}", dir.display())))?;
        let (emulator, port) =
            if start.cold { freeze::boot(name, &dir, start)? } else { freeze::thaw(name, &dir, start)? };
        let pid = emulator.child.id();
        let host = Self { name: name.to_owned(), dir, place: Place::Port(port), child: Some(emulator.child) };
        host.answers(BOOT)?;
        let record = serde_json::json!({ "pid": pid, "port": port }).to_string();
        let path = host.dir.join("host.json");
        fs::write(&path, record).map_err(error::io(format!("write {}", path.display())))?;
        // A thawed host believes it is the day it was frozen.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let short = name.split('.').next().unwrap_or(name);
        host.ok(&format!("date -s @{now:.2} >/dev/null; hostname '{short}'"))?;
        Ok(host)
    }

    /// This machine itself, as if it were a host: for what needs no other and is much faster here.
    #[must_use]
    pub fn here() -> Self {
        Self { name: "here".to_owned(), dir: PathBuf::from("/run"), place: Place::Here, child: None }
    }

    /// Takes hold of a host that another process started. Dropping the value leaves it running.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn attach(name: &str) -> Result<Self, HostError> {
        let none = || HostError::Usage(format!("no host {name} is running"));
        let dir = runs().join(name);
        let text = fs::read_to_string(dir.join("host.json")).map_err(|_| none())?;
        let record: serde_json::Value = serde_json::from_str(&text).map_err(|_| none())?;
        let field = |key: &str| record.get(key).and_then(serde_json::Value::as_u64).ok_or_else(none);
        let port = u16::try_from(field("port")?).map_err(|_| none())?;
        let alive = pid_of(&dir, field("pid")?).is_some();
        alive
            .then(|| Self { name: name.to_owned(), dir, place: Place::Port(port), child: None })
            .ok_or_else(none)
    }

    /// Names of the hosts that run now.
    #[must_use]
    pub fn list() -> Vec<String> {
        let Ok(dir) = fs::read_dir(runs()) else { return Vec::new() };
        let mut names: Vec<String> =
            dir.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| Self::attach(name).is_ok());
        names.sort();
        names
    }

    /// Leaves the host running.
    pub fn detach(mut self) {
        self.child = None;
    }

    /// Switches off, also a host that another process started.
    ///
    /// # Errors
    /// When its process cannot be ended.
    pub fn stop(self) -> Result<(), HostError> {
        if self.child.is_none() {
            let text = fs::read_to_string(self.dir.join("host.json")).unwrap_or_default();
            let record: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let pid = record.get("pid").and_then(serde_json::Value::as_u64).unwrap_or_default();
            if let Some(pid) = pid_of(&self.dir, pid) {
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
                    .map_err(|errno| error::io(format!("kill {pid}"))(errno.into()))?;
            }
            let _ = fs::remove_file(self.dir.join("host.json"));
        }
        Ok(())
    }

    /// The name it was started under.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its console socket (`console.sock`) and logs are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.dir
    }

    /// Runs a line for bash, within [`COMMAND`].
    ///
    /// # Errors
    /// When the host does not answer; the command's own failure is in the output.
    pub fn run(&self, command: &str) -> Result<Output, HostError> {
        self.run_for(COMMAND, command)
    }

    /// Runs a line for bash, with a deadline of its own.
    ///
    /// # Errors
    /// As for [`Host::run`].
    pub fn run_for(&self, limit: Duration, command: &str) -> Result<Output, HostError> {
        self.run_with(limit, command, io::empty())
    }

    fn run_with(
        &self,
        limit: Duration,
        command: &str,
        input: impl Read + Send + 'static,
    ) -> Result<Output, HostError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = self.stream(limit, command, input, |kind, data| {
            if kind == Kind::Output { &mut stdout } else { &mut stderr }.extend_from_slice(data);
            Ok(())
        })?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Output { code, stdout: text(stdout), stderr: text(stderr) })
    }

    /// Runs a line for bash with input and output as they come; returns the exit code.
    ///
    /// # Errors
    /// As for [`Host::run`], and those of `output`.
    pub fn stream(
        &self,
        limit: Duration,
        command: &str,
        input: impl Read + Send + 'static,
        mut output: impl FnMut(Kind, &[u8]) -> io::Result<()>,
    ) -> Result<i32, HostError> {
        agent::run(self.place, command, input, limit, &mut output).map_err(|error| HostError::Emulator {
            host: self.name.clone(),
            what: format!("`{command}`: {error}"),
            console: self.console_tail(),
        })
    }

    /// Runs a line that must succeed; returns what it printed, without the last line end.
    ///
    /// # Errors
    /// Also when it exits with another code than 0.
    pub fn ok(&self, command: &str) -> Result<String, HostError> {
        self.ok_for(COMMAND, command)
    }

    /// As [`Host::ok`], with a deadline of its own.
    ///
    /// # Errors
    /// As for [`Host::ok`].
    pub fn ok_for(&self, limit: Duration, command: &str) -> Result<String, HostError> {
        let output = self.run_for(limit, command)?;
        match output.code {
            0 => Ok(output.stdout.trim_end().to_owned()),
            _ => Err(self.failed(command, output)),
        }
    }

    /// Runs a line that must be refused: it exits with a code from 1 to 123, so neither well, nor late, nor by a signal.
    ///
    /// # Errors
    /// Also when it is not.
    pub fn refused(&self, command: &str) -> Result<Output, HostError> {
        let output = self.run(command)?;
        match output.code {
            1..=123 => Ok(output),
            _ => Err(self.failed(command, output)),
        }
    }

    fn failed(&self, command: &str, output: Output) -> HostError {
        let Output { code, stdout, stderr } = output;
        HostError::Command { host: self.name.clone(), command: command.to_owned(), code, stdout, stderr }
    }

    /// Runs a line again and again until it succeeds, and returns what it printed.
    ///
    /// # Errors
    /// After `limit`: with the newest answer and the console's end.
    pub fn eventually(&self, limit: Duration, command: &str) -> Result<String, HostError> {
        let deadline = Instant::now() + limit;
        loop {
            let output = self.run(command)?;
            if output.code == 0 {
                return Ok(output.stdout.trim_end().to_owned());
            }
            if Instant::now() > deadline {
                let Output { code, stdout, stderr } = output;
                return Err(HostError::Late {
                    host: self.name.clone(),
                    what: format!("`{command}` (last: exit {code}, stdout: {stdout}, stderr: {stderr})"),
                    limit,
                    console: self.console_tail(),
                });
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Starts a line for bash and returns a stream to its input and output; closing the stream ends its input.
    ///
    /// # Errors
    /// When there are no sockets left; a command that cannot run is seen as the stream's end.
    pub fn talk(&self, command: &str) -> Result<UnixStream, HostError> {
        let (near, mut far) = UnixStream::pair().map_err(error::io("socketpair"))?;
        let input = far.try_clone().map_err(error::io("copy a descriptor"))?;
        let (place, command) = (self.place, command.to_owned());
        thread::spawn(move || {
            let _ = agent::run(place, &command, input, TALK, &mut |kind, data: &[u8]| {
                if kind == Kind::Output { far.write_all(data) } else { Ok(()) }
            });
            let _ = far.shutdown(Shutdown::Both);
        });
        Ok(near)
    }

    /// Connects to a unix socket inside the host.
    ///
    /// # Errors
    /// As for [`Host::talk`].
    pub fn dial(&self, socket: &str) -> Result<UnixStream, HostError> {
        // Whoever binds a socket listens a moment later: it may be seen before.
        self.talk(&format!("exec socat - 'UNIX-CONNECT:{socket},retry=30,interval=0.1'"))
    }

    /// Copies a file in, with its mode; folders on the way are made.
    ///
    /// # Errors
    /// When either side refuses.
    pub fn push(&self, local: &Path, remote: &str) -> Result<(), HostError> {
        use std::os::unix::fs::PermissionsExt;
        let what = || error::io(format!("read {}", local.display()));
        let file = File::open(local).map_err(what())?;
        let mode = file.metadata().map_err(what())?.permissions().mode() & 0o7777;
        self.put(remote, mode, file)
    }

    /// Writes a file of mode 0644; folders on the way are made.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn write(&self, remote: &str, content: impl Into<Vec<u8>>) -> Result<(), HostError> {
        self.put(remote, 0o644, Cursor::new(content.into()))
    }

    fn put(&self, remote: &str, mode: u32, content: impl Read + Send + 'static) -> Result<(), HostError> {
        // Under another name first: a program that runs cannot be written over.
        let command = format!(
            "set -e; f='{remote}'; mkdir -p \"$(dirname \"$f\")\"; cat > \"$f.part\"; chmod {mode:o} \"$f.part\"; mv \"$f.part\" \"$f\""
        );
        let output = self.run_with(COMMAND, &command, content)?;
        if output.code == 0 { Ok(()) } else { Err(self.failed(&command, output)) }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When there is none.
    pub fn pull(&self, remote: &str) -> Result<Vec<u8>, HostError> {
        let command = format!("cat '{remote}'");
        let (mut content, mut stderr) = (Vec::new(), Vec::new());
        let code = self.stream(COMMAND, &command, io::empty(), |kind, data| {
            if kind == Kind::Output { &mut content } else { &mut stderr }.extend_from_slice(data);
            Ok(())
        })?;
        if code == 0 {
            return Ok(content);
        }
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        Err(self.failed(&command, Output { code, stdout: String::new(), stderr }))
    }

    /// The last lines of the host's console and of the emulator's own messages.
    #[must_use]
    pub fn console_tail(&self) -> String {
        [tail(&self.dir.join("emulator.log"), 5), tail(&self.dir.join("console.log"), 15)].join("\n")
    }

    /// Waits until the agent answers.
    fn answers(&self, limit: Duration) -> Result<(), HostError> {
        let deadline = Instant::now() + limit;
        loop {
            // The forwarder takes connections before anything listens in the host, and drops them: so ask and see.
            let asked = agent::run(
                self.place,
                "true",
                io::empty(),
                Duration::from_secs(5),
                &mut |_, _: &[u8]| Ok(()),
            );
            match asked {
                Ok(0) => return Ok(()),
                _ if Instant::now() < deadline => thread::sleep(Duration::from_millis(100)),
                last => {
                    return Err(HostError::Late {
                        host: self.name.clone(),
                        what: format!("the agent (last: {last:?})"),
                        limit,
                        console: self.console_tail(),
                    });
                }
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = child.kill();
        let _ = child.wait();
        clean(&self.dir);
    }
}

/// Removes all of a host's folder but its logs.
fn clean(dir: &Path) {
    for file in ["disk.qcow2", "ram", "initrd", "host.json", "link.sock", "console.sock"] {
        let _ = fs::remove_file(dir.join(file));
    }
}

/// Cleans up after tests that were killed, and drops logs after a day. A host's folder carries its test's process id.
fn sweep() {
    let Ok(dirs) = fs::read_dir(runs()) else { return };
    for dir in dirs.flatten() {
        let name = dir.file_name().to_string_lossy().into_owned();
        let owner = name.rsplit('.').nth(1).filter(|_| name.split('.').count() == 3);
        if owner.is_none_or(|pid| Path::new("/proc").join(pid).exists()) {
            continue;
        }
        clean(&dir.path());
        let age = dir.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age > Duration::from_secs(86_400)) {
            let _ = fs::remove_dir_all(dir.path());
        }
    }
}

/// A name no other host of this or another process has.
fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{name}.{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The process of the host in this folder, if the id is still its own: ids are reused.
fn pid_of(dir: &Path, pid: u64) -> Option<nix::unistd::Pid> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mark = dir.join("console.sock").display().to_string();
    let ours = String::from_utf8_lossy(&line).contains(&mark);
    ours.then(|| i32::try_from(pid).ok().map(nix::unistd::Pid::from_raw))?
}
