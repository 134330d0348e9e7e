//! The whole device, from registers to a pair of sockets that stands for the tap.

use std::os::fd::OwnedFd;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::inherit::Inherited;
use crate::net::tests::{in_a_namespace, ip, named};
use crate::net::{Burst, HEADER_BYTES};
use crate::virtio::state::{Suspend as _, TransportState};
use crate::virtio::testing::{DATA, INDIRECT, NEXT, PLAIN, RAM, Rig, Ring, WRITE};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

struct Nic {
    rig: Rig,
    peer: OwnedFd,
    rx: Ring,
    tx: Ring,
}

fn device(backend: Option<Backend>) -> Net {
    Net::new(NetOptions { backend, mac: MAC, multi_queue: true, queue_size: 256, worker: Worker::new("t") })
}

fn start(features: u64) -> Nic {
    let (backend, peer) = Backend::fake();
    let rig = Rig::new(device(Some(backend)));
    let mut rings = rig.start(features, 2, 256).into_iter();
    let (rx, tx) = (rings.next().unwrap(), rings.next().unwrap());
    Nic { rig, peer, rx, tx }
}

fn packet(len: usize, seed: u8) -> Vec<u8> {
    let body = (0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed));
    [0; HEADER_BYTES].into_iter().chain(body).collect()
}

impl Nic {
    fn put(&self, at: u64, bytes: &[u8]) {
        self.rig.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn guest(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rig.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn transmit(&mut self, parts: &[(u64, u32, bool)]) {
        let head = self.tx.add(parts);
        self.rig.kick(&self.tx);
        assert_eq!(self.rig.used(&mut self.tx), (u32::from(head), 0));
    }

    /// What the tap got, or `None`. Call it after the packet has come back on the ring.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        let n = rustix::io::read(&self.peer, &mut bytes).ok()?;
        bytes.truncate(n);
        Some(bytes)
    }

    fn arrive(&self, bytes: &[u8]) {
        assert_eq!(rustix::io::write(&self.peer, bytes).unwrap(), bytes.len());
    }
}

#[path = "port_tests.rs"]
mod port_tests;

#[path = "control_tests.rs"]
mod control_tests;

#[path = "vhost_tests.rs"]
mod vhost_tests;

#[test]
fn packets_go_out_as_they_are() {
    for features in [!0, PLAIN] {
        let mut nic = start(features);
        let out = packet(1000, 3);
        nic.put(DATA, &out);
        nic.transmit(&[(DATA, 12, false), (DATA + 12, 1000, false)]);
        assert_eq!(nic.sent().unwrap(), out);
        nic.transmit(&[
            (DATA, 5, false),
            (DATA + 5, 0, false),
            (DATA + 5, 407, false),
            (DATA + 412, 600, false),
        ]);
        assert_eq!(nic.sent().unwrap(), out);
        nic.transmit(&[(DATA, 1012, false)]);
        assert_eq!(nic.sent().unwrap(), out);
        // Checksum to be filled in by the host; `num_buffers` is not the guest's to say.
        let offload = [&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 9, 9][..], &out[12..]].concat();
        nic.put(DATA, &offload);
        nic.transmit(&[(DATA, 1012, false)]);
        assert_eq!(nic.sent().unwrap(), [&offload[..10], &[0, 0], &offload[12..]].concat());
        // More than a wake-up's worth.
        for i in 0..600u32 {
            nic.put(DATA, &packet(60, i as u8));
            nic.transmit(&[(DATA, 72, false)]);
            assert_eq!(nic.sent().unwrap(), packet(60, i as u8));
        }
        assert!(!nic.rig.needs_reset());
    }
}

