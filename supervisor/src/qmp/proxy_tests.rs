//! The proxy between several clients and a VMM.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::error::QmpError;
use super::fake::{FakeVmm, PATIENCE, Peer};
use super::proxy::Proxy;
use super::rights::{Client, Mode, Stage, Told, Tracked};
use super::session::MAX_CLIENTS;

const ROOT: Client = Client { uid: 0, pid: 1, mode: Mode::Full };

/// A VMM, and a proxy for a VM called "web".
fn setup() -> (FakeVmm, Proxy, PathBuf) {
    let fake = FakeVmm::new();
    let path = fake.directory.path().join("web.sock");
    let proxy = Proxy::bind(&path, &Arc::default(), None, None).unwrap();
    (fake, proxy, path)
}

#[tokio::test]
async fn each_client_has_its_greeting_and_its_ids() {
    let (fake, proxy, path) = setup();
    proxy.set_monitor(Some(fake.echo().await));
    let (mut one, greeting) = Peer::connect(&path).await;
    assert_eq!(greeting["QMP"]["version"]["package"], "fake-1");
    let (mut two, _) = Peer::connect(&path).await;
    for id in
        ["1", "\"x\"", "null", "{\"b\":1,\"a\":[2.50]}", "1e400", "[]", "123456789012345678901234567890"]
    {
        for client in [&mut one, &mut two] {
            client.send(format!("{{\"id\":{id},\"execute\":\"query-status\"}}")).await;
            let answer = String::from_utf8(client.raw().await.unwrap()).unwrap();
            // As the client wrote it, digit by digit; after the answer, as the VMM does.
            assert!(answer.ends_with(&format!(",\"id\":{id}}}")), "{answer}");
        }
    }
    // Without an id there is none in the answer.
    let answer = one.ask("{\"execute\":\"query-status\"}").await;
    assert_eq!(answer, json!({"return": {"execute": "query-status", "arguments": null}}));
    // Arguments arrive as they are, over several lines or not.
    let answer = one.ask("{\"execute\":\"x\",\n \"arguments\":{\n\"z\":1,\"a\":\"l\\nl\"}}").await;
    assert_eq!(answer["return"]["arguments"], json!({"z": 1, "a": "l\nl"}));
    assert_eq!(proxy.clients(), 2);
}

#[tokio::test]
async fn negotiation_is_each_clients_own_and_optional() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut client, _) = Peer::connect(&path).await;
    assert_eq!(
        client.ask("{\"execute\":\"qmp_capabilities\",\"id\":1}").await,
        json!({"return": {}, "id": 1})
    );
    let answer = client.ask("{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[]}}").await;
    assert_eq!(answer, json!({"return": {}}));
    for bad in ["{\"enable\":[\"oob\"]}", "{\"x\":1}", "{\"enable\":1}"] {
        let answer = client.ask(&format!("{{\"execute\":\"qmp_capabilities\",\"arguments\":{bad}}}")).await;
        assert_eq!(answer["error"]["class"], "GenericError", "{bad}");
    }
    // None of it reached the VMM: the first command that does is this one, from a client that never negotiated.
    let (mut other, _) = Peer::connect(&path).await;
    other.send("{\"execute\":\"stop\"}").await;
    assert_eq!(vmm.message().await["execute"], "stop");
}

