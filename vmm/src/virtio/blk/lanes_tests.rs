//! Disks with several queues, and drivers that misuse them.

use vm_memory::{Bytes, GuestAddress};

use super::tests::*;
use super::*;
use crate::config::Aio;
use crate::inherit::Inherited;
use crate::virtio::state::Suspend as _;
use crate::virtio::testing::{DATA, Rig, Ring};

fn device(image: &tempfile::NamedTempFile, aio: Aio, queues: u16) -> Blk {
    Blk::new(BlkOptions {
        backend: Some(Disk::open(&drive(image.path(), aio), &Inherited::default()).unwrap()),
        serial: None,
        read_only: false,
        queue_size: 16,
        queues,
        worker: Worker::new("t"),
    })
}

/// Where the request of a lane keeps its header; its status byte and its data follow.
fn place(lane: u16) -> u64 {
    DATA + 0x2_0000 + 0x1000 * u64::from(lane)
}

/// Offers a request for `sector`, and does not notify.
fn add(rig: &Rig, ring: &mut Ring, kind: u32, sector: u64) -> u16 {
    let at = place(ring.index);
    rig.memory.write_obj(kind, GuestAddress(at)).unwrap();
    rig.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
    rig.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
    rig.memory.write_obj(0xffu8, GuestAddress(at + 16)).unwrap();
    ring.add(&[(at, 16, false), (at + 512, 512, kind == IN), (at + 16, 1, true)])
}

/// Waits for it: its status, and the first byte of its data.
fn answer(rig: &Rig, ring: &mut Ring, head: u16) -> (u8, u8) {
    assert_eq!(rig.used(ring).0, u32::from(head));
    let byte = |at| rig.memory.read_obj(GuestAddress(at)).unwrap();
    (byte(place(ring.index) + 16), byte(place(ring.index) + 512))
}

#[test]
fn the_same_head_on_each_queue_is_another_request() {
    for aio in [Aio::IoUring, Aio::Threads, Aio::Off] {
        let image = image();
        let rig = Rig::new(device(&image, aio, 4));
        assert_eq!(rig.get(0x120) >> 16, 4);
        assert_ne!(rig.offered() & feature::MQ, 0);
        let mut rings = rig.start(!0, 4, 16);
        assert_eq!(rig.doorbell.attached.lock().unwrap().len(), 4);
        for round in 0..20 {
            let heads: Vec<u16> = rings
                .iter_mut()
                .map(|ring| {
                    let sector = u64::from(ring.index) * 10 + round % 10;
                    add(&rig, ring, IN, sector)
                })
                .collect();
            assert!(heads.iter().all(|head| *head == heads[0]));
            rings.iter().for_each(|ring| rig.kick(ring));
            for (ring, head) in rings.iter_mut().zip(heads) {
                let want = ring.index as u8 * 10 + round as u8 % 10;
                assert_eq!(answer(&rig, ring, head), (OK, want), "{aio:?} {round}");
            }
        }
        rig.set(0x70, 0);
        assert!(rig.doorbell.attached.lock().unwrap().is_empty());
    }
}

#[test]
fn one_ring_that_makes_no_sense_stops_the_device_until_its_reset() {
    type Setup = fn(&mut Ring);
    let cases: [Setup; 4] = [
        |ring| ring.offer(16),
        |ring| ring.set_avail_index(100),
        |ring| {
            // A loop.
            ring.put(ring.desc, 0, DATA, 16, 1, 0);
            ring.offer(0);
        },
        |ring| {
            ring.put(ring.desc, 0, u64::MAX - 8, 16, 0, 0);
            ring.offer(0);
        },
    ];
    for (case, setup) in cases.into_iter().enumerate() {
        let image = image();
        let rig = Rig::new(device(&image, Aio::IoUring, 3));
        let mut rings = rig.start(!0, 3, 16);
        setup(&mut rings[1]);
        rig.kick(&rings[1]);
        rig.wait_needs_reset();
        add(&rig, &mut rings[2], OUT, 5);
        rig.kick(&rings[2]);
        rig.set(0x70, 0);
        let mut rings = rig.start(!0, 3, 16);
        let head = add(&rig, &mut rings[2], IN, 5);
        rig.kick(&rings[2]);
        assert_eq!(answer(&rig, &mut rings[2], head), (OK, 5), "case {case}: nothing was written");
    }
}