#[test]
fn many_packets_at_once_go_out_in_their_order() {
    // Small ones are copied, large ones are not; from some round on they leave by one call. One in each round makes no sense.
    let sizes = [60, 1514, 255, 256, 257, 14, 13, 900, 60, 60, 60, 60];
    for features in [!0, PLAIN] {
        let mut nic = start(features);
        for round in 0..100u8 {
            let place = |i: usize| DATA + 0x1000 * i as u64;
            for (i, len) in sizes.into_iter().enumerate() {
                nic.put(place(i), &packet(len, round.wrapping_add(i as u8)));
            }
            let heads: Vec<u16> = sizes
                .into_iter()
                .enumerate()
                .map(|(i, len)| {
                    let len = len as u32;
                    let split = [(place(i), 12, false), (place(i) + 12, len, false)];
                    let whole = [(place(i), 12 + len, false)];
                    nic.tx.add(if i % 2 == 0 { &split } else { &whole })
                })
                .collect();
            nic.rig.kick(&nic.tx);
            for head in heads {
                assert_eq!(nic.rig.used(&mut nic.tx), (u32::from(head), 0));
            }
            for (i, len) in sizes.into_iter().enumerate().filter(|(_, len)| *len >= 14) {
                assert_eq!(nic.sent().unwrap(), packet(len, round.wrapping_add(i as u8)), "{round} {i}");
            }
            assert_eq!(nic.sent(), None);
        }
        assert!(!nic.rig.needs_reset());
        // A tap that takes no more drops them, and a bad head among good ones is no less bad.
        for i in 0..3 * Burst::MOST {
            nic.tx.add(&[(DATA, 1000, false)]);
            if i == Burst::MOST + 7 {
                nic.tx.offer(300);
            }
        }
        nic.rig.kick(&nic.tx);
        nic.rig.wait_needs_reset();
        let sent = std::iter::from_fn(|| nic.sent()).count();
        assert_eq!(sent, Burst::MOST + 8);
    }
}

#[test]
fn a_flood_comes_in_its_order() {
    for features in [!0, !feature::MRG_RXBUF] {
        let mut nic = start(features);
        let place = |head: u16| DATA + 0x1000 * u64::from(head);
        // More buffers than a round's packets need; they go round.
        let (mut offered, mut next) = (0u16, 0u16);
        for round in 0..150u32 {
            let sizes: Vec<usize> = (0..40)
                .map(|i| match (round * 40 + i) % 97 {
                    // Seldom, and not in the first rounds: more than one buffer.
                    50 if round > 100 => 5000,
                    n => 60 + n as usize,
                })
                .collect();
            while offered < 50 {
                let head = nic.rx.add(&[(place(next % 64), 2048, true)]);
                assert_eq!(head % 64, next % 64);
                (offered, next) = (offered + 1, next + 1);
            }
            nic.rig.kick(&nic.rx);
            for (i, len) in sizes.iter().enumerate() {
                nic.arrive(&packet(*len, i as u8));
            }
            for (i, len) in sizes.into_iter().enumerate() {
                let whole = packet(len, i as u8);
                if whole.len() > 2048 && features & feature::MRG_RXBUF == 0 {
                    continue;
                }
                let mut bytes = Vec::new();
                let mut buffers = 1;
                while buffers > 0 {
                    let (head, n) = nic.rig.used(&mut nic.rx);
                    let part = nic.guest(place(head as u16 % 64), n as usize);
                    if bytes.is_empty() {
                        buffers = u16::from_le_bytes([part[10], part[11]]);
                    }
                    bytes.extend(part);
                    (buffers, offered) = (buffers - 1, offered - 1);
                }
                bytes[10..12].fill(0);
                assert_eq!(bytes.len(), whole.len(), "{round} {i}");
                assert!(bytes == whole, "{round} {i}");
            }
        }
        assert!(!nic.rig.needs_reset());
    }
}