#[tokio::test]
async fn malformed_commands_are_answered_and_the_connection_stays() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut client, _) = Peer::connect(&path).await;
    for (text, id, says) in [
        ("hello\n", None, "invalid JSON: expected an object"),
        ("{\"execute\":}\n", None, "expected value"),
        ("{\"execute\":\"stop\n", None, "control character"),
        ("[]", None, "invalid JSON: expected an object"),
        ("{}", None, "invalid request: 'execute' is missing"),
        ("{\"id\":7}", Some(json!(7)), "invalid request: 'execute' is missing"),
        ("{\"execute\":1,\"id\":null}", Some(json!(null)), "invalid request: 'execute' must be a string"),
        (
            "{\"execute\":\"stop\",\"arguments\":[],\"id\":\"a\"}",
            Some(json!("a")),
            "invalid request: 'arguments' must be an object",
        ),
        ("{\"execute\":\"stop\",\"foo\":1,\"id\":2}", Some(json!(2)), "unknown field `foo`"),
        ("{\"execute\":\"query-status\",\"execute\":\"quit\"}", None, "duplicate field `execute`"),
        ("{\"execute\":\"query-status\",\"\\u0065xecute\":\"quit\"}", None, "duplicate field `execute`"),
        ("{\"exec-oob\":\"stop\"}", None, "unknown field `exec-oob`"),
        ("{\"execute\":\"\\ud800\"}", None, "invalid request: 'execute' must be a string"),
    ] {
        let answer = client.ask(text).await;
        assert_eq!(answer["error"]["class"], "GenericError", "{text}: {answer}");
        assert!(answer["error"]["desc"].as_str().unwrap().contains(says), "{text}: {answer}");
        assert_eq!(answer.get("id"), id.as_ref(), "{text}: {answer}");
    }
    let mut invalid = b"{\"execute\":\"".to_vec();
    invalid.extend([0xff, 0xfe, b'"', b'}', b'\n']);
    client.send(invalid).await;
    assert_eq!(client.message().await["error"]["class"], "GenericError");
    // One longer than any command.
    client.send(format!("{{\"execute\":\"x\",\"arguments\":{{\"a\":\"{}\"}}}}", "y".repeat(2 << 20))).await;
    assert!(client.message().await["error"]["desc"].as_str().unwrap().contains("longer than"));
    client.send("{\"execute\":\"cont\"}").await;
    assert_eq!(vmm.message().await["execute"], "cont");
}

#[tokio::test]
async fn events_go_to_all_and_keep_their_place() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut one, _) = Peer::connect(&path).await;
    let (mut two, _) = Peer::connect(&path).await;
    one.send("{\"execute\":\"stop\"}{\"execute\":\"quit\"}").await;
    let stop = vmm.message().await;
    // All in one write: what the client sees must still be in this order.
    let event =
        |name: &str| json!({"event": name, "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}});
    vmm.send(format!("{}{}{}", event("STOP"), json!({"return": {}, "id": stop["id"]}), event("RESUME")))
        .await;
    assert_eq!(one.message().await, event("STOP"));
    assert_eq!(one.message().await, json!({"return": {}}));
    assert_eq!(one.message().await, event("RESUME"));
    let quit = vmm.message().await;
    vmm.send(format!("{}{}", json!({"return": {}, "id": quit["id"]}), event("SHUTDOWN"))).await;
    drop(vmm);
    assert_eq!(one.message().await, json!({"return": {}}));
    assert_eq!(one.message().await, event("SHUTDOWN"));
    assert!(one.next().await.is_none());
    for name in ["STOP", "RESUME", "SHUTDOWN"] {
        assert_eq!(two.message().await, event(name));
    }
    assert!(two.next().await.is_none());
}

#[tokio::test]
async fn without_a_vmm_every_command_says_so() {
    let (fake, proxy, path) = setup();
    let (mut client, greeting) = Peer::connect(&path).await;
    assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 5);
    let expected = json!({"error": {"class": "GenericError", "desc": "VM \"web\" is not running"}, "id": 3});
    assert_eq!(client.ask("{\"execute\":\"query-status\",\"id\":3}").await, expected);
    assert_eq!(client.ask("{\"execute\":\"qmp_capabilities\"}").await, json!({"return": {}}));
    // It starts: who waited has it, and its events.
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let request = async {
        let request = vmm.message().await;
        vmm.event("RESUME", json!({})).await;
        vmm.answer(&request, json!("here")).await;
    };
    client.send("{\"execute\":\"query-status\",\"id\":4}").await;
    request.await;
    assert_eq!(client.message().await["event"], "RESUME");
    assert_eq!(client.message().await, json!({"return": "here", "id": 4}));
    // It ends: the client is told and let go. It starts again: new clients have the new one.
    client.send("{\"execute\":\"query-status\",\"id\":5}").await;
    vmm.message().await;
    proxy.set_monitor(None);
    assert_eq!(client.message().await["error"]["desc"], "VM \"web\" is not running");
    assert!(client.next().await.is_none());
    proxy.set_monitor(Some(fake.echo().await));
    let (mut client, greeting) = Peer::connect(&path).await;
    assert_eq!(greeting["QMP"]["version"]["package"], "fake-1");
    assert_eq!(client.ask("{\"execute\":\"x\"}").await["return"]["execute"], "x");
}

