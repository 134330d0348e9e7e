//! Clients that come, go, half-close, do not read; sockets that are stale or in use.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::event::EventLoop;

fn open(
    kind: &ChardevKind,
    traffic: Traffic,
    ops: &mut Ops<'_>,
) -> Result<Arc<dyn CharBackend>, ChardevError> {
    super::open(kind, traffic, &Inherited::default(), ops)
}

/// Remembers what it is told; takes `room` bytes at a time.
struct Front {
    room: AtomicUsize,
    got: Mutex<Vec<u8>>,
    opened: AtomicUsize,
    closed: AtomicUsize,
}

impl Front {
    fn new(room: usize) -> Arc<Self> {
        Arc::new(Self {
            room: AtomicUsize::new(room),
            got: Mutex::default(),
            opened: AtomicUsize::new(0),
            closed: AtomicUsize::new(0),
        })
    }

    fn got(&self) -> Vec<u8> {
        self.got.lock().unwrap().clone()
    }
}

impl FrontEnd for Front {
    fn can_receive(&self) -> usize {
        self.room.load(Ordering::SeqCst)
    }
    fn receive(&self, data: &[u8]) {
        self.room.fetch_sub(data.len(), Ordering::SeqCst);
        self.got.lock().unwrap().extend(data);
    }
    fn opened(&self) {
        self.opened.fetch_add(1, Ordering::SeqCst);
    }
    fn closed(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }
}

/// Runs the loop until `done`; the deadline only guards against a hang.
fn run_until(event_loop: &mut EventLoop, mut done: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(std::time::Instant::now() < end, "nothing happened for 20 s");
        event_loop.turn(Some(Duration::from_millis(5))).unwrap();
    }
}

fn unix(path: &Path) -> ChardevKind {
    ChardevKind::UnixSocket { path: path.to_owned(), server: true, nowait: true }
}

fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_nonblocking(true).unwrap();
    client
}

fn read_into(client: &mut UnixStream, text: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 65536];
    match client.read(&mut buffer) {
        Ok(n) => text.extend(&buffer[..n]),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
        Err(e) => panic!("{e}"),
    }
    !text.is_empty()
}

#[test]
fn keeps_the_newest_output_for_the_next_client_and_serves_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut event_loop = EventLoop::new().unwrap();
    let backend = open(&unix(&path), Traffic::Line, &mut event_loop.ops()).unwrap();
    let front = Front::new(100);
    backend.attach(Arc::<Front>::clone(&front));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    backend.write(b"lost");
    backend.write(&vec![b'x'; 16 << 10]);
    let mut first = client(&path);
    let mut second = client(&path);
    let mut text = vec![];
    run_until(&mut event_loop, || read_into(&mut first, &mut text) && text.len() >= 16 << 10);
    assert_eq!(text, vec![b'x'; 16 << 10]);

    second.write_all(b"two").unwrap();
    first.write_all(b"one").unwrap();
    run_until(&mut event_loop, || front.got().len() == 3);
    assert_eq!(front.got(), b"one");
    drop(first);
    run_until(&mut event_loop, || front.got().len() == 6);
    assert_eq!(front.got(), b"onetwo");
    assert_eq!((front.opened.load(Ordering::SeqCst), front.closed.load(Ordering::SeqCst)), (2, 1));

    drop((backend, event_loop));
    assert!(!path.exists());
}

#[test]
fn a_client_that_was_there_first_is_announced_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut event_loop = EventLoop::new().unwrap();
    let backend = open(&unix(&path), Traffic::Messages, &mut event_loop.ops()).unwrap();
    let front = Front::new(100);
    // Both are waiting when the loop looks for the first time.
    let mut early = client(&path);
    backend.attach(Arc::<Front>::clone(&front));
    early.write_all(b"x").unwrap();
    run_until(&mut event_loop, || front.got() == b"x");
    for _ in 0..3 {
        event_loop.turn(Some(Duration::from_millis(1))).unwrap();
    }
    assert_eq!(front.opened.load(Ordering::SeqCst), 1);
}

#[test]
fn a_client_that_stopped_writing_still_gets_output() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut event_loop = EventLoop::new().unwrap();
    let backend = open(&unix(&path), Traffic::Line, &mut event_loop.ops()).unwrap();
    let front = Front::new(100);
    backend.attach(Arc::<Front>::clone(&front));
    let mut client = client(&path);
    client.write_all(b"in").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    run_until(&mut event_loop, || front.got() == b"in");
    backend.write(b"out");
    let mut text = vec![];
    run_until(&mut event_loop, || read_into(&mut client, &mut text));
    assert_eq!(text, b"out");
    drop(client);
    run_until(&mut event_loop, || front.closed.load(Ordering::SeqCst) == 1);
}

