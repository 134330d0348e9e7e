//! Whole conversations over a real socket, with a fake machine behind it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::chardev::{self, Traffic};
use crate::config::{ChardevKind, Drive, VmConfig};
use crate::config::{NetBackend, TapSource};
use crate::control::{BoxError, End, Vm};
use crate::event::EventLoop;
use crate::inherit::Inherited;
use crate::machine::{
    BlockDevice, CpuInfo, Departure, GuestEvent, Hotplug, HotplugError, NetDevice, Plugged, Refusal,
};
use crate::snapshot::Target;
use crate::virtio::mem;

mod human;
mod plug;

/// What the machine was asked for, in words; descriptors by what can be read from them.
type Asked = Arc<Mutex<Vec<String>>>;

struct FakeVm(Arc<AtomicUsize>, Asked);

impl Vm for FakeVm {
    fn peek(&self, address: u64) -> Option<u32> {
        (address < 1 << 28).then(|| address as u32 + 0xab)
    }
    fn pause(&mut self) -> Result<(), BoxError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        self.0.fetch_add(100, Ordering::SeqCst);
        Ok(())
    }
    fn cpus(&self) -> Vec<CpuInfo> {
        (0..2)
            .map(|index| CpuInfo {
                index,
                socket_id: 0,
                die_id: 0,
                core_id: index,
                thread_id: 0,
                host_tid: 8439,
            })
            .collect()
    }
    fn balloon(&self) -> Option<u64> {
        None
    }
    fn set_balloon(&mut self, _: u64) {}
    fn memory_device(&self, _: &str) -> Option<Arc<mem::Port>> {
        None
    }
    fn reset(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
    fn save(&mut self, target: &Target) -> Result<(), BoxError> {
        self.1.lock().unwrap().push(match target {
            Target::Directory(dir) => format!("save {}", dir.display()),
            Target::Files { state, memory } => {
                let twin = |file: &std::fs::File| said(file.try_clone().unwrap().into());
                format!("save {} {}", twin(state), twin(memory))
            }
        });
        Ok(())
    }
    fn press_power_button(&mut self) {}
    fn hotplug(&mut self, request: Hotplug) -> Result<Plugged, HotplugError> {
        let words = match request {
            Hotplug::AddDrive { files, .. } if !files.is_empty() => {
                let files = files.into_iter().map(|(path, fd)| format!("{}={}", path.display(), said(fd)));
                files.collect::<Vec<_>>().join(" ")
            }
            Hotplug::AddDrive { drive, node: None, .. } => format!("{drive:?}"),
            Hotplug::AddDrive { drive, node, .. } => format!("{} {:?} {node:?}", drive.id, drive.backing),
            Hotplug::AddNetdev { netdev, .. } if netdev.vhost_user_chardev().is_some() => {
                format!("{} {:?}", netdev.id, netdev.backend)
            }
            Hotplug::AddNetdev { netdev, fds, .. } => {
                let NetBackend::Tap { source, queues, vhost, path, .. } = &netdev.backend else { panic!() };
                let fds: Vec<String> = fds.into_iter().map(said).collect();
                let name = match source {
                    TapSource::Name(name) => name.clone(),
                    TapSource::Fds(_) => fds.join("+"),
                };
                let through = path.iter().map(|path| format!(" through {}", path.display()));
                format!("{} {name} {queues} {vhost}{}", netdev.id, through.collect::<String>())
            }
            Hotplug::Unplug(id) if id == "none" => return Err(Refusal::NoDevice(id).into()),
            other => format!("{other:?}"),
        };
        self.1.lock().unwrap().push(words);
        Ok(Plugged::Done)
    }
    fn device_left(&mut self, _: &Departure) -> Option<String> {
        None
    }
    fn block_devices(&self) -> Vec<BlockDevice> {
        Vec::new()
    }
    fn net_devices(&self) -> Vec<NetDevice> {
        Vec::new()
    }
    fn devices(&self) -> Vec<(String, &'static str)> {
        vec![("rootfs".into(), "virtio-blk-device")]
    }
    fn iothreads(&self) -> Vec<(String, i32)> {
        vec![("iothread1".into(), 77)]
    }
    fn shut_down(self: Box<Self>) -> Result<(), BoxError> {
        Ok(())
    }
}

