//! The launcher against a fake PID 1 on a private bus.

use super::*;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, fdo, interface};

use crate::fleet::life::{Intent, State};
use crate::launch::test_bus::Bus;
use crate::store::Runtime;

const PATIENCE: Duration = Duration::from_secs(60);

/// A unit of the fake.
#[derive(Clone, Default)]
struct FakeUnit {
    active: &'static str,
    main_pid: u32,
    code: i32,
    status: i32,
    invocation: u8,
}

#[derive(Default)]
struct State1 {
    units: BTreeMap<String, FakeUnit>,
    calls: Vec<String>,
    jobs: u32,
    /// What the next start comes to.
    next: Next,
}

#[derive(Default, Clone, Copy, PartialEq)]
enum Next {
    #[default]
    Done,
    Failed,
    /// The process ends as soon as it was executed.
    EndsAtOnce,
    NoSuchUnit,
}

#[derive(Clone, Default)]
struct Pid1(Arc<Mutex<State1>>);

impl Pid1 {
    fn state(&self) -> std::sync::MutexGuard<'_, State1> {
        lock(&self.0)
    }

    /// Changes a unit and tells it as systemd does: first `Service`, then `Unit`.
    async fn change(&self, connection: &Connection, name: &str, change: impl FnOnce(&mut FakeUnit)) {
        let unit = {
            let mut state = self.state();
            let unit = state.units.entry(name.to_owned()).or_default();
            change(unit);
            unit.clone()
        };
        let emitter = SignalEmitter::new(connection, path_of(name)).unwrap();
        for (interface, names) in [
            (SERVICE, &["MainPID", "ExecMainCode", "ExecMainStatus"][..]),
            (UNIT, &["ActiveState", "InvocationID"][..]),
        ] {
            let changed: HashMap<&str, OwnedVariant> =
                names.iter().map(|name| (*name, value(&unit, name))).collect();
            let body = (interface, changed, Vec::<&str>::new());
            emitter.emit("org.freedesktop.DBus.Properties", "PropertiesChanged", &body).await.unwrap();
        }
    }
}

fn value(unit: &FakeUnit, name: &str) -> OwnedVariant {
    use zbus::Variant;
    let value = match name {
        "MainPID" => Variant::from(unit.main_pid),
        "ExecMainCode" => Variant::from(unit.code),
        "ExecMainStatus" => Variant::from(unit.status),
        "ActiveState" => Variant::from(unit.active),
        _ => Variant::from(vec![unit.invocation; 2]),
    };
    value.try_into().unwrap()
}

struct FakeManager(Pid1);

#[interface(name = "org.freedesktop.systemd1.Manager")]
impl FakeManager {
    async fn start_unit(
        &self,
        name: &str,
        _mode: &str,
        #[zbus(connection)] connection: &Connection,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> fdo::Result<OwnedObjectPath> {
        let (job, next, invocation) = {
            let mut state = self.0.state();
            state.calls.push(format!("start {name}"));
            state.jobs += 1;
            (state.jobs, state.next, state.units.get(name).map_or(1, |unit| unit.invocation + 1))
        };
        if next == Next::NoSuchUnit {
            return Err(fdo::Error::Failed(format!("Unit {name} not found.")));
        }
        let path = OwnedObjectPath::try_from(format!("/org/freedesktop/systemd1/job/{job}")).unwrap();
        let unit = FakeUnit { active: "active", main_pid: 4242, invocation, ..FakeUnit::default() };
        let result = match next {
            Next::Failed => "failed",
            _ => {
                self.0.change(connection, name, |u| *u = unit).await;
                "done"
            }
        };
        if next == Next::EndsAtOnce {
            let ended = |u: &mut FakeUnit| {
                (u.active, u.main_pid, u.code, u.status) = ("failed", 0, libc::CLD_EXITED, 1);
            };
            self.0.change(connection, name, ended).await;
        }
        // Another unit's job, and the signal before the reply: both happen.
        Self::job_removed(
            &emitter,
            9999,
            "/org/freedesktop/systemd1/job/9999".try_into().unwrap(),
            name,
            "canceled",
        )
        .await?;
        Self::job_removed(&emitter, job, path.clone(), name, result).await?;
        Ok(path)
    }

    async fn stop_unit(
        &self,
        name: &str,
        _mode: &str,
        #[zbus(connection)] connection: &Connection,
    ) -> fdo::Result<OwnedObjectPath> {
        self.0.state().calls.push(format!("stop {name}"));
        self.0.change(connection, name, |u| (u.active, u.main_pid) = ("failed", 0)).await;
        Ok("/org/freedesktop/systemd1/job/1".try_into().unwrap())
    }

    fn kill_unit(&self, name: &str, whom: &str, signal: i32) {
        let mut state = self.0.state();
        state.calls.push(format!("kill {name} {whom} {signal}"));
        if let Some(unit) = state.units.get_mut(name) {
            (unit.code, unit.status) = (libc::CLD_KILLED, signal);
        }
    }

