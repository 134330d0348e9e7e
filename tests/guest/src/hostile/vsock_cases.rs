//! Misuse of vsock packets (virtio 1.2 §5.10.6). The host's kernel serves these rings: what it cannot read it complains of, and
//! the device needs a reset; a packet that makes no sense it drops, or answers with the end of a connection.

use super::good::{REQUEST, RST, VSOCK_HEADER, vsock_header};
use super::rig::{Desc, NEXT, Rig, SIZE, WRITE};
use super::{ANY, Case, NO, Outcome, YES};
use crate::{clock, cpu};

/// A header with `change` made to it, and so many bytes in the chain.
fn packet(rig: &mut Rig, change: fn(&mut [u8; VSOCK_HEADER]), bytes: u32) -> Outcome {
    let mut header = vsock_header(rig, RST, 0);
    change(&mut header);
    rig.fill(0, &header);
    let at = rig.data(0);
    rig.chain(&[Desc(at, bytes, 0, 0)])
}

const HEADER: u32 = VSOCK_HEADER as u32;

/// From the guest.
#[rustfmt::skip]
pub const PACKETS: &[Case] = &[
    Case { name: "packet/no-bytes", allowed: ANY, run: |rig| packet(rig, |_| (), 0) },
    Case { name: "packet/header-cut-short", allowed: ANY, run: |rig| packet(rig, |_| (), HEADER - 1) },
    Case { name: "packet/from-somebody-else", allowed: ANY, run: |rig| packet(rig, |h| h[0] ^= 0xff, HEADER) },
    Case { name: "packet/from-the-host", allowed: ANY, run: |rig| packet(rig, |h| { h[..8].fill(0); h[0] = 2 }, HEADER) },
    Case { name: "packet/to-somebody-else", allowed: ANY, run: |rig| packet(rig, |h| h[8] = 77, HEADER) },
    Case { name: "packet/to-itself", allowed: ANY, run: |rig| packet(rig, |h| h.copy_within(..8, 8), HEADER) },
    Case { name: "packet/to-address-all-ones", allowed: ANY, run: |rig| packet(rig, |h| h[8..16].fill(0xff), HEADER) },
    Case { name: "packet/length-without-data", allowed: ANY, run: |rig| packet(rig, |h| h[24..28].copy_from_slice(&100u32.to_le_bytes()), HEADER) },
    Case { name: "packet/length-four-gib", allowed: ANY, run: |rig| packet(rig, |h| h[24..28].fill(0xff), 4096) },
    Case { name: "packet/length-over-64-kib", allowed: ANY, run: |rig| packet(rig, |h| h[24..28].copy_from_slice(&(65537u32).to_le_bytes()), 128 << 10) },
    Case { name: "packet/data-without-length", allowed: ANY, run: |rig| packet(rig, |_| (), 4096) },
    Case { name: "packet/128-mib", allowed: ANY, run: |rig| { let header = vsock_header(rig, 5, 128 << 20); rig.fill(0, &header); let at = rig.data(0); rig.chain(&[Desc(at, HEADER, NEXT, 1), Desc(64 << 20, 128 << 20, 0, 0)]) } },
    Case { name: "packet/type-ffff", allowed: ANY, run: |rig| packet(rig, |h| h[28..30].fill(0xff), HEADER) },
    Case { name: "packet/operation-0", allowed: ANY, run: |rig| packet(rig, |h| h[30] = 0, HEADER) },
    Case { name: "packet/operation-ffff", allowed: ANY, run: |rig| packet(rig, |h| h[30..32].fill(0xff), HEADER) },
    Case { name: "packet/data-of-no-connection", allowed: ANY, run: |rig| packet(rig, |h| { h[30] = 5; h[24] = 64 }, HEADER + 64) },
    Case { name: "packet/credit-of-no-connection", allowed: ANY, run: |rig| packet(rig, |h| h[30] = 6, HEADER) },
    Case { name: "packet/header-all-ones", allowed: ANY, run: |rig| packet(rig, |h| h.fill(0xff), HEADER) },
    Case { name: "packet/header-in-pieces", allowed: ANY, run: |rig| {
        let header = vsock_header(rig, RST, 0);
        rig.fill(0, &header);
        let at = rig.data(0);
        let mut chain = [Desc::default(); VSOCK_HEADER];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, if i + 1 < VSOCK_HEADER { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "packet/writable-behind-it", allowed: ANY, run: |rig| {
        let header = vsock_header(rig, RST, 0);
        rig.fill(0, &header);
        let at = rig.data(0);
        rig.chain(&[Desc(at, HEADER, NEXT, 1), Desc(at + 0x1000, 512, WRITE, 0)])
    } },
    Case { name: "packet/last-piece-behind-ram", allowed: NO, run: |rig| {
        let header = vsock_header(rig, RST, 64);
        rig.fill(0, &header);
        let (at, end) = (rig.data(0), rig.ram_end());
        rig.chain(&[Desc(at, HEADER, NEXT, 1), Desc(end, 64, 0, 0)])
    } },
    // The host answers each with the end of a connection that never was, and there is no buffer for any of the answers.
    Case { name: "packet/requests-without-listening", allowed: ANY, run: |rig| {
        rig.start();
        let header = vsock_header(rig, REQUEST, 0);
        rig.fill(0, &header);
        let at = rig.data(0);
        rig.put(0, &[Desc(at, HEADER, 0, 0)]);
        for sent in 1..=2000u16 {
            rig.offer(0);
            rig.notify();
            let end = clock::deadline(100_000);
            while rig.used() != sent {
                // The kernel takes no more before the answers fill its memory.
                if cpu::tsc() > end { return Outcome::Refused; }
            }
        }
        Outcome::Served
    } },
    Case { name: "packet/the-whole-ring-at-once", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { rig.put_good(head); rig.offer(head); })
    } },
];

/// To the guest.
#[rustfmt::skip]
pub const BUFFERS: &[Case] = &[
    Case { name: "buffer/smaller-than-a-header", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, HEADER - 1, WRITE, 0)]) } },
    Case { name: "buffer/of-a-header", allowed: YES, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, HEADER, WRITE, 0)]) } },
    Case { name: "buffer/of-no-bytes", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 0, WRITE, 0)]) } },
    Case { name: "buffer/of-128-mib", allowed: ANY, run: |rig| rig.chain(&[Desc(64 << 20, 128 << 20, WRITE, 0)]) },
    Case { name: "buffer/readable", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 4096, 0, 0)]) } },
    Case { name: "buffer/readable-before-writable", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 44, NEXT, 1), Desc(at + 0x1000, 4096, WRITE, 0)]) } },
    Case { name: "buffer/last-piece-behind-ram", allowed: NO, run: |rig| { let (at, end) = (rig.data(0), rig.ram_end()); rig.chain(&[Desc(at, 44, NEXT | WRITE, 1), Desc(end, 4096, WRITE, 0)]) } },
];
