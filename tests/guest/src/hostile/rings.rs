//! Misuse of rings and chains, for any queue (virtio 1.2 §2.7).

use super::rig::{Desc, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, Rig, SIZE, WRITE};
use super::{ANY, Case, NO, Outcome, YES};
use crate::virtio::reg;

/// One descriptor, at `address`.
fn one(rig: &mut Rig, address: u64, length: u32) -> Outcome {
    let way = rig.way();
    rig.chain(&[Desc(address, length, way, 0)])
}

/// A good request, then the driver's index is `ahead`.
fn index(rig: &mut Rig, ahead: u16) -> Outcome {
    let features = rig.features();
    rig.ring(features, 1, |rig| {
        rig.put_good(0);
        rig.set_index(ahead);
    })
}

/// `heads` are made available; only chain 0 is good.
fn heads(rig: &mut Rig, heads: &[u16]) -> Outcome {
    let features = rig.features();
    rig.ring(features, heads.len() as u16, |rig| {
        rig.put_good(0);
        heads.iter().for_each(|head| rig.offer(*head));
    })
}

/// A chain of `links`: number of the next descriptor of each.
fn links(rig: &mut Rig, links: &[u16]) -> Outcome {
    let (way, at) = (rig.way(), rig.data(0));
    let mut chain = [Desc::default(); SIZE as usize];
    for (desc, next) in chain.iter_mut().zip(links) {
        *desc = Desc(at, 16, NEXT | way, *next);
    }
    rig.chain(&chain[..links.len()])
}

/// A good request while the ring itself is odd.
fn odd(rig: &mut Rig, features: u64, make: fn(&mut Rig)) -> Outcome {
    let features = rig.features() | features & rig.window.features();
    rig.ring(features, 1, |rig| {
        make(rig);
        rig.put_good(0);
        rig.offer(0);
    })
}

/// An indirect descriptor to `address`.
fn table(rig: &mut Rig, address: u64, length: u32) -> Outcome {
    rig.chain(&[Desc(address, length, INDIRECT, 0)])
}

