//! Misuse of packets and their headers (virtio 1.2 §5.1.6). A packet that the device drops comes back like one that it sends.

use super::rig::{Desc, NEXT, Rig, SIZE, WRITE};
use super::{ANY, Case, NO, Outcome, YES};
use crate::virtio::VERSION_1;

const F_CSUM: u64 = 1 << 0;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const OFFLOADS: u64 = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6;

/// One packet of `length` bytes, header included, in one buffer.
fn packet(rig: &mut Rig, length: u32) -> Outcome {
    rig.fill(0, &[0; 12]);
    let at = rig.data(0);
    rig.chain(&[Desc(at, length, 0, 0)])
}

/// A frame of 100 bytes with this header: flags, gso type; header length, gso size, checksum start and offset, buffers.
fn header(rig: &mut Rig, features: u64, kind: [u8; 2], fields: [u16; 5]) -> Outcome {
    rig.fill(0, &kind);
    for (i, field) in fields.iter().enumerate() {
        rig.fill(2 + 2 * i as u64, &field.to_le_bytes());
    }
    let at = rig.data(0);
    rig.ring(rig.features() | features & rig.window.features(), 1, |rig| {
        rig.put(0, &[Desc(at, 112, 0, 0)]);
        rig.offer(0);
    })
}

/// Buffers of these lengths for the device to receive into, then one that takes anything. One packet has to come through.
fn buffers(rig: &mut Rig, features: u64, lengths: &[u32], count: u16) -> Outcome {
    let last = lengths.len() as u16;
    let features = VERSION_1 | features & rig.window.features();
    rig.ring(features, count, |rig| {
        for (i, length) in lengths.iter().enumerate() {
            let at = rig.data(0x1000 * i as u64);
            rig.put(i as u16, &[Desc(at, *length, WRITE, 0)]);
            rig.offer(i as u16);
        }
        rig.put_good(last);
        rig.offer(last);
    })
}

/// From the guest.
#[rustfmt::skip]
pub const TRANSMIT: &[Case] = &[
    Case { name: "net/no-bytes", allowed: ANY, run: |rig| packet(rig, 0) },
    Case { name: "net/one-byte", allowed: YES, run: |rig| packet(rig, 1) },
    Case { name: "net/header-cut-short", allowed: YES, run: |rig| packet(rig, 11) },
    Case { name: "net/header-and-no-packet", allowed: YES, run: |rig| packet(rig, 12) },
    Case { name: "net/less-than-an-ethernet-header", allowed: YES, run: |rig| packet(rig, 12 + 13) },
    Case { name: "net/an-ethernet-header-only", allowed: YES, run: |rig| packet(rig, 12 + 14) },
    Case { name: "net/jumbo-without-offload", allowed: YES, run: |rig| packet(rig, 12 + 9000) },
    Case { name: "net/64-kib", allowed: YES, run: |rig| packet(rig, 12 + 65536) },
    Case { name: "net/one-more-than-any-packet", allowed: YES, run: |rig| packet(rig, 12 + 65535 + 19) },
    Case { name: "net/half-a-mib", allowed: YES, run: |rig| packet(rig, 512 << 10) },
    Case { name: "net/128-mib", allowed: YES, run: |rig| { rig.fill(0, &[0; 12]); rig.chain(&[Desc(64 << 20, 128 << 20, 0, 0)]) } },
    Case { name: "net/flags-nobody-knows", allowed: YES, run: |rig| header(rig, OFFLOADS, [0xff, 0], [0; 5]) },
    Case { name: "net/checksum-not-negotiated", allowed: YES, run: |rig| header(rig, 0, [1, 0], [0, 0, 34, 16, 0]) },
    Case { name: "net/checksum-behind-the-packet", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 0], [0, 0, 2000, 16, 0]) },
    Case { name: "net/checksum-at-the-last-byte", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 0], [0, 0, 84, 15, 0]) },
    Case { name: "net/checksum-overflows", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 0], [0, 0, 0xffff, 0xffff, 0]) },
    Case { name: "net/gso-not-negotiated", allowed: YES, run: |rig| header(rig, 0, [1, 1], [54, 1448, 34, 16, 0]) },
    Case { name: "net/gso-without-checksum", allowed: YES, run: |rig| header(rig, OFFLOADS, [0, 1], [54, 1448, 34, 16, 0]) },
    Case { name: "net/gso-size-0", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 1], [54, 0, 34, 16, 0]) },
    Case { name: "net/gso-size-1", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 1], [54, 1, 34, 16, 0]) },
    Case { name: "net/gso-size-ffff", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 4], [54, 0xffff, 34, 16, 0]) },
    Case { name: "net/gso-header-length-ffff", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 1], [0xffff, 1448, 34, 16, 0]) },
    Case { name: "net/gso-header-length-0", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 1], [0, 1448, 34, 16, 0]) },
    Case { name: "net/gso-udp-not-offered", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 3], [42, 1448, 34, 6, 0]) },
    Case { name: "net/gso-type-7f", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 0x7f], [54, 1448, 34, 16, 0]) },
    Case { name: "net/gso-ecn-alone", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 0x80], [54, 1448, 34, 16, 0]) },
    Case { name: "net/gso-of-what-is-no-tcp", allowed: YES, run: |rig| header(rig, OFFLOADS, [1, 1], [14, 100, 14, 16, 0]) },
    Case { name: "net/num-buffers-ffff", allowed: YES, run: |rig| header(rig, 0, [0, 0], [0, 0, 0, 0, 0xffff]) },
    Case { name: "net/header-all-ones", allowed: YES, run: |rig| header(rig, OFFLOADS, [0xff, 0xff], [0xffff; 5]) },
    Case { name: "net/header-in-twelve-pieces", allowed: YES, run: |rig| {
        rig.fill(0, &[0; 112]);
        let at = rig.data(0);
        let mut chain = [Desc::default(); 13];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, NEXT, i as u16 + 1); }
        chain[12] = Desc(at + 12, 100, 0, 0);
        rig.chain(&chain)
    } },
    Case { name: "net/a-byte-in-each-piece", allowed: YES, run: |rig| {
        rig.fill(0, &[0; 64]);
        let at = rig.data(0);
        let mut chain = [Desc::default(); SIZE as usize];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, if i < 63 { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "net/empty-pieces-in-between", allowed: YES, run: |rig| {
        rig.fill(0, &[0; 112]);
        let at = rig.data(0);
        rig.chain(&[Desc(at, 12, NEXT, 1), Desc(at, 0, NEXT, 2), Desc(at + 12, 50, NEXT, 3), Desc(at, 0, NEXT, 4), Desc(at + 62, 50, 0, 0)])
    } },
    Case { name: "net/writable-behind-the-packet", allowed: ANY, run: |rig| {
        rig.fill(0, &[0; 112]);
        let at = rig.data(0);
        rig.chain(&[Desc(at, 112, NEXT, 1), Desc(at + 0x1000, 512, WRITE, 0)])
    } },
    Case { name: "net/the-whole-ring-at-once", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { rig.put_good(head); rig.offer(head); })
    } },
    Case { name: "net/last-piece-behind-ram", allowed: NO, run: |rig| {
        let (at, end) = (rig.data(0), rig.ram_end());
        rig.chain(&[Desc(at, 112, NEXT, 1), Desc(end, 512, 0, 0)])
    } },
];

