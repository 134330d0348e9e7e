//! The ring against a driver that follows the rules, and one that does not.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{DATA, HIGH, HIGH_END, INDIRECT, NEXT, RAM, Ring, WRITE, memory};

const ALL: u64 = F_INDIRECT_DESC | F_EVENT_IDX;

fn pair(features: u64, size: u16) -> (Ring, Queue) {
    let memory = memory();
    let ring = Ring::new(&memory, 0, size);
    let queue = Queue::new(&memory, layout(&ring), MAX_SIZE, features).unwrap();
    (ring, queue)
}

fn layout(ring: &Ring) -> Layout {
    Layout { size: ring.size, desc: ring.desc, driver: ring.avail, device: ring.used }
}

#[test]
fn layouts_that_are_refused() {
    let memory = memory();
    let good = layout(&Ring::new(&memory, 0, 16));
    let area = QueueError::BadArea;
    let cases = [
        (Layout { size: 0, ..good }, QueueError::BadSize(0)),
        (Layout { size: 3, ..good }, QueueError::BadSize(3)),
        (Layout { size: 32, ..good }, QueueError::BadSize(32)),
        (Layout { size: 0x8000, ..good }, QueueError::BadSize(0x8000)),
        (Layout { desc: 0x1008, ..good }, area("descriptor", 0x1008)),
        (Layout { driver: 0x5001, ..good }, area("driver", 0x5001)),
        (Layout { device: 0x9002, ..good }, area("device", 0x9002)),
        (Layout { desc: RAM - 240, ..good }, area("descriptor", RAM - 240)),
        (Layout { driver: RAM - 32, ..good }, area("driver", RAM - 32)),
        (Layout { device: RAM - 128, ..good }, area("device", RAM - 128)),
        (Layout { desc: HIGH_END, ..good }, area("descriptor", HIGH_END)),
        (Layout { desc: 0xf010_0000, ..good }, area("descriptor", 0xf010_0000)),
        (Layout { driver: u64::MAX - 1, ..good }, area("driver", u64::MAX - 1)),
        (Layout { device: u64::MAX - 3, ..good }, area("device", u64::MAX - 3)),
    ];
    for (layout, error) in cases {
        assert_eq!(Queue::new(&memory, layout, 16, ALL).err(), Some(error), "{layout:?}");
    }
    let at_the_end = Layout { desc: RAM - 256, driver: HIGH, device: HIGH_END - 136, ..good };
    assert!(Queue::new(&memory, at_the_end, 16, ALL).is_ok());
}

#[test]
fn chains_come_whole_and_in_order_direct_or_indirect() {
    let (mut ring, mut queue) = pair(ALL, 8);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(false));
    ring.memory.write_slice(b"hello world", GuestAddress(DATA)).unwrap();
    let head =
        ring.add(&[(DATA, 5, false), (DATA + 5, 0, false), (DATA + 5, 6, false), (DATA + 64, 7, true)]);
    assert_eq!(queue.pop(&mut chain), Ok(true));
    assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (head, 11, 7));
    let mut text = [0; 32];
    assert_eq!(chain.readable.take(&mut text[..8]), 8);
    assert_eq!(chain.readable.take(&mut text[8..]), 3);
    assert_eq!(&text[..11], b"hello world");
    assert_eq!(chain.writable.fill(b"12345678"), 7);
    queue.complete(chain.head, 7);
    assert!(queue.publish());
    assert_eq!(ring.next_used(), Some((0, 7)));

    // A direct part first, then a table (§2.7.5.3.2); the table's own WRITE flag means nothing.
    let table = DATA + 0x1000 + 8;
    ring.put(ring.desc, 4, DATA, 1, NEXT, 5);
    ring.put(ring.desc, 5, table, 32, INDIRECT | WRITE, 0);
    ring.put(table, 0, DATA + 1, 2, NEXT, 1);
    ring.put(table, 1, DATA + 3, 3, WRITE, 0);
    ring.offer(4);
    assert_eq!(queue.pop(&mut chain), Ok(true));
    assert_eq!((chain.readable.len(), chain.writable.len()), (3, 3));
    assert_eq!(chain.readable.parts().len(), 2);
}

