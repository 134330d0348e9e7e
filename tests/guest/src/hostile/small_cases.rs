//! Misuse of the balloon (virtio 1.2 §5.5.6) and of random numbers (§5.4.6).

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