#[test]
fn what_a_client_sends_at_the_end_does_not_cost_it_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut event_loop = EventLoop::new().unwrap();
    let backend = open(&unix(&path), Traffic::Messages, &mut event_loop.ops()).unwrap();
    let front = Front::new(100);
    backend.attach(Arc::<Front>::clone(&front));
    let mut client = client(&path);
    client.write_all(b"quit").unwrap();
    run_until(&mut event_loop, || front.got() == b"quit");
    backend.write(b"answer");
    // The rest of a line, say, after the loop has run for the last time.
    client.write_all(b"\n").unwrap();
    backend.drain(Duration::from_secs(1));
    drop((backend, event_loop));
    client.set_nonblocking(false).unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
}

#[test]
fn a_full_front_end_stops_input_and_hang_up_is_still_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut event_loop = EventLoop::new().unwrap();
    let backend = open(&unix(&path), Traffic::Line, &mut event_loop.ops()).unwrap();
    let front = Front::new(2);
    backend.attach(Arc::<Front>::clone(&front));
    let mut first = client(&path);
    first.write_all(b"abcd").unwrap();
    run_until(&mut event_loop, || front.got() == b"ab");
    front.room.store(1, Ordering::SeqCst);
    backend.front_end_ready();
    run_until(&mut event_loop, || front.got() == b"abc");
    drop(first);
    run_until(&mut event_loop, || front.closed.load(Ordering::SeqCst) == 1);
}

#[test]
fn a_line_that_nobody_reads_loses_the_oldest_and_a_message_client_is_dropped() {
    for traffic in [Traffic::Line, Traffic::Messages] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut event_loop = EventLoop::new().unwrap();
        let backend = open(&unix(&path), traffic, &mut event_loop.ops()).unwrap();
        let front = Front::new(1);
        backend.attach(Arc::<Front>::clone(&front));
        let mut client = client(&path);
        run_until(&mut event_loop, || front.opened.load(Ordering::SeqCst) == 1);
        for _ in 0..400 {
            backend.write(&[b'o'; 8192]);
        }
        backend.write(b"newest");
        if traffic == Traffic::Messages {
            run_until(&mut event_loop, || front.closed.load(Ordering::SeqCst) == 1);
            continue;
        }
        let mut text = vec![];
        run_until(&mut event_loop, || {
            read_into(&mut client, &mut text);
            text.ends_with(b"newest")
        });
        assert!(text.len() < 400 * 8192);
    }
}

#[test]
fn a_socket_in_use_is_refused_a_stale_one_replaced_and_a_file_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut event_loop = EventLoop::new().unwrap();
    let live = UnixListener::bind(&path).unwrap();
    let error = open(&unix(&path), Traffic::Line, &mut event_loop.ops()).err().unwrap().to_string();
    assert!(error.contains("a running process listens there already"), "{error}");
    drop(live);
    drop(open(&unix(&path), Traffic::Line, &mut event_loop.ops()).unwrap());

    let file = dir.path().join("f");
    std::fs::write(&file, "precious").unwrap();
    let error = open(&unix(&file), Traffic::Line, &mut event_loop.ops()).err().unwrap().to_string();
    assert!(error.contains("is not a socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");

    let long = dir.path().join("l".repeat(108));
    let error = open(&unix(&long), Traffic::Line, &mut event_loop.ops()).err().unwrap().to_string();
    assert!(error.contains("longer than 107 bytes"), "{error}");
    let missing = dir.path().join("no/s");
    let error = open(&unix(&missing), Traffic::Line, &mut event_loop.ops()).err().unwrap().to_string();
    assert!(error.contains("No such file or directory"), "{error}");
}

#[test]
fn a_file_is_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, "a").unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let backend = open(&ChardevKind::File(path.clone()), Traffic::Line, &mut event_loop.ops()).unwrap();
    backend.write(b"b");
    assert_eq!(std::fs::read(&path).unwrap(), b"ab");
}

#[test]
fn a_pty_carries_both_directions_and_survives_without_an_opener() {
    let mut event_loop = EventLoop::new().unwrap();
    let backend = open(&ChardevKind::Pty, Traffic::Line, &mut event_loop.ops()).unwrap();
    let front = Front::new(10);
    backend.attach(Arc::<Front>::clone(&front));
    for _ in 0..3 {
        event_loop.turn(Some(Duration::from_millis(1))).unwrap();
    }
    for _ in 0..100 {
        backend.write(&[b'x'; 8192]);
    }
    assert_eq!(front.got(), b"");
    backend.drain(Duration::from_millis(1));
}