#[tokio::test]
async fn while_the_vmm_is_being_connected_to_commands_wait() {
    let (fake, proxy, path) = setup();
    proxy.expect_monitor();
    let (mut client, _) = Peer::connect(&path).await;
    client.send("{\"execute\":\"query-status\",\"id\":1}{\"execute\":\"stop\",\"id\":2}").await;
    let caller = proxy.caller();
    let raw = "{\"execute\":\"x\",\"id\":3}";
    let mut asked = Box::pin(caller.execute_raw(ROOT, raw));
    // What the proxy knows itself needs no VMM.
    assert!(futures_util::poll!(&mut asked).is_pending());
    assert_eq!(
        caller.execute_raw(ROOT, "{\"execute\":\"qmp_capabilities\"}").await.unwrap(),
        "{\"return\":{}}"
    );
    let (mut other, _) = Peer::connect(&path).await;
    assert_eq!(other.ask("{\"execute\":\"qmp_capabilities\"}").await, json!({"return": {}}));
    // Told again, as when the connection failed once more: they wait on.
    proxy.expect_monitor();
    assert!(futures_util::poll!(&mut asked).is_pending());
    proxy.set_monitor(Some(fake.echo().await));
    for (word, id) in [("query-status", 1), ("stop", 2)] {
        let answer = client.message().await;
        assert_eq!((&answer["return"]["execute"], &answer["id"]), (&json!(word), &json!(id)));
    }
    let answer: Value = serde_json::from_str(&asked.await.unwrap()).unwrap();
    assert_eq!((&answer["return"]["execute"], &answer["id"]), (&json!("x"), &json!(3)));

    // Its process ends instead: nobody waits for what cannot come.
    proxy.expect_monitor();
    let (mut client, _) = Peer::connect(&path).await;
    client.send("{\"execute\":\"x\",\"id\":4}").await;
    let mut asked = Box::pin(caller.execute_raw(ROOT, raw));
    assert!(futures_util::poll!(&mut asked).is_pending());
    proxy.set_monitor(None);
    let expected = json!({"error": {"class": "GenericError", "desc": "VM \"web\" is not running"}, "id": 4});
    assert_eq!(client.message().await, expected);
    assert!(matches!(asked.await, Err(QmpError::NotRunning { .. })));

    // It never answers: a deadline, and the connection stays.
    proxy.expect_monitor();
    client.send("{\"execute\":\"x\",\"id\":5}").await;
    let (answer, asked) = tokio::join!(client.message(), caller.execute_raw(ROOT, raw));
    assert_eq!(answer["id"], 5);
    assert!(answer["error"]["desc"].as_str().unwrap().contains("did not take \"x\""), "{answer}");
    assert!(matches!(asked, Err(QmpError::Deadline { sent: false, .. })));
    proxy.set_monitor(Some(fake.echo().await));
    assert_eq!(client.ask("{\"execute\":\"y\"}").await["return"]["execute"], "y");
}

#[tokio::test]
async fn a_vmm_that_dies_ends_its_clients_cleanly() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut asking, _) = Peer::connect(&path).await;
    let (mut idle, _) = Peer::connect(&path).await;
    asking.send("{\"execute\":\"x\",\"id\":1}").await;
    vmm.message().await;
    drop(vmm);
    let answer = asking.message().await;
    assert_eq!(answer["id"], 1);
    assert!(answer["error"]["desc"].as_str().unwrap().contains("the VMM is gone"), "{answer}");
    assert!(asking.next().await.is_none());
    assert!(idle.next().await.is_none());
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_nothing() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut other, _) = Peer::connect(&path).await;
    // Asks and leaves: the VMM still gets the command, and its answer is dropped.
    let (mut leaving, _) = Peer::connect(&path).await;
    leaving.send("{\"execute\":\"cont\"}").await;
    drop(leaving);
    let orphan = vmm.message().await;
    assert_eq!(orphan["execute"], "cont");
    vmm.answer(&orphan, json!({})).await;
    // Half closed: the answer still comes, then the end.
    let (mut half, _) = Peer::connect(&path).await;
    half.send("{\"execute\":\"x\"}{\"execute\":").await;
    half.stream.shutdown().await.unwrap();
    let request = vmm.message().await;
    vmm.answer(&request, json!(1)).await;
    assert_eq!(half.message().await, json!({"return": 1}));
    assert!(half.message().await["error"]["desc"].as_str().unwrap().contains("EOF while parsing"));
    assert!(half.next().await.is_none());
    other.send("{\"execute\":\"y\"}").await;
    assert_eq!(vmm.message().await["execute"], "y");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped_and_stops_nobody() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut sleeper, _) = Peer::connect(&path).await;
    let (mut reader, _) = Peer::connect(&path).await;
    let data = json!({"x": "y".repeat(30 << 10)});
    for _ in 0..300 {
        vmm.event("NOISE", data.clone()).await;
        assert_eq!(reader.message().await["event"], "NOISE");
    }
    reader.send("{\"execute\":\"x\"}").await;
    let request = vmm.message().await;
    vmm.answer(&request, json!(1)).await;
    assert_eq!(reader.message().await, json!({"return": 1}));
    // It gets what the socket held, then the end.
    let mut seen = 0;
    while sleeper.next().await.is_some() {
        seen += 1;
    }
    assert!(seen < 300, "{seen}");
}

