//! Misuse of the balloon (virtio 1.2 §5.5.6), of random numbers (§5.4.6) and of a terminal's input (§5.3.6).

use super::rig::{Desc, NEXT, Rig, SIZE, WRITE};
use super::{ANY, Case, Outcome, YES};

/// A request that holds these page numbers, in a buffer of `bytes`.
fn numbers(rig: &mut Rig, numbers: &[u32], bytes: u32) -> Outcome {
    for (i, number) in numbers.iter().enumerate() {
        rig.fill(4 * i as u64, &number.to_le_bytes());
    }
    let at = rig.data(0);
    rig.chain(&[Desc(at, bytes, 0, 0)])
}

/// Page numbers. Pages that hold anything of ours are left alone: the device may take those, they are our own loss.
#[rustfmt::skip]
pub const PAGES: &[Case] = &[
    Case { name: "pages/behind-ram", allowed: ANY, run: |rig| { let end = (rig.ram_end() >> 12) as u32; numbers(rig, &[end, end + 1, end + 511], 12) } },
    Case { name: "pages/last-there-could-be", allowed: ANY, run: |rig| numbers(rig, &[u32::MAX, u32::MAX - 1], 8) },
    Case { name: "pages/at-its-own-registers", allowed: ANY, run: |rig| { let page = (rig.window.address >> 12) as u32; numbers(rig, &[page], 4) } },
    Case { name: "pages/at-the-interrupt-controller", allowed: ANY, run: |rig| numbers(rig, &[0xfee00], 4) },
    Case { name: "pages/across-the-end-of-ram", allowed: ANY, run: |rig| { let end = (rig.ram_end() >> 12) as u32; numbers(rig, &[end - 1, end], 8) } },
    Case { name: "pages/the-same-again-and-again", allowed: YES, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 512 << 10, 0, 0)]) } },
    Case { name: "pages/its-own-used-page", allowed: YES, run: |rig| { let page = (rig.data(0x7_e000) >> 12) as u32; numbers(rig, &[page, page, page], 12) } },
    Case { name: "pages/one-byte", allowed: ANY, run: |rig| numbers(rig, &[], 1) },
    Case { name: "pages/three-bytes", allowed: ANY, run: |rig| numbers(rig, &[], 3) },
    Case { name: "pages/five-bytes", allowed: ANY, run: |rig| numbers(rig, &[], 5) },
    Case { name: "pages/number-in-four-pieces", allowed: YES, run: |rig| {
        let at = rig.data(0);
        rig.chain(&[Desc(at, 1, NEXT, 1), Desc(at + 1, 1, NEXT, 2), Desc(at + 2, 1, NEXT, 3), Desc(at + 3, 1, 0, 0)])
    } },
    Case { name: "pages/writable-too", allowed: ANY, run: |rig| {
        let at = rig.data(0);
        rig.chain(&[Desc(at, 4, NEXT, 1), Desc(at + 0x1000, 512, WRITE, 0)])
    } },
    Case { name: "pages/eight-mib-of-numbers", allowed: YES, run: |rig| rig.chain(&[Desc(128 << 20, 8 << 20, 0, 0)]) },
];

/// Requests for random bytes.
#[rustfmt::skip]
pub const RANDOM: &[Case] = &[
    Case { name: "rng/one-byte", allowed: YES, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 1, WRITE, 0)]) } },
    Case { name: "rng/eight-mib", allowed: YES, run: |rig| rig.chain(&[Desc(128 << 20, 8 << 20, WRITE, 0)]) },
    Case { name: "rng/no-more-than-asked-for", allowed: YES, run: |rig| {
        for at in 0..0x1000 { rig.fill(at, &[0x77]); }
        let at = rig.data(0);
        let outcome = rig.chain(&[Desc(at, 100, WRITE, 0)]);
        if (100..0x1000).any(|at| rig.byte(at) != 0x77) { Outcome::Wrong("wrote-too-much") } else { outcome }
    } },
    Case { name: "rng/readable-before-writable", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 64, NEXT, 1), Desc(at + 64, 64, WRITE, 0)]) } },
    Case { name: "rng/a-byte-in-each-piece", allowed: YES, run: |rig| {
        let at = rig.data(0);
        let mut chain = [Desc::default(); SIZE as usize];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, WRITE | if i < 63 { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "rng/the-whole-ring-at-once", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { rig.put_good(head); rig.offer(head); })
    } },
];

/// Statistics, which the device keeps until there are newer ones. Each case's request comes back when the next one is there.
#[rustfmt::skip]
pub const STATISTICS: &[Case] = &[
    Case { name: "stats/no-bytes", allowed: YES, run: |rig| numbers(rig, &[], 0) },
    Case { name: "stats/one-byte", allowed: YES, run: |rig| numbers(rig, &[], 1) },
    Case { name: "stats/an-entry-cut-short", allowed: YES, run: |rig| numbers(rig, &[], 9) },
    Case { name: "stats/an-entry-and-a-half", allowed: YES, run: |rig| numbers(rig, &[], 15) },
    Case { name: "stats/tags-nobody-knows", allowed: YES, run: |rig| numbers(rig, &[u32::MAX, u32::MAX, 0xffff_000a, 0x8000_0000, u32::MAX], 20) },
    Case { name: "stats/the-same-tag-thousands-of-times", allowed: YES, run: |rig| {
        for at in 0..0x1_0000 { rig.fill(at, &[0]); }
        numbers(rig, &[], 0x1_0000)
    } },
    Case { name: "stats/128-mib", allowed: YES, run: |rig| rig.chain(&[Desc(64 << 20, 128 << 20, 0, 0)]) },
    Case { name: "stats/writable", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 100, WRITE, 0)]) } },
    Case { name: "stats/a-byte-in-each-piece", allowed: YES, run: |rig| {
        let at = rig.data(0);
        let mut chain = [Desc::default(); 40];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, if i < 39 { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "stats/thirty-at-once", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, 30, |rig| for head in 0..30 { rig.put_good(head); rig.offer(head); })
    } },
    Case { name: "stats/more-than-a-ring-of-them", allowed: ANY, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { rig.put_good(head); rig.offer(head); })
    } },
    Case { name: "stats/a-thousand-unasked", allowed: YES, run: |rig| {
        rig.start();
        for _ in 0..1000 {
            if rig.good() != Outcome::Served { return Outcome::Wrong("not-served"); }
        }
        Outcome::Served
    } },
];

