//! Disks that come and go, whatever the driver does meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::tests::*;
use super::*;
use crate::config::{Aio, Drive};
use crate::inherit::Inherited;
use crate::virtio::testing::{DATA, PLAIN, Rig};

/// Sectors of the second image.
const SMALL: u64 = 32;

#[derive(Debug, Clone)]
enum Act {
    Insert { second: bool, read_only: bool },
    Eject,
    Move,
    Start { plain: bool },
    Reset,
    Read(u64),
    Write(u64),
    Flush,
    GetId,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        3 => (any::<bool>(), any::<bool>())
            .prop_map(|(second, read_only)| Act::Insert { second, read_only }),
        3 => Just(Act::Eject),
        2 => Just(Act::Move),
        2 => any::<bool>().prop_map(|plain| Act::Start { plain }),
        1 => Just(Act::Reset),
        3 => (0..SECTORS).prop_map(Act::Read),
        3 => (0..SECTORS).prop_map(Act::Write),
        1 => Just(Act::Flush),
        1 => Just(Act::GetId),
    ];
    prop::collection::vec(act, 1..40)
}

fn open(path: &std::path::Path, aio: Aio, readonly: bool) -> Disk {
    Disk::open(&Drive { readonly, ..drive(path, aio) }, &Inherited::default()).unwrap()
}

/// What should be so.
#[derive(Default)]
struct Model {
    /// Which image, and whether read-only.
    disk: Option<(usize, bool)>,
    /// A driver runs.
    active: bool,
    offered_ro: bool,
    /// What each sector is filled with.
    images: [Vec<u8>; 2],
    writes: u8,
}

fn run(aio: Aio, acts: &[Act]) {
    let images = [image(), image()];
    images[1].as_file().set_len(SMALL * 512).unwrap();
    let filled = [(0..SECTORS as u8).collect(), (0..SMALL as u8).collect()];
    let mut model = Model { images: filled, ..Model::default() };
    let blk = device(None);
    let port = blk.port();
    let rig = Rig::new(blk);
    let ring = rig.queue(0, 16);
    let mut d = Disked { rig, ring, image: image() };
    for act in acts {
        match act {
            Act::Insert { second, read_only } => {
                let at = usize::from(match model.disk {
                    // The other one: the one inside is locked.
                    Some((inside, _)) => inside == 0,
                    None => *second,
                });
                let disk = open(images[at].path(), aio, *read_only);
                let result = port.insert(disk, Some("NEW".into()));
                if model.disk.is_some() {
                    assert!(matches!(result, Err(PortError::Occupied)));
                } else {
                    result.unwrap();
                    model.disk = Some((at, *read_only));
                    if model.active {
                        d.rig.wait(|| (d.rig.get(0x60) & 2 != 0).then_some(()));
                        d.rig.set(0x64, 2);
                    }
                }
            }
            Act::Eject => match (port.eject(), model.disk.take()) {
                (Ok(()), Some((at, _))) => {
                    assert_eq!(d.rig.get(0x60) & 2 != 0, model.active, "told at once");
                    d.rig.set(0x64, 2);
                    // Closed and unlocked.
                    drop(open(images[at].path(), aio, false));
                }
                (Err(PortError::Empty), None) => {}
                (result, _) => panic!("{result:?}"),
            },
            Act::Move => {
                let moved = port.serve_on(&Worker::new("other"));
                match model.disk {
                    None => moved.unwrap(),
                    Some(_) => assert!(matches!(moved, Err(PortError::Occupied))),
                }
            }
            Act::Start { plain } => {
                if model.active {
                    model.offered_ro = model.disk.is_some_and(|(_, ro)| ro);
                }
                d.ring = d.rig.start(if *plain { PLAIN } else { !0 }, 1, 16).remove(0);
                model.active = true;
                assert_eq!(d.rig.offered() & feature::RO != 0, model.offered_ro);
            }
            Act::Reset => {
                if model.active {
                    model.offered_ro = model.disk.is_some_and(|(_, ro)| ro);
                }
                d.rig.set(0x70, 0);
                model.active = false;
            }
            _ if !model.active => {}
            Act::Read(sector) => {
                let answer = d.ask(IN, *sector, &[(BUFFER, 512, true)]);
                match model.disk.and_then(|(at, _)| model.images[at].get(*sector as usize)) {
                    Some(byte) => {
                        assert_eq!(answer, (OK, 513));
                        assert_eq!(d.guest(BUFFER, 512), [*byte; 512]);
                    }
                    None => assert_eq!(answer, (IOERR, 1)),
                }
            }
            Act::Write(sector) => {
                model.writes = model.writes.wrapping_add(1);
                d.rig.memory.write_slice(&[model.writes; 512], GuestAddress(BUFFER)).unwrap();
                let answer = d.ask(OUT, *sector, &[(BUFFER, 512, false)]);
                let to = model.disk.filter(|(_, ro)| !ro && !model.offered_ro);
                match to.and_then(|(at, _)| model.images[at].get_mut(*sector as usize)) {
                    Some(byte) => {
                        assert_eq!(answer, (OK, 1));
                        *byte = model.writes;
                    }
                    None => assert_eq!(answer, (IOERR, 1)),
                }
            }
            Act::Flush => {
                let want = if model.disk.is_some() { OK } else { IOERR };
                assert_eq!(d.ask(FLUSH, 0, &[]), (want, 1));
            }
            Act::GetId => {
                let answer = d.ask(GET_ID, 0, &[(BUFFER, 20, true)]);
                assert_eq!(answer, if model.disk.is_some() { (OK, 21) } else { (IOERR, 1) });
            }
        }
        let sectors = model.disk.map_or(0, |(at, _)| model.images[at].len());
        assert_eq!(d.rig.get(0x100) as usize, sectors, "capacity after {act:?}");
        assert_eq!(port.disk_id().is_some(), model.disk.is_some());
        assert!(!d.rig.needs_reset());
    }
    d.rig.transport.shut_down().unwrap();
    drop(d);
    drop(port);
    for (file, bytes) in images.iter().zip(&model.images) {
        let content = std::fs::read(file.path()).unwrap();
        assert!(content.iter().enumerate().all(|(i, b)| *b == bytes[i / 512]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_insert_eject_start_reset_and_requests(acts in acts(), uring: bool) {
        run(if uring { Aio::IoUring } else { Aio::Off }, &acts);
    }
}

#[test]
fn disks_come_and_go_under_load() {
    for aio in [Aio::IoUring, Aio::Off] {
        let file = image();
        let blk = device(None);
        let port = blk.port();
        let rig = Rig::new(blk);
        let mut ring = rig.start(!0, 1, 16).remove(0);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let driver = scope.spawn(|| {
                let (mut good, mut bad) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    let bases: Vec<u64> = (0..5).map(|i| DATA + 0x1_0000 * (i + 1)).collect();
                    for (i, base) in bases.iter().enumerate() {
                        write_header(&rig, *base, if i % 2 == 0 { IN } else { OUT }, i as u64);
                        rig.memory.write_obj(0x77u8, GuestAddress(base + 0x800)).unwrap();
                        ring.add(&[
                            (*base, 16, false),
                            (base + 0x1000, 4096, i % 2 == 0),
                            (base + 0x800, 1, true),
                        ]);
                    }
                    rig.kick(&ring);
                    for _ in &bases {
                        rig.used(&mut ring);
                    }
                    for base in bases {
                        match rig.memory.read_obj::<u8>(GuestAddress(base + 0x800)).unwrap() {
                            OK => good += 1,
                            IOERR => bad += 1,
                            other => panic!("status {other}"),
                        }
                    }
                }
                (good, bad)
            });
            for round in 0..60 {
                if round % 4 == 0 {
                    port.serve_on(&Worker::new(&round.to_string())).unwrap();
                }
                port.insert(open(file.path(), aio, false), None).unwrap();
                // Some load on the disk before it goes.
                rig.wait(|| (port.stats().read_ops > 10).then_some(()));
                assert!(port.stats().write_bytes > 0);
                port.eject().unwrap();
                assert_eq!(port.stats(), Stats::default());
            }
            stop.store(true, Ordering::Relaxed);
            let (good, _) = driver.join().unwrap();
            assert!(good > 600);
        });
        assert!(!rig.needs_reset());
    }
}

