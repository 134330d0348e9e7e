//! The launcher against a fake PID 1 on a private bus.

use super::*;

use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedObjectPath, fdo, interface};

use crate::fleet::life::{Intent, State};
use crate::launch::pool::Given;
use crate::launch::test_bus::Bus;
use crate::launch::{Event, Notice};
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
        let objects = connection.object_server();
        let _ = objects.at(path_of(name), ServiceObject(self.0.clone(), name.to_owned())).await;
        let _ = objects.at(path_of(name), UnitObject(self.0.clone(), name.to_owned())).await;
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
        states: Vec<String>,
        patterns: Vec<String>,
    ) -> Vec<super::super::systemd1::UnitRow> {
        assert_eq!(patterns.into_iter().collect::<String>(), "flotilla-vm@*.service");
        let root = || OwnedObjectPath::try_from("/").unwrap();
        let text = String::new;
        let state = self.0.state();
        let row = |(name, unit): (&String, &FakeUnit)| {
            (name.clone(), text(), text(), unit.active.to_owned(), text(), text(), root(), 0, text(), root())
        };
        let states: std::collections::BTreeSet<String> = states.into_iter().collect();
        let listed = |unit: &FakeUnit| states.is_empty() || states.contains(unit.active);
        state.units.iter().filter(|(_, unit)| listed(unit)).map(row).collect()
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
    launcher: Arc<SystemdLauncher>,
    events: mpsc::UnboundedReceiver<Event>,
    dir: tempfile::TempDir,
    _bus: Bus,
}

async fn setup(units: &[&str]) -> Setup {
    setup_with(units, 0).await
}

