//! A slot that is filled and emptied at any time of the device's life.

use std::collections::VecDeque;
use std::sync::Arc;

use super::*;
use crate::vhost::double::Double;
use proptest::prelude::*;

const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];

#[derive(Debug, Clone, Copy)]
enum Act {
    Insert,
    /// A NIC that the kernel serves.
    Lend,
    Eject,
    /// Another NIC's host end for the one that is there.
    Replace,
    /// The link, taken down or let come up.
    Link(bool),
    Move,
    Start,
    Reset,
    Send,
    /// Buffers that no packet comes for yet.
    Stock,
    Receive,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        Just(Act::Insert),
        Just(Act::Lend),
        Just(Act::Eject),
        Just(Act::Replace),
        any::<bool>().prop_map(Act::Link),
        Just(Act::Move),
        Just(Act::Start),
        Just(Act::Reset),
        Just(Act::Send),
        Just(Act::Stock),
        Just(Act::Receive)
    ]
}

/// The other end has been closed: nobody holds a duplicate of it either.
fn is_closed(peer: &OwnedFd) -> bool {
    use rustix::io::Errno;
    // RESET, once: it had not read all that was sent.
    matches!(rustix::io::write(peer, &[0; 64]), Err(Errno::PIPE | Errno::CONNRESET))
}

/// Serves one request of ring `index` as the kernel, once it has the ring.
fn as_kernel(rig: &Rig, kernel: &Double, index: u32, bytes: &[u8]) -> Vec<u8> {
    rig.wait(|| {
        let mut sent = None;
        kernel.serve(index, 1, |read| {
            sent = Some(read.to_vec());
            bytes.to_vec()
        });
        sent
    })
}