    fn reset_failed_unit(&self, name: &str) {
        self.0.state().calls.push(format!("reset {name}"));
    }

    fn list_units_by_patterns(
        &self,
        _states: Vec<String>,
        patterns: Vec<String>,
    ) -> Vec<super::super::systemd1::UnitRow> {
        assert_eq!(patterns.into_iter().collect::<String>(), "flotilla-vm@*.service");
        let root = || OwnedObjectPath::try_from("/").unwrap();
        let text = String::new;
        let state = self.0.state();
        let row = |(name, unit): (&String, &FakeUnit)| {
            (name.clone(), text(), text(), unit.active.to_owned(), text(), text(), root(), 0, text(), root())
        };
        state.units.iter().map(row).collect()
    }

    fn set_unit_properties(&self, name: &str, runtime: bool, properties: Vec<(String, OwnedVariant)>) {
        let mut names: Vec<String> = properties.into_iter().map(|(name, _)| name).collect();
        names.sort();
        self.0.state().calls.push(format!("limit {name} {runtime} {}", names.join(" ")));
    }

    fn subscribe(&self) {}

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
        unit: &str,
        result: &str,
    ) -> zbus::Result<()>;
}

struct ServiceObject(Pid1, String);

#[interface(name = "org.freedesktop.systemd1.Service")]
impl ServiceObject {
    #[zbus(property, name = "MainPID")]
    fn main_pid(&self) -> u32 {
        self.0.state().units[&self.1].main_pid
    }
    #[zbus(property)]
    fn exec_main_code(&self) -> i32 {
        self.0.state().units[&self.1].code
    }
    #[zbus(property)]
    fn exec_main_status(&self) -> i32 {
        self.0.state().units[&self.1].status
    }
}

struct UnitObject(Pid1, String);

#[interface(name = "org.freedesktop.systemd1.Unit")]
impl UnitObject {
    #[zbus(property)]
    fn active_state(&self) -> String {
        self.0.state().units[&self.1].active.to_owned()
    }
    #[zbus(property, name = "InvocationID")]
    fn invocation_id(&self) -> Vec<u8> {
        vec![self.0.state().units[&self.1].invocation; 2]
    }
}

struct Setup {
    pid1: Pid1,
    server: Connection,
    launcher: SystemdLauncher,
    events: mpsc::UnboundedReceiver<Event>,
    dir: tempfile::TempDir,
    _bus: Bus,
}

async fn setup(units: &[&str]) -> Setup {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let pid1 = Pid1::default();
    let server = bus.connect().await;
    let objects = server.object_server();
    objects.at("/org/freedesktop/systemd1", FakeManager(pid1.clone())).await.unwrap();
    for unit in units {
        objects.at(path_of(unit), ServiceObject(pid1.clone(), (*unit).to_owned())).await.unwrap();
        objects.at(path_of(unit), UnitObject(pid1.clone(), (*unit).to_owned())).await.unwrap();
    }
    server.request_name("org.freedesktop.systemd1").await.unwrap();
    let (sender, events) = mpsc::unbounded_channel();
    let launcher =
        SystemdLauncher::connect(bus.connect().await, dir.path().join("flotilla-vm"), sender).await.unwrap();
    Setup { pid1, server, launcher, events, dir, _bus: bus }
}

const WEB: &str = "flotilla-vm@web.service";

fn process(invocation: &str) -> Process {
    Process { pid: 4242, start_time: 0, invocation: invocation.to_owned() }
}

