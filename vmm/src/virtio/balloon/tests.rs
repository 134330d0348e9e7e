//! The whole device, from registers to the pages that go.

use std::sync::Mutex;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::discard::tests::resident;
use crate::virtio::testing::{DATA, HIGH, HIGH_END, PLAIN, RAM, Rig, Ring};

const MEMORY: u64 = RAM + (HIGH_END - HIGH);
/// Where tests put what the device reads: the first megabyte holds the rings.
const TEXT: u64 = DATA;
/// Pages that may go.
const FREE: u64 = 2 << 20;

struct Bench {
    rig: Rig,
    port: Arc<Port>,
    rings: Vec<Ring>,
    told: Arc<Mutex<Vec<u64>>>,
}

fn bench_with(features: u64, reporting: bool, queues: u16) -> Bench {
    bench_of(features, reporting, queues, None)
}

fn bench_of(features: u64, reporting: bool, queues: u16, auto: Option<AutoBalloon>) -> Bench {
    let balloon = Balloon::new(BalloonOptions {
        memory: MEMORY,
        deflate_on_oom: true,
        free_page_reporting: reporting,
        auto,
        worker: Worker::new("t"),
    });
    let port = balloon.port();
    let told = Arc::new(Mutex::new(vec![]));
    let tell = Arc::clone(&told);
    port.on_change(move |bytes| tell.lock().unwrap().push(bytes));
    let rig = Rig::new(balloon);
    let rings = rig.start(features, queues, 64);
    Bench { rig, port, rings, told }
}

fn bench() -> Bench {
    bench_with(!0, false, 3)
}

impl Bench {
    fn read32(&self, offset: u64) -> u32 {
        self.rig.get(0x100 + offset)
    }

    /// Writes page numbers and sends them on a queue; returns when they are back.
    fn send(&mut self, queue: usize, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.rig.memory.write_slice(&bytes, GuestAddress(TEXT)).unwrap();
        let ring = &mut self.rings[queue];
        let head = ring.add(&[(TEXT, bytes.len() as u32, false)]);
        self.rig.kick(ring);
        assert_eq!(self.rig.used(&mut self.rings[queue]), (u32::from(head), 0));
    }

    fn touch(&self, from: u64, len: u64) {
        self.rig.memory.write_slice(&vec![7; len as usize], GuestAddress(from)).unwrap();
    }

    fn byte(&self, at: u64) -> u8 {
        self.rig.memory.read_obj(GuestAddress(at)).unwrap()
    }
}

#[test]
fn pages_in_the_balloon_leave_the_host_and_come_back_empty() {
    for features in [!0, PLAIN] {
        let mut b = bench_with(features, false, 3);
        b.touch(FREE, 1 << 20);
        b.touch(HIGH, 1 << 20);
        let before = resident(&b.rig.memory);
        let mut numbers: Vec<u32> = (512..512 + 256).collect();
        numbers.extend(4096..4096 + 256);
        // Repetition, disorder, the hole, and far away.
        numbers.extend([512, 2000, u32::MAX, 4097, 1 << 20]);
        numbers.reverse();
        b.send(0, &numbers);
        let after = resident(&b.rig.memory);
        assert!(after + 2000 < before, "{before} kB, then {after} kB");
        assert_eq!((b.byte(FREE), b.byte(HIGH), b.byte(HIGH_END - 1)), (0, 0, 0));
        b.touch(FREE, 4096);
        b.send(1, &numbers);
        assert_eq!(b.byte(FREE), 7);
    }
}

#[test]
fn the_target_is_clamped_and_the_guest_is_told() {
    let b = bench();
    assert_eq!(b.port.actual(), MEMORY);
    let edges = b.rig.line.edges();
    b.port.set_target(MEMORY - 8192 - 1);
    assert_eq!((b.read32(0), b.rig.line.edges()), (2, edges + 1));
    for (target, pages) in [(MEMORY * 2, 0), (u64::MAX, 0), (0, (MEMORY / 4096) as u32), (MEMORY - 4095, 0)] {
        b.port.set_target(target);
        assert_eq!(b.read32(0), pages, "{target}");
    }
}