fn play(acts: &[Act]) {
    let device = device(None);
    let port = device.port();
    let rig = Rig::new(device);
    let mut rings: Option<(Ring, Ring)> = None;
    let mut stock = VecDeque::new();
    let mut peer: Option<OwnedFd> = None;
    let mut kernel: Option<Arc<Double>> = None;
    let mut down = false;
    for (step, act) in acts.iter().enumerate() {
        let seed = step as u8;
        let room = DATA + 0x1_0000 + 0x1000 * step as u64;
        match act {
            Act::Insert | Act::Lend => {
                let (backend, other, double) = if matches!(act, Act::Lend) {
                    let (backend, mut others, mut doubles) = Backend::fake_vhosts(1);
                    (backend, others.remove(0), Some(doubles.remove(0)))
                } else {
                    let (backend, other) = Backend::fake();
                    (backend, other, None)
                };
                let result = port.insert(backend, Some(OTHER));
                assert_eq!(result.is_ok(), peer.is_none(), "{step}");
                match result {
                    Ok(()) => (peer, kernel, down) = (Some(other), double, false),
                    Err(NotInserted { error, backend }) => {
                        assert!(
                            matches!(error, PortError::Occupied(_)) && backend.is_some(),
                            "{step}: {error}"
                        );
                        assert!(!is_closed(&other), "{step}: what was refused can be used elsewhere");
                    }
                }
                assert_eq!(rig.get(0x100), u32::from_le_bytes([0x52, 0x54, 0, 9]));
            }
            Act::Eject => {
                assert_eq!(port.eject().is_ok(), peer.is_some(), "{step}");
                if let Some(peer) = peer.take() {
                    assert!(is_closed(&peer), "{step}");
                }
                assert!(kernel.take().is_none_or(|k| k.running().is_empty()), "{step}");
                down = false;
            }
            Act::Replace => {
                let (backend, other) = Backend::fake();
                assert_eq!(port.replace(backend).is_ok(), peer.is_some(), "{step}");
                if let Some(old) = &mut peer {
                    assert!(is_closed(&std::mem::replace(old, other)), "{step}");
                }
                assert!(kernel.take().is_none_or(|k| k.running().is_empty()), "{step}");
            }
            Act::Link(up) => {
                assert_eq!(port.set_link(*up).is_ok(), peer.is_some(), "{step}");
                down = peer.is_some() && !up;
                assert!(!down || kernel.as_ref().is_none_or(|k| k.running().is_empty()), "{step}");
            }
            Act::Move => {
                let worker = Worker::new("other");
                assert_eq!(port.serve_on(&worker).is_ok(), peer.is_none(), "{step}");
                assert!(port.serve_on(&worker).is_ok() == peer.is_none(), "{step}: again");
            }
            Act::Start => {
                let mut started = rig.start(!0, 2, 256).into_iter();
                rings = Some((started.next().unwrap(), started.next().unwrap()));
                stock.clear();
            }
            Act::Reset => {
                rig.set(0x70, 0);
                rings = None;
                assert!(kernel.as_ref().is_none_or(|k| k.running().is_empty()), "{step}");
            }
            Act::Send => {
                let Some((_, tx)) = &mut rings else { continue };
                let out = packet(60, seed);
                rig.memory.write_slice(&out, GuestAddress(DATA)).unwrap();
                let head = tx.add(&[(DATA, 72, false)]);
                rig.kick(tx);
                let sent = kernel.as_ref().filter(|_| !down).map(|k| as_kernel(&rig, k, 1, &[]));
                assert_eq!(rig.used(tx), (u32::from(head), 0));
                let Some(peer) = &peer else { continue };
                if down {
                    assert!(rustix::io::read(peer, &mut [0; 100]).is_err(), "{step}");
                    continue;
                }
                let sent = sent.unwrap_or_else(|| {
                    let mut bytes = vec![0; 2000];
                    let n = rustix::io::read(peer, &mut bytes).unwrap();
                    bytes.truncate(n);
                    bytes
                });
                assert_eq!(sent, out, "{step}");
            }
            Act::Stock => {
                let Some((rx, _)) = &mut rings else { continue };
                rx.add(&[(room, 2000, true)]);
                rig.kick(rx);
                stock.push_back(room);
            }
            Act::Receive => {
                let (Some((rx, _)), Some(peer), false) = (&mut rings, &peer, down) else { continue };
                let incoming = packet(200, seed);
                rx.add(&[(room, 2000, true)]);
                stock.push_back(room);
                let room = stock.pop_front().unwrap();
                rig.memory.write_slice(&[0; 2000], GuestAddress(room)).unwrap();
                match &kernel {
                    Some(kernel) => drop(as_kernel(&rig, kernel, 0, &incoming)),
                    None => assert_eq!(rustix::io::write(peer, &incoming).unwrap(), incoming.len()),
                }
                rig.kick(rx);
                assert_eq!(rig.used(rx).1, 212, "{step}");
                let mut got = vec![0; 200];
                rig.memory.read_slice(&mut got, GuestAddress(room + 12)).unwrap();
                assert_eq!(got, incoming[12..], "{step}");
            }
        }
        assert_eq!(rig.get(0x104) >> 16 & 1 == 1, peer.is_some() && !down, "{step}: link");
        assert!(!rig.needs_reset(), "{step}");
    }
    if let Some(peer) = peer {
        drop(rig);
        drop(port);
        assert!(is_closed(&peer));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_events_leaves_slot_link_and_packets_right(acts in proptest::collection::vec(act(), 1..40)) {
        play(&acts);
    }
}

#[test]
fn the_guest_is_told_and_gets_a_doorbell_when_it_needs_one() {
    let device = device(None);
    let port = device.port();
    let rig = Rig::new(device);
    let mut rings = rig.start(!0, 2, 256).into_iter();
    let (_rx, mut tx) = (rings.next().unwrap(), rings.next().unwrap());
    assert!(rig.doorbell.attached.lock().unwrap().is_empty(), "an empty slot costs nothing");
    let (before, generation) = (rig.line.edges(), rig.get(0xfc));
    let (backend, peer) = Backend::fake();
    port.insert(backend, None).unwrap();
    assert_eq!((rig.get(0x60) & 2, port.netdev_id().as_deref()), (2, Some("fake")));
    assert!(rig.line.edges() > before && rig.get(0xfc) != generation);
    assert_eq!(port.mac(), MAC);
    let head = tx.add(&[(DATA, 72, false)]);
    rig.kick(&tx);
    assert_eq!(rig.used(&mut tx), (u32::from(head), 0));
    assert_eq!(rig.doorbell.attached.lock().unwrap().len(), 2);
    assert!(rustix::io::read(&peer, &mut [0; 100]).is_ok());
    rig.set(0x64, 2);
    port.eject().unwrap();
    assert_eq!((rig.get(0x60) & 2, rig.get(0x104) >> 16 & 1), (2, 0));
    assert!(matches!(port.eject(), Err(PortError::Empty)));
    rig.set(0x70, 0);
    assert!(rig.doorbell.attached.lock().unwrap().is_empty());
}

/// Machine thread and guest at once: every packet goes to a tap or nowhere, every lock is given back.
#[test]
fn filling_and_emptying_while_the_guest_sends_and_resets() {
    let device = device(None);
    let port = device.port();
    let rig = Rig::new(device);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..200 {
                if round % 4 == 0 {
                    port.serve_on(&Worker::new(&round.to_string())).unwrap();
                }
                let (backend, peer) = Backend::fake();
                port.insert(backend, None).unwrap();
                let _ = rustix::io::write(&peer, &packet(100, 1));
                port.eject().unwrap();
                assert!(is_closed(&peer));
            }
        });
        for _ in 0..60 {
            let mut rings = rig.start(!0, 2, 256).into_iter();
            let (mut rx, mut tx) = (rings.next().unwrap(), rings.next().unwrap());
            for _ in 0..16 {
                rx.add(&[(DATA + 0x1_0000, 2000, true)]);
                rig.kick(&rx);
                tx.add(&[(DATA, 72, false)]);
                rig.kick(&tx);
                rig.used(&mut tx);
            }
            assert!(!rig.needs_reset());
        }
    });
    assert_eq!(rig.get(0x104) >> 16 & 1, 0);
}
