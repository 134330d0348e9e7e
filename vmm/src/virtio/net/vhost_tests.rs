//! Rings that change hands between this process and the kernel, of which a double is here.

use std::sync::Arc;

use super::*;
use crate::vhost::double::{Double, Fails};

struct Served {
    rig: Rig,
    rings: Vec<Ring>,
    port: Arc<Port>,
    kernels: Vec<Arc<Double>>,
    peers: Vec<OwnedFd>,
}

fn start(pairs: usize, queues: u16) -> Served {
    let (backend, peers, kernels) = Backend::fake_vhosts(pairs);
    let device = device(Some(backend));
    let port = device.port();
    let rig = Rig::new(device);
    let rings = rig.start(!0, queues, 256);
    rig.wait(|| kernels.iter().all(|k| k.running() == [0, 1]).then_some(()));
    Served { rig, rings, port, kernels, peers }
}

/// The kernel's signal comes while its rings are taken back: nobody listens to it, and the driver has asked for no other.
#[test]
fn what_the_kernel_signals_last_reaches_the_driver() {
    for ring in [0, 1] {
        let Served { rig, mut rings, port, kernels, .. } = start(1, 2);
        rings[ring].add(&[(DATA, 2000, ring == 0)]);
        rig.kick(&rings[ring]);
        rig.set(0x64, 3);
        kernels[0].before_stop(ring as u32, Box::new(|_| vec![0; 100]));
        port.eject().unwrap();
        assert!(rings[ring].next_used().is_some(), "{ring}: the kernel was at it");
        assert_eq!(rig.get(0x60) & 1, 1, "{ring}: the driver is told");
    }
}

#[test]
fn the_kernel_is_told_of_what_was_queued_and_its_calls_are_interrupts() {
    let Served { rig, rings, port, kernels, .. } = start(1, 2);
    for ring in [0, 1] {
        rig.wait(|| kernels[0].kicked(ring).then_some(()));
    }
    assert_eq!(kernels[0].told().0 & !(1 << 28 | 1 << 29 | 1 << 32 | 1 << 15), 0, "only what it knows");
    rig.set(0x64, 3);
    kernels[0].call(1);
    rig.wait(|| (rig.get(0x60) & 1 == 1).then_some(()));
    rig.kick(&rings[0]);
    rig.wait(|| kernels[0].kicked(0).then_some(()));
    port.eject().unwrap();
    assert!(kernels[0].running().is_empty());
    // Nobody passes on what comes after the end.
    let before = rig.line.edges();
    kernels[0].call(0);
    port.insert(Backend::fake().0, None).unwrap();
    assert_eq!(rig.line.edges(), before + 1, "the link, and nothing else");
}

#[test]
fn a_hand_over_that_fails_leaves_an_empty_slot_that_works() {
    for fails in [Fails::SetUp(0), Fails::SetUp(1), Fails::Run(0), Fails::Run(1)] {
        let device = device(None);
        let port = device.port();
        let rig = Rig::new(device);
        let mut rings = rig.start(!0, 2, 256);
        let (backend, peers, kernels) = Backend::fake_vhosts(1);
        kernels[0].fail(fails);
        let text = port.insert(backend, None).unwrap_err().to_string();
        assert!(text.starts_with("cannot use netdev \"fake\": "), "{text}");
        assert!(kernels[0].running().is_empty() && rustix::io::write(&peers[0], &[0; 64]).is_err());
        assert_eq!(rig.get(0x104) >> 16 & 1, 0, "no link");
        for _ in 0..3 {
            // A driver whose packets do not come back would call its card dead.
            rings[1].add(&[(DATA, 72, false)]);
            rig.kick(&rings[1]);
            rig.used(&mut rings[1]);
        }
        let (backend, peer) = Backend::fake();
        port.insert(backend, None).unwrap();
        rig.memory.write_slice(&packet(60, 1), GuestAddress(DATA)).unwrap();
        rings[1].add(&[(DATA, 72, false)]);
        rig.kick(&rings[1]);
        rig.used(&mut rings[1]);
        assert_eq!(rustix::io::read(&peer, &mut [0; 100]).unwrap(), 72);
        assert!(!rig.needs_reset());
    }
}