#[test]
fn chains_that_make_no_sense() {
    type Setup = fn(&mut Ring);
    let table = DATA;
    assert_eq!(table, 1 << 20, "the cases below write it out");
    let cases: [(&str, u64, Setup, QueueError); 24] = [
        ("index far ahead", ALL, |r| r.set_avail_index(9), QueueError::IndexJumped { from: 0, to: 9 }),
        (
            "index behind",
            ALL,
            |r| r.set_avail_index(u16::MAX),
            QueueError::IndexJumped { from: 0, to: u16::MAX },
        ),
        ("head beyond the table", ALL, |r| r.offer(8), QueueError::BadIndex(8)),
        ("head far beyond", ALL, |r| r.offer(u16::MAX), QueueError::BadIndex(65535)),
        (
            "next beyond the table",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 1, NEXT, 8);
                r.offer(0);
            },
            QueueError::BadIndex(8),
        ),
        (
            "loop to itself",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 1, NEXT, 0);
                r.offer(0);
            },
            QueueError::Loop(0),
        ),
        (
            "loop of all",
            ALL,
            |r| {
                for i in 0..8 {
                    r.put(r.desc, i, DATA, 1, NEXT, (i + 1) % 8);
                }
                r.offer(3);
            },
            QueueError::Loop(3),
        ),
        (
            "loop of empty parts",
            ALL,
            |r| {
                r.put(r.desc, 1, DATA, 0, NEXT, 1);
                r.offer(1);
            },
            QueueError::Loop(1),
        ),
        (
            "read after write",
            ALL,
            |r| {
                r.add(&[(DATA, 1, true), (DATA, 1, false)]);
            },
            QueueError::OutOfOrder(0),
        ),
        (
            "hole",
            ALL,
            |r| {
                r.add(&[(RAM, 1, true)]);
            },
            QueueError::NotRam { addr: RAM, len: 1 },
        ),
        (
            "over the end of RAM",
            ALL,
            |r| {
                r.add(&[(RAM - 1, 2, true)]);
            },
            QueueError::NotRam { addr: RAM - 1, len: 2 },
        ),
        (
            "device registers",
            ALL,
            |r| {
                r.add(&[(0xf010_0000, 4, true)]);
            },
            QueueError::NotRam { addr: 0xf010_0000, len: 4 },
        ),
        (
            "wraps around",
            ALL,
            |r| {
                r.add(&[(u64::MAX, 2, true)]);
            },
            QueueError::NotRam { addr: u64::MAX, len: 2 },
        ),
        (
            "huge",
            ALL,
            |r| {
                r.add(&[(0, u32::MAX, true)]);
            },
            QueueError::NotRam { addr: 0, len: u32::MAX },
        ),
        (
            "indirect not negotiated",
            F_EVENT_IDX,
            |r| {
                r.put(r.desc, 0, DATA, 16, INDIRECT, 0);
                r.offer(0);
            },
            QueueError::BadIndirect(0),
        ),
        (
            "indirect and next",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 16, INDIRECT | NEXT, 1);
                r.offer(0);
            },
            QueueError::BadIndirect(0),
        ),
        (
            "indirect in indirect",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 16, INDIRECT, 0);
                r.put(DATA, 0, DATA, 16, INDIRECT, 0);
                r.offer(0);
            },
            QueueError::BadIndirect(0),
        ),
        (
            "table of no entries",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 0, INDIRECT, 0);
                r.offer(0);
            },
            QueueError::BadIndirect(0),
        ),
        (
            "table of half an entry",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 24, INDIRECT, 0);
                r.offer(0);
            },
            QueueError::BadIndirect(0),
        ),
        (
            "table too long",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 16 * 1025, INDIRECT, 0);
                r.offer(0);
            },
            QueueError::BadIndirect(0),
        ),
        (
            "table of 4 GiB",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, u32::MAX - 15, INDIRECT, 0);
                r.offer(0);
            },
            QueueError::BadIndirect(0),
        ),
        (
            "table outside RAM",
            ALL,
            |r| {
                r.put(r.desc, 0, RAM - 16, 32, INDIRECT, 0);
                r.offer(0);
            },
            QueueError::NotRam { addr: RAM - 16, len: 32 },
        ),
        (
            "loop in a table",
            ALL,
            |r| {
                r.put(r.desc, 0, DATA, 32, INDIRECT, 0);
                r.put(DATA, 0, DATA, 1, NEXT, 1);
                r.put(DATA, 1, DATA, 1, NEXT, 0);
                r.offer(0);
            },
            QueueError::Loop(0),
        ),
        (
            "4 GiB in all",
            ALL,
            |r| {
                let table = DATA;
                r.put(r.desc, 0, table, 16 * 1024, INDIRECT, 0);
                for i in 0..1024 {
                    r.put(table, i, 0, RAM as u32, NEXT, i + 1);
                }
                r.offer(0);
            },
            QueueError::TooLong(0),
        ),
    ];
    for (name, features, setup, error) in cases {
        let (mut ring, mut queue) = pair(features, 8);
        setup(&mut ring);
        assert_eq!(queue.pop(&mut Chain::default()), Err(error), "{name}");
    }
}

