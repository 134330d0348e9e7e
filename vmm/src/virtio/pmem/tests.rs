//! The whole device, from registers to the flush.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{DATA, HIGH_END, PATIENCE, PLAIN, RAM, Rig, Ring};

const BASE: u64 = 5 << 30;
const SIZE: u64 = 64 << 20;
const ANSWER: u64 = DATA + 4096;
const FAILED: u32 = u32::MAX;

fn rig_of(flush: Flush) -> Rig {
    let device = "p".into();
    Rig::new(Pmem::new(PmemOptions { device, base: BASE, size: SIZE, flush, worker: Worker::new("t") }))
}

/// A device whose flushes are counted, and fail while `fails` is not 0.
fn counted() -> (Rig, Arc<AtomicU32>, Arc<AtomicU32>) {
    let (count, fails) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (counter, failure) = (Arc::clone(&count), Arc::clone(&fails));
    let rig = rig_of(Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
        if failure.load(Ordering::SeqCst) != 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }));
    (rig, count, fails)
}

fn send(rig: &Rig, ring: &mut Ring, kind: u32) -> u32 {
    rig.memory.write_obj(kind, GuestAddress(DATA)).unwrap();
    rig.memory.write_obj(0xeeee_eeee_u32, GuestAddress(ANSWER)).unwrap();
    let head = ring.add(&[(DATA, 4, false), (ANSWER, 4, true)]);
    rig.kick(ring);
    assert_eq!(rig.used(ring), (u32::from(head), 4));
    rig.memory.read_obj(GuestAddress(ANSWER)).unwrap()
}

#[test]
fn the_configuration_says_where_it_is() {
    let (rig, _, _) = counted();
    let word = |at: u64| u64::from(rig.get(0x100 + at));
    assert_eq!((word(4) << 32 | word(0), word(12) << 32 | word(8), word(16)), (BASE, SIZE, 0));
    rig.set(0x100, 7);
    assert_eq!(word(0), BASE & 0xffff_ffff);
}

#[test]
fn a_flush_is_answered_when_it_is_done() {
    for features in [!0, PLAIN] {
        let (rig, count, fails) = counted();
        let mut ring = rig.start(features, 1, 64).remove(0);
        assert_eq!((send(&rig, &mut ring, 0), count.load(Ordering::SeqCst)), (0, 1));
        // No request, no flush.
        assert_eq!((send(&rig, &mut ring, 1), count.load(Ordering::SeqCst)), (FAILED, 1));
        fails.store(1, Ordering::SeqCst);
        assert_eq!(send(&rig, &mut ring, 0), FAILED);
        fails.store(0, Ordering::SeqCst);
        assert_eq!((send(&rig, &mut ring, 0), count.load(Ordering::SeqCst)), (0, 3));
    }
}

#[test]
fn what_waits_is_answered_by_one_flush_in_order() {
    // The first flush says that it has begun, and ends when it is told; so does each that follows.
    let (began, begins) = mpsc::channel();
    let (end, ends) = mpsc::channel::<()>();
    let ends = std::sync::Mutex::new(ends);
    let rig = rig_of(Arc::new(move || {
        let _ = began.send(());
        let _ = ends.lock().unwrap().recv_timeout(PATIENCE);
        Ok(())
    }));
    let mut ring = rig.start(!0, 1, 64).remove(0);
    rig.memory.write_obj(0u32, GuestAddress(DATA)).unwrap();
    let add = |ring: &mut Ring| u32::from(ring.add(&[(DATA, 4, false), (ANSWER, 4, true)]));
    let mut heads = vec![add(&mut ring)];
    rig.kick(&ring);
    begins.recv_timeout(PATIENCE).unwrap();
    heads.extend((0..10).map(|_| add(&mut ring)));
    rig.kick(&ring);
    // Sent too late for the first: none is answered by it.
    end.send(()).unwrap();
    assert_eq!(rig.used(&mut ring), (heads[0], 4));
    begins.recv_timeout(PATIENCE).unwrap();
    assert_eq!(ring.next_used(), None);
    end.send(()).unwrap();
    for head in &heads[1..] {
        assert_eq!(rig.used(&mut ring), (*head, 4));
    }
    assert!(begins.try_recv().is_err());
}

#[test]
fn as_many_requests_as_a_turn_takes() {
    let (rig, count, _) = counted();
    let mut ring = rig.start(!0, 1, 64).remove(0);
    rig.memory.write_obj(0u32, GuestAddress(DATA)).unwrap();
    for _ in 0..5 {
        for _ in 0..64 {
            ring.add(&[(DATA, 4, false)]);
        }
        rig.kick(&ring);
        for _ in 0..64 {
            assert_eq!(rig.used(&mut ring).1, 0);
        }
    }
    assert!(count.load(Ordering::SeqCst) >= 5);
}

#[test]
fn odd_chains_come_back() {
    let (rig, count, _) = counted();
    let mut ring = rig.start(!0, 1, 64).remove(0);
    rig.memory.write_obj(0u32, GuestAddress(DATA)).unwrap();
    for (parts, written) in [
        (vec![(DATA, 4, false)], 0),
        (vec![(DATA, 4, false), (ANSWER, 3, true)], 0),
        (vec![(ANSWER, 4, true)], 4),
        (vec![(DATA, 3, false), (ANSWER, 4, true)], 4),
        (vec![(DATA, 1, false), (DATA + 1, 900, false), (ANSWER, 1, true), (ANSWER + 1, 900, true)], 4),
    ] {
        let head = ring.add(&parts);
        rig.kick(&ring);
        assert_eq!(rig.used(&mut ring), (u32::from(head), written), "{parts:?}");
    }
    // Those that hold a request are carried out, whether the answer has room or not.
    assert_eq!(count.load(Ordering::SeqCst), 3);
}

#[test]
fn hostile_rings_need_a_reset_and_then_work_again() {
    type Wrong = fn(&mut Ring);
    let wrongs: [(&str, Wrong); 6] = [
        ("head out of range", |r| r.offer(64)),
        ("index jumps", |r| r.set_avail_index(65)),
        ("not in RAM", |r| _ = r.add(&[(RAM, 4, false)])),
        ("over the end", |r| _ = r.add(&[(HIGH_END - 8, 16, true)])),
        ("order", |r| _ = r.add(&[(ANSWER, 4, true), (DATA, 4, false)])),
        ("the same head twice", |r| {
            r.put(r.desc, 0, DATA, 4, 0, 0);
            r.offer(0);
            r.offer(0);
        }),
    ];
    for (what, wrong) in wrongs {
        let (rig, _, _) = counted();
        let mut ring = rig.start(!0, 1, 64).remove(0);
        wrong(&mut ring);
        rig.kick(&ring);
        rig.wait_needs_reset();
        let mut ring = rig.start(!0, 1, 64).remove(0);
        assert_eq!(send(&rig, &mut ring, 0), 0, "{what}");
    }
    let (rig, _, _) = counted();
    rig.start(!0, 0, 64);
    assert!(rig.needs_reset());
}

#[test]
fn the_end_of_the_machine_is_a_flush() {
    let (rig, count, fails) = counted();
    rig.transport.shut_down().unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1);
    fails.store(1, Ordering::SeqCst);
    assert!(rig.transport.shut_down().is_err());
}
