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
use crate::machine::{
    BlockDevice, CpuInfo, Departure, GuestEvent, Hotplug, HotplugError, NetDevice, Plugged, Refusal,
};
use crate::snapshot::Target;

mod human;

/// What the machine was asked for, in words; descriptors by what can be read from them.
type Asked = Arc<Mutex<Vec<String>>>;

struct FakeVm(Arc<AtomicUsize>, Asked);

impl Vm for FakeVm {
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
                let NetBackend::Tap { source, queues, vhost, .. } = &netdev.backend else { panic!() };
                let fds: Vec<String> = fds.into_iter().map(said).collect();
                let name = match source {
                    TapSource::Name(name) => name.clone(),
                    TapSource::Fds(_) => fds.join("+"),
                };
                format!("{} {name} {queues} {vhost}", netdev.id)
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
            qmp.add_monitor(&chardev::open(&kind, Traffic::Messages, &mut event_loop.ops()).unwrap());
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

/// The seed's own lines, as they stand there.
#[test]
fn the_hot_plug_conversations_of_the_manual() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for line in [
        r#"{"execute": "blockdev-add", "arguments": {"node-name": "drive-0", "file": {"driver": "file", "filename": "/path/to/block"}, "cache": {"direct": true}, "read-only": false}}"#,
        r#"{"execute": "device_add", "arguments": {"id": "drive-0", "driver": "virtio-blk-mmio", "addr": "0x1"}}"#,
        r#"{"execute":"netdev_add", "arguments":{"id":"net-0", "ifname":"tap0"}}"#,
        r#"{"execute":"device_add", "arguments":{"id":"net-0", "driver":"virtio-net-mmio", "addr":"0x0"}} "#,
    ] {
        assert_eq!(world.ask(&mut client, line), EMPTY, "{line}");
    }
    let deleted = world.ask(&mut client, r#"{"execute": "device_del", "arguments": {"id": "drive-0"}}"#);
    assert!(
        deleted.starts_with(
            r#"{"event":"DEVICE_DELETED","data":{"device":"drive-0","path":"drive-0"},"timestamp":{"#
        ),
        "{deleted}"
    );
    assert_eq!(world.line(&mut client), EMPTY);
    let asked = world.asked.lock().unwrap().clone();
    let drive = Drive { direct: true, ..Drive::new("drive-0", "/path/to/block") };
    assert_eq!(asked[0], format!("{drive:?}"));
    assert!(asked[1].contains(r#"addr: Some("0x1")"#), "{}", asked[1]);
    assert_eq!(asked[2], "net-0 tap0 1 false");
    assert_eq!(
        world.ask(&mut client, r#"{"execute":"device_del","arguments":{"id":"none"},"id":1}"#),
        r#"{"error":{"class":"DeviceNotFound","desc":"Device none not found"},"id":1}"#
    );
}

#[test]
fn what_lies_under_an_image_is_a_node_or_is_described() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let add = |driver: &str, backing: &str| {
        format!(
            r#"{{"execute":"blockdev-add","arguments":{{"node-name":"n","driver":"{driver}","file":{{"driver":"file","filename":"/top"}},"backing":{backing}}}}}"#
        )
    };
    let file = |path: &str| format!(r#""file":{{"driver":"file","filename":"{path}"}}"#);
    let nested = format!(r#"{{"driver":"qcow2",{},"backing":{{{}}}}}"#, file("/mid"), file("/base"));
    let on_node = format!(r#"{{"driver":"qcow2",{},"backing":"base"}}"#, file("/mid"));
    for backing in ["\"base\"", nested.as_str(), on_node.as_str()] {
        assert_eq!(world.ask(&mut client, &add("qcow2", backing)), EMPTY, "{backing}");
    }
    let asked = world.asked.lock().unwrap().clone();
    assert_eq!(asked[0], r#"n [] Some("base")"#);
    let image = |path: &str, format: &str| format!(r#"BackingImage {{ file: "{path}", format: {format} }}"#);
    assert!(
        asked[1].contains(&format!("[{}, {}]", image("/mid", "Qcow2"), image("/base", "Raw"))),
        "{}",
        asked[1]
    );
    assert_eq!(asked[2], format!(r#"n [{}] Some("base")"#, image("/mid", "Qcow2")));
    let deep = (0..30).fold("null".to_owned(), |under, _| {
        format!(r#"{{"driver":"qcow2",{},"backing":{under}}}"#, file("/x"))
    });
    assert_eq!(world.ask(&mut client, &add("qcow2", &deep)), EMPTY);
    for (driver, backing, want) in [
        ("raw", "\"base\"", "a raw image has no backing file"),
        ("qcow2", "7", "argument 'backing' of command blockdev-add must be null or a string or an object"),
        ("qcow2", "{}", "argument 'backing.file' of command blockdev-add is missing"),
        (
            "qcow2",
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"/m"},"backing":{"driver":"raw"}}"#,
            "argument 'file' of command blockdev-add is missing",
        ),
        (
            "qcow2",
            r#"{"file":{"driver":"file","filename":"/m"},"backing":"x"}"#,
            "a raw image has no backing file",
        ),
    ] {
        let got = world.ask(&mut client, &add(driver, backing));
        assert!(got.contains(want), "{backing}: {got}");
    }
    let seen = r#"{"execute":"qom-list","arguments":{"path":"/machine/peripheral"}}"#;
    let got = world.ask(&mut client, seen);
    assert!(got.contains(r#"{"name":"rootfs","type":"child<virtio-blk-device>"}"#), "{got}");
}

#[test]
fn hot_plug_arguments_that_make_no_sense_are_refused_by_name() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for (text, want) in [
        (r#"{"execute":"device_add"}"#, "argument 'id' of command device_add is missing"),
        (
            r#"{"execute":"device_add","arguments":{"id":"","driver":"x"}}"#,
            "argument 'id' must have 1 to 255 bytes",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"x","addres":"1"}}"#,
            "unknown argument 'addres'",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"x","mac":"01:00:00:00:00:00"}}"#,
            "argument 'mac'",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"virtio-blk-pci","num-queues":33}}"#,
            "argument 'num-queues' must be 1 to 32",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"virtio-net-pci","queue-size":128}}"#,
            "argument 'queue-size' must be a power of two from 256 to 4096",
        ),
        (
            r#"{"execute":"device_add","arguments":{"id":"x","driver":"x","serial":"123456789012345678901"}}"#,
            "argument 'serial'",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"file"}}}"#,
            "argument 'file.filename' of command blockdev-add is missing",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"nbd","filename":"x"}}}"#,
            "argument 'file.driver' of command blockdev-add must be one of file, host_device",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"file","filename":"x","aio":"native"},"cache":{"direct":false}}}"#,
            "Invalid parameter 'aio'",
        ),
        (
            r#"{"execute":"blockdev-add","arguments":{"node-name":"x","file":{"driver":"file","filename":"x"},"throttling.iops-total":1000001}}"#,
            "at most 1000000",
        ),
        (r#"{"execute":"netdev_add","arguments":{"id":"x"}}"#, "Tap device is missing"),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","ifname":"0123456789abcdef"}}"#,
            "argument 'ifname' must have 1 to 15 bytes",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","ifname":"t","queues":17}}"#,
            "argument 'queues' must be 1 to 16",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","fd":"t"}}"#,
            "no descriptor is called 't': send it with getfd first",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","ifname":"t","vhostfd":3}}"#,
            "no descriptor is called '3'",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","type":"vhost-user"}}"#,
            "argument 'chardev' of a vhost-user netdev is missing",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","chardev":"c","ifname":"t"}}"#,
            "argument 'ifname' is for a tap",
        ),
        (
            r#"{"execute":"netdev_add","arguments":{"id":"x","chardev":"c","queues":2}}"#,
            "must be 1 in this version",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"pty","data":{"addr":{"type":"unix","data":{"path":"/s"}}}}}}"#,
            "argument 'backend.type' of command chardev-add must be one of socket",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"inet","data":{"path":"/s"}}}}}}"#,
            "argument 'backend.data.addr.type' of command chardev-add must be one of unix",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/s"}},"server":true}}}}"#,
            "whose back end is the server",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":""}}}}}}"#,
            "must be a path of 1 to 107 bytes",
        ),
        (
            r#"{"execute":"chardev-add","arguments":{"id":"","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/s"}}}}}}"#,
            "argument 'id' must have 1 to 255 bytes",
        ),
        (r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#, "Invalid SCM message"),
        (r#"{"execute":"getfd","arguments":{"fdname":"a:b"}}"#, "colon"),
    ] {
        let got = world.ask(&mut client, text);
        assert!(got.contains(r#""class":"GenericError""#) && got.contains(want), "{text}: {got}");
    }
    assert!(world.asked.lock().unwrap().is_empty());
}

#[test]
fn sockets_of_processes_that_serve_devices_get_names() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    for line in [
        r#"{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/run/c"}},"server":false}}}}"#,
        r#"{"execute":"netdev_add","arguments":{"id":"n","type":"vhost-user","chardev":"c"}}"#,
        r#"{"execute":"netdev_add","arguments":{"id":"o","chardev":"c","queues":1}}"#,
        r#"{"execute":"chardev-remove","arguments":{"id":"c"}}"#,
    ] {
        assert_eq!(world.ask(&mut client, line), EMPTY, "{line}");
    }
    let asked = world.asked.lock().unwrap();
    assert_eq!(
        *asked,
        [
            r#"AddChardev { id: "c", path: "/run/c" }"#,
            r#"n VhostUser { chardev: "c", queues: 1 }"#,
            r#"o VhostUser { chardev: "c", queues: 1 }"#,
            r#"RemoveChardev("c")"#,
        ]
    );
}

/// Sends `text` with descriptors that say these words when read.
fn send_with(client: &Client, text: &str, words: &[&str]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let fds: Vec<OwnedFd> = words
        .iter()
        .map(|word| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(word.as_bytes()).unwrap();
            ours.into()
        })
        .collect();
    let borrowed: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let sent =
        sendmsg(&client.socket, &[std::io::IoSlice::new(text.as_bytes())], &mut control, SendFlags::empty());
    assert_eq!(sent, Ok(text.len()));
}

