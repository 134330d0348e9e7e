//! The whole device, from registers to a pipe that stands for the source.

use std::io::Write as _;

use rustix::fs::FileType;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::RngSource;
use crate::inherit::Inherited;
use crate::virtio::state::Suspend as _;
use crate::virtio::testing::{DATA, HIGH_END, INDIRECT, NEXT, PLAIN, RAM, Rig, Ring, WRITE};

struct Bench {
    rig: Rig,
    ring: Ring,
    pipe: std::fs::File,
}

/// The far end of a fifo, and the source at its near end.
fn fifo() -> (Source, std::fs::File) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("random");
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    let source =
        Source::open(&RngSource { id: "r".into(), filename: path.clone() }, &Inherited::default()).unwrap();
    (source, std::fs::OpenOptions::new().write(true).open(path).unwrap())
}

fn bench(limit: Option<RngLimit>, features: u64) -> Bench {
    let (source, pipe) = fifo();
    let rig = Rig::new(Rng::new(RngOptions { source, limit, worker: Worker::new("t") }));
    let ring = rig.start(features, 1, 64).remove(0);
    Bench { rig, ring, pipe }
}

impl Bench {
    fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rig.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn ask(&mut self, parts: &[(u64, u32, bool)]) -> u32 {
        let head = self.ring.add(parts);
        self.rig.kick(&self.ring);
        u32::from(head)
    }

    /// Everything still works after a reset.
    fn still_works(&mut self) {
        self.ring = self.rig.start(!0, 1, 64).remove(0);
        self.pipe.write_all(b"again").unwrap();
        let head = self.ask(&[(DATA, 5, true)]);
        assert_eq!(self.rig.used(&mut self.ring), (head, 5));
    }
}

#[test]
fn bytes_of_the_source_reach_the_guest() {
    for features in [!0, PLAIN] {
        let mut b = bench(None, features);
        // The request waits for the source.
        let head = b.ask(&[(DATA, 3, true), (DATA + 100, 4, true)]);
        b.pipe.write_all(b"abcdefg").unwrap();
        let (used, len) = b.rig.used(&mut b.ring);
        assert_eq!((used, len), (head, 7));
        assert_eq!((b.guest(DATA, 3), b.guest(DATA + 100, 4)), (b"abc".to_vec(), b"defg".to_vec()));
        // A source that has less gives less.
        b.pipe.write_all(b"xy").unwrap();
        let head = b.ask(&[(DATA, 4096, true)]);
        assert_eq!(b.rig.used(&mut b.ring), (head, 2));
    }
}

#[test]
fn the_kernels_own_source_fills_every_buffer() {
    let rng = RngSource { id: "r".into(), filename: "/dev/urandom".into() };
    let source = Source::open(&rng, &Inherited::default()).unwrap();
    let rig = Rig::new(Rng::new(RngOptions { source, limit: None, worker: Worker::new("t") }));
    let mut ring = rig.start(!0, 1, 256).remove(0);
    for _ in 0..200 {
        ring.add(&[(DATA, 64, true)]);
    }
    rig.kick(&ring);
    for _ in 0..200 {
        assert_eq!(rig.used(&mut ring).1, 64);
    }
    let mut bytes = [0; 64];
    rig.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert_ne!(bytes, [0; 64]);
}

#[test]
fn a_limit_holds_over_resets_and_opens_by_itself() {
    let mut b = bench(Some(RngLimit { max_bytes: 4, period_ms: 3_600_000 }), !0);
    b.pipe.write_all(&[1; 64]).unwrap();
    let head = b.ask(&[(DATA, 16, true)]);
    assert_eq!(b.rig.used(&mut b.ring), (head, 4));
    b.ring = b.rig.start(!0, 1, 64).remove(0);
    b.ask(&[(DATA, 16, true)]);
    assert_eq!(b.ring.next_used(), None);

    let mut b = bench(Some(RngLimit { max_bytes: 4, period_ms: 5 }), !0);
    b.pipe.write_all(&[1; 64]).unwrap();
    for _ in 0..6 {
        b.ask(&[(DATA, 16, true)]);
    }
    for _ in 0..6 {
        assert_eq!(b.rig.used(&mut b.ring).1, 4);
    }
}

#[test]
fn odd_requests_are_served_as_far_as_they_make_sense() {
    let mut b = bench(None, !0);
    b.pipe.write_all(&vec![7; 40_000]).unwrap();
    for (parts, len) in [
        // Nothing to write to.
        (vec![(DATA, 16, false)], 0),
        (vec![(DATA, 0, true)], 0),
        // Readable parts, which have no meaning, before writable ones.
        (vec![(DATA, 16, false), (DATA + 16, 8, true)], 8),
        // More than a device gives at once.
        (vec![(DATA, (RAM - DATA) as u32, true)], 4096),
    ] {
        b.ring = b.rig.start(!0, 1, 64).remove(0);
        let head = b.ask(&parts);
        assert_eq!(b.rig.used(&mut b.ring), (head, len), "{parts:?}");
    }
}