#[test]
fn a_disk_that_leaves_during_resets_leaves() {
    let file = image();
    let blk = device(Some(open(file.path(), Aio::IoUring, false)));
    let port = blk.port();
    let rig = Rig::new(blk);
    for _ in 0..40 {
        let mut ring = rig.start(!0, 1, 16).remove(0);
        write_header(&rig, HEADER, IN, 0);
        ring.add(&[(HEADER, 16, false), (BUFFER, 4096, true), (STATUS, 1, true)]);
        rig.kick(&ring);
        std::thread::scope(|scope| {
            let resets = scope.spawn(|| rig.set(0x70, 0));
            port.eject().unwrap();
            port.serve_on(&Worker::new("other")).unwrap();
            resets.join().unwrap();
        });
        port.insert(open(file.path(), Aio::IoUring, false), None).unwrap();
    }
}

#[test]
fn what_was_done_is_counted() {
    let file = image();
    let blk = device(Some(open(file.path(), Aio::Off, false)));
    let port = blk.port();
    let rig = Rig::new(blk);
    let ring = rig.start(!0, 1, 16).remove(0);
    let mut d = Disked { rig, ring, image: image() };
    d.ask(IN, 0, &[(BUFFER, 1024, true)]);
    d.ask(OUT, 0, &[(BUFFER, 512, false)]);
    d.ask(OUT, SECTORS, &[(BUFFER, 512, false)]);
    d.ask(FLUSH, 0, &[]);
    let want = Stats {
        read_ops: 1,
        read_bytes: 1024,
        write_ops: 1,
        write_bytes: 512,
        flush_ops: 1,
        failed_ops: 1,
        ..Stats::default()
    };
    assert_eq!(port.stats(), want);
}

#[test]
fn a_disk_that_comes_later_gets_a_doorbell() {
    let image = image();
    let blk = device(None);
    let port = blk.port();
    let rig = Rig::new(blk);
    let ring = rig.start(!0, 1, 16).remove(0);
    assert!(rig.doorbell.attached.lock().unwrap().is_empty(), "an empty slot costs nothing");
    port.insert(open(image.path(), Aio::IoUring, false), None).unwrap();
    let mut d = Disked { rig, ring, image };
    d.rig.wait(|| (d.rig.get(0x60) & 2 != 0).then_some(()));
    d.rig.set(0x64, 2);
    assert_eq!(d.ask(IN, 1, &[(BUFFER, 512, true)]), (OK, 513));
    assert_eq!(d.rig.doorbell.attached.lock().unwrap().len(), 1);
    // Another disk in the same slot keeps it, and the driver's reset takes it away.
    port.eject().unwrap();
    port.insert(open(d.image.path(), Aio::IoUring, false), None).unwrap();
    assert_eq!(d.rig.doorbell.attached.lock().unwrap().len(), 1);
    d.rig.set(0x70, 0);
    assert!(d.rig.doorbell.attached.lock().unwrap().is_empty());
}