#[test]
fn one_head_is_in_flight_once() {
    let (mut ring, mut queue) = pair(ALL, 8);
    let mut chain = Chain::default();
    ring.add(&[(DATA, 1, true)]);
    ring.offer(0);
    assert_eq!(queue.pop(&mut chain), Ok(true));
    assert_eq!(queue.pop(&mut chain), Err(QueueError::HeadInFlight(0)));
    queue.complete(0, 0);
    assert_eq!(queue.pop(&mut chain), Ok(true), "given back, it may come again");
}

#[test]
fn a_driver_that_polls_sees_requests_before_one_that_waits_is_told() {
    let (mut ring, mut queue) = pair(ALL, 8);
    let mut chain = Chain::default();
    ring.set_used_event(0);
    assert!(!queue.waits());
    for _ in 0..3 {
        ring.add(&[(DATA, 1, true)]);
    }
    for done in 0..3 {
        assert!(queue.waits());
        assert_eq!(queue.pop(&mut chain), Ok(true));
        queue.complete(chain.head, done);
        assert_eq!(ring.next_used(), None);
        queue.show();
        assert_eq!(ring.next_used().map(|used| used.1), Some(done));
    }
    assert!(!queue.waits());
    assert!(queue.publish(), "of the first, which was shown long ago");
    assert!(!queue.publish());
}

#[test]
fn interrupts_are_suppressed_as_the_driver_asks() {
    // Without EVENT_IDX: by the flag.
    let (mut ring, mut queue) = pair(0, 8);
    let mut chain = Chain::default();
    assert!(!queue.publish(), "nothing to tell");
    for (flags, wanted) in [(0, true), (1, false), (0, true)] {
        ring.set_avail_flags(flags);
        ring.add(&[(DATA, 1, true)]);
        assert_eq!(queue.pop(&mut chain), Ok(true));
        queue.complete(chain.head, 0);
        assert_eq!(queue.publish(), wanted);
    }
    // With it: when the used index passes the event, around the wrap too. The flag means nothing.
    let (mut ring, mut queue) = pair(ALL, 8);
    ring.set_avail_flags(1);
    for step in 0..70_000u32 {
        ring.add(&[(DATA, 1, true)]);
        let event = (step % 3 == 0).then_some(step as u16);
        ring.set_used_event(event.unwrap_or((step as u16).wrapping_add(5)));
        assert_eq!(queue.pop(&mut chain), Ok(true));
        queue.complete(chain.head, 0);
        assert_eq!(queue.publish(), event.is_some(), "step {step}");
        assert!(ring.next_used().is_some());
    }
}

#[test]
fn notifications_are_asked_for_and_not() {
    let (mut ring, mut queue) = pair(0, 8);
    queue.disable_notify();
    assert_eq!(ring.used_flags(), 1);
    assert_eq!(queue.enable_notify(), Ok(false));
    assert_eq!(ring.used_flags(), 0);
    ring.add(&[(DATA, 1, true)]);
    assert_eq!(queue.enable_notify(), Ok(true), "came in between");

    let (mut ring, mut queue) = pair(ALL, 8);
    ring.add(&[(DATA, 1, true)]);
    assert_eq!(queue.pop(&mut Chain::default()), Ok(true));
    assert_eq!(queue.enable_notify(), Ok(false));
    assert_eq!(ring.avail_event(), 1);
    ring.set_avail_index(10);
    assert!(queue.enable_notify().is_err());
}

