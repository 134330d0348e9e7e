//! The whole device, from registers to a character device that does as it is told.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Weak};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::chardev::FrontEnd;
use crate::virtio::Worker;
use crate::virtio::testing::{DATA, PLAIN, RAM, Rig, Ring};

const RX0: usize = 0;
const TX0: usize = 1;
const IN: usize = 2;
const OUT: usize = 3;
const RX1: usize = 4;
const TX1: usize = 5;
const QUEUES: u16 = 6;

/// The host's side.
struct Host {
    front: Mutex<Option<Weak<dyn FrontEnd>>>,
    got: Mutex<Vec<u8>>,
    room: AtomicUsize,
    ready: AtomicUsize,
}

impl CharBackend for Host {
    fn write(&self, data: &[u8]) {
        self.got.lock().unwrap().extend(data);
        let room = self.room.load(Ordering::SeqCst);
        self.room.store(room.saturating_sub(data.len()), Ordering::SeqCst);
    }
    fn attach(&self, front: Arc<dyn FrontEnd>) {
        *self.front.lock().unwrap() = Some(Arc::downgrade(&front));
    }
    fn front_end_ready(&self) {
        self.ready.fetch_add(1, Ordering::SeqCst);
    }
    fn room(&self) -> usize {
        self.room.load(Ordering::SeqCst)
    }
}

struct Bench {
    rig: Rig,
    rings: Vec<Ring>,
    hosts: [Arc<Host>; 2],
    main_loop: LoopHandle,
    _thread: Worker,
}

fn bench_with(features: u64, queues: u16) -> Bench {
    let thread = Worker::new("t");
    let main_loop = thread.start().unwrap();
    let host = || {
        Arc::new(Host {
            front: Mutex::default(),
            got: Mutex::default(),
            room: AtomicUsize::new(1 << 30),
            ready: AtomicUsize::new(0),
        })
    };
    let hosts = [host(), host()];
    let port = |nr: u8, console, name: Option<&str>| PortOptions {
        nr,
        console,
        name: name.map(Into::into),
        backend: Arc::<Host>::clone(&hosts[usize::from(nr)]),
    };
    let ports = vec![port(1, false, Some("agent")), port(0, true, None)];
    let rig = Rig::new(Console::new(ports, main_loop.clone()));
    let rings = rig.start(features, queues, 64);
    Bench { rig, rings, hosts, main_loop, _thread: thread }
}

fn bench() -> Bench {
    bench_with(!0, QUEUES)
}

impl Bench {
    /// Calls the port's front end as its character device would: on the main loop.
    fn host<R: Send + 'static>(
        &self,
        port: usize,
        work: impl FnOnce(&dyn FrontEnd) -> R + Send + 'static,
    ) -> R {
        let front = self.hosts[port].front.lock().unwrap().as_ref().unwrap().upgrade().unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        self.main_loop.post(move |_| tx.send(work(&*front)).unwrap());
        rx.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rig.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// The driver sends bytes on a queue and waits for the buffer.
    fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.rig.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let head = self.rings[queue].add(&[(DATA, bytes.len() as u32, false)]);
        self.rig.kick(&self.rings[queue]);
        assert_eq!(self.rig.used(&mut self.rings[queue]), (u32::from(head), 0));
    }

    fn say(&mut self, nr: u32, event: u16, value: u16) {
        self.send(OUT, &[&nr.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat());
    }

    /// The driver gives a buffer and waits for what comes in it.
    fn hear(&mut self, queue: usize) -> Vec<u8> {
        let at = DATA + 0x1_0000 + 0x1000 * queue as u64;
        let head = self.rings[queue].add(&[(at, 64, true)]);
        self.rig.kick(&self.rings[queue]);
        let (used, len) = self.rig.used(&mut self.rings[queue]);
        assert_eq!(used, u32::from(head));
        self.guest(at, len as usize)
    }

    fn hear_control(&mut self) -> (u8, u8, u8) {
        let bytes = self.hear(IN);
        (bytes[0], bytes[4], bytes[6])
    }

    /// Both ports known, open, and told.
    fn introduce(&mut self) {
        self.say(0, 0, 1);
        assert_eq!([self.hear_control(), self.hear_control()], [(0, 1, 1), (1, 1, 1)]);
        self.say(0, 3, 1);
        assert_eq!([self.hear_control(), self.hear_control()], [(0, 4, 1), (0, 6, 1)]);
        self.say(1, 3, 1);
        assert_eq!(self.hear(IN)[8..], *b"agent");
        self.say(0, 6, 1);
        self.say(1, 6, 1);
    }
}