#[test]
fn a_driver_may_leave_queues_out_but_not_the_first() {
    let image = image();
    let rig = Rig::new(device(&image, Aio::IoUring, 3));
    rig.negotiate(!0);
    let mut rings = [rig.queue(0, 16), rig.queue(2, 16)];
    rig.driver_ok();
    for queue in [1, 3, 9, u32::MAX] {
        rig.set(0x50, queue);
    }
    for ring in &mut rings {
        let head = add(&rig, ring, IN, 7);
        rig.kick(ring);
        assert_eq!(answer(&rig, ring, head), (OK, 7));
    }
    assert!(!rig.needs_reset());
    rig.set(0x70, 0);
    rig.negotiate(!0);
    rig.queue(1, 16);
    rig.driver_ok();
    assert!(rig.needs_reset());
}

#[test]
fn a_disk_leaves_when_no_queue_uses_it() {
    let image = image();
    let blk = device(&image, Aio::Threads, 4);
    let port = blk.port();
    let rig = Rig::new(blk);
    let mut rings = rig.start(!0, 4, 16);
    let heads: Vec<u16> = rings.iter_mut().map(|ring| add(&rig, ring, OUT, 3)).collect();
    rings.iter().for_each(|ring| rig.kick(ring));
    port.eject().unwrap();
    for (ring, head) in rings.iter_mut().zip(heads) {
        // Before the disk left, or after.
        assert!([OK, IOERR].contains(&answer(&rig, ring, head).0));
        let head = add(&rig, ring, IN, 3);
        rig.kick(ring);
        assert_eq!(answer(&rig, ring, head).0, IOERR);
    }
}

#[test]
fn every_queue_goes_on_where_it_stood_after_a_snapshot() {
    for (aio, elsewhere) in [(Aio::IoUring, false), (Aio::IoUring, true), (Aio::Off, true)] {
        let image = image();
        let rig = Rig::new(device(&image, aio, 3));
        rig.negotiate(!0);
        // The driver leaves the second one out.
        let mut rings = [rig.queue(0, 16), rig.queue(2, 16)];
        rig.driver_ok();
        let ask = |ring: &mut Ring, sector: u64| {
            let head = add(&rig, ring, IN, sector);
            rig.kick(ring);
            assert_eq!(answer(&rig, ring, head), (OK, sector as u8));
        };
        (0..5).for_each(|sector| ask(&mut rings[0], sector));
        (0..20).for_each(|sector| ask(&mut rings[1], sector));
        let saved = rig.stand_and_go_on(elsewhere);
        let positions: Vec<_> = saved.queues.iter().map(|q| (q.position.avail, q.position.used)).collect();
        assert_eq!(positions, [(5, 5), (0, 0), (20, 20)]);
        rig.set(0x30, 1);
        assert_eq!(rig.get(0x44), 0);
        for round in 0..20 {
            rings.iter_mut().for_each(|ring| ask(ring, round));
        }
        assert!(!rig.needs_reset());
    }
}

#[test]
fn a_disk_with_other_queues_than_the_one_that_was_saved_is_refused() {
    let image = image();
    let rig = Rig::new(device(&image, Aio::Off, 2));
    rig.start(!0, 2, 16);
    rig.transport.suspend().unwrap();
    let text = serde_json::to_string(&rig.transport.save().unwrap()).unwrap();
    let refusal = |queues, text: &str| {
        let image = tests::image();
        let other = Rig::new(device(&image, Aio::Off, queues));
        other.transport.restore(&serde_json::from_str(text).unwrap()).unwrap_err().to_string()
    };
    assert_eq!(refusal(1, &text), "the number of queues differs: 2 in the snapshot, 1 in this VM");
    assert_eq!(refusal(3, &text), "the number of queues differs: 2 in the snapshot, 3 in this VM");
    let saved: serde_json::Value = serde_json::from_str(&text).unwrap();
    let features = saved["device"]["blk"]["features"].as_u64().unwrap();
    let without = text.replace(
        &format!("\"blk\":{{\"features\":{features}"),
        &format!("\"blk\":{{\"features\":{}", features & !feature::MQ),
    );
    assert_ne!(without, text);
    assert_eq!(refusal(2, &without), "the saved set of features makes no sense");
}
