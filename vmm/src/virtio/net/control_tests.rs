//! The control queue and several pairs, from the driver's side.

use super::*;

#[test]
fn commands_take_effect_and_a_reset_undoes_them() {
    let (backend, _peer) = Backend::fake();
    let rig = Rig::new(device(Some(backend)));
    let mut control = rig.start(!0, 3, 256).remove(2);
    let mut ask = |bytes: &[u8]| rig.command(&mut control, bytes);
    assert_eq!(ask(&[0, 0, 1]), Some(0));
    assert_eq!(ask(&[2, 0, 1, 0]), Some(1), "no VLAN filter");
    assert_eq!(ask(&[4, 0, 1, 0]), Some(1), "one pair only");
    assert_eq!(ask(&[1, 1, 2, 0, 0, 0, 0, 7]), Some(0));
    assert_eq!(ask(&[0x5a; 20_000]), Some(1));
    assert_eq!(ask(&[]), Some(1));
    assert_eq!((rig.get(0x100), rig.get(0x104) & 0xffff), (2, 0x0700));
    // Nowhere to put the answer: the command counts all the same.
    rig.memory.write_slice(&[1, 1, 2, 0, 0, 0, 0, 9], GuestAddress(DATA)).unwrap();
    control.add(&[(DATA, 8, false)]);
    rig.kick(&control);
    assert_eq!(rig.used(&mut control).1, 0);
    assert_eq!(rig.get(0x104) & 0xffff, 0x0900);
    rig.set(0x70, 0);
    assert_eq!(rig.get(0x100), u32::from_le_bytes([0x52, 0x54, 0, 1]));
}

#[test]
fn a_bad_control_ring_needs_a_reset() {
    let rig = Rig::new(device(None));
    let control = rig.start(!0, 3, 256).remove(2);
    control.set_avail_index(300);
    rig.kick(&control);
    rig.wait_needs_reset();
}

#[test]
fn offloads_reach_the_tap_when_the_driver_changes_them() {
    in_a_namespace(|| {
        assert!(ip("tuntap add dev t0 mode tap"));
        let rig = Rig::new(device(Some(Backend::open(&named("t0"), &Inherited::default()).unwrap())));
        let mut control = rig.start(!0, 3, 256).remove(2);
        let mut set = |bits: u64| rig.command(&mut control, &[&[5, 0], &bits.to_le_bytes()[..]].concat());
        let all = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6;
        assert_eq!([set(0), set(all), set(feature::GUEST_CSUM), set(1 << 10)], [0, 0, 0, 1].map(Some));
    });
}

#[test]
fn pairs_come_into_use_when_the_driver_says_so() {
    let (backend, peers) = Backend::fakes(2);
    let rig = Rig::new(device(Some(backend)));
    assert_eq!(rig.get(0x108), 2);
    let mut rings = rig.start(!0, 5, 256);
    let ask = |rings: &mut Vec<Ring>, n: u8| rig.command(&mut rings[4], &[4, 0, n, 0]);
    rings[2].add(&[(DATA + 0x1_0000, 2000, true)]);
    rig.kick(&rings[2]);
    assert_eq!(rustix::io::write(&peers[1], &packet(100, 1)).unwrap(), 112);
    assert_eq!(ask(&mut rings, 3), Some(1));
    assert!(rings[2].next_used().is_none(), "not in use yet");
    assert_eq!(ask(&mut rings, 2), Some(0));
    assert_eq!(rig.used(&mut rings[2]).1, 112);
    let out = packet(60, 3);
    for (pair, to) in [(1, 1), (0, 0)] {
        rig.memory.write_slice(&out, GuestAddress(DATA)).unwrap();
        rings[2 * pair + 1].add(&[(DATA, 72, false)]);
        rig.kick(&rings[2 * pair + 1]);
        rig.used(&mut rings[2 * pair + 1]);
        let mut got = [0; 100];
        assert_eq!(rustix::io::read(&peers[to], &mut got).unwrap(), 72, "{pair}");
    }
    assert_eq!(ask(&mut rings, 1), Some(0));
    // What is still sent on the pair that is not in use goes out by the other.
    rig.memory.write_slice(&out, GuestAddress(DATA)).unwrap();
    rings[3].add(&[(DATA, 72, false)]);
    rig.kick(&rings[3]);
    rig.used(&mut rings[3]);
    assert_eq!(rustix::io::read(&peers[0], &mut [0; 100]).unwrap(), 72);
    assert!(!rig.needs_reset());
}