#[test]
fn hostile_rings_need_a_reset_and_then_work_again() {
    type Wrong = fn(&mut Ring);
    let wrongs: [(&str, Wrong); 9] = [
        ("head out of range", |r| r.offer(64)),
        ("index jumps", |r| r.set_avail_index(65)),
        ("not in RAM", |r| _ = r.add(&[(RAM, 16, true)])),
        ("over the end of RAM", |r| _ = r.add(&[(HIGH_END - 8, 16, true)])),
        ("an address that wraps", |r| _ = r.add(&[(u64::MAX - 8, 16, true)])),
        ("4 GiB and more", |r| _ = r.add(&[(0, u32::MAX, true), (0, u32::MAX, true)])),
        ("writable before readable", |r| _ = r.add(&[(DATA, 8, true), (DATA, 8, false)])),
        ("a loop", |r| {
            r.put(r.desc, 0, DATA, 1, WRITE | NEXT, 1);
            r.put(r.desc, 1, DATA, 1, WRITE | NEXT, 0);
            r.offer(0);
        }),
        ("an indirect table in itself", |r| {
            r.put(r.desc, 0, DATA, 16, INDIRECT, 0);
            r.put(DATA, 0, DATA, 16, INDIRECT, 0);
            r.offer(0);
        }),
    ];
    for (what, wrong) in wrongs {
        let mut b = bench(None, !0);
        wrong(&mut b.ring);
        b.rig.kick(&b.ring);
        b.rig.wait_needs_reset();
        assert_eq!(b.ring.next_used(), None, "{what}");
        b.still_works();
    }
    // The same head twice: the first of them waits for the source and is in flight.
    let mut b = bench(None, !0);
    b.ring.put(b.ring.desc, 0, DATA, 4, WRITE, 0);
    b.ring.offer(0);
    b.ring.offer(0);
    b.rig.kick(&b.ring);
    b.pipe.write_all(&[1; 8]).unwrap();
    // One after the other it is no error: each was given back before it was taken again.
    assert_eq!(b.rig.used(&mut b.ring), (0, 4));
    assert_eq!(b.rig.used(&mut b.ring), (0, 4));
}

#[test]
fn a_reset_in_mid_flight_leaves_the_guest_alone() {
    let mut b = bench(None, !0);
    b.ask(&[(DATA, 8, true)]);
    b.rig.transport.reset();
    b.pipe.write_all(&[9; 8]).unwrap();
    assert_eq!(b.guest(DATA, 8), [0; 8]);
    assert_eq!(b.ring.next_used(), None);
}

#[test]
fn a_source_that_ends_is_the_end_of_the_device_only() {
    let mut b = bench(None, !0);
    b.pipe = std::fs::File::open("/dev/null").unwrap();
    b.ask(&[(DATA, 8, true)]);
    b.rig.wait_needs_reset();
}

#[test]
fn says_what_is_wrong_with_a_source() {
    let open = |name: &str| {
        let rng = RngSource { id: "r".into(), filename: name.into() };
        Source::open(&rng, &Inherited::default()).err().unwrap().to_string()
    };
    assert!(open("/nonexistent").starts_with("rng \"r\": /nonexistent: No such file"));
    for name in ["/", "/etc/passwd"] {
        assert_eq!(
            open(name),
            format!("rng \"r\": {name} is no character device: write filename=/dev/urandom")
        );
    }
}

#[test]
fn a_request_that_waits_goes_on_after_a_snapshot() {
    for elsewhere in [false, true] {
        let mut b = bench(None, !0);
        b.pipe.write_all(b"abc").unwrap();
        let head = b.ask(&[(DATA, 3, true)]);
        assert_eq!(b.rig.used(&mut b.ring), (head, 3));
        let head = b.ask(&[(DATA, 4, true)]);
        for _ in 0..2 {
            let saved = b.rig.stand_and_go_on(elsewhere);
            assert_eq!((saved.queues[0].position.avail, saved.queues[0].position.used), (1, 1));
        }
        b.pipe.write_all(b"defg").unwrap();
        assert_eq!(b.rig.used(&mut b.ring), (head, 4));
        b.still_works();
    }
}

#[test]
fn what_no_driver_has_done_is_not_restored() {
    type Change = fn(&mut crate::virtio::state::TransportState);
    let b = bench(None, !0);
    b.rig.transport.suspend().unwrap();
    let saved = b.rig.transport.save().unwrap();
    let cases: [(Change, &str); 10] = [
        (|s| s.device_type = 2, "the virtio device type differs"),
        (|s| s.status = 4, "the saved device status"),
        (|s| s.status = 0x2f, "the saved device status"),
        (|s| s.driver_features |= 1, "the set of features differs"),
        (|s| s.driver_features = 0, "the set of features differs"),
        (|s| s.interrupt_status = 4, "the saved interrupt status"),
        (|s| s.queues.clear(), "the number of queues differs"),
        (|s| s.queues[0].layout.size = 3, "queue 0: "),
        (|s| s.queues[0].layout.device = RAM - 8, "queue 0: "),
        (
            |s| s.device = DeviceState::Console(serde_json::from_str(r#"{"ports":[]}"#).unwrap()),
            "the saved device",
        ),
    ];
    for (change, text) in cases {
        let mut bad = saved.clone();
        change(&mut bad);
        b.rig.transport.reset();
        let error = b.rig.transport.restore(&bad).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
    // Positions are the ring's own business: the device finds out.
    let mut bad = saved;
    bad.queues[0].position.avail = 0x8000;
    b.rig.transport.reset();
    b.rig.transport.restore(&bad).unwrap();
    b.rig.transport.resume().unwrap();
    b.rig.wait_needs_reset();
    // And so it stays over a snapshot, until its driver resets it.
    b.rig.stand_and_go_on(true);
    assert!(b.rig.needs_reset());
    let mut b = b;
    b.still_works();
}
