//! The whole daemon but its processes, on a private bus, driven by the client proxies of the API: what `flotilla` and busctl see.
//!
//! The launcher is a fake that keeps VMMs as tasks, so that tests decide when one is silent, crashes or powers off; it outlives a fleet, as
//! units outlive the daemon.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dbus_api::proxy::{ManagerProxy, VmProxy};
use futures_util::StreamExt;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use zbus::{MatchRule, MessageStream, OwnedVariant, Variant};

use super::fake_launcher::{Act, FakeLauncher};
use super::*;
use crate::fleet::Context;
use crate::fleet::gate::{Admission, Gate};
use crate::fleet::network::Network;
use crate::launch::dhcp::ProcessDhcp;
use crate::launch::test_bus::Bus;
use crate::launch::{Event, Notice};
use crate::shelf::Shelf;
use crate::store::Store;

#[path = "bus_tests/folder.rs"]
mod folder;
#[path = "bus_tests/interfaces.rs"]
mod interfaces;
#[path = "bus_tests/limits.rs"]
mod limits;

/// Long enough for a loaded machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon on a bus.
struct Daemon {
    fleet: Arc<Fleet>,
    connection: Connection,
    manager: ManagerProxy<'static>,
    client: Connection,
}

impl Daemon {
    async fn start(bus: &Bus, dir: &Path, launcher: &FakeLauncher) -> Self {
        let (events, event_inbox) = mpsc::unbounded_channel();
        *launcher.events.lock().unwrap() = Some(events);
        let store = Arc::new(Store::open(&dir.join("lib"), &dir.join("run")).unwrap());
        let proxies = dir.join("run/qmp");
        std::fs::create_dir_all(&proxies).unwrap();
        let (news, news_inbox) = mpsc::unbounded_channel();
        let network = Network::new(
            Vec::new(),
            Arc::new(ProcessDhcp::new(dir.join("run/dhcp"))),
            Arc::clone(&store),
            &dir.join("run"),
        );
        let launcher = Arc::new(launcher.clone());
        let fleet = Fleet::new(Context::new(
            launcher,
            store,
            network,
            news,
            "/usr/bin/flotilla-vmm".into(),
            proxies,
            Shelf::none(),
            Gate::new(Admission::default(), dir.join("lib/drained")),
        ));
        fleet.adopt().await.unwrap();
        tokio::spawn(Arc::clone(&fleet).route(event_inbox));
        let connection = bus.connect().await;
        let access = Access::SameUser(connection.clone());
        serve(&connection, Templates::open(Arc::clone(&fleet), None), access, news_inbox).await.unwrap();
        fleet.classify().await;
        fleet.be_ready();
        let client = bus.connect().await;
        let manager = ManagerProxy::builder(&client)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .unwrap();
        Self { fleet, connection, manager, client }
    }