#[test]
fn descriptors_come_with_getfd_and_go_to_the_netdev_that_names_them() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    // Two descriptors with one message, each with a getfd of its own; then one alone.
    let two =
        r#"{"execute":"getfd","arguments":{"fdname":"7"}}{"execute":"getfd","arguments":{"fdname":"b"}}"#;
    send_with(&client, two, &["first", "second"]);
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(world.line(&mut client), EMPTY);
    send_with(&client, r#"{"execute":"getfd","arguments":{"fdname":"c"}}"#, &["third"]);
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(
        world.ask(
            &mut client,
            r#"{"execute":"netdev_add","arguments":{"id":"n","type":"tap","fds":"b:7","vhost":false}}"#
        ),
        EMPTY
    );
    assert_eq!(*world.asked.lock().unwrap(), ["n second+first 2 false"]);
    // Those of a snapshot likewise.
    let pair =
        r#"{"execute":"getfd","arguments":{"fdname":"s"}}{"execute":"getfd","arguments":{"fdname":"m"}}"#;
    send_with(&client, pair, &["state", "memory"]);
    assert_eq!((world.line(&mut client).as_str(), world.line(&mut client).as_str()), (EMPTY, EMPTY));
    let migrate = r#"{"execute":"migrate","arguments":{"uri":"fd:s:m"}}"#;
    assert!(world.ask(&mut client, migrate).contains("\"STOP\""));
    assert_eq!(world.line(&mut client), EMPTY);
    assert_eq!(world.asked.lock().unwrap().last().unwrap(), "save state memory");
    assert!(world.ask(&mut client, migrate).contains("no descriptor is called 's'"));
    // A name is good once, and for the client that gave it.
    let gone = world.ask(&mut client, r#"{"execute":"netdev_add","arguments":{"id":"m","fd":7}}"#);
    assert!(gone.contains("no descriptor is called '7'"), "{gone}");
    drop(client);
    let mut client = world.connect("a");
    world.line(&mut client);
    let gone = world.ask(&mut client, r#"{"execute":"netdev_add","arguments":{"id":"m","fd":"c"}}"#);
    assert!(gone.contains("no descriptor is called 'c'"), "{gone}");
}

#[test]
fn a_descriptor_stands_for_the_file_of_a_disk() {
    let mut world = World::new();
    let mut client = world.connect("a");
    world.line(&mut client);
    let two =
        r#"{"execute":"getfd","arguments":{"fdname":"top"}}{"execute":"getfd","arguments":{"fdname":"low"}}"#;
    send_with(&client, two, &["first", "second"]);
    assert_eq!((world.line(&mut client), world.line(&mut client)), (EMPTY.into(), EMPTY.into()));
    let add = r#"{"execute":"blockdev-add","arguments":{"node-name":"n","driver":"qcow2","file":{"driver":"file","filename":"/t.qcow2","fd":"top"},
        "backing":{"driver":"raw","file":{"driver":"file","filename":"/b.img","fd":"low"}}}}"#;
    assert_eq!(world.ask(&mut client, add), EMPTY);
    assert_eq!(*world.asked.lock().unwrap(), ["/t.qcow2=first /b.img=second"]);
    let gone = world.ask(&mut client, add);
    assert!(gone.contains("no descriptor is called 'top'"), "{gone}");
}

#[test]
fn a_monitor_over_tcp_speaks_the_same() {
    let mut world = World::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let kind = ChardevKind::TcpSocket { addr: port, server: true, nowait: true };
    world.qmp.add_monitor(&chardev::open(&kind, Traffic::Messages, &mut world.event_loop.ops()).unwrap());
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