async fn next(setup: &mut Setup) -> Notice {
    let event = timeout(PATIENCE, setup.events.recv()).await.expect("no event").unwrap();
    assert_eq!(event.name, "web");
    event.notice
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_is_started_watched_and_killed() {
    let mut s = setup(&[WEB]).await;
    assert_eq!(s.launcher.start("web", Prepared::default()).await.unwrap(), process("0101"));
    assert_eq!(next(&mut s).await, Notice::Started(process("0101")));
    // systemctl stop: first the word, then the end.
    s.pid1.change(&s.server, WEB, |u| u.active = "deactivating").await;
    assert_eq!(next(&mut s).await, Notice::Stopping);
    s.pid1.change(&s.server, WEB, |u| (u.main_pid, u.code, u.status) = (0, libc::CLD_EXITED, 0)).await;
    s.pid1.change(&s.server, WEB, |u| u.active = "inactive").await;
    let ended = |exit| Notice::Ended { invocation: "0101".into(), exit };
    assert_eq!(next(&mut s).await, ended(Exit::Code(0)));

    // A crash: ExecStop= still runs, which is no stop.
    assert_eq!(s.launcher.start("web", Prepared::default()).await.unwrap(), process("0202"));
    assert_eq!(next(&mut s).await, Notice::Started(process("0202")));
    let crash = |u: &mut FakeUnit| {
        (u.active, u.main_pid, u.code, u.status) = ("deactivating", 0, libc::CLD_DUMPED, libc::SIGSEGV);
    };
    s.pid1.change(&s.server, WEB, crash).await;
    s.pid1.change(&s.server, WEB, |u| u.active = "failed").await;
    let exit = Exit::Signal("SIGSEGV".into());
    assert_eq!(next(&mut s).await, Notice::Ended { invocation: "0202".into(), exit });

    assert_eq!(s.launcher.start("web", Prepared::default()).await.unwrap(), process("0303"));
    assert_eq!(next(&mut s).await, Notice::Started(process("0303")));
    s.launcher.kill("web", None).await.unwrap();
    let exit = Exit::Signal("SIGKILL".into());
    assert_eq!(next(&mut s).await, Notice::Ended { invocation: "0303".into(), exit });
    // What we killed does not stay behind as a failed unit.
    timeout(PATIENCE, async {
        while !s.pid1.state().calls.contains(&format!("reset {WEB}")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let directory = s.dir.path().join("flotilla-vm/web");
    std::fs::create_dir_all(&directory).unwrap();
    s.launcher.clean("web").await;
    assert!(!directory.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sockets_of_a_vm_are_the_daemons_and_handed_over() {
    let s = setup(&[WEB]).await;
    let directory = s.launcher.sockets("web");
    for _ in 0..2 {
        let handed = s.launcher.listeners("web").unwrap();
        let paths = [QMP_SOCKET, CONSOLE_SOCKET].map(|name| Handed::Path(directory.join(name)));
        assert!(handed.iter().map(|(name, _)| name).eq(&paths));
        let open = std::fs::metadata(&directory).unwrap().permissions().mode();
        assert_eq!(open & 0o777, 0o700);
        for (_, listener) in &handed {
            assert!(rustix::net::sockopt::socket_acceptconn(listener).unwrap());
        }
        std::os::unix::net::UnixStream::connect(directory.join(QMP_SOCKET)).unwrap();
    }
    std::fs::remove_file(directory.join(QMP_SOCKET)).unwrap();
    std::fs::create_dir(directory.join(QMP_SOCKET)).unwrap();
    let refused = s.launcher.listeners("web").unwrap_err().to_string();
    assert!(refused.contains(&directory.display().to_string()), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_set_on_the_unit_until_the_next_boot() {
    let s = setup(&[WEB]).await;
    s.launcher.limit("web", &Limits::default()).await.unwrap();
    assert!(s.pid1.state().calls.is_empty(), "nothing to set, nothing to take back");
    let limits = Limits { cpu_quota: Some(50), ..Limits::default() };
    s.launcher.limit("web", &limits).await.unwrap();
    let names =
        "AllowedCPUs AllowedMemoryNodes CPUQuotaPerSecUSec CPUWeight IOWeight MemoryHigh MemoryMax TasksMax";
    assert_eq!(s.pid1.state().calls, [format!("limit {WEB} true {names}")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_says_why_and_leaves_no_unit() {
    let s = setup(&[WEB]).await;
    for (next, word) in
        [(Next::Failed, "journalctl -u"), (Next::EndsAtOnce, "exit code 1"), (Next::NoSuchUnit, "not found")]
    {
        s.pid1.state().next = next;
        s.pid1.state().calls.clear();
        let error = s.launcher.start("web", Prepared::default()).await.unwrap_err().to_string();
        assert!(error.contains(WEB) && error.contains(word), "{error}");
        assert!(s.pid1.state().calls.contains(&format!("stop {WEB}")));
        assert!(lock(&s.launcher.shared.prepared).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn units_are_found_again() {
    let unit = unit_of;
    let names = ["alive", "crashed", "ending", "foreign"].map(unit);
    let s = setup(&names.each_ref().map(String::as_str)).await;
    for (name, active, main_pid, code, status) in [
        ("alive", "active", 4242, 0, 0),
        ("foreign", "active", 1, 0, 0),
        ("crashed", "failed", 0, libc::CLD_KILLED, libc::SIGKILL),
        ("ending", "deactivating", 0, libc::CLD_EXITED, 0),
    ] {
        let fake = FakeUnit { active, main_pid, code, status, invocation: 1 };
        s.pid1.state().units.insert(unit_of(name), fake);
    }
    let wanted = |name: &str, state: Option<State>| Wanted {
        name: name.to_owned(),
        uuid: Uuid::nil(),
        record: state.map(|state| Runtime::new(name, "", state, Intent::Running)),
    };
    let found = s
        .launcher
        .find(&[
            wanted("alive", None),
            wanted("crashed", Some(State::Running)),
            wanted("ending", Some(State::Stopping)),
            wanted("forgotten", Some(State::Running)),
            wanted("idle", Some(State::Stopped)),
            wanted("new", None),
        ])
        .await
        .unwrap();
    let expected = [
        ("alive", Found::Alive(process("0101"))),
        ("crashed", Found::Ended(Exit::Signal("SIGKILL".into()))),
        ("ending", Found::Ended(Exit::Code(0))),
        ("forgotten", Found::Ended(Exit::Unknown)),
    ];
    assert_eq!(found, expected.map(|(name, found)| (name.to_owned(), found)).into());
}