#[tokio::test]
async fn a_client_that_only_writes_blocks_itself() {
    let (fake, proxy, path) = setup();
    proxy.set_monitor(Some(fake.echo().await));
    let (mut flood, _) = Peer::connect(&path).await;
    // Nothing of this is ever read by the client; the proxy must stop reading, not grow.
    let chunk = "{\"execute\":\"nonsense\"} garbage\n".repeat(100);
    let mut written = 0usize;
    while let Ok(sent) =
        tokio::time::timeout(Duration::from_millis(300), flood.stream.write(chunk.as_bytes())).await
    {
        written += sent.unwrap();
        assert!(written < 16 << 20, "the proxy takes everything");
    }
    let (mut other, _) = Peer::connect(&path).await;
    assert_eq!(other.ask("{\"execute\":\"x\"}").await["return"]["execute"], "x");
}

#[tokio::test]
async fn there_is_room_for_sixteen() {
    let (fake, proxy, path) = setup();
    proxy.set_monitor(Some(fake.echo().await));
    let mut clients = Vec::new();
    for _ in 0..MAX_CLIENTS {
        clients.push(Peer::connect(&path).await.0);
    }
    let (mut refused, message) = Peer::connect(&path).await;
    assert!(message["error"]["desc"].as_str().unwrap().contains("16 QMP clients"), "{message}");
    assert!(refused.next().await.is_none());
    assert_eq!(proxy.open(ROOT).unwrap_err().kind(), std::io::ErrorKind::ResourceBusy);
    drop(clients.pop());
    // The place is free as soon as the proxy has noticed.
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while proxy.clients() == MAX_CLIENTS {
        assert!(tokio::time::Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    let (mut client, _) = Peer::connect(&path).await;
    assert_eq!(client.ask("{\"execute\":\"x\"}").await["return"]["execute"], "x");
}

#[tokio::test]
async fn a_slow_command_of_one_does_not_hold_up_another() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut slow, _) = Peer::connect(&path).await;
    let (mut quick, _) = Peer::connect(&path).await;
    // Two at once from one client: the second waits for the first.
    slow.send("{\"execute\":\"slow\",\"id\":1}{\"execute\":\"after\",\"id\":2}").await;
    let first = vmm.message().await;
    quick.send("{\"execute\":\"quick\",\"id\":1}").await;
    let second = vmm.message().await;
    assert_eq!(second["execute"], "quick");
    vmm.answer(&second, json!("q")).await;
    assert_eq!(quick.message().await, json!({"return": "q", "id": 1}));
    vmm.answer(&first, json!("s")).await;
    assert_eq!(slow.message().await, json!({"return": "s", "id": 1}));
    assert_eq!(vmm.message().await["execute"], "after");
}

#[tokio::test]
async fn descriptors_go_with_their_getfd() {
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;

    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut client, _) = Peer::connect(&path).await;
    let (read, mut write) = std::io::pipe().unwrap();
    let command = b"{\"execute\":\"query-status\"}{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"tap\"}}";
    client.stream.writable().await.unwrap();
    assert_eq!(super::wire::send(&client.stream, command, &[OwnedFd::from(read)]).unwrap(), command.len());
    let mut descriptors = Vec::new();
    let mut buffer = [0; 1000];
    for (name, expected) in [("query-status", 0), ("getfd", 1)] {
        let got = loop {
            vmm.stream.readable().await.unwrap();
            match super::wire::receive(&vmm.stream, &mut buffer, &mut descriptors) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                got => break got.unwrap(),
            }
        };
        let request: Value = serde_json::from_slice(&buffer[..got]).unwrap();
        assert_eq!((request["execute"].as_str(), descriptors.len()), (Some(name), expected));
        vmm.answer(&request, json!({})).await;
        assert_eq!(client.message().await, json!({"return": {}}));
    }
    write.write_all(b"through").unwrap();
    drop(write);
    let mut text = String::new();
    std::fs::File::from(descriptors.pop().unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
}