#[test]
fn a_short_buffer_before_one_of_very_many_parts() {
    // More parts than one read takes: read into the first, copied on to the second.
    let mut nic = start(!0);
    let (table, parts, many) = (DATA + 0x8000, DATA + 0x10000, 1024);
    for i in 0..many {
        let (flags, next) = if i + 1 < many { (WRITE | NEXT, i + 1) } else { (WRITE, 0) };
        nic.rx.put(table, i, parts + 2 * u64::from(i), 2, flags, next);
    }
    for seed in 0..3 {
        let short = nic.rx.add(&[(DATA, 600, true)]);
        let long = 200;
        nic.rx.put(nic.rx.desc, long, table, 16 * u32::from(many), INDIRECT, 0);
        nic.rx.offer(long);
        nic.rig.kick(&nic.rx);
        let whole = packet(1500, seed);
        nic.arrive(&whole);
        assert_eq!(nic.rig.used(&mut nic.rx), (u32::from(short), 600));
        assert_eq!(nic.rig.used(&mut nic.rx), (u32::from(long), 912));
        let mut bytes = [nic.guest(DATA, 600), nic.guest(parts, 912)].concat();
        assert_eq!(bytes[10..12], 2u16.to_le_bytes());
        bytes[10..12].fill(0);
        assert!(bytes == whole);
    }
    assert!(!nic.rig.needs_reset());
}