#[test]
fn a_driver_that_does_not_know_several_pairs_finds_control_at_two() {
    let (backend, peers) = Backend::fakes(3);
    let rig = Rig::new(device(Some(backend)));
    let mut rings = rig.start(!feature::MQ, 3, 256);
    assert_eq!(rig.command(&mut rings[2], &[0, 1, 1]), Some(0));
    assert_eq!(rig.command(&mut rings[2], &[4, 0, 1, 0]), Some(1));
    rig.memory.write_slice(&packet(60, 1), GuestAddress(DATA)).unwrap();
    rings[1].add(&[(DATA, 72, false)]);
    rig.kick(&rings[1]);
    rig.used(&mut rings[1]);
    assert_eq!(rustix::io::read(&peers[0], &mut [0; 100]).unwrap(), 72);
}

#[test]
fn a_slot_gains_no_queues_after_boot() {
    let device = device(None);
    let port = device.port();
    let _rig = Rig::new(device);
    let (backend, peers) = Backend::fakes(2);
    let text = port.insert(backend, None).unwrap_err().error.to_string();
    assert!(text.starts_with("netdev \"fake\" has 2 queue pairs, and the slot has 1"), "{text}");
    assert_eq!(rustix::io::write(&peers[0], &[0; 64]), Err(rustix::io::Errno::PIPE));
}

/// Driver nonsense with the control queue's chains: refused, or a reset, and the device lives on.
#[test]
fn chains_that_are_no_commands() {
    let answer = DATA + 0x8000;
    // What the driver queues, how many bytes come back; `None` needs a reset.
    type Case<'a> = (&'static str, &'a [(u64, u32, bool)], Option<u32>);
    let cases: [Case<'_>; 9] = [
        ("only an answer", &[(answer, 1, true)], Some(1)),
        ("a whole page for the answer", &[(DATA, 3, false), (answer, 4096, true)], Some(1)),
        ("empty parts", &[(DATA, 0, false), (DATA, 3, false), (answer, 0, true), (answer, 1, true)], Some(1)),
        ("no answer and no command", &[(DATA, 0, false)], Some(0)),
        ("four gigabytes of command", &[(DATA, u32::MAX, false), (answer, 1, true)], None),
        ("command from a hole", &[(RAM, 3, false), (answer, 1, true)], None),
        ("answer to a hole", &[(DATA, 3, false), (RAM, 1, true)], None),
        ("address at the end", &[(u64::MAX - 1, 8, false), (answer, 1, true)], None),
        ("answer first", &[(answer, 1, true), (DATA, 3, false)], None),
    ];
    for (name, parts, want) in cases {
        let rig = Rig::new(device(None));
        let mut control = rig.start(!0, 3, 256).remove(2);
        rig.memory.write_slice(&[0, 0, 1], GuestAddress(DATA)).unwrap();
        control.add(parts);
        rig.kick(&control);
        match want {
            Some(len) => assert_eq!(rig.used(&mut control).1, len, "{name}"),
            None => rig.wait_needs_reset(),
        }
        let mut control = rig.start(!0, 3, 256).remove(2);
        assert_eq!(rig.command(&mut control, &[0, 0, 1]), Some(0), "{name}: works after a reset");
    }
}

#[test]
fn storms_of_commands_and_resets_in_the_middle() {
    let (backend, _peer) = Backend::fake();
    let rig = Rig::new(device(Some(backend)));
    for round in 0..40u8 {
        let mut control = rig.start(!0, 3, 256).remove(2);
        rig.memory.write_slice(&[1, 1, 2, 0, 0, 0, 0, round], GuestAddress(DATA)).unwrap();
        // Many turns' worth, and one notification for all.
        for _ in 0..120 {
            control.add(&[(DATA, 8, false), (DATA + 0x8000, 1, true)]);
        }
        rig.kick(&control);
        if round % 2 == 0 {
            rig.set(0x70, 0);
            assert_eq!(rig.get(0x104) & 0xff00, 0x0300, "the address is the NIC's own again");
        } else {
            (0..120).for_each(|_| assert_eq!(rig.used(&mut control).1, 1));
            assert_eq!(rig.get(0x104) & 0xff00, u32::from(round) << 8);
        }
        assert!(!rig.needs_reset());
    }
}