#[test]
fn what_the_guest_says_is_told_once_and_never_more_than_it_has() {
    let b = bench();
    b.rig.set(0x104, 3);
    b.rig.set(0x104, 3);
    assert_eq!((b.port.actual(), b.read32(4)), (MEMORY - 3 * 4096, 3));
    b.rig.set(0x104, u32::MAX);
    assert_eq!(b.port.actual(), 0);
    // Not the driver's to write.
    b.rig.set(0x100, 77);
    assert_eq!(b.read32(0), 0);
    // One byte at a time, and over the end.
    b.rig.set(0x104, 0);
    b.rig.w1.write(0x105, &[1]);
    b.rig.w1.write(0x107, &[0, 0, 0, 0]);
    assert_eq!(b.read32(4), 256);
    b.rig.transport.reset();
    assert_eq!(b.port.actual(), MEMORY);
    let told = b.told.lock().unwrap().clone();
    assert_eq!(told, [MEMORY - 3 * 4096, 0, MEMORY, MEMORY - 256 * 4096, MEMORY]);
}

#[test]
fn writes_beside_the_number_of_pages_change_nothing_else() {
    let mut balloon = Balloon::new(BalloonOptions {
        memory: MEMORY,
        deflate_on_oom: false,
        free_page_reporting: false,
        auto: None,
        worker: Worker::new("t"),
    });
    for (offset, bytes, want) in [
        (0, &[0xff; 4][..], 0),
        (8, &[0xff; 8], 0),
        (u64::MAX, &[0xff; 8], 0),
        (u64::MAX - 3, &[0xff; 16], 0),
        (4, &[], 0),
        (3, &[0xff, 7], 7),
        (5, &[1], 0x107),
        (7, &[0, 0xff], 0x107),
        (0, &[0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff], 1),
    ] {
        balloon.write_config(offset, bytes);
        assert_eq!(balloon.port.actual_pages(), want, "{offset:#x} {bytes:?}");
    }
}

#[test]
fn a_target_outlives_the_driver() {
    let b = bench();
    b.port.set_target(MEMORY - 4096);
    b.rig.transport.reset();
    assert!(!b.port.has_driver());
    b.port.set_target(MEMORY - 8192);
    b.rig.start(!0, 3, 64);
    assert!(b.port.has_driver());
    assert_eq!(b.read32(0), 2);
}

fn stats(free: u64) -> Vec<u8> {
    [4u16.to_le_bytes().to_vec(), free.to_le_bytes().to_vec()].concat()
}

#[test]
fn statistics_are_kept_and_refreshed_on_demand() {
    let mut b = bench();
    assert_eq!(b.port.stats(), None);
    for free in [1000, 2000] {
        b.rig.memory.write_slice(&stats(free), GuestAddress(TEXT)).unwrap();
        let head = b.rings[2].add(&[(TEXT, 10, false)]);
        b.rig.kick(&b.rings[2]);
        let port = Arc::clone(&b.port);
        b.rig.wait(|| port.stats()?.named().find(|s| *s == ("stat-free-memory", free)));
        // The device keeps the buffer until it wants more.
        assert_eq!(b.rings[2].next_used(), None);
        b.port.refresh_stats();
        assert_eq!(b.rig.used(&mut b.rings[2]), (u32::from(head), 0));
    }
    // A second buffer sends the first back; asking with none in hand does nothing.
    b.port.refresh_stats();
    b.rings[2].add(&[(TEXT, 10, false)]);
    let second = b.rings[2].add(&[(TEXT, 7, false)]);
    b.rig.kick(&b.rings[2]);
    b.rig.used(&mut b.rings[2]);
    b.port.refresh_stats();
    assert_eq!(b.rig.used(&mut b.rings[2]).0, u32::from(second));
}

#[test]
fn the_automatic_follows_what_the_guest_can_spare_below_what_a_client_asks_for() {
    let port = Port::new(1 << 30);
    let says = |port: &Port, tag: u16, mib: u64| {
        let entry = [tag.to_le_bytes().to_vec(), (mib << 20).to_le_bytes().to_vec()].concat();
        port.set_stats(Stats::parse(&entry));
        port.follow(50);
        port.wanted_pages() / 256
    };
    // Nothing is known yet.
    port.follow(50);
    assert_eq!(port.wanted_pages(), 0);
    for (available, given) in [(800, 128), (672, 256), (544, 384), (416, 400), (400, 400), (100, 250)] {
        assert_eq!(says(&port, 6, available), given, "{available}");
        port.set_actual_pages(given * 256);
    }
    // A kernel that says only what is free.
    assert_eq!(says(&port, 4, 550), 378);
    // No less than a client wants, and no more often than that changes.
    port.set_target(1 << 29);
    assert_eq!(says(&port, 6, 10), 512);
    port.set_target(1 << 30);
    assert_eq!(says(&port, 6, 0), 125);
}