#[tokio::test]
async fn an_opened_end_is_a_client_like_any() {
    let (fake, proxy, _) = setup();
    proxy.set_monitor(Some(fake.echo().await));
    let end = std::os::unix::net::UnixStream::from(proxy.open(ROOT).unwrap());
    end.set_nonblocking(true).unwrap();
    let mut client = Peer::new(UnixStream::from_std(end).unwrap());
    assert_eq!(client.message().await["QMP"]["version"]["package"], "fake-1");
    assert_eq!(client.ask("{\"execute\":\"x\"}").await["return"]["execute"], "x");
    drop(proxy);
    assert!(client.next().await.is_none());
}

#[tokio::test]
async fn raw_commands_follow_the_same_rules() {
    let (fake, proxy, _) = setup();
    let caller = proxy.caller();
    let run = |text: &'static str| caller.execute_raw(ROOT, text);
    assert!(matches!(run("{\"execute\":\"x\"}").await, Err(QmpError::NotRunning { vm }) if vm == "web"));
    assert!(matches!(run("nonsense").await, Err(QmpError::BadRequest { .. })));
    assert!(matches!(run("{\"execute\":\"x\"} {}").await, Err(QmpError::BadRequest { .. })));
    assert_eq!(run("{\"execute\":\"qmp_capabilities\",\"id\":1}").await.unwrap(), "{\"return\":{},\"id\":1}");
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (answer, ()) = tokio::join!(run("{\"execute\":\"x\"}"), async {
        let request = vmm.message().await;
        vmm.answer(&request, json!([1])).await;
    });
    assert_eq!(answer.unwrap(), "{\"return\":[1]}");
    let (answer, ()) = tokio::join!(run("{\"execute\":\"x\"}"), async {
        let id = vmm.message().await["id"].clone();
        vmm.send(json!({"error": {"class": "DeviceNotFound", "desc": "d"}, "id": id}).to_string()).await;
    });
    assert!(matches!(answer, Err(QmpError::Refused { class, .. }) if class == "DeviceNotFound"));
}

#[tokio::test]
async fn the_socket_is_private_replaced_when_stale_and_removed() {
    let (fake, proxy, path) = setup();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    // Only root may give a directory away; for others the two groups are one anyway.
    let _ = std::os::unix::fs::chown(fake.directory.path(), None, Some(4321));
    let other = Proxy::bind(&fake.directory.path().join("db.sock"), &Arc::default(), None, None).unwrap();
    let group = |path: &std::path::Path| std::fs::metadata(path).unwrap().gid();
    assert_eq!(group(other.path()), group(fake.directory.path()));
    drop(other);
    let error = Proxy::bind(&path, &Arc::default(), None, None).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("web.sock"), "{error}");
    drop(proxy);
    assert!(!path.exists());
    // A socket of a daemon that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let proxy = Proxy::bind(&path, &Arc::default(), None, None).unwrap();
    Peer::connect(&path).await;
    // Somebody else's file is not ours to replace, nor theirs to be removed by us.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    assert_eq!(
        Proxy::bind(&path, &Arc::default(), None, None).unwrap_err().kind(),
        std::io::ErrorKind::AlreadyExists
    );
    drop(proxy);
    assert!(path.exists());
    let missing = fake.directory.path().join("no/such/web.sock");
    assert_eq!(
        Proxy::bind(&missing, &Arc::default(), None, None).unwrap_err().kind(),
        std::io::ErrorKind::NotFound
    );
    let long = fake.directory.path().join("x".repeat(200));
    assert!(Proxy::bind(&long.join("web.sock"), &Arc::default(), None, None).is_err());
    let left: Vec<_> =
        std::fs::read_dir(fake.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn outside_a_runtime_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    assert!(Proxy::bind(&directory.path().join("web.sock"), &Arc::default(), None, None).is_err());
}

type Notes = Arc<std::sync::Mutex<Vec<(Tracked, Stage)>>>;