#[test]
fn a_ring_that_the_kernel_cannot_use_needs_a_reset() {
    let Served { rig, kernels, .. } = start(1, 2);
    for round in 0..3 {
        kernels[0].complain(round % 2);
        rig.wait_needs_reset();
        rig.set(0x70, 0);
        assert!(kernels[0].running().is_empty());
        rig.start(!0, 2, 256);
        rig.wait(|| (kernels[0].running() == [0, 1]).then_some(()));
        assert!(!rig.needs_reset());
    }
    drop(rig);
    assert!(kernels[0].running().is_empty(), "stops when the device goes");
}

#[test]
fn several_pairs_go_over_and_come_back_together() {
    let Served { rig, mut rings, port, kernels, peers } = start(2, 5);
    for (pair, kernel) in kernels.iter().enumerate() {
        rings[2 * pair + 1].add(&[(DATA, 72, false)]);
        rig.kick(&rings[2 * pair + 1]);
        assert_eq!(kernel.serve(1, 9, |_| Vec::new()), 1);
        rig.used(&mut rings[2 * pair + 1]);
    }
    port.eject().unwrap();
    assert!(
        kernels.iter().all(|k| k.running().is_empty()) && rustix::io::write(&peers[1], &[0; 64]).is_err()
    );
    let (backend, peers) = Backend::fakes(2);
    port.insert(backend, None).unwrap();
    let control = rig.command(&mut rings[4], &[4, 0, 2, 0]);
    assert_eq!(control, Some(0));
    for (pair, peer) in peers.iter().enumerate() {
        rig.memory.write_slice(&packet(60, 1), GuestAddress(DATA)).unwrap();
        rings[2 * pair + 1].add(&[(DATA, 72, false)]);
        rig.kick(&rings[2 * pair + 1]);
        rig.used(&mut rings[2 * pair + 1]);
        assert_eq!(rustix::io::read(peer, &mut [0; 100]).unwrap(), 72, "{pair}");
    }
    assert!(!rig.needs_reset());
}

/// The slot has had two pairs from boot on, and the guest uses both; the NIC that is plugged now has one.
#[test]
fn pairs_that_the_kernel_has_no_ring_for_are_served_here() {
    let (backend, _peers) = Backend::fakes(2);
    let device = device(Some(backend));
    let port = device.port();
    let rig = Rig::new(device);
    let mut rings = rig.start(!0, 5, 256);
    assert_eq!(rig.command(&mut rings[4], &[4, 0, 2, 0]), Some(0));
    port.eject().unwrap();
    let (backend, peers, kernels) = Backend::fake_vhosts(1);
    port.insert(backend, None).unwrap();
    for round in 0..2 {
        rig.memory.write_slice(&packet(60, 1), GuestAddress(DATA)).unwrap();
        for ring in [1, 3] {
            rings[ring].add(&[(DATA, 72, false)]);
            rig.kick(&rings[ring]);
        }
        rig.used(&mut rings[3]);
        assert_eq!(rustix::io::read(&peers[0], &mut [0; 100]).unwrap(), 72);
        assert!(rings[1].next_used().is_none() && rustix::io::read(&peers[0], &mut [0; 100]).is_err());
        assert_eq!(kernels[0].serve(1, 9, |_| Vec::new()), 1, "{round}");
        rig.used(&mut rings[1]);
        // And the same with a driver that comes later.
        rings = rig.start(!0, 5, 256);
        rig.wait(|| (kernels[0].running() == [0, 1]).then_some(()));
    }
    port.eject().unwrap();
    for ring in [1, 3] {
        rings[ring].add(&[(DATA, 72, false)]);
        rig.kick(&rings[ring]);
        rig.used(&mut rings[ring]);
    }
    assert!(!rig.needs_reset());
}