#[test]
fn the_automatic_asks_the_guest_for_its_statistics() {
    let auto = AutoBalloon { percent: 50, interval: Duration::from_millis(5) };
    let mut b = bench_of(!0, false, 3, Some(auto));
    b.rig.memory.write_slice(&stats(MEMORY / 2), GuestAddress(TEXT)).unwrap();
    let head = b.rings[2].add(&[(TEXT, 10, false)]);
    b.rig.kick(&b.rings[2]);
    // Nobody else asks: this is the timer.
    assert_eq!(b.rig.used(&mut b.rings[2]), (u32::from(head), 0));
}

#[test]
fn reported_pages_leave_the_host_whole_pages_only() {
    // Where Linux has the queue, and where the specification has it; and with no statistics.
    for (features, queue, queues) in [(!0, 3, 4), (!0, 4, 5), (!feature::STATS_VQ, 2, 3)] {
        let mut b = bench_with(features, true, queues);
        b.touch(FREE, 1 << 20);
        let ring = &mut b.rings[queue];
        let head = ring.add(&[
            (FREE, 64 << 10, true),
            (FREE + (128 << 10) + 100, 8192, true),
            (FREE + (512 << 10), 0, true),
            (FREE + (512 << 10), 100, true),
        ]);
        b.rig.kick(ring);
        assert_eq!(b.rig.used(&mut b.rings[queue]), (u32::from(head), 0));
        assert_eq!((b.byte(FREE), b.byte(FREE + (64 << 10) - 1), b.byte(FREE + (64 << 10))), (0, 0, 7));
        let cut = FREE + (128 << 10);
        assert_eq!((b.byte(cut), b.byte(cut + 4096), b.byte(cut + 8192)), (7, 0, 7));
        assert_eq!(b.byte(FREE + (512 << 10)), 7);
    }
}

#[test]
fn odd_requests_come_back() {
    let mut b = bench_with(!0, true, 4);
    for queue in [0, 1, 3] {
        for parts in [
            vec![(TEXT, 0, false)],
            // Half a page number, and a number in two parts.
            vec![(TEXT, 3, false)],
            vec![(TEXT, 2, false), (TEXT + 2, 2, false)],
            vec![(FREE, 4096, true)],
            // All of RAM as page numbers.
            vec![(0, RAM as u32, false)],
        ] {
            let head = b.rings[queue].add(&parts);
            b.rig.kick(&b.rings[queue]);
            assert_eq!(b.rig.used(&mut b.rings[queue]), (u32::from(head), 0), "{queue} {parts:?}");
            // What was in RAM as page numbers may have named the rings: start over.
            b.rings = b.rig.start(!0, 4, 64);
        }
    }
}

#[test]
fn hostile_rings_need_a_reset_and_then_work_again() {
    type Wrong = fn(&mut Ring);
    let wrongs: [(&str, Wrong); 7] = [
        ("head out of range", |r| r.offer(64)),
        ("index jumps", |r| r.set_avail_index(65)),
        ("not in RAM", |r| _ = r.add(&[(RAM, 16, false)])),
        ("over the end", |r| _ = r.add(&[(HIGH_END - 8, 16, true)])),
        ("4 GiB and more", |r| _ = r.add(&[(0, u32::MAX, false), (0, u32::MAX, false)])),
        ("order", |r| _ = r.add(&[(DATA, 8, true), (DATA, 8, false)])),
        ("beyond the table", |r| {
            r.put(r.desc, 0, DATA, 1, 1, 64);
            r.offer(0);
        }),
    ];
    for queue in 0..4 {
        for (what, wrong) in wrongs {
            let mut b = bench_with(!0, true, 4);
            wrong(&mut b.rings[queue]);
            b.rig.kick(&b.rings[queue]);
            b.rig.wait_needs_reset();
            assert_eq!(b.rings[queue].next_used(), None, "{queue}: {what}");
            // Nothing is served until a reset, everything after it.
            b.rings = b.rig.start(!0, 4, 64);
            b.touch(FREE, 4096);
            b.send(0, &[(FREE / 4096) as u32]);
            assert_eq!(b.byte(FREE), 0);
        }
    }
    // The same head twice: the device keeps the first, for statistics.
    let mut b = bench();
    b.rings[2].put(b.rings[2].desc, 0, DATA, 10, 0, 0);
    b.rings[2].offer(0);
    b.rings[2].offer(0);
    b.rig.kick(&b.rings[2]);
    b.rig.wait_needs_reset();
}

#[test]
fn both_page_queues_are_needed() {
    let mut b = bench();
    b.rings = b.rig.start(!0, 1, 64);
    assert!(b.rig.needs_reset());
    assert!(!b.port.has_driver());
}