#[test]
fn ports_are_announced_and_carry_bytes_both_ways() {
    for features in [!0, PLAIN] {
        let mut b = bench_with(features, QUEUES);
        assert_eq!(b.rig.get(0x104), 2);
        b.introduce();
        b.host(1, |front| front.opened());
        assert_eq!(b.hear_control(), (1, 6, 1));
        b.send(TX0, b"login: ");
        b.send(TX1, &[9; 10_000]);
        assert_eq!(*b.hosts[0].got.lock().unwrap(), b"login: ");
        assert_eq!(*b.hosts[1].got.lock().unwrap(), [9; 10_000]);
        for (port, queue) in [(0, RX0), (1, RX1)] {
            assert_eq!(b.host(port, |front| front.can_receive()), 4096);
            b.host(port, |front| front.receive(b"root\n"));
            assert_eq!(b.hear(queue), b"root\n");
            assert_eq!(b.host(port, |front| front.can_receive()), 4096);
        }
    }
}

#[test]
fn clients_come_and_go_and_the_guest_hears_it_after_the_last_byte() {
    let mut b = bench();
    b.introduce();
    b.host(1, |front| front.opened());
    assert_eq!(b.hear_control(), (1, 6, 1));
    b.host(1, |front| {
        front.receive(&[1; 100]);
        front.closed();
        front.opened();
    });
    // The close waits for the bytes before it; the second half of them is in the second buffer.
    assert_eq!(b.hear(RX1).len(), 64);
    assert_eq!(b.hear(RX1).len(), 36);
    assert_eq!([b.hear_control(), b.hear_control()], [(1, 6, 0), (1, 6, 1)]);
    // A console is always there.
    b.host(0, |front| front.opened());
    b.host(0, |front| front.closed());
    b.host(1, |front| front.closed());
    assert_eq!(b.hear_control(), (1, 6, 0));
}

#[test]
fn a_host_that_does_not_read_makes_a_stream_wait_and_a_console_not() {
    let mut b = bench();
    b.introduce();
    for host in &b.hosts {
        host.room.store(10, Ordering::SeqCst);
    }
    b.send(TX0, &[7; 100]);
    b.rig.memory.write_slice(&[8; 100], GuestAddress(DATA + 4096)).unwrap();
    let head = b.rings[TX1].add(&[(DATA + 4096, 100, false)]);
    b.rig.kick(&b.rings[TX1]);
    // The other queue is served meanwhile, and after it on the same thread.
    b.send(TX0, &[7; 100]);
    b.host(1, |_| ());
    assert_eq!(b.hosts[1].got.lock().unwrap().len(), 10);
    assert_eq!(b.rings[TX1].next_used(), None);
    b.hosts[1].room.store(1000, Ordering::SeqCst);
    b.host(1, |front| front.writable());
    assert_eq!(b.rig.used(&mut b.rings[TX1]), (u32::from(head), 0));
    assert_eq!(*b.hosts[1].got.lock().unwrap(), [8; 100]);
}

#[test]
fn a_guest_that_does_not_read_stops_the_host() {
    let mut b = bench();
    assert_eq!(b.host(1, |front| front.can_receive()), 0);
    b.introduce();
    assert_eq!(b.host(1, |front| front.can_receive()), 4096);
    b.host(1, |front| front.receive(&[1; 4096]));
    assert_eq!(b.host(1, |front| front.can_receive()), 0);
    let ready = b.hosts[1].ready.load(Ordering::SeqCst);
    b.hear(RX1);
    b.host(1, |_| ());
    assert!(b.hosts[1].ready.load(Ordering::SeqCst) > ready);
    assert_eq!(b.host(1, |front| front.can_receive()), 64);
    // The guest's reader goes: what was on its way to it goes too.
    b.say(1, 6, 0);
    assert_eq!(b.host(1, |front| front.can_receive()), 0);
    b.say(1, 6, 1);
    assert_eq!(b.host(1, |front| front.can_receive()), 4096);
}

#[test]
fn a_driver_without_multiport_has_port_0() {
    let mut b = bench_with(!F_MULTIPORT, 2);
    b.send(TX0, b"hi");
    assert_eq!(*b.hosts[0].got.lock().unwrap(), b"hi");
    b.host(0, |front| front.receive(b"x"));
    assert_eq!(b.hear(RX0), b"x");
    assert_eq!(b.host(1, |front| front.can_receive()), 0);
}

#[test]
fn nonsense_on_the_control_queue_changes_nothing() {
    let mut b = bench();
    for (nr, event, value) in [(2, 3, 1), (u32::MAX, 6, 1), (0, 99, 1), (0, 1, 1), (0x101, 6, 1)] {
        b.say(nr, event, value);
    }
    b.send(OUT, &[1, 2, 3]);
    b.send(OUT, &[]);
    // Again and again, with nobody to listen to the answers.
    for _ in 0..300 {
        b.say(0, 0, 1);
        b.say(1, 3, 1);
    }
    b.say(0, 0, 1);
    b.introduce();
    b.send(TX0, b"ok");
    assert_eq!(*b.hosts[0].got.lock().unwrap(), b"ok");
}

