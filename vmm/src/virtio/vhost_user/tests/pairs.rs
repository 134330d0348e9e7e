//! NICs with several pairs of queues.

use std::sync::atomic::AtomicBool;

use super::*;

const MQ: u64 = 1 << 22;
const CTRL_VQ: u64 = 1 << 17;
/// Of the control queue's answers.
const OK: Option<u8> = Some(0);
const ERR: Option<u8> = Some(1);

fn skilled(pairs: u64) -> Skills {
    // MQ of virtio and of the protocol, as back ends of NICs have it, and a control queue that nobody wants of it.
    Skills { features: RINGS | PROTOCOL | MQ | CTRL_VQ | 1 << 23, queues: pairs, ..skills() }
}

fn model(pairs: u16) -> Model {
    Model::Net { mac: [0x52, 0x54, 0, 1, 2, 3], pairs }
}

fn nic(back: &BackEnd, main: &Main, pairs: u16) -> Rig {
    Rig::with_memory(open(back, main, model(pairs)).unwrap(), shared_memory())
}

/// Starts a driver that knows of three pairs; the last ring is the control queue.
fn start_three(rig: &Rig, back: &BackEnd) -> Vec<DriverRing> {
    let mut rings = rig.start(!0, 7, 128);
    // Commands are obeyed once the back end has all rings.
    assert_eq!(set_pairs(rig, &mut rings, 1), OK);
    assert_eq!(back.rings.running(), [0, 1]);
    rings
}

fn set_pairs(rig: &Rig, rings: &mut [DriverRing], pairs: u8) -> Option<u8> {
    rig.command(rings.last_mut().unwrap(), &[4, 0, pairs, 0])
}

/// A packet each way on a pair, which the back end is told of.
fn moves(rig: &Rig, back: &BackEnd, rings: &mut [DriverRing], pair: usize) {
    for (index, length) in [(2 * pair, 60), (2 * pair + 1, 0)] {
        let part = (DATA + 0x1_0000, 60, length > 0);
        rings[index].add(&[part]);
        rig.kick(&rings[index]);
        let (ring, mut served) = (index as u32, 0);
        wait(|| {
            served += back.rings.serve(ring, 1, |sent| vec![7; 60 - sent.len()]);
            served == 1
        });
        assert_eq!(rig.used(&mut rings[index]).1, length);
        wait(|| back.rings.kicked(ring));
    }
    assert!(!rig.needs_reset());
}

#[test]
fn pairs_come_into_use_when_the_driver_says_so() {
    let (back, main) = (BackEnd::start(skilled(3)), Main::start());
    let rig = nic(&back, &main, 3);
    assert_eq!(rig.offered(), RINGS | MQ | CTRL_VQ | 1 << 5 | 1 << 16);
    // The link is up, and there are three pairs.
    assert_eq!((rig.get(0x104) >> 16, rig.get(0x108)), (1, 3));
    for _ in 0..2 {
        let mut rings = start_three(&rig, &back);
        // What is agreed on with the guest the back end hears; not what is ours.
        assert_eq!(back.rings.told().0 & (MQ | 1 << 5 | 1 << 16), MQ);
        moves(&rig, &back, &mut rings, 0);
        assert_eq!(set_pairs(&rig, &mut rings, 3), OK);
        assert_eq!(back.rings.running(), [0, 1, 2, 3, 4, 5]);
        (0..3).for_each(|pair| moves(&rig, &back, &mut rings, pair));
        for wrong in [4, 0, 255] {
            assert_eq!(set_pairs(&rig, &mut rings, wrong), ERR);
        }
        // A receive mode, and an address: this control queue has no such commands.
        for command in [&[0, 0, 1][..], &[1, 1, 2, 0, 0, 0, 0, 7], &[4, 0, 1], &[4], &[], &[0x5a; 20_000]] {
            assert_eq!(rig.command(&mut rings[6], command), ERR);
        }
        assert_eq!(back.rings.running(), [0, 1, 2, 3, 4, 5]);
        assert_eq!(set_pairs(&rig, &mut rings, 1), OK);
        assert_eq!(back.rings.running(), [0, 1]);
        // What the driver queues on one that is not in use is there when it is.
        rings[3].add(&[(DATA, 60, false)]);
        rig.kick(&rings[3]);
        assert_eq!(set_pairs(&rig, &mut rings, 2), OK);
        assert_eq!(back.rings.running(), [0, 1, 2, 3]);
        assert_eq!(back.rings.serve(3, 9, |_| Vec::new()), 1);
        rig.used(&mut rings[3]);
        // The next driver begins with one again.
        rig.set(0x70, 0);
        assert!(back.rings.running().is_empty());
    }
    assert_eq!(back.clients.load(Ordering::SeqCst), 1);
}

#[test]
fn pairs_in_use_are_so_after_a_pause() {
    use crate::virtio::state::Suspend as _;
    let (back, main) = (BackEnd::start(skilled(8)), Main::start());
    let rig = nic(&back, &main, 3);
    let mut rings = start_three(&rig, &back);
    assert_eq!(set_pairs(&rig, &mut rings, 3), OK);
    moves(&rig, &back, &mut rings, 2);
    assert_eq!(set_pairs(&rig, &mut rings, 2), OK);
    for _ in 0..3 {
        moves(&rig, &back, &mut rings, 1);
        rig.transport.hold().unwrap();
        assert!(back.rings.running().is_empty());
        rig.transport.resume().unwrap();
        wait(|| back.rings.running() == [0, 1, 2, 3]);
    }
    // One that stood aside goes on where it was, and the control queue, too.
    assert_eq!(set_pairs(&rig, &mut rings, 3), OK);
    (0..3).for_each(|pair| moves(&rig, &back, &mut rings, pair));
    rig.transport.hold().unwrap();
    rig.set(0x70, 0);
    rig.transport.resume().unwrap();
    start_three(&rig, &back);
}