/// To the guest.
#[rustfmt::skip]
pub const RECEIVE: &[Case] = &[
    Case { name: "net/buffer-of-one-byte", allowed: YES, run: |rig| buffers(rig, F_MRG_RXBUF, &[1], 2) },
    Case { name: "net/buffer-smaller-than-the-header", allowed: YES, run: |rig| buffers(rig, F_MRG_RXBUF, &[11], 2) },
    Case { name: "net/buffers-smaller-than-the-header", allowed: YES, run: |rig| buffers(rig, 0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 12) },
    Case { name: "net/buffer-for-the-header-only", allowed: ANY, run: |rig| buffers(rig, F_MRG_RXBUF, &[12], 2) },
    Case { name: "net/merged-from-tiny-buffers", allowed: ANY, run: |rig| buffers(rig, F_MRG_RXBUF, &[16, 16, 16, 16], 5) },
    Case { name: "net/buffer-of-no-bytes", allowed: ANY, run: |rig| buffers(rig, F_MRG_RXBUF, &[0], 2) },
    Case { name: "net/readable-buffer", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 2048, 0, 0)]) } },
    Case { name: "net/readable-before-writable", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 12, NEXT, 1), Desc(at + 0x1000, 2048, WRITE, 0)]) } },
    Case { name: "net/header-in-twelve-pieces", allowed: YES, run: |rig| {
        let at = rig.data(0);
        let mut chain = [Desc::default(); 13];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, NEXT | WRITE, i as u16 + 1); }
        chain[12] = Desc(at + 0x1000, 2048, WRITE, 0);
        rig.chain(&chain)
    } },
    Case { name: "net/buffer-of-128-mib", allowed: YES, run: |rig| rig.chain(&[Desc(64 << 20, 128 << 20, WRITE, 0)]) },
    Case { name: "net/the-whole-ring-of-tiny-buffers", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| {
            for head in 0..SIZE - 1 { let at = rig.data(0); rig.put(head, &[Desc(at, 4, WRITE, 0)]); rig.offer(head); }
            rig.put_good(SIZE - 1);
            rig.offer(SIZE - 1);
        })
    } },
];