#[test]
fn odd_buffers_come_back() {
    let mut b = bench();
    b.introduce();
    b.host(0, |front| front.receive(b"abc"));
    let no_room = b.rings[RX0].add(&[(DATA, 8, false)]);
    let small = b.rings[RX0].add(&[(DATA + 16, 1, true), (DATA + 32, 1, true)]);
    b.rig.kick(&b.rings[RX0]);
    assert_eq!(b.rig.used(&mut b.rings[RX0]), (u32::from(no_room), 0));
    assert_eq!(b.rig.used(&mut b.rings[RX0]), (u32::from(small), 2));
    assert_eq!(b.hear(RX0), b"c");
    // Only something to write to, on a queue that the device reads; and a request of megabytes.
    for parts in [[(DATA, 8, true)], [(DATA, (RAM - DATA) as u32, false)]] {
        let head = b.rings[TX0].add(&parts);
        b.rig.kick(&b.rings[TX0]);
        assert_eq!(b.rig.used(&mut b.rings[TX0]), (u32::from(head), 0));
    }
    assert_eq!(b.hosts[0].got.lock().unwrap().len() as u64, RAM - DATA);
}

#[test]
fn hostile_rings_need_a_reset_and_then_work_again() {
    type Wrong = fn(&mut Ring);
    let wrongs: [(&str, Wrong); 5] = [
        ("head out of range", |r| r.offer(64)),
        ("index jumps", |r| r.set_avail_index(r.avail_index.wrapping_add(65))),
        ("not in RAM", |r| _ = r.add(&[(RAM, 16, false)])),
        ("order", |r| _ = r.add(&[(DATA, 8, true), (DATA, 8, false)])),
        ("a loop", |r| {
            r.put(r.desc, 0, DATA, 1, 1, 0);
            r.offer(0);
        }),
    ];
    for queue in [RX0, TX0, IN, OUT, RX1, TX1] {
        for (what, wrong) in wrongs {
            let mut b = bench();
            b.introduce();
            // Something to put into the buffers of a queue to the driver.
            b.host(0, |front| front.receive(b"x"));
            b.host(1, |front| {
                front.opened();
                front.receive(b"x");
            });
            wrong(&mut b.rings[queue]);
            b.rig.kick(&b.rings[queue]);
            b.rig.wait_needs_reset();
            assert_eq!(b.host(1, |front| front.can_receive()), 0, "{queue}: {what}");
            b.rings = b.rig.start(!0, QUEUES, 64);
            b.say(0, 0, 1);
            assert_eq!(b.hear_control(), (0, 1, 1), "{queue}: {what}");
            b.send(TX0, b"ok");
        }
    }
}

#[test]
fn a_reset_in_mid_flight_leaves_guest_and_host_alone() {
    let mut b = bench();
    b.introduce();
    let at = DATA + 0x2_0000;
    b.rings[RX1].add(&[(at, 8, true)]);
    b.rig.kick(&b.rings[RX1]);
    b.rig.transport.reset();
    assert_eq!(b.host(1, |front| front.can_receive()), 0);
    b.host(1, |front| {
        front.opened();
        front.receive(b"late");
        front.closed();
        front.writable();
    });
    assert_eq!(b.guest(at, 8), [0; 8]);
}

#[test]
fn bytes_on_their_way_arrive_once_after_a_snapshot() {
    for elsewhere in [false, true] {
        let mut b = bench();
        b.introduce();
        b.host(1, |front| front.opened());
        assert_eq!(b.hear_control(), (1, 6, 1));
        // The host takes three of ten bytes, and has sent some that the guest has no buffer for.
        b.hosts[1].room.store(3, Ordering::SeqCst);
        b.rig.memory.write_slice(b"0123456789", GuestAddress(DATA)).unwrap();
        let head = b.rings[TX1].add(&[(DATA, 10, false)]);
        b.rig.kick(&b.rings[TX1]);
        b.rig.wait(|| (b.hosts[1].got.lock().unwrap().len() == 3).then_some(()));
        b.host(1, |front| front.receive(b"input"));
        for _ in 0..2 {
            b.rig.stand_and_go_on(elsewhere);
        }
        b.hosts[1].room.store(100, Ordering::SeqCst);
        b.host(1, |front| front.writable());
        assert_eq!(b.rig.used(&mut b.rings[TX1]), (u32::from(head), 0));
        assert_eq!(*b.hosts[1].got.lock().unwrap(), b"0123456789");
        assert_eq!(b.hear(RX1), b"input");
    }
}
