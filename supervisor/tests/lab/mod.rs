//! A host for one daemon: a bus of its own, directories of its own, a network namespace of its own, and VMMs that are none.
//!
//! Needs `dbus-daemon`, and root for the network namespace. Without them a test that needs them **fails and says so**.

pub(crate) mod keeper;
pub(crate) mod vmm;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dbus_api::error::Error;
use dbus_api::proxy::{ManagerProxy, VmProxy};
use dbus_api::vm_path;
use futures_util::StreamExt;
use keeper::Keeper;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use zbus::{Connection, OwnedObjectPath};

/// Long enough for a loaded machine, short enough to notice a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A bus for users of all kinds, as the system's is; who may do what is the daemon's to say.
const BUS_CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:tmpdir=/tmp</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
  </policy>
</busconfig>
"#;

/// The host.
pub(crate) struct Lab {
    directory: TempDir,
    bus: Child,
    address: String,
    connection: Connection,
    pub(crate) manager: ManagerProxy<'static>,
    daemon: Option<Child>,
    namespace: Option<Child>,
    keeper: Option<Keeper>,
}

/// `Options` of a call that has none.
pub(crate) fn none<'a>() -> dbus_api::proxy::Options<'a> {
    dbus_api::proxy::Options::new()
}

/// The name of an API error, without its prefix.
pub(crate) fn name_of(error: &Error) -> String {
    let text = format!("{error:?}");
    text.split('(').next().unwrap_or_default().to_owned()
}

impl Lab {
    /// A host with a daemon on it.
    pub(crate) async fn new() -> Lab {
        let mut lab = Lab::bare().await;
        lab.start_daemon().await;
        lab
    }