fn said(fd: OwnedFd) -> String {
    let mut text = String::new();
    UnixStream::from(fd).read_to_string(&mut text).unwrap();
    text
}

/// A VMM without a machine: everything from the socket down to the seam.
struct World {
    event_loop: EventLoop,
    qmp: Arc<Qmp>,
    calls: Arc<AtomicUsize>,
    asked: Asked,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let mut event_loop = EventLoop::new().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let config = VmConfig { name: Some("web".to_owned()), ..Default::default() };
        let asked = Asked::default();
        let control = Control::new(
            Box::new(FakeVm(Arc::clone(&calls), Arc::clone(&asked))),
            &config,
            event_loop.handle(),
        );
        let qmp = Qmp::new(control);
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            let path = dir.path().join(name);
            let kind = ChardevKind::UnixSocket { path, server: true, nowait: true };
            qmp.add_monitor(
                &chardev::open(&kind, Traffic::Messages, &Inherited::default(), &mut event_loop.ops())
                    .unwrap(),
            );
        }
        Self { event_loop, qmp, calls, asked, dir }
    }

    fn connect(&mut self, name: &str) -> Client {
        let socket = UnixStream::connect(self.dir.path().join(name)).unwrap();
        socket.set_nonblocking(true).unwrap();
        Client { socket, text: String::new() }
    }

    /// The next line of `client`; the deadline only guards against a hang.
    fn line(&mut self, client: &mut Client) -> String {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some((line, rest)) = client.text.split_once("\r\n") {
                let line = line.to_owned();
                client.text = rest.to_owned();
                return line;
            }
            assert!(Instant::now() < end, "no line came; so far: {}", client.text);
            self.event_loop.turn(Some(Duration::from_millis(2))).unwrap();
            let mut buffer = [0; 4096];
            match client.socket.read(&mut buffer) {
                Ok(0) => panic!("closed; so far: {}", client.text),
                Ok(n) => client.text.push_str(std::str::from_utf8(&buffer[..n]).unwrap()),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
        }
    }

    fn ask(&mut self, client: &mut Client, text: &str) -> String {
        client.socket.write_all(text.as_bytes()).unwrap();
        self.line(client)
    }
}

struct Client {
    socket: UnixStream,
    text: String,
}

const EMPTY: &str = r#"{"return":{}}"#;

