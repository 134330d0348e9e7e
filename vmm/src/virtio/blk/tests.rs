//! The whole device, from registers to a real file, on each engine.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::block::tests::reopen;
use crate::config::{Aio, Drive};
use crate::inherit::Inherited;
use crate::virtio::state::Suspend as _;
use crate::virtio::testing::{DATA, HIGH, INDIRECT, NEXT, PLAIN, RAM, Rig, Ring, WRITE};

pub(super) const HEADER: u64 = DATA;
pub(super) const STATUS: u64 = DATA + 0x800;
pub(super) const BUFFER: u64 = DATA + 0x1000;
const UNTOUCHED: u8 = 0x77;
const SEGMENT: u64 = DATA + 0x3000;
pub(super) const SECTORS: u64 = 64;

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;

pub(super) fn drive(path: &std::path::Path, aio: Aio) -> Drive {
    Drive { direct: false, aio: Some(aio), discard: true, ..Drive::new("d", path) }
}

/// An image whose sector N is filled with N.
pub(super) fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.as_file().write_all_at(&[sector as u8; 512], sector * 512).unwrap();
    }
    file
}

pub(super) struct Disked {
    pub(super) rig: Rig,
    pub(super) ring: Ring,
    pub(super) image: tempfile::NamedTempFile,
}

pub(super) fn device(disk: Option<Disk>) -> Blk {
    Blk::new(BlkOptions {
        backend: disk,
        serial: Some("SERIAL".into()),
        read_only: false,
        queue_size: 16,
        queues: 1,
        worker: Worker::new("t"),
    })
}

fn start(change: impl FnOnce(&mut Drive), features: u64) -> Disked {
    let image = image();
    let mut drive = drive(image.path(), Aio::IoUring);
    change(&mut drive);
    let rig = Rig::new(device(Some(Disk::open(&drive, &Inherited::default()).unwrap())));
    let ring = rig.start(features, 1, 16).remove(0);
    Disked { rig, ring, image }
}

pub(super) fn write_header(rig: &Rig, at: u64, kind: u32, sector: u64) {
    rig.memory.write_obj(kind, GuestAddress(at)).unwrap();
    rig.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
    rig.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
    rig.memory.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
}

impl Disked {
    /// One request with a header, `parts` and a status byte; returns status and used length.
    pub(super) fn ask(&mut self, kind: u32, sector: u64, parts: &[(u64, u32, bool)]) -> (u8, u32) {
        write_header(&self.rig, HEADER, kind, sector);
        let chain = [&[(HEADER, 16, false)], parts, &[(STATUS, 1, true)]].concat();
        self.ask_raw(&chain)
    }

    fn ask_raw(&mut self, chain: &[(u64, u32, bool)]) -> (u8, u32) {
        let head = self.ring.add(chain);
        self.rig.kick(&self.ring);
        let (id, len) = self.rig.used(&mut self.ring);
        assert_eq!(id, u32::from(head));
        (self.rig.memory.read_obj(GuestAddress(STATUS)).unwrap(), len)
    }