async fn setup_with(units: &[&str], spares: usize) -> Setup {
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
    let (connection, directory) = (bus.connect().await, dir.path().join("flotilla-vm"));
    let launcher = SystemdLauncher::connect(connection, directory, sender, spares).await.unwrap();
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
    let defined = [
        wanted("alive", None),
        wanted("crashed", Some(State::Running)),
        wanted("ending", Some(State::Stopping)),
        wanted("forgotten", Some(State::Running)),
        wanted("idle", Some(State::Stopped)),
        wanted("new", None),
    ];
    let found = s.launcher.find(&defined).await.unwrap();
    let expected = [
        ("alive", Found::Alive(process("0101"))),
        ("crashed", Found::Ended(Exit::Signal("SIGKILL".into()))),
        ("ending", Found::Ended(Exit::Code(0))),
        ("forgotten", Found::Ended(Exit::Unknown)),
    ];
    assert_eq!(found, expected.map(|(name, found)| (name.to_owned(), found)).into());
    let orphans = s.launcher.orphans(&defined).await.unwrap();
    let rows: Vec<_> = orphans.iter().map(|o| (o.name.as_str(), o.unit.as_str(), o.pid, o.alive())).collect();
    assert_eq!(rows, [("foreign", &*unit("foreign"), 1, true)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cleaning_a_unit_is_no_end_of_a_process() {
    let mut s = setup(&[WEB]).await;
    for invocation in ["0101", "0202", "0303"] {
        s.launcher.start("web", Prepared::default()).await.unwrap();
        assert_eq!(next(&mut s).await, Notice::Started(process(invocation)));
        s.pid1.change(&s.server, WEB, |u| (u.main_pid, u.active) = (0, "inactive")).await;
        let ended = Notice::Ended { invocation: invocation.into(), exit: Exit::Unknown };
        assert_eq!(next(&mut s).await, ended);
        // `systemctl clean`. The next thing that is heard is the next start.
        for active in ["maintenance", "inactive"] {
            s.pid1.change(&s.server, WEB, |unit| unit.active = active).await;
        }
    }
}

// --- the pool ---------------------------------------------------------------------------------------------------------------------

/// The fleet, for what is handed over without the pool.
struct NoFleet;

impl Source for NoFleet {
    fn hand_over<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Prepared, String>> {
        async move { Ok(prepared(name)) }.boxed()
    }

    fn end<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), String>> {
        async move { Err(format!("the fleet ends {name}")) }.boxed()
    }
}

fn prepared(word: &str) -> Prepared {
    Prepared { command_line: vec![word.to_owned()], ..Prepared::default() }
}

impl Setup {
    /// Waits until something is so.
    async fn settle(&self, so: impl Fn(&Self) -> bool) {
        let reached = async {
            while !so(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(PATIENCE, reached).await.is_err() {
            panic!("it does not come to that: {:?}", self.pid1.state().calls);
        }
    }

    /// Spares that PID 1 was asked to start, without what their names have in common.
    fn started(&self) -> Vec<String> {
        let state = self.pid1.state();
        let calls = state.calls.iter().filter_map(|call| call.strip_prefix("start flotilla-vm@Spare-"));
        calls.map(|call| format!("Spare-{}", call.trim_end_matches(".service"))).collect()
    }

    fn count(&self, call: &str) -> usize {
        self.pid1.state().calls.iter().filter(|other| *other == call).count()
    }
}

/// The process of a spare: asks, and notes what it became.
fn spare(
    source: &Arc<dyn Source>,
    instance: &str,
) -> tokio::task::JoinHandle<Result<Option<String>, String>> {
    let (source, instance) = (Arc::clone(source), instance.to_owned());
    tokio::spawn(async move {
        let given = source.wait(&instance, 4242).await?;
        Ok(given.map(|Given { prepared, sent }| {
            let _ = sent.send(Ok(()));
            prepared.command_line.concat()
        }))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_becomes_a_vm_and_another_one_takes_its_place() {
    let mut s = setup_with(&[], 2).await;
    assert_eq!(s.launcher.take("web"), None, "nothing waits yet");
    let source = s.launcher.source(Arc::new(NoFleet));
    s.settle(|s| s.started().len() == 2).await;
    let first = s.started()[0].clone();
    let mut becomes: BTreeMap<String, _> =
        s.started().iter().map(|instance| (instance.clone(), spare(&source, instance))).collect();
    s.settle(|s| s.launcher.pool().waiting() == 2).await;
    // Stopped by hand while it waits: nobody's VM is asked to end.
    source.end(&first).await.unwrap();

    let instance = s.launcher.take("web").unwrap();
    assert_eq!(s.launcher.unit(&instance), format!("flotilla-vm@{instance}.service"));
    assert!(s.launcher.sockets(&instance).ends_with(format!("flotilla-vm/{instance}")));
    assert_eq!(s.launcher.start(&instance, prepared("vmm")).await.unwrap(), process("0101"));
    let became = becomes.remove(&instance).unwrap().await.unwrap();
    assert_eq!(became, Ok(Some("vmm".to_owned())));
    assert_eq!(source.end(&instance).await, Err("the fleet ends web".to_owned()));
    s.settle(|s| s.started().len() == 3).await;

    // Its end is that of the VM; what it leaves goes, once.
    let unit = unit_of(&instance);
    s.pid1.change(&s.server, &unit, |u| (u.active, u.main_pid) = ("deactivating", 4242)).await;
    assert_eq!(next(&mut s).await, Notice::Stopping);
    let crash = |u: &mut FakeUnit| {
        (u.active, u.main_pid, u.code, u.status) = ("failed", 0, libc::CLD_KILLED, libc::SIGKILL);
    };
    s.pid1.change(&s.server, &unit, crash).await;
    let exit = Exit::Signal("SIGKILL".into());
    assert_eq!(next(&mut s).await, Notice::Ended { invocation: "0101".into(), exit });
    let clean = format!("reset {unit}");
    s.settle(|s| s.count(&clean) == 1).await;
    for active in ["maintenance", "inactive"] {
        s.pid1.change(&s.server, &unit, |unit| unit.active = active).await;
    }
    // All signals of that have been read when a later one has: a unit that is cleaned has not ended again.
    s.launcher.start("web", Prepared::default()).await.unwrap();
    assert!(matches!(next(&mut s).await, Notice::Started(_)));
    assert_eq!(s.count(&clean), 1);
    assert_eq!(s.launcher.pool().owner(&instance), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spares_wait_until_no_vm_waits_for_its_start() {
    let s = setup_with(&[], 3).await;
    let start = Waits::new(&s.launcher.starts);
    let source = s.launcher.source(Arc::new(NoFleet));
    s.launcher.start("web", Prepared::default()).await.unwrap();
    assert_eq!(s.started(), [""; 0]);
    drop(start);
    for count in 1..=3 {
        s.settle(|s| s.started().len() == count).await;
        drop(spare(&source, &s.started()[count - 1]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spare_that_cannot_be_started_leaves_nothing() {
    let s = setup_with(&[], 1).await;
    s.pid1.state().next = Next::Failed;
    s.launcher.source(Arc::new(NoFleet));
    s.settle(|s| s.started().len() == 1).await;
    let unit = unit_of(&s.started()[0]);
    // Twice when its end was heard, too: that is no harm.
    let (stop, clean) = (format!("stop {unit}"), format!("reset {unit}"));
    s.settle(|s| s.count(&stop) == 1 && s.count(&clean) >= 1).await;
    assert_eq!(s.launcher.take("web"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_is_not_given_to_a_process_that_has_gone() {
    let s = setup_with(&[], 1).await;
    let source = s.launcher.source(Arc::new(NoFleet));
    s.settle(|s| s.started().len() == 1).await;
    let instance = s.started()[0].clone();
    let becomes = spare(&source, &instance);
    s.settle(|s| s.launcher.pool().waiting() == 1).await;
    assert_eq!(s.launcher.take("web").as_deref(), Some(instance.as_str()));
    becomes.abort();
    assert!(becomes.await.is_err());
    let error = s.launcher.start(&instance, prepared("vmm")).await.unwrap_err();
    assert!(matches!(&error, LaunchError::SpareGone { unit } if *unit == unit_of(&instance)), "{error}");
    assert_eq!(
        (s.launcher.pool().owner(&instance), s.count(&format!("stop {}", unit_of(&instance)))),
        (None, 1)
    );
    // Another process of the unit, or of another one, gets nothing.
    let other = source.wait(&instance, 1).await.unwrap_err();
    assert!(other.contains("not the main process"), "{other}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_daemon_finds_spares_and_the_vms_that_took_some() {
    let names = ["Spare-a", "Spare-b", "Spare-c", "Spare-d", "Spare-e"];
    let units = names.map(unit_of);
    let mut s = setup_with(&units.each_ref().map(String::as_str), 1).await;
    for (name, active, main_pid) in [
        ("Spare-a", "active", 4242),
        ("Spare-b", "failed", 0),
        ("Spare-c", "active", 4242),
        ("Spare-d", "active", 4242),
        ("Spare-e", "failed", 0),
    ] {
        let fake = FakeUnit { active, main_pid, invocation: 1, ..FakeUnit::default() };
        s.pid1.state().units.insert(unit_of(name), fake);
    }
    let wanted = |name: &str, instance: &str| {
        let mut record = Runtime::new(name, "", State::Running, Intent::Running);
        record.instance = Some(instance.to_owned());
        Wanted { name: name.to_owned(), uuid: Uuid::nil(), record: Some(record) }
    };
    let found = s.launcher.find(&[wanted("web", "Spare-a"), wanted("db", "Spare-b")]).await.unwrap();
    let expected = [("db", Found::Ended(Exit::Unknown)), ("web", Found::Alive(process("0101")))];
    assert_eq!(found, expected.map(|(name, found)| (name.to_owned(), found)).into());
    // Those that ended are cleaned, whoever they were.
    s.settle(|s| ["Spare-b", "Spare-e"].iter().all(|name| s.count(&format!("reset {}", unit_of(name))) == 1))
        .await;
    let source = s.launcher.source(Arc::new(NoFleet));
    // One that was given away and not told yet is told by the fleet.
    assert_eq!(spare(&source, "Spare-a").await.unwrap(), Ok(Some("web".to_owned())));
    // Of two that wait one is needed.
    assert_eq!(spare(&source, "Spare-c").await.unwrap(), Ok(None));
    let becomes = spare(&source, "Spare-d");
    s.settle(|s| s.launcher.pool().waiting() == 1).await;
    assert_eq!(s.launcher.take("mail").as_deref(), Some("Spare-d"));
    s.launcher.start("Spare-d", prepared("mail")).await.unwrap();
    assert_eq!(becomes.await.unwrap(), Ok(Some("mail".to_owned())));
    s.pid1.change(&s.server, &unit_of("Spare-a"), |u| (u.active, u.main_pid) = ("inactive", 0)).await;
    let event = timeout(PATIENCE, s.events.recv()).await.unwrap().unwrap();
    assert_eq!(event.name, "web");
}