#[test]
fn buffers_are_cut_at_any_byte() {
    let (mut ring, mut queue) = pair(ALL, 8);
    let mut chain = Chain::default();
    ring.add(&[(DATA, 3, true), (DATA + 3, 4, true)]);
    assert_eq!(queue.pop(&mut chain), Ok(true));
    chain.writable.split_last_byte().unwrap().write(9);
    assert_eq!(chain.writable.len(), 6);
    chain.writable.write_at(2, &[1, 2]);
    chain.writable.write_at(5, &[7, 8]);
    chain.writable.advance(4);
    assert_eq!(chain.writable.parts().len(), 1);
    assert_eq!(chain.writable.len(), 2);
    chain.writable.advance(100);
    assert!(chain.writable.is_empty());

    ring.add(&[(DATA, 4096, true), (DATA + 5, 1, true)]);
    assert_eq!(queue.pop(&mut chain), Ok(true));
    assert!(chain.writable.split_last_byte().is_some());
    assert_eq!((chain.writable.parts().len(), chain.writable.len()), (1, 4096));
    chain.writable.clear();
    assert!(chain.writable.split_last_byte().is_none());
    let bytes: [u8; 7] = ring.memory.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(bytes, [0, 0, 1, 2, 0, 7, 9]);
}

proptest! {
    /// Any bytes in the rings and tables: an error or a chain wholly in RAM, in bounded time; never a panic.
    #[test]
    fn any_garbage_is_survived(
        descriptors in prop::collection::vec((any::<u32>(), 0..40_000u32, 0..8u16, 0..20u16), 48),
        heads in prop::collection::vec(0..20u16, 16),
        index in 0..20u16,
    ) {
        let (ring, mut queue) = pair(ALL, 16);
        for (i, (addr, len, flags, next)) in (0u16..).zip(descriptors) {
            // The second and third part are indirect tables that the first may point to.
            let (table, at) = if i < 16 { (ring.desc, i) } else { (DATA, i - 16) };
            let addr = if flags & INDIRECT != 0 { DATA + u64::from(addr % 32) * 16 } else { u64::from(addr) };
            let len = if flags & INDIRECT != 0 { len % 34 * 16 } else { len };
            ring.put(table, at, addr, len, flags, next);
        }
        for (i, head) in (0u64..).zip(heads) {
            ring.memory.write_obj(head, GuestAddress(ring.avail + 4 + 2 * i)).unwrap();
        }
        ring.set_avail_index(index);
        let mut chain = Chain::default();
        let mut popped = 0;
        while let Ok(true) = queue.pop(&mut chain) {
            popped += 1;
            prop_assert!(popped <= 16);
            for part in chain.readable.parts().iter().chain(chain.writable.parts()) {
                let at = part.iov_base as usize;
                let inside = [(0, RAM), (HIGH, HIGH_END - HIGH)].iter().any(|(base, len)| {
                    let host = host_address(&ring.memory, *base, *len as usize).unwrap() as usize;
                    at >= host && at + part.iov_len <= host + *len as usize
                });
                prop_assert!(inside);
            }
            if popped % 2 == 0 {
                queue.complete(chain.head, 0);
                let _ = queue.publish();
            }
        }
    }
}

#[test]
fn a_ring_changes_hands_in_the_middle_of_its_life() {
    let (mut ring, mut ours) = pair(ALL, 8);
    let mut other = Queue::new(&ring.memory, layout(&ring), MAX_SIZE, ALL).unwrap();
    let mut chain = Chain::default();
    let mut given = Vec::new();
    // Longer than the indices' wrap at the ring's size; each side leaves something in hand.
    for round in 0..40 {
        let (from, to) = if round % 2 == 0 { (&mut ours, &mut other) } else { (&mut other, &mut ours) };
        while given.len() < 3 {
            given.push(ring.add(&[(DATA, 16, false)]));
        }
        assert_eq!(from.pop(&mut chain), Ok(true));
        assert_eq!(chain.head, given.remove(0), "{round}");
        from.complete(chain.head, round);
        let _ = from.publish();
        assert_eq!(ring.next_used(), Some((u32::from(chain.head), round)));
        assert_eq!(from.pop(&mut chain), Ok(true));
        let lent = from.lend(1);
        assert_eq!((lent.size, lent.base), (8, round as u16 + 1));
        to.take_back(lent.base);
    }
}