    /// A host whose daemon is yet to be started.
    pub(crate) async fn bare() -> Lab {
        let directory = tempfile::tempdir().unwrap();
        for name in ["pids", "state", "run"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        std::fs::write(directory.path().join("kernel"), "no kernel, but no VMM looks").unwrap();
        // The test program is the VMM: its only test that may run then is the one of this name.
        let program = directory.path().join("vmm");
        let own = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\nexec '{}' --exact --nocapture --test-threads=1 this_program_is_the_vmm -- \"$@\"\n",
            own.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();

        let bus_config = directory.path().join("bus.conf");
        std::fs::write(&bus_config, BUS_CONFIG).unwrap();
        let mut bus = Command::new("dbus-daemon")
            .args(["--nofork", "--nopidfile", "--print-address"])
            .arg(format!("--config-file={}", bus_config.display()))
            .stdout(Stdio::piped())
            // It cannot raise its limit of descriptors here, and says so.
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need dbus-daemon");
        let mut address = String::new();
        BufReader::new(bus.stdout.take().unwrap()).read_line(&mut address).unwrap();
        let address = address.trim().to_owned();
        let connection = zbus::connection::Builder::address(address.as_str()).build().await.unwrap();
        let manager = ManagerProxy::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .unwrap();
        Lab { directory, bus, address, connection, manager, daemon: None, namespace: None, keeper: None }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The bus, as a client has it.
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Where it is.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// How many descriptors the daemon has open.
    pub(crate) fn descriptors(&self) -> usize {
        let number = self.daemon.as_ref().unwrap().id();
        std::fs::read_dir(format!("/proc/{number}/fd")).unwrap().count()
    }

    /// How much memory of its own the daemon uses, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        let number = self.daemon.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{number}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// How many children of the daemon run this program.
    pub(crate) fn children(&self, program: &str) -> usize {
        let daemon = self.daemon.as_ref().unwrap().id().to_string();
        let child = |entry: &std::fs::DirEntry| {
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            // The name in brackets, the state, the parent.
            let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
            stat.contains(&format!("({program})")) && parent == Some(&daemon)
        };
        std::fs::read_dir("/proc").unwrap().flatten().filter(child).count()
    }

    /// From now on the daemon lives in a network namespace that outlives it.
    pub(crate) fn own_network(&mut self) {
        assert!(nix::unistd::geteuid().is_root(), "a test with bridges and taps needs root");
        let holder = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        let theirs = format!("/proc/{}/ns/net", holder.id());
        self.namespace = Some(holder);
        for _ in 0..5000 {
            if std::fs::read_link(&theirs).is_ok_and(|theirs| theirs != own) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("unshare --net does not begin");
    }

    /// From now on the daemon's descriptors are kept while it is restarted.
    pub(crate) fn keep_descriptors(&mut self) {
        self.keeper = Some(Keeper::new(self.path("notify")));
    }

    /// Waits until so many are kept.
    pub(crate) async fn until_kept(&self, count: usize) {
        let keeper = self.keeper.as_ref().unwrap();
        self.settle(async || keeper.count() == count).await;
    }

    /// Waits until something is so.
    pub(crate) async fn settle(&self, mut so: impl AsyncFnMut() -> bool) {
        let reached = async {
            while !so().await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("it does not come to that:\n{}", self.log());
        }
    }

    /// Runs a program in the daemon's network.
    fn command(&self, program: &str) -> Command {
        match &self.namespace {
            None if self.keeper.is_some() && program == env!("CARGO_BIN_EXE_flotillad") => {
                self.keeper.as_ref().unwrap().command(program)
            }
            None => Command::new(program),
            Some(holder) => {
                let mut command = Command::new("nsenter");
                command.args([&format!("--net=/proc/{}/ns/net", holder.id()), program]);
                command
            }
        }
    }

    /// What `ip` says of the daemon's network.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        let output = self.command("ip").args(arguments.split(' ')).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a program in the daemon's network; it must succeed.
    pub(crate) fn ok(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {errors}\n{}", self.log());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A machine on a cable whose other end is the link `port` in the daemon's network; with this hardware address.
    pub(crate) fn machine(&self, port: &str, mac: &str) -> Machine {
        let holder = Command::new("unshare").args(["--net", "sleep", "600"]).spawn().unwrap();
        let machine = Machine(holder);
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        let theirs = format!("/proc/{}/ns/net", machine.0.id());
        let begun = || std::fs::read_link(&theirs).is_ok_and(|theirs| theirs != own);
        let mut tries = 0;
        while !begun() {
            tries += 1;
            assert!(tries < 5000, "unshare --net does not begin");
            std::thread::sleep(Duration::from_millis(2));
        }
        let cable =
            format!("link add {port} type veth peer name eth0 address {mac} netns {}", machine.0.id());
        self.ok("ip", &cable.split(' ').collect::<Vec<_>>());
        self.ok("ip", &["link", "set", port, "up"]);
        machine.ok("ip link set eth0 up");
        machine
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) async fn start_daemon(&mut self) {
        let notify = self.keeper.is_some();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = self.command(env!("CARGO_BIN_EXE_flotillad"));
        if !notify {
            command.env_remove("NOTIFY_SOCKET");
        }
        let daemon = command
            .args(["--bus", &self.address, "--launcher", "process"])
            .args(["--config".as_ref(), self.configuration().as_os_str()])
            .args(["--state-dir".as_ref(), self.path("state").as_os_str()])
            .args(["--runtime-dir".as_ref(), self.path("run").as_os_str()])
            .args(["--vmm".as_ref(), self.path("vmm").as_os_str()])
            .env("FAKE_VMM_PIDS", self.path("pids"))
            .env("FLOTILLA_LOG", "debug,zbus=warn")
            .env_remove("JOURNAL_STREAM")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.daemon = Some(daemon);
        let answers = async {
            while self.manager.state().await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, answers).await.is_err() {
            panic!("flotillad does not answer:\n{}", self.log());
        }
    }

    fn configuration(&self) -> PathBuf {
        let path = self.path("flotillad.toml");
        if !path.exists() {
            std::fs::write(&path, "").unwrap();
        }
        path
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Sends the daemon a signal and waits for its end.
    pub(crate) fn end_daemon(&mut self, signal: Signal) {
        let mut daemon = self.daemon.take().unwrap();
        kill(pid(daemon.id()), signal).unwrap();
        daemon.wait().unwrap();
    }

    pub(crate) async fn vm(&self, name: &str) -> VmProxy<'static> {
        VmProxy::builder(&self.connection)
            .path(vm_path(name))
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .unwrap()
    }

    /// Defines a VM from the members of a definition that are not the kernel.
    pub(crate) async fn define(&self, name: &str, members: Value) -> Result<(), Error> {
        let mut spec = members;
        spec["kernel"] = self.path("kernel").display().to_string().into();
        self.manager.define_vm(name, &spec.to_string(), none()).await.map(drop)
    }

    /// Waits for the end of the job that `call` returns; its error, when it failed, as "Name: text".
    pub(crate) async fn job(
        &self,
        call: impl Future<Output = Result<OwnedObjectPath, Error>>,
    ) -> Result<(), String> {
        // From before the call: a job may end before the call returns.
        let mut removed = self.manager.receive_job_removed().await.unwrap();
        let job = call.await.map_err(|error| format!("{error:?}"))?;
        let end = async {
            while let Some(signal) = removed.next().await {
                let args = signal.args().unwrap();
                if *args.path() == job {
                    let name = args.error_name().rsplit('.').next().unwrap_or_default().to_owned();
                    return match args.result().as_str() {
                        "done" => Ok(()),
                        _ => Err(format!("{name}: {}", args.error_message())),
                    };
                }
            }
            panic!("the bus is gone");
        };
        let Ok(end) = tokio::time::timeout(PATIENCE, end).await else {
            panic!("{job} does not end:\n{}", self.log())
        };
        end
    }

    /// Gives a VM a card and waits for the end of the job: its id, and how the job ended.
    pub(crate) async fn attach_nic(
        &self,
        name: &str,
        nic: Value,
        options: dbus_api::proxy::Options<'_>,
    ) -> Result<(String, Result<(), String>), Error> {
        let nic = nic.to_string();
        self.attached(self.manager.attach_nic(name, &nic, options)).await
    }

    /// The same with a disk.
    pub(crate) async fn attach_disk(
        &self,
        name: &str,
        disk: Value,
        options: dbus_api::proxy::Options<'_>,
    ) -> Result<(String, Result<(), String>), Error> {
        let disk = disk.to_string();
        self.attached(self.manager.attach_disk(name, &disk, options)).await
    }

    async fn attached(
        &self,
        call: impl Future<Output = Result<(String, OwnedObjectPath), Error>>,
    ) -> Result<(String, Result<(), String>), Error> {
        let mut id = Err(None);
        let ended = self
            .job(async {
                match call.await {
                    Ok((given, job)) => {
                        id = Ok(given);
                        Ok(job)
                    }
                    Err(error) => {
                        let text = format!("{error:?}");
                        id = Err(Some(error));
                        Err(Error::Cancelled(text))
                    }
                }
            })
            .await;
        match id {
            Ok(id) => Ok((id, ended)),
            Err(error) => Err(error.expect("the call was made")),
        }
    }

    pub(crate) async fn start(&self, name: &str) -> Result<(), String> {
        self.job(self.manager.start_vm(name, "run", none())).await
    }

    /// Waits until a VM is in a state.
    pub(crate) async fn until(&self, name: &str, state: &str) {
        let vm = self.vm(name).await;
        let reached = async {
            while vm.state().await.unwrap() != state {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("{name} is {:?}, not {state}:\n{}", vm.state().await, self.log());
        }
    }

    /// Waits until a VM's VMM answers: after a restart of the daemon that is a moment after its state is known.
    pub(crate) async fn until_responsive(&self, name: &str) {
        let vm = self.vm(name).await;
        let answers = async {
            while !vm.qmp_responsive().await.unwrap() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, answers).await.is_err() {
            panic!("{name} does not answer:\n{}", self.log());
        }
    }

    /// How many VMMs run.
    pub(crate) fn processes(&self) -> usize {
        self.pids().filter(|number| runs_in(*number, self.directory.path())).count()
    }

    fn pids(&self) -> impl Iterator<Item = u32> + use<> {
        let entries = std::fs::read_dir(self.path("pids")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
    }

    /// A client of a VM's QMP socket.
    pub(crate) async fn qmp(&self, name: &str) -> Qmp {
        let path = self.vm(name).await.qmp_socket().await.unwrap();
        let mut qmp = Qmp(tokio::io::BufReader::new(tokio::net::UnixStream::connect(path).await.unwrap()));
        assert!(qmp.next().await.unwrap()["QMP"].is_object());
        qmp
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for child in
            [self.daemon.as_mut(), self.namespace.as_mut(), Some(&mut self.bus)].into_iter().flatten()
        {
            let _ = child.kill();
            let _ = child.wait();
        }
        // So do the servers of its networks.
        for entry in std::fs::read_dir(self.path("run/dhcp")).into_iter().flatten().flatten() {
            let number = std::fs::read_to_string(entry.path()).ok().and_then(|text| text.trim().parse().ok());
            if let Some(number) = number.filter(|number| runs_in(*number, self.directory.path())) {
                let _ = kill(pid(number), Signal::SIGKILL);
            }
        }
        // VMMs outlive the daemon on purpose. Only those of this host: their command line names its directory.
        for number in self.pids() {
            if runs_in(number, self.directory.path()) {
                let _ = kill(pid(number), Signal::SIGKILL);
            }
        }
    }
}

/// A machine in the daemon's network: a namespace that a process holds.
pub(crate) struct Machine(Child);

impl Machine {
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.0.id())).args(line.split(' '));
        command
    }

    /// Runs a program there; it must succeed.
    pub(crate) fn ok(&self, line: &str) {
        assert!(self.command(line).status().unwrap().success(), "{line}");
    }

    /// Whether an address answers a ping.
    pub(crate) fn reaches(&self, address: &str) -> bool {
        let line = format!("busybox ping -q -c 1 -W 1 -w 10 {address}");
        self.command(&line).stdout(Stdio::null()).status().unwrap().success()
    }

    /// What DHCP tells it, as udhcpc's variables; `None`: nobody answers so many questions.
    pub(crate) fn asks(&self, lab: &Lab, tries: u32) -> Option<String> {
        let script = lab.path("udhcpc");
        let text = "#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip/$mask router=$router dns=$dns lease=$lease\"\nexit 0\n";
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let script = script.display();
        let line = format!("busybox udhcpc -f -q -n -t {tries} -T 1 -i eth0 -s {script}");
        let output = self.command(&line).output().expect("these tests need busybox");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn runs_in(number: u32, directory: &Path) -> bool {
    let line = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains(&directory.display().to_string())
}

pub(crate) fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap())
}

/// A QMP client.
pub(crate) struct Qmp(tokio::io::BufReader<tokio::net::UnixStream>);

impl Qmp {
    /// A client over a stream that is connected.
    pub(crate) fn of(stream: std::os::unix::net::UnixStream) -> Qmp {
        stream.set_nonblocking(true).unwrap();
        Qmp(tokio::io::BufReader::new(tokio::net::UnixStream::from_std(stream).unwrap()))
    }

    /// The next message; `None` at the end of the connection.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        let read = tokio::time::timeout(PATIENCE, self.0.read_line(&mut line)).await.expect("QMP is silent");
        match read {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    }

    /// Sends a command and returns its answer; events before it are passed over.
    pub(crate) async fn ask(&mut self, command: &str) -> Value {
        self.ask_with(command, serde_json::json!({})).await
    }

    /// Sends a command and waits for nothing.
    pub(crate) async fn tell(&mut self, command: &str) {
        self.0.get_mut().write_all(format!("{{\"execute\":\"{command}\"}}").as_bytes()).await.unwrap();
    }

    /// As `ask`, with arguments.
    pub(crate) async fn ask_with(&mut self, command: &str, arguments: Value) -> Value {
        let command = serde_json::json!({"execute": command, "arguments": arguments});
        self.0.get_mut().write_all(command.to_string().as_bytes()).await.unwrap();
        loop {
            let message = self.next().await.expect("the connection ended");
            if message.get("event").is_none() {
                return message;
            }
        }
    }
}
