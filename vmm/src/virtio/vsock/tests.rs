//! Against a double of the kernel's vhost-vsock, and against the real one where this machine has it.

use super::*;
use crate::vhost::double::{Double, Fails};
use crate::virtio::testing::{DATA, HIGH_END, NEXT, RAM, Rig, Ring as DriverRing};

const GUEST: u32 = 42;

fn rig() -> (Rig, Arc<Double>) {
    let (vhost, kernel) = Double::make(Kind::Vsock, REQUIRED | F_SEQPACKET);
    let device = Vsock::new(vhost, GUEST, Worker::new("v")).unwrap();
    (Rig::new(device), kernel)
}

/// A packet each way.
fn works(rig: &Rig, kernel: &Double, rings: &mut [DriverRing]) {
    rings[0].add(&[(DATA, 4096, true)]);
    rig.kick(&rings[0]);
    assert_eq!(kernel.serve(0, 1, |_| vec![7; 100]), 1);
    assert_eq!(rig.used(&mut rings[0]).1, 100);
    rings[1].add(&[(DATA, 44, false)]);
    rig.kick(&rings[1]);
    assert_eq!(kernel.serve(1, 1, |sent| Vec::from(&sent[44..])), 1);
    assert_eq!(rig.used(&mut rings[1]).1, 0);
    assert!(!rig.needs_reset());
}

fn open(guest_cid: u32, vhost_fd: Option<i32>) -> Result<Vsock, VsockError> {
    let inherited = &Inherited::default();
    Vsock::open(VsockOptions { device: "v", guest_cid, vhost_fd, inherited, worker: Worker::new("v") })
}

fn is_here() -> bool {
    let here = std::path::Path::new(Kind::Vsock.path()).exists();
    if !here {
        eprintln!("SKIPPED: no {}", Kind::Vsock.path());
    }
    here
}

#[test]
fn says_what_is_wrong_with_the_kernels_side() {
    use std::os::fd::IntoRawFd;
    let text = |cid, fd| open(cid, fd).err().unwrap().to_string();
    assert_eq!(text(3, Some(9999)), "device \"v\": descriptor 9999 is not open, or is a standard stream");
    let null = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
    assert!(text(3, Some(null)).ends_with("is not an open /dev/vhost-vsock"));
    if is_here() {
        let _first = open(0x7fff_0001, None).unwrap();
        assert!(text(0x7fff_0001, None).contains("guest-cid=2147418113 is in use"));
    } else {
        assert!(text(3, None).contains("`modprobe vhost_vsock`"));
    }
}

#[test]
fn shows_its_address_starts_stops_and_reports_a_bad_ring() {
    if !is_here() {
        return;
    }
    let rig = Rig::new(open(0x7fff_0002, None).unwrap());
    assert_eq!((rig.get(8), rig.get(0x100), rig.get(0x104)), (19, 0x7fff_0002, 0));
    for _ in 0..3 {
        let mut rings = rig.start(!0, 3, 256);
        rings[0].add(&[(DATA, 4096, true)]);
        rig.kick(&rings[0]);
        rig.kick(&rings[2]);
        assert!(!rig.needs_reset());
        rings[1].set_avail_index(300);
        rig.kick(&rings[1]);
        rig.wait_needs_reset();
        rig.set(0x70, 0);
    }
}

#[test]
fn rings_go_to_the_kernel_and_come_back_with_each_reset() {
    let (rig, kernel) = rig();
    assert_eq!((rig.get(0x100), rig.get(0x104), kernel.told().1), (GUEST, 0, Some(42)));
    for features in [!0, REQUIRED, F_VERSION_1] {
        let mut rings = rig.start(features, 3, 256);
        assert_eq!((kernel.running(), kernel.told().0 & !(features | F_INDIRECT_DESC)), (vec![0, 1], 0));
        assert!(kernel.kicked(0) && kernel.kicked(1), "what a quick driver has queued is seen");
        works(&rig, &kernel, &mut rings);
        let before = rig.line.edges();
        kernel.call(1);
        rig.wait(|| (rig.line.edges() > before).then_some(()));
        rig.set(0x70, 0);
        assert!(kernel.running().is_empty());
    }
    rig.start(!0, 3, 256);
    drop(rig);
    assert!(kernel.running().is_empty(), "stops when the device goes");
}