/// Page 0x40 of the buffers is whole; what lies around a report keeps its contents.
fn around(rig: &mut Rig, first: u64, bytes: u32) -> Outcome {
    for at in 0x4_0000..0x4_4000 {
        rig.fill(at, &[0x77]);
    }
    let at = rig.data(0x4_0000 + first);
    let outcome = rig.chain(&[Desc(at, bytes, WRITE, 0)]);
    let inside = first..first + u64::from(bytes);
    if (0..0x4000).any(|at| !inside.contains(&at) && rig.byte(0x4_0000 + at) != 0x77) {
        return Outcome::Wrong("took-too-much");
    }
    outcome
}

/// Reports of free pages.
#[rustfmt::skip]
pub const REPORTS: &[Case] = &[
    Case { name: "report/one-byte", allowed: ANY, run: |rig| around(rig, 0x100, 1) },
    Case { name: "report/half-a-page", allowed: ANY, run: |rig| around(rig, 0, 2048) },
    Case { name: "report/the-other-half", allowed: ANY, run: |rig| around(rig, 2048, 2048) },
    Case { name: "report/two-halves-of-two-pages", allowed: ANY, run: |rig| around(rig, 2048, 4096) },
    Case { name: "report/a-page-and-a-byte", allowed: ANY, run: |rig| around(rig, 0, 4097) },
    Case { name: "report/all-but-a-byte-of-two-pages", allowed: ANY, run: |rig| around(rig, 1, 8191) },
    Case { name: "report/a-page-is-gone-and-nothing-else", allowed: YES, run: |rig| around(rig, 4096, 4096) },
    Case { name: "report/the-same-page-again-and-again", allowed: YES, run: |rig| {
        let at = rig.data(0x4_0000);
        let mut chain = [Desc::default(); 32];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at, 4096, WRITE | if i < 31 { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "report/overlapping", allowed: YES, run: |rig| {
        let at = rig.data(0x4_0000);
        rig.chain(&[Desc(at, 16384, NEXT | WRITE, 1), Desc(at + 4096, 16384, WRITE, 0)])
    } },
    Case { name: "report/128-mib", allowed: YES, run: |rig| rig.chain(&[Desc(64 << 20, 128 << 20, WRITE, 0)]) },
    Case { name: "report/its-own-ring", allowed: ANY, run: |rig| { let at = rig.own().driver; rig.chain(&[Desc(at, 4096, WRITE, 0)]) } },
    Case { name: "report/its-own-used-ring", allowed: ANY, run: |rig| { let at = rig.own().device; rig.chain(&[Desc(at, 4096, WRITE, 0)]) } },
    Case { name: "report/readable", allowed: ANY, run: |rig| { let at = rig.data(0x4_0000); rig.chain(&[Desc(at, 4096, 0, 0)]) } },
    Case { name: "report/readable-before-writable", allowed: ANY, run: |rig| { let at = rig.data(0x4_0000); rig.chain(&[Desc(at, 4096, NEXT, 1), Desc(at + 4096, 4096, WRITE, 0)]) } },
    Case { name: "report/the-whole-ring-at-once", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { rig.put_good(head); rig.offer(head); })
    } },
];

/// Buffers for what comes from the host.
#[rustfmt::skip]
pub const INPUT: &[Case] = &[
    Case { name: "input/one-byte", allowed: YES, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 1, WRITE, 0)]) } },
    Case { name: "input/no-more-than-asked-for", allowed: YES, run: |rig| {
        for at in 0..0x1000 { rig.fill(at, &[0]); }
        let at = rig.data(0);
        let outcome = rig.chain(&[Desc(at, 100, WRITE, 0)]);
        if (100..0x1000).any(|at| rig.byte(at) != 0) { Outcome::Wrong("wrote-too-much") } else { outcome }
    } },
    Case { name: "input/a-byte-in-each-piece", allowed: YES, run: |rig| {
        let at = rig.data(0);
        let mut chain = [Desc::default(); SIZE as usize];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, WRITE | if i < 63 { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "input/128-mib", allowed: YES, run: |rig| rig.chain(&[Desc(64 << 20, 128 << 20, WRITE, 0)]) },
    Case { name: "input/readable-before-writable", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 64, NEXT, 1), Desc(at + 64, 64, WRITE, 0)]) } },
    Case { name: "input/the-whole-ring-of-single-bytes", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { let at = rig.data(u64::from(head)); rig.put(head, &[Desc(at, 1, WRITE, 0)]); rig.offer(head); })
    } },
    Case { name: "input/resets-in-the-flood", allowed: YES, run: |rig| {
        for _ in 0..30 {
            rig.start();
            for head in 0..SIZE { rig.put_good(head); rig.offer(head); }
            rig.notify();
            if !rig.reset() { return Outcome::Wrong("no-reset"); }
        }
        rig.start();
        rig.good()
    } },
];