    async fn vm(&self, name: &str) -> VmProxy<'static> {
        VmProxy::builder(&self.client)
            .path(dbus_api::vm_path(name))
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .unwrap()
    }

    /// Runs a verb as a client should: listen, ask, wait for the end of that job.
    async fn job(
        &self,
        ask: impl AsyncFnOnce(&ManagerProxy<'static>) -> Result<OwnedObjectPath, Error>,
    ) -> (String, String, String) {
        let mut ended = self.manager.receive_job_removed().await.unwrap();
        let job = ask(&self.manager).await.unwrap();
        timeout(PATIENCE, async {
            loop {
                let signal = ended.next().await.unwrap();
                let args = signal.args().unwrap();
                if args.path == job {
                    return (args.result.clone(), args.error_name.clone(), args.error_message.clone());
                }
            }
        })
        .await
        .expect("the job does not end")
    }

    async fn wait_state(&self, name: &str, state: &str) {
        let vm = self.vm(name).await;
        let waited = timeout(PATIENCE, async {
            // Each look is answered from memory; between two of them an event arrives or time passes.
            while vm.state().await.unwrap() != state {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        let now = waited.await;
        assert!(now.is_ok(), "{name} is {}, not {state}", vm.state().await.unwrap());
    }
}

fn none() -> HashMap<&'static str, Variant<'static>> {
    HashMap::new()
}

fn option(name: &'static str, value: impl Into<Variant<'static>>) -> HashMap<&'static str, Variant<'static>> {
    HashMap::from([(name, value.into())])
}

fn done() -> (String, String, String) {
    ("done".into(), String::new(), String::new())
}

fn kernel(dir: &Path) -> String {
    let path = dir.join("kernel");
    std::fs::write(&path, "kernel").unwrap();
    json!({ "kernel": path }).to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_life_over_the_api() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let daemon = Daemon::start(&bus, dir.path(), &launcher).await;
    let manager = &daemon.manager;
    assert_eq!(manager.state().await.unwrap(), "running");
    let mut new = manager.receive_vm_new().await.unwrap();
    let (path, generation) = manager.define_vm("web", &kernel(dir.path()), none()).await.unwrap();
    assert_eq!((path.as_str(), generation), (dbus_api::vm_path("web").as_str(), 1));
    assert_eq!(new.next().await.unwrap().args().unwrap().name, "web");
    let vm = daemon.vm("web").await;
    assert_eq!(vm.state().await.unwrap(), "defined");

    let mut changes = manager.receive_vm_state_changed().await.unwrap();
    let of_jobs = MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .member("PropertiesChanged")
        .path_namespace("/org/flotilla/Flotilla1/job")
        .build()
        .unwrap();
    let mut of_jobs = MessageStream::for_match_rule(of_jobs, &daemon.client, None).await.unwrap();
    assert_eq!(daemon.job(async |m| m.start_vm("web", "paused", none()).await).await, done());
    assert_eq!((vm.state().await.unwrap(), vm.intent().await.unwrap()), ("paused".into(), "paused".into()));
    // The job told each step.
    let told = timeout(PATIENCE, async {
        loop {
            let message = of_jobs.next().await.unwrap().unwrap();
            let (interface, changed, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
                message.body().deserialize().unwrap();
            assert_eq!(interface, "org.flotilla.Flotilla1.Job");
            if String::try_from(changed["Phase"].clone()).unwrap() == "paused" {
                return;
            }
        }
    });
    told.await.expect("no change of phase is told");
    let mut seen = Vec::new();
    for _ in 0..2 {
        let change = changes.next().await.unwrap();
        let args = change.args().unwrap();
        seen.push((args.seq, args.old.clone(), args.new.clone()));
    }
    assert_eq!((seen[0].1.as_str(), seen[1].2.as_str()), ("defined", "paused"));
    assert!(seen[0].0 < seen[1].0 && seen[1].0 <= manager.event_seq().await.unwrap());
    assert_eq!(vm.main_pid().await.unwrap(), 100_001);
    assert_eq!(vm.unit().await.unwrap(), "flotilla-vm@web.service");
    assert_eq!(vm.applied_generation().await.unwrap(), 1);
    assert!(vm.command_line().await.unwrap().join(" ").contains("-name web -uuid "));

    assert_eq!(daemon.job(async |m| m.resume_vm("web", none()).await).await, done());
    assert_eq!(daemon.job(async |m| m.pause_vm("web", none()).await).await, done());
    assert!(matches!(manager.pause_vm("web", none()).await, Err(Error::InvalidState(_))));
    assert!(matches!(manager.undefine_vm("web", none()).await, Err(Error::InvalidState(_))));
    assert_eq!(daemon.job(async |m| m.resume_vm("web", none()).await).await, done());
    let rows = manager.list_vms().await.unwrap();
    assert_eq!((rows.len(), rows[0].0.as_str(), rows[0].2.as_str()), (1, "web", "running"));
    assert_eq!(manager.get_vm_by_uuid(&rows[0].1).await.unwrap(), path);
    assert_eq!(manager.n_running().await.unwrap(), 1);

    // Others on the VM's QMP: a call, and a stream of their own.
    let status = vm.qmp_command(r#"{"execute":"query-status"}"#, none()).await.unwrap();
    assert!(status.contains("\"running\":true"), "{status}");
    let answer = vm.qmp_command(r#"{"execute":"query-status","id":[7]}"#, none()).await.unwrap();
    assert!(answer.starts_with("{\"return\":") && answer.ends_with(",\"id\":[7]}"), "{answer}");
    assert!(vm.qmp_command("\"query-status\"", none()).await.is_ok());
    assert!(matches!(vm.qmp_command("{", none()).await, Err(Error::QmpError(_))));
    assert!(matches!(vm.qmp_command(r#"{"execute":"fly"}"#, none()).await, Err(Error::QmpError(_))));
    let stream = StdStream::from(OwnedFd::from(vm.open_qmp(none()).await.unwrap()));
    stream.set_nonblocking(true).unwrap();
    let mut greeting = [0; 6];
    UnixStream::from_std(stream).unwrap().read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"{\"QMP\"");

    // Without a power button: not unless forced.
    let (result, name, text) = daemon.job(async |m| m.shutdown_vm("web", option("force", false)).await).await;
    assert_eq!((result.as_str(), name.as_str()), ("failed", "org.flotilla.Flotilla1.Error.NotSupported"));
    assert!(text.contains("power button"), "{text}");
    assert_eq!(vm.state().await.unwrap(), "running");
    assert_eq!(daemon.job(async |m| m.shutdown_vm("web", none()).await).await, done());
    assert_eq!((vm.state().await.unwrap(), vm.intent().await.unwrap()), ("stopped".into(), "stopped".into()));
    assert_eq!(vm.exit_status().await.unwrap(), ("exited".into(), "0".into()));
    assert_eq!((vm.main_pid().await.unwrap(), vm.command_line().await.unwrap().len()), (0, 0));

    let mut removed = manager.receive_vm_removed().await.unwrap();
    manager.undefine_vm("web", none()).await.unwrap();
    assert_eq!(removed.next().await.unwrap().args().unwrap().name, "web");
    assert!(vm.state().await.is_err());
    assert_eq!(manager.list_vms().await.unwrap().len(), 0);
    assert!(!dir.path().join("run/qmp/web.sock").exists() && !dir.path().join("vm/web").exists());
    assert_eq!(std::fs::read_dir(dir.path().join("lib/vms")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_have_names() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let daemon = Daemon::start(&bus, dir.path(), &launcher).await;
    let manager = &daemon.manager;
    let spec = kernel(dir.path());
    assert!(matches!(manager.get_vm("web").await, Err(Error::NoSuchVm(_))));
    assert!(matches!(manager.start_vm("web", "run", none()).await, Err(Error::NoSuchVm(_))));
    for (name, text) in
        [("web", "{"), ("web", r#"{"kernel":"k"}"#), ("web", r#"{"kernel":"/k","x":1}"#), ("../web", &spec)]
    {
        assert!(
            matches!(manager.define_vm(name, text, none()).await, Err(Error::InvalidSpec(_))),
            "{name} {text}"
        );
    }
    manager.define_vm("web", &spec, none()).await.unwrap();
    assert!(matches!(manager.define_vm("web", &spec, none()).await, Err(Error::VmExists(_))));
    let mismatch = manager.define_vm("web", &spec, option("if_generation", 7u64)).await;
    assert!(matches!(mismatch, Err(Error::GenerationMismatch(_))));
    let uuid = daemon.vm("web").await.uuid().await.unwrap();
    let twin = json!({"kernel": "/k", "uuid": uuid}).to_string();
    assert!(matches!(manager.define_vm("db", &twin, none()).await, Err(Error::VmExists(_))));
    for wrong in [
        manager.start_vm("web", "fast", none()).await,
        manager.start_vm("web", "run", option("x", 1u32)).await,
        manager.shutdown_vm("web", option("force", "yes")).await,
    ] {
        let error = wrong.unwrap_err().to_string();
        assert!(error.contains("org.freedesktop.DBus.Error.InvalidArgs"), "{error}");
    }
    assert!(matches!(manager.pause_vm("web", none()).await, Err(Error::InvalidState(_))));
    assert!(matches!(daemon.vm("web").await.open_console("", none()).await, Err(Error::InvalidState(_))));

    // A start that fails says why, and the next one works.
    std::fs::remove_file(dir.path().join("kernel")).unwrap();
    let (result, name, text) = daemon.job(async |m| m.start_vm("web", "run", none()).await).await;
    assert_eq!((result.as_str(), name.as_str()), ("failed", "org.flotilla.Flotilla1.Error.InvalidSpec"));
    assert!(text.contains("kernel") && text.contains("no such file"), "{text}");
    assert_eq!(daemon.vm("web").await.state().await.unwrap(), "failed");
    kernel(dir.path());
    launcher.vmms.lock().unwrap().refuse = Some("no such unit");
    let (_, name, text) = daemon.job(async |m| m.start_vm("web", "run", none()).await).await;
    assert_eq!(name, "org.flotilla.Flotilla1.Error.LaunchFailed");
    assert!(text.contains("no such unit"), "{text}");
    launcher.vmms.lock().unwrap().refuse = None;
    assert_eq!(daemon.job(async |m| m.start_vm("web", "run", none()).await).await, done());
    // A change while it runs holds from the next start on.
    let changed = spec.replace('}', r#","cpus":2}"#);
    let (_, generation) = manager.define_vm("web", &changed, option("replace", true)).await.unwrap();
    let vm = daemon.vm("web").await;
    assert_eq!((generation, vm.applied_generation().await.unwrap()), (2, 1));
    manager.undefine_vm("web", option("force", true)).await.unwrap();
    assert!(launcher.vmms.lock().unwrap().alive.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_are_seen_as_what_they_are() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let daemon = Daemon::start(&bus, dir.path(), &launcher).await;
    daemon.manager.define_vm("web", &kernel(dir.path()), none()).await.unwrap();
    let vm = daemon.vm("web").await;
    for (act, state, intent) in [(Act::PowerOff, "stopped", "stopped"), (Act::Crash, "failed", "running")] {
        assert_eq!(daemon.job(async |m| m.start_vm("web", "run", none()).await).await, done());
        launcher.act("web", act);
        daemon.wait_state("web", state).await;
        assert_eq!(vm.intent().await.unwrap(), intent);
    }
    assert_eq!(vm.exit_status().await.unwrap(), ("signal".into(), "SIGSEGV".into()));
    // A start seen outside the API, and a stop of its unit.
    let process = launcher.spawn("web", false);
    let events = launcher.events.lock().unwrap().clone().unwrap();
    let tell = |notice| events.send(Event { name: "web".into(), notice }).unwrap();
    tell(Notice::Started(process));
    daemon.wait_state("web", "running").await;
    tell(Notice::Stopping);
    daemon.wait_state("web", "stopping").await;
    launcher.act("web", Act::Crash);
    daemon.wait_state("web", "stopped").await;
    assert_eq!(launcher.vmms.lock().unwrap().started, 3, "nothing was started by itself");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_vm_hinders_nobody_and_can_be_ended() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let daemon = Daemon::start(&bus, dir.path(), &launcher).await;
    for name in ["ice", "web"] {
        daemon.manager.define_vm(name, &kernel(dir.path()), none()).await.unwrap();
        assert_eq!(daemon.job(async |m| m.start_vm(name, "run", none()).await).await, done());
    }
    launcher.act("ice", Act::Freeze);
    let pause = daemon.manager.pause_vm("ice", none()).await.unwrap();
    assert!(matches!(daemon.manager.resume_vm("ice", none()).await, Err(Error::Busy(_))));
    assert_eq!(daemon.job(async |m| m.pause_vm("web", none()).await).await, done());
    assert_eq!(daemon.manager.list_vms().await.unwrap().len(), 2);
    let jobs = daemon.manager.list_jobs().await.unwrap();
    assert!(jobs.iter().any(|job| job.7 == pause && job.1 == "pause" && job.2 == "ice"));
    assert_eq!(daemon.job(async |m| m.power_off_vm("ice", none()).await).await, done());
    assert_eq!(daemon.vm("ice").await.state().await.unwrap(), "stopped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_daemon_finds_everything_again() {
    let (bus, dir) = (Bus::new(), tempfile::tempdir().unwrap());
    let launcher = FakeLauncher::new(dir.path().join("vm"));
    let bus = Arc::new(bus);
    // A daemon in a runtime of its own, which ends as abruptly as a process does.
    let life = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (its_bus, its_dir, its_launcher) = (Arc::clone(&bus), dir.path().to_owned(), launcher.clone());
    let lived = std::thread::spawn(move || {
        life.block_on(async move {
            let first = Daemon::start(&its_bus, &its_dir, &its_launcher).await;
            for name in ["crashed", "frozen", "idle", "paused", "running"] {
                first.manager.define_vm(name, &kernel(&its_dir), none()).await.unwrap();
                if name != "idle" {
                    assert_eq!(first.job(async |m| m.start_vm(name, "run", none()).await).await, done());
                }
            }
            assert_eq!(first.job(async |m| m.pause_vm("paused", none()).await).await, done());
            // In one process the objects keep their connection; a process that ends closes it.
            first.connection.clone().close().await.unwrap();
        });
        life.shutdown_background();
    });
    tokio::task::spawn_blocking(|| lived.join().unwrap()).await.unwrap();
    *launcher.events.lock().unwrap() = None;
    launcher.act("frozen", Act::Freeze);
    launcher.act("crashed", Act::Crash);
    while launcher.vmms.lock().unwrap().alive.contains_key("crashed") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    std::fs::write(dir.path().join("lib/vms/broken.json"), "{").unwrap();
    // A copy of what it left on disk: its locks go with its process, which is ours.
    let copy = dir.path().join("second");
    for part in ["lib/vms", "run/vms"] {
        std::fs::create_dir_all(copy.join(part)).unwrap();
        for file in std::fs::read_dir(dir.path().join(part)).unwrap().flatten() {
            std::fs::copy(file.path(), copy.join(part).join(file.file_name())).unwrap();
        }
    }
    let second = Daemon::start(&bus, &copy, &launcher).await;
    let states: BTreeMap<String, String> =
        second.manager.list_vms().await.unwrap().into_iter().map(|row| (row.0, row.2)).collect();
    let expected = [
        ("crashed", "failed"),
        ("frozen", "quarantined"),
        ("idle", "defined"),
        ("paused", "paused"),
        ("running", "running"),
    ];
    assert_eq!(states, expected.map(|(name, state)| (name.to_owned(), state.to_owned())).into());
    assert_eq!(second.manager.state().await.unwrap(), "degraded");
    let corrupt = second.manager.corrupt_records().await.unwrap();
    assert!(corrupt.len() == 1 && corrupt[0].0.ends_with("corrupt/broken.json"), "{corrupt:?}");
    assert_eq!(launcher.vmms.lock().unwrap().started, 4, "nothing was started anew");
    assert_eq!(second.job(async |m| m.resume_vm("paused", none()).await).await, done());
    // What thaws is taken back.
    // A command for a VM that has a process waits for its answer; for one that has none it does not.
    let (frozen, idle) = (second.vm("frozen").await, second.vm("idle").await);
    let (answer, ()) = tokio::join!(frozen.qmp_command("\"query-status\"", none()), async {
        launcher.act("frozen", Act::Thaw);
    });
    assert!(answer.as_ref().is_ok_and(|answer| answer.contains("\"running\":true")), "{answer:?}");
    assert!(matches!(idle.qmp_command("\"query-status\"", none()).await, Err(Error::InvalidState(_))));
    second.wait_state("frozen", "running").await;
    assert_eq!(second.fleet.list().len(), 5);
}