/// A proxy that notes what its owner is told.
fn watched() -> (FakeVmm, Proxy, PathBuf, Notes) {
    let fake = FakeVmm::new();
    let path = fake.directory.path().join("web.sock");
    let notes = Notes::default();
    let to = Arc::clone(&notes);
    let watch: super::rights::Watch =
        Arc::new(move |told: Told| to.lock().unwrap().push((told.command, told.stage)));
    let proxy = Proxy::bind(&path, &Arc::default(), Some(watch), None).unwrap();
    (fake, proxy, path, notes)
}

#[tokio::test]
async fn the_owner_is_told_before_and_after() {
    let (fake, proxy, path, notes) = watched();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let (mut client, _) = Peer::connect(&path).await;
    client.send("{\"execute\":\"query-status\"}").await;
    let request = vmm.message().await;
    vmm.answer(&request, json!({})).await;
    client.message().await;
    assert!(notes.lock().unwrap().is_empty());

    client.send("{\"execute\":\"stop\"}").await;
    let request = vmm.message().await;
    assert_eq!(*notes.lock().unwrap(), [(Tracked::Stop, Stage::Asked)]);
    vmm.answer(&request, json!({})).await;
    client.message().await;
    assert_eq!(notes.lock().unwrap().pop(), Some((Tracked::Stop, Stage::Done)));

    client.send("{\"execute\":\"device_add\",\"arguments\":{\"id\":\"d\"}}").await;
    let id = vmm.message().await["id"].clone();
    vmm.send(json!({"error": {"class": "GenericError", "desc": "no"}, "id": id}).to_string()).await;
    client.message().await;
    assert_eq!(notes.lock().unwrap().pop(), Some((Tracked::DeviceAdd("d".into()), Stage::Refused)));

    // `quit`, and gone: it is done or not, nobody waits for it.
    client.send("{\"execute\":\"quit\"}").await;
    vmm.message().await;
    drop(client);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    drop(vmm);
    drop(proxy);
    while notes.lock().unwrap().last() != Some(&(Tracked::Quit, Stage::Left)) {
        assert!(tokio::time::Instant::now() < deadline, "{notes:?}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_reader_changes_nothing_and_its_descriptors_go_nowhere() {
    use std::os::fd::OwnedFd;

    let (fake, proxy, _, notes) = watched();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let reader = Client { mode: Mode::Query, ..ROOT };
    let end = std::os::unix::net::UnixStream::from(proxy.open(reader).unwrap());
    end.set_nonblocking(true).unwrap();
    let mut client = Peer::new(UnixStream::from_std(end).unwrap());
    client.message().await;
    let (read, mut write) = std::io::pipe().unwrap();
    let command = b"{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"x\"},\"id\":3}";
    client.stream.writable().await.unwrap();
    super::wire::send(&client.stream, command, &[OwnedFd::from(read)]).unwrap();
    let answer = client.message().await;
    assert!(answer["id"] == 3 && answer["error"]["desc"].as_str().unwrap().contains("read-only"), "{answer}");
    // Nobody holds the other end any more.
    assert_eq!(std::io::Write::write(&mut write, b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    for command in ["quit", "stop", "device_del", "x-anything"] {
        let answer = client.ask(&format!("{{\"execute\":\"{command}\"}}")).await;
        assert_eq!(answer["error"]["class"], "GenericError", "{command}");
        let refused = proxy.caller().execute_raw(reader, &format!("{{\"execute\":\"{command}\"}}")).await;
        assert!(matches!(refused, Err(QmpError::Refused { .. })), "{command}");
    }
    client.send("{\"execute\":\"query-status\"}").await;
    // The first that the VMM hears of this client.
    let request = vmm.message().await;
    assert_eq!(request["execute"], "query-status");
    assert!(notes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn single_commands_in_bulk_take_no_more_turns_than_a_few_clients() {
    let (fake, proxy, path) = setup();
    let (monitor, mut vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let mut bulk = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let caller = proxy.caller();
        bulk.spawn(async move { caller.execute_raw(ROOT, "{\"execute\":\"bulk\"}").await });
    }
    assert_eq!(vmm.message().await["execute"], "bulk");
    let (mut client, _) = Peer::connect(&path).await;
    client.send("{\"execute\":\"mine\"}").await;
    // Unanswered as they are, only a few of the bulk stand before it.
    let mut before = 1;
    while vmm.message().await["execute"] == "bulk" {
        before += 1;
    }
    assert!(before <= 4, "{before}");
    bulk.shutdown().await;
}