#[test]
fn the_conversation_of_the_manual() {
    let mut world = World::new();
    let mut client = world.connect("a");
    assert!(
        world.line(&mut client).starts_with(r#"{"QMP":{"version":{"qemu":{"micro":1,"minor":0,"major":"#)
    );
    assert_eq!(
        world.ask(&mut client, "{ \"execute\": \"query-status\" }"),
        r#"{"return":{"running":true,"singlestep":false,"status":"running"}}"#
    );
    let stop = world.ask(&mut client, "{\"execute\":\"stop\"}\n");
    assert!(stop.starts_with(r#"{"event":"STOP","data":{},"timestamp":{"seconds":"#), "{stop}");
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(
        world.ask(&mut client, "{\"execute\":\"stop\"}"),
        r#"{"error":{"class":"GenericError","desc":"the VM is paused already"}}"#
    );
    assert!(world.ask(&mut client, "{\"execute\":\"cont\"}").contains("RESUME"));
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(world.calls.load(Ordering::SeqCst), 101);
    assert_eq!(world.ask(&mut client, "{\"execute\":\"quit\",\"id\":1.5}"), r#"{"return":{},"id":1.5}"#);
    let end = world.line(&mut client);
    assert!(
        end.starts_with(r#"{"event":"SHUTDOWN","data":{"guest":false,"reason":"host-qmp-quit"},"#),
        "{end}"
    );
    assert_eq!(world.qmp.control().end(), Some(&End::Quit));
}

#[test]
fn introspection() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let cpus: Value = serde_json::from_str(&world.ask(&mut client, "{\"execute\":\"query-cpus\"}")).unwrap();
    assert_eq!(
        cpus["return"][1],
        json!({"CPU": 1, "arch": "x86", "current": true, "halted": false,
               "props": {"core-id": 1, "die-id": 0, "die_id": 0, "socket-id": 0, "thread-id": 0},
               "qom_path": "/machine/unattached/device[1]", "thread_id": 8439})
    );
    for (command, want) in [
        ("qmp_capabilities", "{}"),
        ("query-name", r#"{"name":"web"}"#),
        ("query-uuid", r#"{"UUID":"00000000-0000-0000-0000-000000000000"}"#),
        ("query-target", r#"{"arch":"x86_64"}"#),
        ("query-kvm", r#"{"enabled":true,"present":true}"#),
        (
            "query-iothreads",
            r#"[{"id":"iothread1","poll-grow":0,"poll-max-ns":0,"poll-shrink":0,"thread-id":77}]"#,
        ),
        ("query-block", "[]"),
        ("query-blockstats", "[]"),
        ("query-named-block-nodes", "[]"),
        ("query-block-jobs", "[]"),
        ("query-chardev", "[]"),
        ("query-migrate-capabilities", "[]"),
    ] {
        let got = world.ask(&mut client, &format!("{{\"execute\":\"{command}\",\"arguments\":{{}}}}"));
        assert_eq!(got, format!("{{\"return\":{want}}}"), "{command}");
    }
    // Every command in the list exists.
    let list: Value =
        serde_json::from_str(&world.ask(&mut client, "{\"execute\":\"query-commands\"}")).unwrap();
    for spec in list["return"].as_array().unwrap() {
        let name = spec["name"].as_str().unwrap();
        let got =
            world.ask(&mut client, &format!("{{\"execute\":\"{name}\",\"arguments\":{{\"bogus\":1}}}}"));
        if ["balloon", "migrate", "query-balloon"].contains(&name) {
            assert!(!got.contains("bogus"), "{got}");
            continue;
        }
        assert!(got.contains(&format!("unknown argument 'bogus' of command {name}")), "{got}");
    }
}

#[test]
fn whatever_is_malformed_gets_an_error_and_the_connection_stays() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for (text, want) in [
        ("nonsense\n", "expected a JSON object"),
        ("]", "expected a JSON object"),
        ("{\"execute\" \"stop\"}\n", "expected ':'"),
        (
            "{\"execute\":\"nope\",\"id\":\"x\"}",
            r#""class":"CommandNotFound","desc":"The command nope has not been found"},"id":"x"}"#,
        ),
        ("{\"execute\":\"stop\",\"arguments\":3,\"id\":[]}", r#"'arguments' must be an object"},"id":[]}"#),
        ("{\"id\":null}", r#"'execute' is missing"},"id":null}"#),
        ("{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}", "is not available"),
        ("{\"execute\":\"stop\",\"id\":1e999}", "number out of range"),
        ("{\"execute\":\"\\ud800\"}", "invalid request"),
        (
            "{\"execute\":\"query-mem-gpa\",\"arguments\":{\"gpa\":\"10x\"}}",
            "argument 'gpa' must be an address in hexadecimal digits",
        ),
        (
            "{\"execute\":\"query-mem-gpa\",\"arguments\":{\"gpa\":\"+10\"}}",
            "argument 'gpa' must be an address in hexadecimal digits",
        ),
        (
            "{\"execute\":\"query-mem-gpa\",\"arguments\":{\"gpa\":\"10000000\"}}",
            "there is no guest RAM at 0x10000000",
        ),
        ("{\"execute\":\"query-vnc\"}", "The service of VNC is not supported"),
        ("{\"execute\":\"query-display-image\"}", "query-display-image is not supported"),
    ] {
        let got = world.ask(&mut client, text);
        assert!(got.starts_with("{\"error\":{\"class\":") && got.contains(want), "{text}: {got}");
        assert_eq!(world.ask(&mut client, "{\"execute\":\"qmp_capabilities\"}\n"), EMPTY, "{text}");
    }
}

#[test]
fn several_requests_in_one_read_and_one_over_many() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let three = "{\"execute\":\"query-kvm\",\"id\":1}{\"execute\":\"query-kvm\",\"id\":2}\n{\"execute\":\"query-kvm\",\"id\":3}";
    assert!(world.ask(&mut client, three).ends_with("\"id\":1}"));
    assert!(world.line(&mut client).ends_with("\"id\":2}"));
    assert!(world.line(&mut client).ends_with("\"id\":3}"));
    for byte in "{\"execute\":\"query-name\"".bytes() {
        client.socket.write_all(&[byte]).unwrap();
        world.event_loop.turn(Some(Duration::from_millis(1))).unwrap();
    }
    assert_eq!(world.ask(&mut client, "}"), r#"{"return":{"name":"web"}}"#);
}

#[test]
fn events_reach_every_monitor_and_a_queued_client_is_greeted_when_its_turn_comes() {
    let mut world = World::new();
    let (mut first, mut other, mut queued) = (world.connect("a"), world.connect("b"), world.connect("a"));
    world.line(&mut first);
    world.line(&mut other);
    assert!(world.ask(&mut first, "{\"execute\":\"stop\"}").contains("STOP"));
    assert!(world.line(&mut other).contains("STOP"));
    drop(first);
    assert!(world.line(&mut queued).contains("QMP"));
    world.qmp.happened(&Input::Guest(GuestEvent::PowerOff));
    for client in [&mut other, &mut queued] {
        assert!(world.line(client).contains(r#""data":{"guest":true,"reason":"guest-shutdown"}"#));
    }
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_the_next_one_served() {
    let mut world = World::new();
    let mut deaf = world.connect("a");
    let mut queued = world.connect("a");
    let request = "{\"execute\":\"query-commands\"}\n".repeat(400);
    let end = Instant::now() + Duration::from_secs(20);
    // Never reads; ends when the VMM has hung up.
    loop {
        assert!(Instant::now() < end);
        match deaf.socket.write(request.as_bytes()) {
            Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => break,
            _ => world.event_loop.turn(Some(Duration::from_millis(2))).unwrap(),
        }
    }
    assert!(world.line(&mut queued).contains("QMP"));
}

#[test]
fn a_monitor_over_tcp_speaks_the_same() {
    let mut world = World::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let kind = ChardevKind::TcpSocket { addr: port, server: true, nowait: true };
    world.qmp.add_monitor(
        &chardev::open(&kind, Traffic::Messages, &Inherited::default(), &mut world.event_loop.ops()).unwrap(),
    );
    let mut socket = std::net::TcpStream::connect(port).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    socket.write_all(b"{\"execute\":\"query-name\"}").unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let mut text = Vec::new();
    while !text.ends_with(b"{\"return\":{\"name\":\"web\"}}\r\n") {
        assert!(Instant::now() < end, "{}", String::from_utf8_lossy(&text));
        world.event_loop.turn(Some(Duration::from_millis(2))).unwrap();
        let mut buffer = [0; 4096];
        if let Ok(n) = socket.read(&mut buffer) {
            text.extend(&buffer[..n]);
        }
    }
    assert!(text.starts_with(b"{\"QMP\":"));
}

#[test]
fn the_schema_names_every_command_and_event_there_is() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let mut list = |command: &str| -> Vec<Value> {
        let text = world.ask(&mut client, &format!("{{\"execute\":\"{command}\"}}"));
        serde_json::from_str::<Value>(&text).unwrap()["return"].as_array().unwrap().clone()
    };
    let schema = list("query-qmp-schema");
    for (query, meta) in [("query-commands", "command"), ("query-events", "event")] {
        for named in list(query) {
            assert!(
                schema.iter().any(|info| info["meta-type"] == meta && info["name"] == named["name"]),
                "{named}"
            );
        }
    }
}

#[test]
fn changes_of_the_balloon_come_at_most_once_a_second_and_the_last_always() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let inactive = world.ask(&mut client, r#"{"execute":"balloon","arguments":{"value":1}}"#);
    assert_eq!(
        inactive,
        r#"{"error":{"class":"DeviceNotActive","desc":"No balloon device has been activated"}}"#
    );
    let qmp = Arc::clone(&world.qmp);
    for actual in [5, 6, 7] {
        qmp.balloon_changed(actual, &mut world.event_loop.ops());
    }
    for want in [5, 7] {
        let line = world.line(&mut client);
        assert!(
            line.starts_with(&format!(r#"{{"event":"BALLOON_CHANGED","data":{{"actual":{want}}},"#)),
            "{line}"
        );
    }
}