/// Rings and direct chains.
#[rustfmt::skip]
pub const CASES: &[Case] = &[
    Case { name: "ring/head-is-the-size", allowed: NO, run: |rig| heads(rig, &[SIZE]) },
    Case { name: "ring/head-is-ffff", allowed: NO, run: |rig| heads(rig, &[u16::MAX]) },
    Case { name: "ring/good-head-then-bad-head", allowed: NO, run: |rig| heads(rig, &[0, SIZE + 1]) },
    Case { name: "ring/same-head-twice", allowed: ANY, run: |rig| heads(rig, &[0, 0]) },
    Case { name: "ring/same-head-in-every-entry", allowed: ANY, run: |rig| heads(rig, &[0; SIZE as usize]) },
    Case { name: "ring/index-one-too-far", allowed: NO, run: |rig| index(rig, SIZE + 1) },
    Case { name: "ring/index-half-way-round", allowed: NO, run: |rig| index(rig, 0x8000) },
    Case { name: "ring/index-goes-back", allowed: NO, run: |rig| index(rig, u16::MAX) },
    Case { name: "ring/index-jumps-later", allowed: NO, run: |rig| {
        rig.start();
        if rig.good() != Outcome::Served { return Outcome::Wrong("no-good-start"); }
        rig.set_index(rig.index().wrapping_add(SIZE + 7));
        rig.notify();
        rig.settle(SIZE)
    } },
    Case { name: "ring/index-goes-back-later", allowed: NO, run: |rig| {
        rig.start();
        if rig.good() != Outcome::Served { return Outcome::Wrong("no-good-start"); }
        rig.set_index(0);
        rig.notify();
        rig.settle(SIZE)
    } },
    Case { name: "ring/full-of-the-same-empty-chain", allowed: ANY, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| (0..SIZE).for_each(|head| rig.offer(head)))
    } },
    Case { name: "ring/driver-flags-nonsense", allowed: YES, run: |rig| odd(rig, 0, |rig| rig.set_flags(0xfffe)) },
    Case { name: "ring/used-area-scribbled", allowed: YES, run: |rig| odd(rig, 0, |rig| rig.scribble(0x5a5a)) },
    Case { name: "ring/event-index-nonsense", allowed: YES, run: |rig| odd(rig, EVENT_IDX, |rig| rig.set_used_event(0x7777)) },
    Case { name: "ring/event-index-behind", allowed: YES, run: |rig| odd(rig, EVENT_IDX, |rig| rig.set_used_event(u16::MAX)) },
    Case { name: "ring/used-index-rewritten-while-running", allowed: YES, run: |rig| {
        rig.start();
        if rig.good() != Outcome::Served { return Outcome::Wrong("no-good-start"); }
        rig.set_used_index(0xbeef);
        rig.put_good(0);
        rig.offer(0);
        rig.notify();
        // The device goes by its own index: it writes 2, or a few more where requests come back by others.
        for _ in 0..200_000 {
            if (2..8).contains(&rig.used()) { return Outcome::Served; }
            if rig.status() & 64 != 0 { return Outcome::NeedsReset; }
        }
        Outcome::Stuck
    } },
    Case { name: "ring/descriptors-change-under-way", allowed: ANY, run: |rig| {
        rig.start();
        for round in 0..32u64 {
            rig.put_good(0);
            rig.offer(0);
            rig.notify();
            let way = rig.way();
            rig.put(0, &[Desc(rig.ram_end() + round, 0xffff_ffff, way, 77)]);
            match rig.settle(1) {
                Outcome::Served | Outcome::Refused => {}
                other => return other,
            }
        }
        Outcome::Served
    } },
    Case { name: "chain/next-is-itself", allowed: NO, run: |rig| links(rig, &[0]) },
    Case { name: "chain/two-that-loop", allowed: NO, run: |rig| links(rig, &[1, 0]) },
    Case { name: "chain/tail-that-loops", allowed: NO, run: |rig| links(rig, &[1, 2, 3, 1]) },
    Case { name: "chain/loop-of-the-whole-table", allowed: NO, run: |rig| {
        let mut all = [0; SIZE as usize];
        for (i, next) in all.iter_mut().enumerate() { *next = (i as u16 + 1) % SIZE; }
        links(rig, &all)
    } },
    Case { name: "chain/next-is-the-size", allowed: NO, run: |rig| links(rig, &[1, SIZE]) },
    Case { name: "chain/next-is-ffff", allowed: NO, run: |rig| links(rig, &[u16::MAX]) },
    Case { name: "chain/behind-ram", allowed: NO, run: |rig| one(rig, rig.ram_end(), 512) },
    Case { name: "chain/across-the-end-of-ram", allowed: NO, run: |rig| one(rig, rig.ram_end() - 16, 512) },
    Case { name: "chain/at-its-own-registers", allowed: NO, run: |rig| one(rig, rig.window.address, 0x100) },
    Case { name: "chain/at-its-own-doorbell", allowed: NO, run: |rig| one(rig, rig.window.address + reg::QUEUE_NOTIFY, 4) },
    Case { name: "chain/at-the-interrupt-controller", allowed: NO, run: |rig| one(rig, 0xfee0_0000, 4096) },
    Case { name: "chain/wraps-the-address-space", allowed: NO, run: |rig| one(rig, u64::MAX - 15, 512) },
    Case { name: "chain/at-the-last-byte-there-is", allowed: NO, run: |rig| one(rig, u64::MAX, 1) },
    Case { name: "chain/beyond-any-processor", allowed: NO, run: |rig| one(rig, 1 << 62, 512) },
    Case { name: "chain/four-gib", allowed: NO, run: |rig| one(rig, 0, u32::MAX) },
    Case { name: "chain/two-gib", allowed: NO, run: |rig| one(rig, rig.data(0), 1 << 31) },
    Case { name: "chain/zero-length", allowed: ANY, run: |rig| one(rig, rig.data(0), 0) },
    Case { name: "chain/zero-length-behind-ram", allowed: ANY, run: |rig| one(rig, rig.ram_end() + 64, 0) },
    Case { name: "chain/zero-lengths-only", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        rig.chain(&[Desc(at, 0, NEXT | way, 1), Desc(at, 0, NEXT | way, 2), Desc(at, 0, way, 0)])
    } },
    Case { name: "chain/sum-over-four-gib", allowed: NO, run: |rig| {
        let (way, length) = (rig.way(), (rig.ram_end() - (16 << 20)) as u32);
        let mut chain = [Desc::default(); SIZE as usize];
        for (i, desc) in chain.iter_mut().enumerate() {
            *desc = Desc(8 << 20, length, way | if i + 1 < usize::from(SIZE) { NEXT } else { 0 }, i as u16 + 1);
        }
        // Nobody may read or write through it: it must be refused before.
        rig.chain(&chain)
    } },
    Case { name: "chain/writable-before-readable", allowed: NO, run: |rig| {
        let at = rig.data(0);
        rig.chain(&[Desc(at, 16, NEXT | WRITE, 1), Desc(at, 16, NEXT, 2), Desc(at, 16, WRITE, 0)])
    } },
    Case { name: "chain/the-wrong-way", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way() ^ WRITE, rig.data(0));
        rig.chain(&[Desc(at, 64, way, 0)])
    } },
    Case { name: "chain/flags-nobody-knows", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way() | 0xfff8, rig.data(0));
        rig.chain(&[Desc(at, 512, way, 0)])
    } },
    Case { name: "chain/every-descriptor-of-the-table", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        let mut chain = [Desc::default(); SIZE as usize];
        for (i, desc) in chain.iter_mut().enumerate() {
            *desc = Desc(at + 64 * i as u64, 32, way | if i + 1 < usize::from(SIZE) { NEXT } else { 0 }, i as u16 + 1);
        }
        rig.chain(&chain)
    } },
    Case { name: "chain/the-same-buffer-many-times", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        let mut chain = [Desc::default(); 32];
        for (i, desc) in chain.iter_mut().enumerate() {
            *desc = Desc(at, 512, way | if i < 31 { NEXT } else { 0 }, i as u16 + 1);
        }
        rig.chain(&chain)
    } },
    Case { name: "chain/its-own-descriptor-table", allowed: ANY, run: |rig| one(rig, rig.own().desc, 1024) },
    Case { name: "chain/its-own-driver-area", allowed: ANY, run: |rig| one(rig, rig.own().driver, 128) },
    Case { name: "chain/its-own-unused-entries", allowed: ANY, run: |rig| one(rig, rig.own().device + 64, 256) },
];