#[test]
fn input_that_cannot_be_watched_is_read_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, vec![b'y'; 100_000]).unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let port = Port::new(event_loop.handle(), Traffic::Line.policy());
    let input = std::fs::File::open(&path).unwrap().into();
    let output = std::fs::File::create(dir.path().join("o")).unwrap().into();
    let front = Front::new(70_000);
    port.connect(Stream::standard(input, output, None, None), &mut event_loop.ops());
    port.attach(Arc::<Front>::clone(&front));
    run_until(&mut event_loop, || front.got().len() == 70_000);
    front.room.store(50_000, Ordering::SeqCst);
    port.front_end_ready();
    run_until(&mut event_loop, || front.got().len() == 100_000);
}

#[test]
fn knows_that_a_client_has_come_even_if_it_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut event_loop = EventLoop::new().unwrap();
    let kind = ChardevKind::UnixSocket { path: path.clone(), server: true, nowait: false };
    assert!(kind.awaits_client() && !unix(&path).awaits_client());
    let backend = open(&kind, Traffic::Line, &mut event_loop.ops()).unwrap();
    assert!(!backend.had_client());
    drop(UnixStream::connect(&path).unwrap());
    run_until(&mut event_loop, || backend.had_client());
    event_loop.turn(Some(Duration::from_millis(1))).unwrap();
    assert!(backend.had_client());
    let file = ChardevKind::File(dir.path().join("f"));
    assert!(open(&file, Traffic::Line, &mut event_loop.ops()).unwrap().had_client());
}

#[test]
fn connects_once_as_a_client() {
    use std::os::unix::net::UnixListener;

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let kind = ChardevKind::UnixSocket { path: path.clone(), server: false, nowait: false };
    let mut event_loop = EventLoop::new().unwrap();
    let error = open(&kind, Traffic::Line, &mut event_loop.ops()).err().unwrap().to_string();
    assert!(error.contains("start its server first"), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let backend = open(&kind, Traffic::Line, &mut event_loop.ops()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_nonblocking(true).unwrap();
    let front = Front::new(100);
    backend.attach(Arc::<Front>::clone(&front));
    server.write_all(b"in").unwrap();
    backend.write(b"out");
    let mut text = vec![];
    run_until(&mut event_loop, || {
        read_into(&mut server, &mut text) && text.len() == 3 && front.got() == b"in"
    });
    drop(server);
    run_until(&mut event_loop, || front.closed.load(Ordering::SeqCst) == 1);
    // Nobody is there, and nobody comes.
    backend.write(b"lost");
    assert_eq!((front.opened.load(Ordering::SeqCst), backend.room()), (1, usize::MAX));
    drop((backend, event_loop));
    assert!(path.exists(), "the file is the server's");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let kind = ChardevKind::TcpSocket { addr, server: false, nowait: false };
    let backend = open(&kind, Traffic::Messages, &mut event_loop.ops()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let front = Front::new(100);
    backend.attach(Arc::<Front>::clone(&front));
    server.write_all(b"tcp").unwrap();
    run_until(&mut event_loop, || front.got() == b"tcp");
}

#[test]
fn a_socket_that_was_handed_over_is_listened_to_and_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let bound = UnixListener::bind(&path).unwrap();
    // Somebody was there before the VMM: the socket listens already.
    let mut early = client(&path);
    let inherited = Inherited::of(vec![(path.clone(), bound.into())]);
    let mut event_loop = EventLoop::new().unwrap();
    let backend = super::open(&unix(&path), Traffic::Line, &inherited, &mut event_loop.ops()).unwrap();
    let front = Front::new(100);
    backend.attach(Arc::<Front>::clone(&front));
    early.write_all(b"first").unwrap();
    run_until(&mut event_loop, || front.got().len() == 5);
    drop((backend, event_loop));
    assert!(path.exists(), "it is its maker's to remove");

    // A second user of the name is on its own, as by hand.
    let mut event_loop = EventLoop::new().unwrap();
    let backend = super::open(&unix(&path), Traffic::Line, &inherited, &mut event_loop.ops()).unwrap();
    drop((backend, event_loop));
    assert!(!path.exists());

    let file = std::fs::File::open("/dev/null").unwrap();
    let inherited = Inherited::of(vec![(path.clone(), file.into())]);
    let mut event_loop = EventLoop::new().unwrap();
    let refused = super::open(&unix(&path), Traffic::Line, &inherited, &mut event_loop.ops());
    assert!(refused.is_err_and(|error| error.to_string().contains(&path.display().to_string())));
}