#[test]
fn what_a_driver_must_not_do_ends_in_a_reset_and_not_in_the_kernel() {
    type Change = fn(&mut DriverRing);
    let usual: Change = |_| {};
    // Queues that the driver sets up, and what is wrong with the last of them.
    let cases: [(&str, &[u16], Change); 9] = [
        ("no queue", &[], usual),
        ("only to the guest", &[0], usual),
        ("only from the guest", &[1], usual),
        ("only events", &[2], usual),
        ("a size that is none", &[0, 2, 1], |ring| ring.size = 255),
        ("more than offered", &[1, 2, 0], |ring| ring.size = 512),
        ("descriptors in a hole", &[1, 2, 0], |ring| ring.desc = RAM),
        ("used ring over the end", &[0, 2, 1], |ring| ring.used = HIGH_END - 8),
        ("odd driver area", &[0, 1, 2], |ring| ring.avail += 1),
    ];
    let (rig, kernel) = rig();
    for (name, queues, change) in cases {
        rig.negotiate(!0);
        for index in queues {
            let mut ring = DriverRing::new(&rig.memory, *index, 256);
            if Some(index) == queues.last() {
                change(&mut ring);
            }
            rig.place(&ring);
        }
        rig.driver_ok();
        assert!(rig.needs_reset() && kernel.running().is_empty(), "{name}");
        let mut rings = rig.start(!0, 3, 256);
        works(&rig, &kernel, &mut rings);
    }
}

#[test]
fn a_ring_that_the_kernel_cannot_use_needs_a_reset_and_works_after_it() {
    let (rig, kernel) = rig();
    for index in [0, 1] {
        let mut rings = rig.start(!0, 3, 256);
        rings[0].put(rings[0].desc, 0, DATA, 12, NEXT, 0);
        rings[0].offer(0);
        rig.kick(&rings[0]);
        kernel.complain(index);
        rig.wait_needs_reset();
        let mut rings = rig.start(!0, 3, 256);
        works(&rig, &kernel, &mut rings);
    }
}

#[test]
fn a_kernel_that_refuses_leaves_no_ring_running() {
    for fails in [Fails::SetUp(0), Fails::SetUp(1), Fails::Run(0), Fails::Run(1)] {
        let (rig, kernel) = rig();
        kernel.fail(fails);
        rig.start(!0, 3, 256);
        assert!(rig.needs_reset() && kernel.running().is_empty());
    }
}

#[test]
fn events_configuration_and_resets_in_mid_flight_hurt_nobody() {
    let (rig, kernel) = rig();
    for round in 0..50u32 {
        let mut rings = rig.start(!0, 3, 256);
        // Nobody serves the event queue: nonsense in it stays there.
        rings[2].set_avail_index(round as u16 * 1000);
        rig.kick(&rings[2]);
        (0..8).for_each(|i| rig.set(0x100 + 4 * i, u32::MAX));
        assert_eq!((rig.get(0x100), rig.get(0x104)), (GUEST, 0), "read-only");
        for _ in 0..4 {
            rings[1].add(&[(DATA, 44, false)]);
            rings[0].add(&[(DATA, 4096, true)]);
            rig.kick(&rings[0]);
            rig.kick(&rings[1]);
        }
        kernel.serve(1, 2, |_| Vec::new());
        kernel.before_stop(0, Box::new(|_| vec![1; 4096]));
        if round % 2 == 0 {
            rig.set(0x70, 0);
            assert!(kernel.running().is_empty());
        }
        assert_eq!(kernel.serve(0, 9, |_| Vec::new()) > 0, round % 2 != 0);
    }
}