#[test]
fn packets_that_make_no_sense_are_dropped_and_come_back() {
    let mut nic = start(!0);
    type Case = (&'static str, [u8; 12], &'static [(u64, u32, bool)]);
    let cases: [Case; 11] = [
        ("nothing", [0; 12], &[(DATA, 0, false)]),
        ("half a header", [0; 12], &[(DATA, 6, false)]),
        ("no packet", [0; 12], &[(DATA, 12, false)]),
        ("shorter than Ethernet", [0; 12], &[(DATA, 25, false)]),
        ("only writable", [0; 12], &[(DATA, 100, true)]),
        ("longer than any packet", [0; 12], &[(DATA, 12, false), (DATA, 65_554, false)]),
        ("a megabyte", [0; 12], &[(DATA, 1 << 20, false)]),
        ("unknown flag", [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[(DATA, 100, false)]),
        ("unknown segmentation", [1, 3, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0], &[(DATA, 100, false)]),
        ("checksum outside", [1, 0, 0, 0, 0, 0, 90, 0, 0, 0, 0, 0], &[(DATA, 100, false)]),
        ("segments of nothing", [1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &[(DATA, 100, false)]),
    ];
    for (name, header, parts) in cases {
        nic.put(DATA, &header);
        nic.transmit(parts);
        assert_eq!(nic.sent(), None, "{name}");
    }
    nic.put(DATA, &packet(60, 1));
    nic.transmit(&[(DATA, 72, false)]);
    assert!(nic.sent().is_some(), "goes on");
}

#[test]
fn packets_come_in_whole_buffers_or_several() {
    for features in [!0, PLAIN] {
        let mut nic = start(features);
        for (len, buffers) in [(60, 1), (1488, 1), (1489, 2), (9000, 7), (65_000, 44), (60, 1)] {
            let incoming = packet(len, buffers as u8);
            for i in 0..48 {
                nic.rx.add(&[(DATA + 0x800 * i, 1500, true)]);
            }
            nic.rig.kick(&nic.rx);
            nic.arrive(&incoming);
            let mut got = Vec::new();
            for i in 0..buffers {
                let (id, n) = nic.rig.used(&mut nic.rx);
                let at = nic.rig.memory.read_obj(GuestAddress(nic.rx.desc + 16 * u64::from(id))).unwrap();
                assert!(n == 1500 || i + 1 == buffers);
                got.extend(nic.guest(at, n as usize));
            }
            assert_eq!(u16::from_le_bytes([got[10], got[11]]), buffers);
            assert_eq!(got.len(), incoming.len());
            assert!(got[12..] == incoming[12..], "{len}");
            // What is left over stays with the device: start again with a clean ring.
            let mut rings = nic.rig.start(features, 2, 256).into_iter();
            (nic.rx, nic.tx) = (rings.next().unwrap(), rings.next().unwrap());
        }
    }
}

#[test]
fn without_merging_a_packet_fits_or_is_dropped() {
    let mut nic = start(!feature::MRG_RXBUF);
    nic.rx.add(&[(DATA, 12, true), (DATA + 0x1000, 100, true)]);
    nic.rig.kick(&nic.rx);
    nic.arrive(&packet(101, 1));
    nic.arrive(&packet(100, 2));
    assert_eq!(nic.rig.used(&mut nic.rx), (0, 112));
    assert_eq!(nic.guest(DATA, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(nic.guest(DATA + 0x1000, 100), packet(100, 2)[12..]);
}

#[test]
fn a_guest_without_buffers_keeps_packets_waiting() {
    for features in [!0, PLAIN] {
        let mut nic = start(features);
        for i in 0..20 {
            nic.arrive(&packet(100, i));
        }
        for i in 0..20u8 {
            nic.rx.add(&[(DATA, 2000, true)]);
            nic.rig.kick(&nic.rx);
            nic.rig.used(&mut nic.rx);
            assert_eq!(nic.guest(DATA + 12, 100), packet(100, i)[12..], "{i}");
        }
        // Buffers that cannot even hold a header come back unused.
        nic.rx.add(&[(DATA, 11, true)]);
        let tiny = nic.rx.add(&[(DATA, 100, false)]);
        let good = nic.rx.add(&[(DATA, 2000, true)]);
        nic.arrive(&packet(100, 7));
        nic.rig.kick(&nic.rx);
        assert_eq!(nic.rig.used(&mut nic.rx).1, 0);
        assert_eq!(nic.rig.used(&mut nic.rx), (u32::from(tiny), 0));
        assert_eq!(nic.rig.used(&mut nic.rx), (u32::from(good), 112));
    }
}

#[test]
fn bad_rings_need_a_reset_in_each_direction() {
    type Break = fn(&mut Nic);
    let cases: [(&str, Break); 6] = [
        ("tx index jumps", |n| {
            n.tx.set_avail_index(300);
            n.rig.kick(&n.tx);
        }),
        ("tx loop", |n| {
            n.tx.put(n.tx.desc, 0, DATA, 12, NEXT, 0);
            n.tx.offer(0);
            n.rig.kick(&n.tx);
        }),
        ("tx from a hole", |n| {
            n.tx.add(&[(RAM, 100, false)]);
            n.rig.kick(&n.tx);
        }),
        ("rx into a hole", |n| {
            n.rx.add(&[(RAM, 2000, true)]);
            n.rig.kick(&n.rx);
        }),
        ("rx head twice", |n| {
            n.rx.put(n.rx.desc, 0, DATA, 20, 2, 0);
            n.rx.offer(0);
            n.rx.offer(0);
            n.rig.kick(&n.rx);
        }),
        ("rx index jumps", |n| {
            n.rx.set_avail_index(300);
            n.rig.kick(&n.rx);
        }),
    ];
    for (name, spoil) in cases {
        let mut nic = start(!0);
        nic.arrive(&packet(1000, 1));
        spoil(&mut nic);
        nic.rig.wait_needs_reset();
        while nic.sent().is_some() {}
        let mut rings = nic.rig.start(!0, 2, 256).into_iter();
        (nic.rx, nic.tx) = (rings.next().unwrap(), rings.next().unwrap());
        assert!(!nic.rig.needs_reset(), "{name}");
        nic.put(DATA, &packet(60, 1));
        nic.transmit(&[(DATA, 72, false)]);
        assert_eq!(nic.sent().unwrap(), packet(60, 1), "{name}: works after the reset");
    }
}

#[test]
fn an_empty_slot_is_a_nic_without_link() {
    let rig = Rig::new(device(None));
    assert_eq!(
        (rig.get(8), rig.get(0x100), rig.get(0x104)),
        (1, u32::from_le_bytes([0x52, 0x54, 0, 1]), 0x0302)
    );
    let mut rings = rig.start(!0, 2, 256).into_iter();
    let (rx, tx) = (rings.next().unwrap(), rings.next().unwrap());
    let mut nic = Nic { rig, peer: Backend::fake().1, rx, tx };
    nic.rx.add(&[(DATA, 2000, true)]);
    nic.rig.kick(&nic.rx);
    nic.transmit(&[(DATA, 72, false)]);
    let nic = start(!0);
    assert_eq!(nic.rig.get(0x104), 0x1_0302, "link up, and one pair of queues above it in the next word");
    assert_eq!(nic.rig.get(0x108), 1);
}

#[test]
fn a_driver_without_both_queues_needs_a_reset() {
    let rig = Rig::new(device(None));
    rig.negotiate(!0);
    rig.queue(1, 256);
    rig.driver_ok();
    assert!(rig.needs_reset());
}

#[test]
fn resets_under_load() {
    let mut nic = start(!0);
    for round in 0..60u32 {
        for i in 0..8u64 {
            nic.rx.add(&[(DATA + 0x1000 * i, 2000, true)]);
            nic.put(DATA + 0x1_0000, &packet(500, 1));
            nic.tx.add(&[(DATA + 0x1_0000, 512, false)]);
            // Full when the device has had no chance to read for some rounds: fine too.
            let _ = rustix::io::write(&nic.peer, &packet(500, i as u8));
            nic.rig.kick(&nic.rx);
            nic.rig.kick(&nic.tx);
        }
        for _ in 0..round * 20 {
            std::hint::spin_loop();
        }
        nic.rig.set(0x70, 0);
        nic.put(DATA, &[0x5a; 0x1_0000]);
        while nic.sent().is_some() {}
        let mut rings = nic.rig.start(!0, 2, 256).into_iter();
        (nic.rx, nic.tx) = (rings.next().unwrap(), rings.next().unwrap());
        // Goes through the I/O thread, so all that was there has passed.
        nic.put(DATA + 0x1_0000, &packet(60, 9));
        nic.transmit(&[(DATA + 0x1_0000, 72, false)]);
        assert_eq!(nic.guest(DATA, 0x1_0000), [0x5a; 0x1_0000], "round {round}");
        while nic.sent().is_some() {}
        // Packets that came while nobody wanted them.
        for _ in 0..8 {
            nic.rx.add(&[(DATA + 0x2_0000, 2000, true)]);
        }
        nic.rig.kick(&nic.rx);
    }
}

#[test]
fn a_deleted_tap_takes_the_link_down_and_the_device_goes_on() {
    in_a_namespace(|| {
        assert!(ip("tuntap add dev t0 mode tap"));
        assert!(ip("link set t0 up"));
        let rig = Rig::new(device(Some(Backend::open(&named("t0"), &Inherited::default()).unwrap())));
        let mut rings = rig.start(!0, 2, 256).into_iter();
        let (rx, tx) = (rings.next().unwrap(), rings.next().unwrap());
        let mut nic = Nic { rig, peer: Backend::fake().1, rx, tx };
        nic.put(DATA, &packet(60, 1));
        nic.transmit(&[(DATA, 72, false)]);
        // Something to read into, so that the end of the tap is what the device meets next.
        for _ in 0..32 {
            nic.rx.add(&[(DATA + 0x1000, 2000, true)]);
        }
        nic.rig.kick(&nic.rx);
        assert_eq!(nic.rig.get(0x104) >> 16 & 1, 1);
        assert!(ip("link del t0"));
        nic.rig.wait(|| (nic.rig.get(0x104) >> 16 & 1 == 0).then_some(()));
        nic.rig.wait(|| (nic.rig.get(0x60) & 2 != 0).then_some(()));
        for _ in 0..3 {
            nic.transmit(&[(DATA, 72, false)]);
        }
        assert!(!nic.rig.needs_reset());
        let mut rings = nic.rig.start(!0, 2, 256).into_iter();
        (nic.rx, nic.tx) = (rings.next().unwrap(), rings.next().unwrap());
        nic.transmit(&[(DATA, 72, false)]);
    });
}

#[test]
fn packets_go_on_after_a_snapshot() {
    for elsewhere in [false, true] {
        let mut nic = start(!0);
        for i in 0..4 {
            nic.rx.add(&[(DATA + 0x1000 * i, 0x1000, true)]);
        }
        nic.rig.kick(&nic.rx);
        for seed in 0..4 {
            let bytes = packet(300, seed);
            nic.arrive(&bytes);
            assert_eq!(nic.rig.used(&mut nic.rx).1, 312);
            assert_eq!(nic.guest(DATA + 0x1000 * u64::from(seed) + 12, 300), bytes[12..]);
            let saved = nic.rig.stand_and_go_on(elsewhere);
            let position = saved.queues[0].position;
            assert_eq!((position.avail, position.used), (u16::from(seed) + 1, u16::from(seed) + 1));
        }
        nic.put(DATA, &packet(60, 9));
        nic.transmit(&[(DATA, 72, false)]);
        assert_eq!(nic.sent().unwrap(), packet(60, 9));
    }
}

#[test]
fn a_link_that_was_down_when_it_was_saved_is_announced() {
    for (link, changes) in [("true", false), ("false", true)] {
        let nic = start(!0);
        nic.rig.transport.suspend().unwrap();
        let text = serde_json::to_string(&nic.rig.transport.save().unwrap()).unwrap();
        assert!(text.contains("\"link\":true"), "{text}");
        nic.rig.transport.reset();
        let state: TransportState =
            serde_json::from_str(&text.replace("\"link\":true", &format!("\"link\":{link}"))).unwrap();
        nic.rig.transport.restore(&state).unwrap();
        nic.rig.transport.resume().unwrap();
        let again = nic.rig.transport.save().unwrap();
        assert_eq!(again.config_generation != state.config_generation, changes);
        assert_eq!(again.interrupt_status & 2 != 0, changes);
    }
}

#[test]
fn another_nic_than_the_one_that_was_saved_is_refused() {
    let nic = start(!0);
    nic.rig.transport.suspend().unwrap();
    let text = serde_json::to_string(&nic.rig.transport.save().unwrap()).unwrap();
    for (from, to, words) in [
        ("\"mac\":[82", "\"mac\":[2", "mac differs: \"02:54:00:01:02:03\" in the snapshot"),
        ("\"present\":true", "\"present\":false", "what is in the slot differs"),
        ("\"pairs\":1,\"link", "\"pairs\":2,\"link", "the number of queue pairs differs"),
    ] {
        assert!(text.contains(from), "{text}");
        nic.rig.transport.reset();
        let bad = serde_json::from_str(&text.replace(from, to)).unwrap();
        let error = nic.rig.transport.restore(&bad).unwrap_err().to_string();
        assert!(error.starts_with(words), "{error}");
    }
}

#[test]
fn a_nic_of_another_vm_has_the_address_of_that_one_and_its_guest_is_told() {
    let nic = start(!0);
    nic.rig.transport.suspend().unwrap();
    let here = nic.rig.transport.save().unwrap();
    // The driver had given it an address of its own.
    let text = serde_json::to_string(&here).unwrap();
    let text = text.replace("\"mac\":[82", "\"mac\":[86").replace("\"face\":[82", "\"face\":[90");
    let mut saved: TransportState = serde_json::from_str(&text).unwrap();
    saved.device.take_identity(&here.device);
    nic.rig.transport.reset();
    nic.rig.transport.restore(&saved).unwrap();
    nic.rig.transport.resume().unwrap();
    nic.rig.transport.suspend().unwrap();
    let again = nic.rig.transport.save().unwrap();
    assert_eq!(again.device, here.device);
    assert_eq!((again.interrupt_status & 2, again.config_generation), (2, here.config_generation + 1));
}