#[test]
fn a_driver_may_know_of_one_pair_or_use_some() {
    let (back, main) = (BackEnd::start(skilled(3)), Main::start());
    let rig = nic(&back, &main, 3);
    // Of one: its control queue is the third.
    let mut rings = rig.start(!MQ, 3, 128);
    wait(|| back.rings.running() == [0, 1]);
    assert_eq!(set_pairs(&rig, &mut rings, 1), ERR);
    moves(&rig, &back, &mut rings, 0);
    // It sets up two pairs, or two and a half, or has a gap.
    for (queues, most) in
        [(&[0, 1, 2, 3][..], 2), (&[0, 1, 2, 3, 4], 2), (&[0, 1, 3, 4, 5], 1), (&[0, 1, 4, 5], 1)]
    {
        rig.negotiate(!0);
        let mut rings: Vec<_> = queues.iter().chain(&[6]).map(|index| rig.queue(*index, 128)).collect();
        rig.driver_ok();
        wait(|| back.rings.running() == [0, 1]);
        assert_eq!(set_pairs(&rig, &mut rings, most + 1), ERR, "{queues:?}");
        assert_eq!(set_pairs(&rig, &mut rings, most), OK, "{queues:?}");
        assert_eq!(back.rings.running().len(), 2 * usize::from(most));
    }
    // No first pair; and no control queue, which leaves the first.
    for queues in [&[2, 3, 6][..], &[0, 6], &[1, 2, 3, 6]] {
        rig.negotiate(!0);
        queues.iter().for_each(|index| drop(rig.queue(*index, 128)));
        rig.driver_ok();
        assert!(rig.needs_reset(), "{queues:?}");
    }
    let mut rings = rig.start(!0, 6, 128);
    wait(|| back.rings.running() == [0, 1]);
    moves(&rig, &back, &mut rings, 0);
}

#[test]
fn a_control_ring_that_makes_no_sense_needs_a_reset() {
    let (back, main) = (BackEnd::start(skilled(3)), Main::start());
    let rig = nic(&back, &main, 3);
    let rings = start_three(&rig, &back);
    rings[6].set_avail_index(300);
    rig.kick(&rings[6]);
    rig.wait_needs_reset();
    rig.set(0x70, 0);
    let mut rings = start_three(&rig, &back);
    assert_eq!(set_pairs(&rig, &mut rings, 2), OK);
}

#[test]
fn back_ends_that_cannot_serve_several_pairs_are_refused() {
    let main = Main::start();
    for (skills, pairs, want) in [
        (Skills { features: RINGS | PROTOCOL, ..skilled(3) }, 3, "the back end lacks features 0x400000"),
        (Skills { features: RINGS | MQ, ..skilled(3) }, 2, "has 1 pairs of queues, and 2 are wanted"),
        (Skills { protocol: ALL & !1, ..skilled(3) }, 2, "has 1 pairs of queues, and 2 are wanted"),
        (skilled(2), 3, "has 2 pairs of queues, and 3 are wanted: ask for fewer"),
        (skilled(0), 1, "has 0 pairs of queues, and 1 are wanted"),
    ] {
        let said = open(&BackEnd::start(skills), &main, model(pairs)).err().unwrap().to_string();
        assert!(said.contains(want), "{said}");
    }
    // One that boasts gets what there is, and one that has a single pair serves one that wants no more.
    for (skills, pairs) in
        [(skilled(u64::MAX), 3), (Skills { features: RINGS | PROTOCOL, protocol: 0, ..skilled(0) }, 1)]
    {
        let back = BackEnd::start(skills);
        let rig = nic(&back, &main, pairs);
        rig.start(!0, if pairs > 1 { 7 } else { 2 }, 128);
        wait(|| back.rings.running() == [0, 1]);
    }
}

#[test]
fn a_back_end_that_goes_or_lies_when_pairs_change_costs_its_device_only() {
    let main = Main::start();
    let lies: [fn(&mut Vec<u8>); 4] =
        [|r| r[12] = 1, |r| r[0] = 1, |r| r[4] = 1, |r| r[8..12].copy_from_slice(&u32::MAX.to_ne_bytes())];
    for lie in lies {
        let armed = Arc::new(AtomicBool::new(false));
        let trigger = Arc::clone(&armed);
        let wrong: Wrong = Arc::new(move |asked, reply| {
            if asked == 18 && trigger.swap(false, Ordering::SeqCst) {
                lie(reply);
            }
        });
        let back = BackEnd::start_wrong(skilled(3), wrong);
        let rig = nic(&back, &main, 3);
        let mut rings = start_three(&rig, &back);
        armed.store(true, Ordering::SeqCst);
        assert_eq!(set_pairs(&rig, &mut rings, 3), ERR);
        rig.wait_needs_reset();
        wait(|| back.rings.running().is_empty());
        // Nothing is asked of it any more, and the next driver finds a new connection.
        assert_eq!(set_pairs(&rig, &mut rings, 2), ERR);
        rig.set(0x70, 0);
        let mut rings = start_three(&rig, &back);
        assert_eq!(set_pairs(&rig, &mut rings, 3), OK);
        back.hang_up();
        rig.wait_needs_reset();
        assert_eq!(set_pairs(&rig, &mut rings, 1), ERR);
    }
}
