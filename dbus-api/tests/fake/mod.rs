//! A fake of flotillad: the Manager and Vm interfaces over a table in memory, on a private `dbus-daemon`. Its guests answer each line
//! with "guest says: LINE" and end at "bye". A VM named "broken" fails to start, one named "slow" never finishes starting.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dbus_api::error::Error;
use dbus_api::proxy::{JobRow, Stats, VmRow};
use dbus_api::{BUS_NAME, MANAGER_INTERFACE, MANAGER_PATH, job_path, vm_path};
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedFd, OwnedObjectPath, OwnedVariant};

type Details = HashMap<String, OwnedVariant>;

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A bus with a fake daemon on it.
pub(crate) struct Fleet {
    bus: Child,
    address: String,
    runtime: tokio::runtime::Runtime,
    connection: Mutex<Option<Connection>>,
    state: Shared,
    environment: Mutex<HashMap<String, String>>,
}

type Shared = Arc<Mutex<State>>;

#[derive(Default)]
struct State {
    vms: BTreeMap<String, VmState>,
    jobs: u32,
    calls: Vec<String>,
}

#[derive(Clone)]
struct VmState {
    spec: String,
    state: &'static str,
    generation: u64,
}

impl Fleet {
    /// `None` when `dbus-daemon` is not installed.
    pub(crate) fn start() -> Option<Self> {
        let mut bus = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--print-address"])
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut address = String::new();
        BufReader::new(bus.stdout.take().unwrap()).read_line(&mut address).unwrap();
        let address = address.trim().to_owned();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Shared::default();
        let connection = runtime
            .block_on(
                zbus::connection::Builder::address(address.as_str())
                    .serve_at(MANAGER_PATH, Manager(state.clone()))
                    .name(BUS_NAME)
                    .build(),
            )
            .unwrap();
        let connection = Mutex::new(Some(connection));
        Some(Self { bus, address, runtime, connection, state, environment: Mutex::default() })
    }

    /// What was asked of the daemon so far.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.state.lock().unwrap().calls.clone()
    }

    /// Sets a variable for the commands to come.
    pub(crate) fn environment(&self, key: &str, value: &str) {
        self.environment.lock().unwrap().insert(key.to_owned(), value.to_owned());
    }

    /// The daemon ends.
    pub(crate) fn go_away(&self) {
        let connection = self.connection.lock().unwrap().take().unwrap();
        self.runtime.block_on(async { connection.release_name(BUS_NAME).await }).unwrap();
    }

    /// Runs a command without input.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.spawn(args).wait()
    }

    /// Runs a command with this input.
    pub(crate) fn run_with_input(&self, args: &[&str], input: &str) -> Ran {
        let mut running = self.command(args, Stdio::piped());
        running.0.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        running.wait()
    }

    /// Begins a command.
    pub(crate) fn spawn(&self, args: &[&str]) -> Running {
        self.command(args, Stdio::null())
    }

    /// Begins a command on a terminal.
    pub(crate) fn spawn_on(&self, args: &[&str], terminal: &std::fs::File) -> Running {
        let end = || terminal.try_clone().unwrap();
        Running(self.prepare(args).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap())
    }

    fn command(&self, args: &[&str], input: Stdio) -> Running {
        let mut command = self.prepare(args);
        Running(command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn prepare(&self, args: &[&str]) -> Command {
        // A limit on everything: a command that hangs is a failure, not a wait. In the foreground, so that it may use a terminal.
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "60", env!("CARGO_BIN_EXE_flotilla")])
            .args(args)
            .env("FLOTILLA_BUS", &self.address)
            .envs(&*self.environment.lock().unwrap());
        command
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let _ = self.bus.kill();
        let _ = self.bus.wait();
    }
}