    pub(super) fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rig.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn file(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.image.as_file().read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

#[test]
fn every_kind_of_request_on_each_engine() {
    for aio in [Aio::IoUring, Aio::Threads, Aio::Off] {
        for features in [!0, PLAIN] {
            let mut d = start(|drive| drive.aio = Some(aio), features);
            // Over several buffers, one of odd length.
            assert_eq!(
                d.ask(IN, 3, &[(BUFFER, 512, true), (BUFFER + 0x1000, 100, true), (HIGH, 412, true)]),
                (OK, 1025)
            );
            assert_eq!(d.guest(BUFFER, 512), [3; 512]);
            assert_eq!(d.guest(BUFFER + 0x1000, 101), [&[4; 100][..], &[0]].concat());
            assert_eq!(d.guest(HIGH, 413), [&[4; 412][..], &[0]].concat());

            d.rig.memory.write_slice(&[0xab; 1024], GuestAddress(BUFFER)).unwrap();
            assert_eq!(d.ask(OUT, 62, &[(BUFFER, 1, false), (BUFFER + 1, 1023, false)]), (OK, 1));
            assert_eq!(d.file(61, 1536), [&[61; 512][..], &[0xab; 1024]].concat());
            assert_eq!(d.ask(FLUSH, 0, &[]), (OK, 1));
            assert_eq!(d.ask(GET_ID, 0, &[(BUFFER, 20, true)]), (OK, 21));
            assert_eq!(d.guest(BUFFER, 20), *b"SERIAL\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
            assert_eq!(d.ask(IN, 0, &[]), (OK, 1), "no data is no error");

            let segment = |sector: u64, sectors: u32, flags: u32| {
                [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
            };
            for (kind, sector, flags) in [(WRITE_ZEROES, 8, 0), (WRITE_ZEROES, 24, 1), (DISCARD, 40, 0)] {
                d.rig.memory.write_slice(&segment(sector, 8, flags), GuestAddress(BUFFER)).unwrap();
                assert_eq!(d.ask(kind, 0, &[(BUFFER, 16, false)]), (OK, 1));
                assert_eq!(d.file(sector - 1, 512), [sector as u8 - 1; 512]);
                assert_eq!(d.file(sector, 4096), [0; 4096]);
                assert_eq!(d.file(sector + 8, 512), [sector as u8 + 8; 512]);
            }
            assert_eq!(d.image.as_file().metadata().unwrap().len(), SECTORS * 512);
            assert!(!d.rig.needs_reset());
        }
    }
}

#[test]
fn requests_that_are_answered_with_an_error() {
    type Part = (u64, u32, bool);
    // kind, sector, parts, segment (sector, sectors, flags), status
    type Case = (&'static str, u32, u64, &'static [Part], (u64, u32, u32), u8);
    let cases: [Case; 22] = [
        ("unknown", 99, 0, &[], (0, 0, 0), UNSUPP),
        ("secure erase is not offered", 14, 0, &[], (0, 0, 0), UNSUPP),
        ("scsi", 2, 0, &[], (0, 0, 0), UNSUPP),
        ("read half a sector", IN, 0, &[(BUFFER, 256, true)], (0, 0, 0), IOERR),
        ("read a sector and a byte", IN, 0, &[(BUFFER, 513, true)], (0, 0, 0), IOERR),
        ("read past the end", IN, SECTORS, &[(BUFFER, 512, true)], (0, 0, 0), IOERR),
        ("read over the end", IN, SECTORS - 1, &[(BUFFER, 1024, true)], (0, 0, 0), IOERR),
        ("read from the end of numbers", IN, u64::MAX, &[(BUFFER, 512, true)], (0, 0, 0), IOERR),
        ("offset overflows", IN, u64::MAX / 512 + 1, &[(BUFFER, 512, true)], (0, 0, 0), IOERR),
        ("end overflows", IN, u64::MAX / 512, &[(BUFFER, 512, true)], (0, 0, 0), IOERR),
        ("write over the end", OUT, SECTORS - 1, &[(BUFFER, 1024, false)], (0, 0, 0), IOERR),
        ("write half a sector", OUT, 0, &[(BUFFER, 100, false)], (0, 0, 0), IOERR),
        ("more than the disk", IN, 0, &[(0, RAM as u32 / 512 * 512, true)], (0, 0, 0), IOERR),
        ("discard without a segment", DISCARD, 0, &[], (0, 0, 0), IOERR),
        ("discard with half a segment", DISCARD, 0, &[(SEGMENT, 8, false)], (0, 0, 0), IOERR),
        ("discard with two segments", DISCARD, 0, &[(SEGMENT, 32, false)], (0, 0, 0), IOERR),
        ("discard over the end", DISCARD, 0, &[(SEGMENT, 16, false)], (SECTORS - 1, 2, 0), IOERR),
        ("discard far away", DISCARD, 0, &[(SEGMENT, 16, false)], (u64::MAX, 1, 0), IOERR),
        ("discard too much", DISCARD, 0, &[(SEGMENT, 16, false)], (0, u32::MAX, 0), IOERR),
        ("discard with unmap", DISCARD, 0, &[(SEGMENT, 16, false)], (0, 1, 1), UNSUPP),
        ("zero with unknown flags", WRITE_ZEROES, 0, &[(SEGMENT, 16, false)], (0, 1, 2), UNSUPP),
        ("zero too much", WRITE_ZEROES, 0, &[(SEGMENT, 16, false)], (0, 65537, 0), IOERR),
    ];
    let mut d = start(|_| {}, !0);
    for (name, kind, sector, parts, (at, sectors, flags), status) in cases {
        d.rig.memory.write_obj(at, GuestAddress(SEGMENT)).unwrap();
        d.rig.memory.write_obj(sectors, GuestAddress(SEGMENT + 8)).unwrap();
        d.rig.memory.write_obj(flags, GuestAddress(SEGMENT + 12)).unwrap();
        // The one request that covers low memory would cover the status byte and the ring too, had it been carried out.
        assert_eq!(d.ask(kind, sector, parts), (status, 1), "{name}");
    }
    for sector in 0..SECTORS {
        assert_eq!(d.file(sector, 512), [sector as u8; 512]);
    }
    assert_eq!(d.ask(IN, 1, &[(BUFFER, 512, true)]), (OK, 513), "goes on");
}

#[test]
fn chains_without_room_for_an_answer_come_back() {
    let mut d = start(|_| {}, !0);
    let cases: [&[(u64, u32, bool)]; 6] = [
        &[(HEADER, 16, false)],
        &[(HEADER, 8, false)],
        &[(HEADER, 16, false), (BUFFER, 512, false)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
        &[(HEADER, 0, false)],
        &[(HEADER, 1, false), (HEADER, 1, false)],
    ];
    write_header(&d.rig, HEADER, IN, 0);
    for chain in cases {
        assert_eq!(d.ask_raw(chain), (UNTOUCHED, 0));
    }
    for chain in [&[(STATUS, 1, true)][..], &[(HEADER, 15, false), (STATUS, 1, true)]] {
        assert_eq!(d.ask_raw(chain), (IOERR, 1), "a header too short, but a place to say so");
    }
    // A header in pieces, and a status at the end of a data buffer, are fine (§2.7.4: layout is free).
    write_header(&d.rig, HEADER, IN, 5);
    let odd = [(HEADER, 3, false), (HEADER + 3, 13, false), (BUFFER, 100, true), (BUFFER + 100, 413, true)];
    assert_eq!(d.ask_raw(&odd).1, 513);
    assert_eq!(d.guest(BUFFER, 513), [&[5; 512][..], &[OK]].concat());
}

#[test]
fn rings_that_make_no_sense_need_a_reset_and_nothing_else_breaks() {
    type Break = fn(&mut Ring);
    let cases: [(&str, Break); 8] = [
        ("index jumps", |r| r.set_avail_index(1000)),
        ("head beyond the table", |r| r.offer(16)),
        ("loop", |r| {
            r.put(r.desc, 0, HEADER, 16, NEXT, 0);
            r.offer(0);
        }),
        ("same head twice at once", |r| {
            r.offer(0);
            r.offer(0);
        }),
        ("write before read", |r| {
            r.add(&[(STATUS, 1, true), (HEADER, 16, false)]);
        }),
        ("data in device registers", |r| {
            r.add(&[(HEADER, 16, false), (0xf010_0000, 512, true), (STATUS, 1, true)]);
        }),
        ("data in a hole", |r| {
            r.add(&[(HEADER, 16, false), (RAM - 256, 512, true), (STATUS, 1, true)]);
        }),
        ("endless table", |r| {
            r.put(r.desc, 0, DATA, u32::MAX, INDIRECT | WRITE, 0);
            r.offer(0);
        }),
    ];
    for aio in [Aio::IoUring, Aio::Threads] {
        // What is done at once is not in flight when its head comes again.
        let fits = |name: &str| aio == Aio::Threads || name != "same head twice at once";
        let mut d = start(|drive| drive.aio = Some(aio), !0);
        for (name, spoil) in cases.into_iter().filter(|(name, _)| fits(name)) {
            // A good request that may be in flight meanwhile.
            write_header(&d.rig, HEADER, IN, 1);
            d.ring.put(d.ring.desc, 0, HEADER, 16, NEXT, 14);
            d.ring.put(d.ring.desc, 14, BUFFER, 512, NEXT | WRITE, 15);
            d.ring.put(d.ring.desc, 15, STATUS, 1, WRITE, 0);
            spoil(&mut d.ring);
            d.rig.kick(&d.ring);
            d.rig.wait_needs_reset();
            assert_eq!(d.rig.get(0x60) & 2, 2, "{name}: told by a configuration interrupt");
            d.rig.kick(&d.ring);
            d.ring = d.rig.start(!0, 1, 16).remove(0);
            assert!(!d.rig.needs_reset(), "{name}");
            assert_eq!(d.ask(IN, 7, &[(BUFFER, 512, true)]), (OK, 513), "{name}: works after the reset");
            assert_eq!(d.guest(BUFFER, 512), [7; 512]);
        }
    }
}

#[test]
fn read_only_write_through_and_empty() {
    let mut d = start(|drive| drive.readonly = true, !0);
    assert_ne!(d.rig.offered() & feature::RO, 0);
    assert_eq!(d.rig.offered() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(d.ask(OUT, 0, &[(BUFFER, 512, false)]), (IOERR, 1));
    assert_eq!(d.ask(DISCARD, 0, &[(BUFFER, 16, false)]), (UNSUPP, 1));
    assert_eq!(d.ask(IN, 2, &[(BUFFER, 512, true)]), (OK, 513));
    assert_eq!(d.file(0, 512), [0; 512]);

    for aio in [Aio::IoUring, Aio::Off] {
        let mut d = start(|drive| drive.aio = Some(aio), !feature::FLUSH);
        d.rig.memory.write_slice(&[9; 512], GuestAddress(BUFFER)).unwrap();
        assert_eq!(d.ask(OUT, 0, &[(BUFFER, 512, false)]), (OK, 1));
        assert_eq!(d.file(0, 512), [9; 512]);
    }

    let rig = Rig::new(device(None));
    assert_eq!((rig.get(0x100), rig.get(0x104), rig.get(0x114)), (0, 0, 512));
    let ring = rig.start(!0, 1, 16).remove(0);
    let mut d = Disked { rig, ring, image: image() };
    assert!(d.rig.doorbell.attached.lock().unwrap().is_empty(), "nobody will ring it");
    for kind in [IN, FLUSH, GET_ID] {
        assert_eq!(d.ask(kind, 0, &[(BUFFER, 512, true)]), (IOERR, 1));
    }
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let d = start(|_| {}, !0);
    assert_eq!((d.rig.get(8), d.rig.get(0x100), d.rig.get(0x10c), d.rig.get(0x114)), (2, 64, 14, 512));
    d.rig.set(0x100, 1 << 20);
    assert_eq!(d.rig.get(0x100), 64);
    assert_eq!(d.rig.get(0x12c), 1, "one discard segment, aligned to a sector");
}

#[test]
fn an_image_cut_short_behind_our_back_gives_errors() {
    for aio in [Aio::IoUring, Aio::Off] {
        let mut d = start(|drive| drive.aio = Some(aio), !0);
        d.image.as_file().set_len(10 * 512).unwrap();
        assert_eq!(d.ask(IN, 9, &[(BUFFER, 1024, true)]), (IOERR, 1));
        assert_eq!(d.ask(IN, 9, &[(BUFFER, 512, true)]), (OK, 513));
    }
}

#[test]
fn direct_io_takes_any_buffer() {
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    for sector in 0..SECTORS {
        image.as_file().write_all_at(&[sector as u8; 512], sector * 512).unwrap();
    }
    let mut drive = drive(image.path(), Aio::IoUring);
    drive.direct = true;
    let disk = match Disk::open(&drive, &Inherited::default()) {
        Ok(disk) => disk,
        Err(error) => return eprintln!("SKIPPED, this file system has no direct I/O: {error}"),
    };
    let rig = Rig::new(device(Some(disk)));
    let ring = rig.start(!0, 1, 16).remove(0);
    let mut d = Disked { rig, ring, image };
    // Misaligned in memory, and (where blocks are larger than a sector) on the disk.
    for (sector, at, len) in
        [(0, BUFFER, 4096), (3, BUFFER + 1, 512), (5, BUFFER + 7, 8192), (63, BUFFER, 512)]
    {
        assert_eq!(d.ask(IN, sector, &[(at, 100, true), (at + 100, len - 100, true)]), (OK, len + 1));
        assert_eq!(d.guest(at, len as usize), d.file(sector, len as usize));
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        d.rig.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        assert_eq!(d.ask(OUT, sector, &[(at, 33, false), (at + 33, len - 33, false)]), (OK, 1));
        assert_eq!(d.file(sector, len as usize), bytes);
    }
    assert_eq!(
        d.file(2, 512),
        [0..=250u8, 0..=250].into_iter().flatten().cycle().skip(1024).take(512).collect::<Vec<_>>()
    );
    assert_eq!(d.file(62, 512), [62; 512]);
}

/// Requests are in flight, notifications come, and the driver resets at any moment: no hang, no lost device, and
/// after the reset nothing writes to guest memory.
#[test]
fn resets_under_load() {
    for aio in [Aio::IoUring, Aio::Off] {
        let mut d = start(|drive| drive.aio = Some(aio), !0);
        for round in 0..60u32 {
            std::thread::scope(|scope| {
                let rig = &d.rig;
                let kicker = scope.spawn(move || (0..50).for_each(|_| rig.set(0x50, 0)));
                for i in 0..5u64 {
                    let base = DATA + 0x1_0000 * (i + 1);
                    write_header(rig, base, if i % 2 == 0 { IN } else { OUT }, i);
                    d.ring.add(&[
                        (base, 16, false),
                        (base + 0x1000, 4096, i % 2 == 0),
                        (base + 0x800, 1, true),
                    ]);
                    rig.kick(&d.ring);
                }
                for _ in 0..round * 20 {
                    std::hint::spin_loop();
                }
                rig.set(0x70, 0);
                let mark = vec![0x5a; 0x6_0000];
                rig.memory.write_slice(&mark, GuestAddress(DATA)).unwrap();
                kicker.join().unwrap();
                d.ring = rig.start(!0, 1, 16).remove(0);
            });
            // Goes through the I/O thread, so all that was there has passed.
            assert_eq!(d.ask(GET_ID, 0, &[]), (OK, 1));
            assert_eq!(d.guest(DATA + 0x1_0000, 0x5_0000), vec![0x5a; 0x5_0000], "round {round}");
        }
    }
}

#[test]
fn one_thread_serves_many_devices_and_ends_with_them() {
    let worker = Worker::new("many");
    let images: Vec<_> = (0..3).map(|_| image()).collect();
    let mut disks: Vec<_> = images
        .into_iter()
        .map(|image| {
            let disk = Disk::open(&drive(image.path(), Aio::IoUring), &Inherited::default()).unwrap();
            let rig = Rig::new(Blk::new(BlkOptions {
                backend: Some(disk),
                serial: None,
                read_only: false,
                queue_size: 16,
                queues: 1,
                worker: worker.clone(),
            }));
            let ring = rig.start(!0, 1, 16).remove(0);
            Disked { rig, ring, image }
        })
        .collect();
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        tasks
            .filter(|t| {
                let name =
                    t.as_ref().map(|t| std::fs::read_to_string(t.path().join("comm")).unwrap_or_default());
                name.is_ok_and(|n| n.trim() == "io-many")
            })
            .count()
    };
    for d in &mut disks {
        assert_eq!(d.ask(IN, 1, &[(BUFFER, 512, true)]), (OK, 513));
    }
    assert_eq!(threads(), 1);
    disks.pop().unwrap().rig.transport.shut_down().unwrap();
    assert_eq!(disks[0].ask(FLUSH, 0, &[]), (OK, 1));
    drop(disks);
    drop(worker);
    // A thread that has been joined is still listed until the kernel has put it away.
    let deadline = Instant::now() + Duration::from_secs(10);
    while threads() > 0 {
        assert!(Instant::now() < deadline, "the thread is still there");
        std::thread::yield_now();
    }
}

#[test]
fn a_limit_delays_requests_and_keeps_their_order() {
    // A burst of one, then one each two milliseconds: most of these wait for the timer.
    let mut d = start(
        |drive| {
            drive.iops_total = Some(500);
            drive.aio = Some(Aio::Off);
        },
        !0,
    );
    for round in 0..40u64 {
        let heads: Vec<u16> = (0..5)
            .map(|i| {
                let base = DATA + 0x1_0000 * (i + 1);
                write_header(&d.rig, base, IN, round);
                d.ring.add(&[(base, 16, false), (base + 0x1000, 512, true), (base + 0x800, 1, true)])
            })
            .collect();
        d.rig.kick(&d.ring);
        for head in heads {
            assert_eq!(d.rig.used(&mut d.ring), (u32::from(head), 513));
        }
    }
    // A reset while requests wait leaves nothing behind.
    for _ in 0..14 {
        d.ring.add(&[(HEADER, 16, false)]);
    }
    d.rig.kick(&d.ring);
    d.ring = d.rig.start(!0, 1, 16).remove(0);
    assert_eq!(d.ask(IN, 1, &[(BUFFER, 512, true)]), (OK, 513));
}

#[test]
fn zeroes_are_found_out_and_flushes_may_be_left_out() {
    use crate::config::DetectZeroes;
    for (detect, discard, blocks) in
        [(DetectZeroes::Off, true, 64), (DetectZeroes::On, true, 64), (DetectZeroes::Unmap, true, 48)]
    {
        let mut d = start(
            |drive| {
                drive.detect_zeroes = detect;
                drive.discard = discard;
                drive.no_flush = true;
            },
            !0,
        );
        d.rig.memory.write_slice(&[0; 8192], GuestAddress(BUFFER)).unwrap();
        assert_eq!(d.ask(OUT, 16, &[(BUFFER, 1000, false), (BUFFER + 1000, 7192, false)]), (OK, 1));
        assert_eq!(d.file(15, 512), [15; 512]);
        assert_eq!(d.file(16, 8192), [0; 8192]);
        assert_eq!(d.file(32, 512), [32; 512]);
        // One byte that is not zero, at the very end.
        d.rig.memory.write_obj(1u8, GuestAddress(BUFFER + 4095)).unwrap();
        assert_eq!(d.ask(OUT, 40, &[(BUFFER, 4096, false)]), (OK, 1));
        assert_eq!(d.file(47, 512)[511], 1);
        assert_eq!(d.ask(FLUSH, 0, &[]), (OK, 1));
        use std::os::unix::fs::MetadataExt;
        assert_eq!(d.image.as_file().metadata().unwrap().blocks(), blocks, "{detect:?}");
    }
}

#[test]
fn a_qcow2_disk_is_a_disk_like_any_other() {
    use crate::config::ImageFormat;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for (aio, features) in [(Aio::IoUring, !0), (Aio::Off, !0), (Aio::Threads, !feature::FLUSH)] {
        let mut create = std::process::Command::new("qemu-img");
        let create = create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M");
        assert!(create.status().unwrap().success());
        let drive = Drive { format: ImageFormat::Qcow2, ..drive(&path, aio) };
        let blk = device(None);
        let port = blk.port();
        let rig = Rig::new(blk);
        let ring = rig.start(features, 1, 16).remove(0);
        let mut d = Disked { rig, ring, image: image() };
        for round in 1..4u8 {
            port.insert(reopen(&drive), None).unwrap();
            d.rig.wait(|| (d.rig.get(0x60) & 2 != 0).then_some(()));
            d.rig.set(0x64, 2);
            assert_eq!(d.rig.get(0x100), 2048);
            // Zeroes, a place made for it, and then in place.
            for (sector, want) in [(0, round - 1), (100, round - 1), (900, 0)] {
                assert_eq!(d.ask(IN, sector, &[(BUFFER, 512, true)]), (OK, 513));
                assert_eq!(d.guest(BUFFER, 512), [want; 512], "{sector} in round {round}");
            }
            for (at, len) in [(0, 8192), (100, 1024), (100, 512), (700, 4096)] {
                d.rig.memory.write_slice(&vec![round; len as usize], GuestAddress(BUFFER)).unwrap();
                assert_eq!(
                    d.ask(OUT, at, &[(BUFFER, 300, false), (BUFFER + 300, len - 300, false)]),
                    (OK, 1)
                );
            }
            let segment = [&512u64.to_le_bytes()[..], &1024u32.to_le_bytes(), &1u32.to_le_bytes()].concat();
            d.rig.memory.write_slice(&segment, GuestAddress(BUFFER)).unwrap();
            assert_eq!(d.ask(WRITE_ZEROES, 0, &[(BUFFER, 16, false)]), (OK, 1));
            assert_eq!(d.ask(FLUSH, 0, &[]), (OK, 1));
            assert_eq!(d.ask(IN, 698, &[(BUFFER, 4096, true)]), (OK, 4097));
            assert_eq!(d.guest(BUFFER, 4096), [0; 4096]);
            port.eject().unwrap();
            d.rig.set(0x64, 2);
            let check =
                std::process::Command::new("qemu-img").args(["check", "-U"]).arg(&path).output().unwrap();
            assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        }
    }
}

#[test]
fn requests_go_on_after_a_snapshot() {
    for aio in [Aio::IoUring, Aio::Threads, Aio::Off] {
        for elsewhere in [false, true] {
            // One request a second: the others wait in the ring.
            let mut d = start(|drive| (drive.aio, drive.iops_total) = (Some(aio), Some(1)), !0);
            for sector in 0..3 {
                write_header(&d.rig, HEADER + 0x100 * sector, IN, sector);
                d.ring.add(&[
                    (HEADER + 0x100 * sector, 16, false),
                    (BUFFER + 0x400 * sector, 512, true),
                    (STATUS + sector, 1, true),
                ]);
            }
            d.rig.kick(&d.ring);
            d.rig.used(&mut d.ring);
            let saved = d.rig.stand_and_go_on(elsewhere);
            let position = saved.queues[0].position;
            assert_eq!(position.avail, position.used, "nothing is in flight");
            for sector in 1..3 {
                d.rig.used(&mut d.ring);
                assert_eq!(d.guest(BUFFER + 0x400 * sector, 512), [sector as u8; 512]);
            }
            assert_eq!(d.ring.next_used(), None);
        }
    }
}

#[test]
fn another_disk_than_the_one_that_was_saved_is_refused() {
    let d = start(|_| (), !0);
    d.rig.transport.suspend().unwrap();
    let saved = d.rig.transport.save().unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    for (from, to, words) in [
        ("\"SERIAL\"", "\"OTHER\"", "serial differs: \"OTHER\" in the snapshot, \"SERIAL\" in this VM"),
        ("\"sectors\":64", "\"sectors\":65", "the size of the disk in sectors differs"),
        ("\"read_only\":false", "\"read_only\":true", "readonly differs"),
        ("\"disk\":{", "\"disk\":null,\"x\":{", "what is in the slot differs"),
        ("\"blk\":{\"features\":", "\"blk\":{\"features\":9", "the saved set of features"),
    ] {
        assert!(text.contains(from), "{text}");
        d.rig.transport.reset();
        let bad = serde_json::from_str(&text.replace(from, to)).unwrap();
        let error = d.rig.transport.restore(&bad).unwrap_err().to_string();
        assert!(error.starts_with(words), "{error}");
    }
}

#[test]
fn another_vm_may_have_another_read_only_disk_and_its_guest_is_told() {
    let d = start(|_| (), !0);
    d.rig.transport.suspend().unwrap();
    let here = d.rig.transport.save().unwrap();
    let text = serde_json::to_string(&here).unwrap();
    let read_only = |text: &str| text.replace("\"read_only\":false", "\"read_only\":true");
    let parse = |text: &str| serde_json::from_str::<crate::virtio::state::TransportState>(text).unwrap();
    for (saved, here, changes) in [
        // The disk that is written is the one that was saved, or none at all.
        (text.replace("\"sectors\":64", "\"sectors\":65"), text.clone(), None),
        (text.replace("\"sectors\":64", "\"sectors\":65"), read_only(&text), None),
        (read_only(&text), text.clone(), None),
        (text.clone(), text.clone(), Some(false)),
    ] {
        let mut saved = parse(&saved);
        saved.device.take_identity(&parse(&here).device);
        d.rig.transport.reset();
        assert_eq!(d.rig.transport.restore(&saved).is_ok(), changes.is_some());
    }
    for saved in [
        text.replace("\"SERIAL\"", "\"OTHER\"").replace("\"read_only\":false", "\"read_only\":true"),
        text.replace("\"disk\":{", "\"disk\":null,\"x\":{"),
    ] {
        let mut saved = parse(&saved);
        saved.device.take_identity(&parse(&read_only(&text)).device);
        assert_ne!(saved.device, parse(&read_only(&text)).device, "it says that it has changed");
        let said = serde_json::to_string(&saved.device).unwrap();
        assert_eq!(said, serde_json::to_string(&parse(&read_only(&text)).device).unwrap());
    }
}