/// Indirect descriptors.
#[rustfmt::skip]
pub const INDIRECT_CASES: &[Case] = &[
    Case { name: "indirect/not-negotiated", allowed: NO, run: |rig| {
        let features = rig.features() & !INDIRECT_DESC;
        rig.ring(features, 1, |rig| {
            let (way, at) = (rig.way(), rig.data(0));
            rig.put_table(&[Desc(at, 512, way, 0)]);
            rig.put(0, &[Desc(rig.table(), 16, INDIRECT, 0)]);
            rig.offer(0);
        })
    } },
    Case { name: "indirect/in-an-indirect", allowed: NO, run: |rig| rig.indirect(16, &[Desc(rig.table() + 16, 16, INDIRECT, 0)]) },
    Case { name: "indirect/to-itself", allowed: NO, run: |rig| rig.indirect(16, &[Desc(rig.table(), 16, INDIRECT, 0)]) },
    Case { name: "indirect/and-next", allowed: NO, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        rig.put_table(&[Desc(at, 512, way, 0)]);
        rig.chain(&[Desc(rig.table(), 16, INDIRECT | NEXT, 1), Desc(at, 16, way, 0)])
    } },
    Case { name: "indirect/length-0", allowed: NO, run: |rig| table(rig, rig.table(), 0) },
    Case { name: "indirect/length-8", allowed: NO, run: |rig| table(rig, rig.table(), 8) },
    Case { name: "indirect/length-17", allowed: NO, run: |rig| table(rig, rig.table(), 17) },
    Case { name: "indirect/length-four-gib", allowed: NO, run: |rig| table(rig, rig.table(), 0xffff_fff0) },
    Case { name: "indirect/longer-than-any-queue", allowed: NO, run: |rig| table(rig, rig.table(), 16 * 65537) },
    Case { name: "indirect/behind-ram", allowed: NO, run: |rig| table(rig, rig.ram_end(), 64) },
    Case { name: "indirect/across-the-end-of-ram", allowed: NO, run: |rig| table(rig, rig.ram_end() - 16, 64) },
    Case { name: "indirect/at-its-own-registers", allowed: NO, run: |rig| table(rig, rig.window.address, 64) },
    Case { name: "indirect/wraps-the-address-space", allowed: NO, run: |rig| table(rig, u64::MAX - 15, 64) },
    Case { name: "indirect/misaligned", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        rig.put_table(&[Desc(at, 512, way, 0), Desc(at, 512, way, 0)]);
        table(rig, rig.table() + 3, 16)
    } },
    Case { name: "indirect/loop", allowed: NO, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        rig.indirect(32, &[Desc(at, 16, way | NEXT, 1), Desc(at, 16, way | NEXT, 0)])
    } },
    Case { name: "indirect/next-is-beyond-it", allowed: NO, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        rig.indirect(32, &[Desc(at, 16, way | NEXT, 2), Desc(at, 16, way, 0)])
    } },
    Case { name: "indirect/buffer-behind-ram", allowed: NO, run: |rig| {
        let way = rig.way();
        rig.indirect(16, &[Desc(rig.ram_end(), 512, way, 0)])
    } },
    Case { name: "indirect/with-the-write-flag", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        rig.put_table(&[Desc(at, 512, way, 0)]);
        rig.chain(&[Desc(rig.table(), 16, INDIRECT | WRITE, 0)])
    } },
    Case { name: "indirect/behind-a-direct-one", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        rig.put_table(&[Desc(at, 512, way, 0)]);
        rig.chain(&[Desc(at, 16, way | NEXT, 1), Desc(rig.table(), 16, INDIRECT, 0)])
    } },
    Case { name: "indirect/a-thousand-buffers", allowed: ANY, run: |rig| {
        let (way, at) = (rig.way(), rig.data(0));
        let mut entries = [Desc::default(); 1024];
        for (i, desc) in entries.iter_mut().enumerate() {
            *desc = Desc(at + 16 * i as u64, 16, way | if i < 1023 { NEXT } else { 0 }, i as u16 + 1);
        }
        rig.indirect(16 * 1024, &entries)
    } },
];