/// A terminal: the person's end and the program's end.
pub(crate) fn terminal() -> (std::fs::File, std::fs::File) {
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let name = ptsname(&person, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let program = rustix::fs::open(name, flags, Mode::empty()).unwrap();
    (person.into(), program.into())
}

/// A command under way.
pub(crate) struct Running(Child);

impl Running {
    /// Waits for its end.
    pub(crate) fn wait(self) -> Ran {
        let output = self.0.wait_with_output().unwrap();
        Ran {
            status: output.status.code().unwrap(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

struct Manager(Shared);

impl Manager {
    fn note(&self, call: String) {
        self.0.lock().unwrap().calls.push(call);
    }

    fn known(&self, name: &str) -> Result<VmState, Error> {
        let state = self.0.lock().unwrap();
        state.vms.get(name).cloned().ok_or_else(|| Error::NoSuchVm(format!("no VM \"{name}\"; see ListVms")))
    }

    /// A job that ends before its call returns: the hard case for a client.
    async fn job(
        &self,
        emitter: &SignalEmitter<'_>,
        kind: &str,
        name: &str,
        to: &'static str,
    ) -> Result<OwnedObjectPath, Error> {
        let id = {
            let mut state = self.0.lock().unwrap();
            state.jobs += 1;
            let id = state.jobs;
            if let Some(vm) = state.vms.get_mut(name).filter(|_| name != "broken") {
                vm.state = to;
            }
            id
        };
        let path = OwnedObjectPath::try_from(job_path(id)).unwrap();
        let failed = name == "broken" && kind == "start";
        let (result, error, text) = match failed {
            true => ("failed", "org.flotilla.Flotilla1.Error.LaunchFailed", "no such kernel"),
            false => ("done", "", ""),
        };
        if name != "slow" {
            let body = (id, path.clone(), kind, name, result, error, text);
            emitter.emit(MANAGER_INTERFACE, "JobRemoved", &body).await?;
        }
        Ok(path)
    }
}

#[zbus::interface(name = "org.flotilla.Flotilla1.Manager")]
impl Manager {
    fn list_vms(&self) -> Vec<VmRow> {
        let state = self.0.lock().unwrap();
        let row = |(name, vm): (&String, &VmState)| {
            let path = OwnedObjectPath::try_from(vm_path(name)).unwrap();
            (
                name.clone(),
                "uuid".to_owned(),
                vm.state.to_owned(),
                vm.state.to_owned(),
                0,
                vm.generation,
                path,
            )
        };
        state.vms.iter().map(row).collect()
    }

    fn list_addresses(&self) -> Vec<(String, String, String)> {
        Vec::new()
    }

    fn get_stats(&self, names: Vec<String>) -> Result<(u64, Stats), Error> {
        for name in names {
            self.known(&name)?;
        }
        let state = self.0.lock().unwrap();
        let counts = || HashMap::from([("memory".to_owned(), 1 << 30), ("resident".to_owned(), 3 << 20)]);
        let running = state.vms.iter().filter(|(_, vm)| vm.state == "running");
        Ok((1, running.map(|(name, _)| (name.clone(), counts())).collect()))
    }

    fn get_vm(&self, name: &str) -> Result<OwnedObjectPath, Error> {
        self.known(name).map(|_| OwnedObjectPath::try_from(vm_path(name)).unwrap())
    }

    async fn define_vm(
        &self,
        name: &str,
        spec: &str,
        options: Details,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(OwnedObjectPath, u64), Error> {
        self.note(format!("define {name}"));
        if name.contains('!') {
            return Err(Error::InvalidSpec(format!("name \"{name}\": use a-z, 0-9, - and .")));
        }
        let replace = options.get("replace").is_some_and(|value| bool::try_from(value.clone()).unwrap());
        let generation = {
            let mut state = self.0.lock().unwrap();
            let old = state.vms.get(name).map_or(0, |vm| vm.generation);
            if old > 0 && !replace {
                return Err(Error::VmExists(format!("VM \"{name}\" exists")));
            }
            let vm = VmState { spec: spec.to_owned(), state: "defined", generation: old + 1 };
            state.vms.insert(name.to_owned(), vm);
            old + 1
        };
        let vm = Vm { name: name.to_owned(), state: self.0.clone() };
        connection.object_server().at(vm_path(name), vm).await?;
        Ok((OwnedObjectPath::try_from(vm_path(name)).unwrap(), generation))
    }

    async fn create_vm(
        &self,
        name: &str,
        spec: &str,
        image: &str,
        options: Details,
        #[zbus(connection)] connection: &Connection,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<(OwnedObjectPath, OwnedObjectPath), Error> {
        let mut options: Vec<String> =
            options.iter().map(|(key, value)| format!("{key}={}", **value)).collect();
        options.sort();
        self.note(format!("create {name} {image} {} {spec}", options.join(" ")));
        let (vm, _) = self.define_vm(name, spec, Details::new(), connection).await?;
        Ok((vm, self.job(&emitter, "create", name, "running").await?))
    }

    async fn undefine_vm(
        &self,
        name: &str,
        options: Details,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), Error> {
        let force = options.get("force").is_some_and(|value| bool::try_from(value.clone()).unwrap());
        if self.known(name)?.state == "running" && !force {
            return Err(Error::InvalidState(format!("VM \"{name}\" is running: stop it first")));
        }
        self.0.lock().unwrap().vms.remove(name);
        connection.object_server().remove::<Vm, _>(vm_path(name)).await?;
        Ok(())
    }

    async fn start_vm(
        &self,
        name: &str,
        mode: &str,
        _options: Details,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.note(format!("start {name} {mode}"));
        if self.known(name)?.state == "running" {
            return Err(Error::InvalidState("running already".to_owned()));
        }
        self.job(&emitter, "start", name, if mode == "paused" { "paused" } else { "running" }).await
    }

    async fn shutdown_vm(
        &self,
        name: &str,
        options: Details,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.known(name)?;
        let usec = u64::try_from(options["timeout_usec"].clone()).unwrap();
        self.note(format!("shutdown {name} {usec}"));
        self.job(&emitter, "shutdown", name, "stopped").await
    }

    async fn power_off_vm(
        &self,
        name: &str,
        _options: Details,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.known(name)?;
        self.note(format!("power-off {name}"));
        self.job(&emitter, "power-off", name, "stopped").await
    }

    async fn pause_vm(
        &self,
        name: &str,
        _options: Details,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.known(name)?;
        self.job(&emitter, "pause", name, "paused").await
    }

    async fn resume_vm(
        &self,
        name: &str,
        _options: Details,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, Error> {
        self.known(name)?;
        self.note(format!("resume {name}"));
        self.job(&emitter, "resume", name, "running").await
    }

    async fn drain(
        &self,
        options: Details,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<Vec<OwnedObjectPath>, Error> {
        self.note("drain".to_owned());
        let stop = options.get("stop").is_some_and(|value| bool::try_from(value.clone()).unwrap());
        match stop {
            true => Ok(vec![self.job(&emitter, "shutdown", "web", "stopped").await?]),
            false => Ok(Vec::new()),
        }
    }

    fn cancel_job(&self, id: u32) -> Result<(), Error> {
        self.note(format!("cancel {id}"));
        if id == 17 { Ok(()) } else { Err(Error::NoSuchJob(format!("job {id} has ended, or never was"))) }
    }

    fn undrain(&self) {
        self.note("undrain".to_owned());
    }

    fn list_jobs(&self) -> Vec<JobRow> {
        Vec::new()
    }
}

struct Vm {
    name: String,
    state: Shared,
}

impl Vm {
    fn now(&self) -> VmState {
        self.state.lock().unwrap().vms[&self.name].clone()
    }
}

/// A guest on a console: echoes lines, ends at "bye".
fn guest(stream: UnixStream, state: &Shared, name: &str) {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut out = stream.try_clone().unwrap();
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        if out.write_all(format!("guest says: {line}\n").as_bytes()).is_err() {
            return;
        }
        if line == "bye" {
            if let Some(vm) = state.lock().unwrap().vms.get_mut(name) {
                vm.state = "stopped";
            }
            return;
        }
    }
}

#[zbus::interface(name = "org.flotilla.Flotilla1.Vm")]
impl Vm {
    fn qmp_command(&self, command: &str, options: Details) -> String {
        if options.into_keys().any(|option| option == "mode") {
            self.state.lock().unwrap().calls.push(format!("read-only {}", self.name));
        }
        format!("{{\"return\":{command}}}")
    }

    /// A VMM that greets, and says back what it hears.
    fn open_qmp(&self, options: Details) -> OwnedFd {
        let mode = if options.into_keys().any(|option| option == "mode") { "read-only" } else { "full" };
        self.state.lock().unwrap().calls.push(format!("stream {mode} {}", self.name));
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            ours.write_all(b"{\"QMP\":{}}\r\n").unwrap();
            let mut heard = Vec::new();
            std::io::Read::read_to_end(&mut ours, &mut heard).unwrap();
            ours.write_all(&heard).unwrap();
        });
        std::os::fd::OwnedFd::from(theirs).into()
    }

    #[zbus(property)]
    fn last_log(&self) -> Vec<String> {
        Vec::new()
    }

    #[zbus(property, name = "NRestarts")]
    fn n_restarts(&self) -> u32 {
        0
    }

    #[zbus(property)]
    fn removed_devices(&self) -> Vec<String> {
        vec!["disk1".to_owned()]
    }

    #[zbus(property)]
    fn added_devices(&self) -> Vec<String> {
        Vec::new()
    }

    fn open_console(&self, _which: &str, _options: Details) -> (OwnedFd, String) {
        self.state.lock().unwrap().calls.push(format!("console {}", self.name));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (state, name) = (self.state.clone(), self.name.clone());
        std::thread::spawn(move || guest(ours, &state, &name));
        (std::os::fd::OwnedFd::from(theirs).into(), "socket".to_owned())
    }

    #[zbus(property)]
    fn name(&self) -> String {
        self.name.clone()
    }

    #[zbus(property)]
    fn uuid(&self) -> String {
        "uuid".to_owned()
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.now().state.to_owned()
    }

    #[zbus(property)]
    fn state_reason(&self) -> String {
        String::new()
    }

    #[zbus(property)]
    fn state_change_timestamp(&self) -> u64 {
        0
    }

    #[zbus(property)]
    fn intent(&self) -> String {
        "running".to_owned()
    }

    #[zbus(property)]
    fn generation(&self) -> u64 {
        self.now().generation
    }

    #[zbus(property)]
    fn applied_generation(&self) -> u64 {
        0
    }

    #[zbus(property, name = "MainPID")]
    fn main_pid(&self) -> u32 {
        0
    }

    #[zbus(property)]
    fn unit(&self) -> String {
        String::new()
    }

    #[zbus(property)]
    fn log_file(&self) -> String {
        String::new()
    }

    #[zbus(property)]
    fn exit_status(&self) -> (String, String) {
        (String::new(), String::new())
    }

    #[zbus(property)]
    fn spec(&self) -> String {
        self.now().spec
    }

    #[zbus(property)]
    fn command_line(&self) -> Vec<String> {
        Vec::new()
    }

    #[zbus(property)]
    fn network_interfaces(&self) -> Vec<(String, String, String, String)> {
        Vec::new()
    }

    #[zbus(property)]
    fn addresses(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    #[zbus(property)]
    fn qmp_socket(&self) -> String {
        String::new()
    }

    #[zbus(property)]
    fn qmp_responsive(&self) -> bool {
        false
    }
}
