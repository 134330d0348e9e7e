//! Misuse of block requests (virtio 1.2 §5.2.6).

use super::rig::{Desc, INDIRECT_DESC, NEXT, Rig, WRITE};
use super::{ANY, Allowed, Case, ERROR, Outcome, YES};
use crate::virtio::VERSION_1;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// Segments are not negotiated with every disk: then the device does not know the request.
const SEGMENT: Allowed = &[Outcome::Refused];

/// Where cases have their header, data and status byte.
const HEADER: u64 = 0;
const DATA: u64 = 0x1000;
const STATUS: u64 = 0x3_f000;

fn header(rig: &Rig, kind: u32, sector: u64) {
    rig.fill(HEADER, &kind.to_le_bytes());
    rig.fill(HEADER + 4, &[0; 4]);
    rig.fill(HEADER + 8, &sector.to_le_bytes());
}

/// Sectors of the disk.
fn capacity(rig: &Rig) -> u64 {
    crate::blk::capacity(rig.window)
}

/// Header, `length` bytes of data in one buffer if any, status.
fn request(rig: &mut Rig, kind: u32, sector: u64, length: u32, flags: u16) -> Outcome {
    header(rig, kind, sector);
    let (at, data, status) = (rig.data(HEADER), rig.data(DATA), rig.expect_status(STATUS));
    if length == 0 {
        return rig.chain(&[Desc(at, 16, NEXT, 1), Desc(status, 1, WRITE, 0)]);
    }
    rig.chain(&[Desc(at, 16, NEXT, 1), Desc(data, length, NEXT | flags, 2), Desc(status, 1, WRITE, 0)])
}

/// Chains of any form, after a header for a read of sector 0; `form` gets the addresses of header, data and status.
fn form(rig: &mut Rig, form: fn(&mut Rig, u64, u64, u64) -> Outcome) -> Outcome {
    header(rig, IN, 0);
    let (header, data, status) = (rig.data(HEADER), rig.data(DATA), rig.expect_status(STATUS));
    form(rig, header, data, status)
}

/// A discard or write of zeroes with these segments.
fn segments(rig: &mut Rig, kind: u32, segments: &[(u64, u32, u32)], bytes: u32) -> Outcome {
    header(rig, kind, 0);
    for (i, (sector, count, flags)) in segments.iter().enumerate() {
        let at = DATA + 16 * i as u64;
        rig.fill(at, &sector.to_le_bytes());
        rig.fill(at + 8, &count.to_le_bytes());
        rig.fill(at + 12, &flags.to_le_bytes());
    }
    let features = VERSION_1 | (rig.window.features() & (INDIRECT_DESC | F_DISCARD | F_WRITE_ZEROES));
    let (at, data, status) = (rig.data(HEADER), rig.data(DATA), rig.expect_status(STATUS));
    rig.ring(features, 1, |rig| {
        rig.put(0, &[Desc(at, 16, NEXT, 1), Desc(data, bytes, NEXT, 2), Desc(status, 1, WRITE, 0)]);
        rig.offer(0);
    })
}

/// Requests and their layout.
#[rustfmt::skip]
pub const REQUESTS: &[Case] = &[
    Case { name: "blk/read-behind-the-end", allowed: ERROR, run: |rig| { let end = capacity(rig); request(rig, IN, end, 512, WRITE) } },
    Case { name: "blk/read-across-the-end", allowed: ERROR, run: |rig| { let end = capacity(rig); request(rig, IN, end - 1, 1024, WRITE) } },
    Case { name: "blk/read-the-last-sector", allowed: YES, run: |rig| { let end = capacity(rig); request(rig, IN, end - 1, 512, WRITE) } },
    Case { name: "blk/write-behind-the-end", allowed: ERROR, run: |rig| { let end = capacity(rig); request(rig, OUT, end, 512, 0) } },
    Case { name: "blk/write-across-the-end", allowed: ERROR, run: |rig| { let end = capacity(rig); request(rig, OUT, end - 1, 1024, 0) } },
    Case { name: "blk/sector-overflows-as-bytes", allowed: ERROR, run: |rig| request(rig, IN, 1 << 55, 512, WRITE) },
    Case { name: "blk/sector-overflows-to-zero", allowed: ERROR, run: |rig| request(rig, OUT, 1 << 56, 512, 0) },
    Case { name: "blk/last-sector-there-could-be", allowed: ERROR, run: |rig| request(rig, IN, u64::MAX, 512, WRITE) },
    Case { name: "blk/end-overflows", allowed: ERROR, run: |rig| request(rig, OUT, (1 << 55) - 1, 1024, 0) },
    Case { name: "blk/read-511-bytes", allowed: ERROR, run: |rig| request(rig, IN, 0, 511, WRITE) },
    Case { name: "blk/read-513-bytes", allowed: ERROR, run: |rig| request(rig, IN, 0, 513, WRITE) },
    Case { name: "blk/write-1-byte", allowed: ERROR, run: |rig| request(rig, OUT, 0, 1, 0) },
    Case { name: "blk/read-nothing", allowed: ANY, run: |rig| request(rig, IN, 0, 0, 0) },
    Case { name: "blk/write-nothing", allowed: ANY, run: |rig| request(rig, OUT, 0, 0, 0) },
    Case { name: "blk/read-nothing-behind-the-end", allowed: ERROR, run: |rig| { let end = capacity(rig); request(rig, IN, end + 1, 0, 0) } },
    Case { name: "blk/read-into-a-readable-buffer", allowed: ANY, run: |rig| request(rig, IN, 0, 512, 0) },
    Case { name: "blk/write-from-a-writable-buffer", allowed: ANY, run: |rig| request(rig, OUT, 0, 512, WRITE) },
    Case { name: "blk/more-than-the-disk-has", allowed: ERROR, run: |rig| {
        form(rig, |rig, header, _, status| rig.chain(&[Desc(header, 16, NEXT, 1), Desc(64 << 20, 128 << 20, NEXT | WRITE, 2), Desc(status, 1, WRITE, 0)]))
    } },
    Case { name: "blk/type-2", allowed: ERROR, run: |rig| request(rig, 2, 0, 512, WRITE) },
    Case { name: "blk/type-3", allowed: ERROR, run: |rig| request(rig, 3, 0, 512, 0) },
    Case { name: "blk/type-5", allowed: ERROR, run: |rig| request(rig, 5, 0, 0, 0) },
    Case { name: "blk/secure-erase-not-offered", allowed: ERROR, run: |rig| request(rig, 14, 0, 16, 0) },
    Case { name: "blk/zone-report-not-offered", allowed: ERROR, run: |rig| request(rig, 16, 0, 4096, WRITE) },
    Case { name: "blk/lifetime-not-offered", allowed: ERROR, run: |rig| request(rig, 10, 0, 40, WRITE) },
    Case { name: "blk/type-ffffffff", allowed: ERROR, run: |rig| request(rig, u32::MAX, 0, 512, WRITE) },
    Case { name: "blk/barrier-bit-of-old", allowed: ERROR, run: |rig| request(rig, 0x8000_0000, 0, 512, WRITE) },
    Case { name: "blk/flush-with-data", allowed: ANY, run: |rig| request(rig, FLUSH, 7, 512, 0) },
    Case { name: "blk/flush-with-a-sector-behind-the-end", allowed: ANY, run: |rig| request(rig, FLUSH, u64::MAX, 0, 0) },
    Case { name: "blk/get-id-in-no-bytes", allowed: ANY, run: |rig| request(rig, GET_ID, 0, 0, 0) },
    Case { name: "blk/get-id-in-1-byte", allowed: ANY, run: |rig| request(rig, GET_ID, 0, 1, WRITE) },
    Case { name: "blk/get-id-in-19-bytes", allowed: ANY, run: |rig| request(rig, GET_ID, 0, 19, WRITE) },
    Case { name: "blk/get-id-in-20-bytes", allowed: YES, run: |rig| request(rig, GET_ID, 0, 20, WRITE) },
    Case { name: "blk/get-id-writes-no-more-than-20", allowed: YES, run: |rig| {
        for at in 0..4096 { rig.fill(DATA + at, &[0x77]); }
        let outcome = request(rig, GET_ID, 0, 4096, WRITE);
        if (20..4096).any(|at| rig.byte(DATA + at) != 0x77) { Outcome::Wrong("wrote-too-much") } else { outcome }
    } },
    Case { name: "blk/get-id-into-a-readable-buffer", allowed: ANY, run: |rig| request(rig, GET_ID, u64::MAX, 20, 0) },
    Case { name: "blk/no-status", allowed: ANY, run: |rig| form(rig, |rig, header, data, _| rig.chain(&[Desc(header, 16, NEXT, 1), Desc(data, 512, 0, 0)])) },
    Case { name: "blk/header-only", allowed: ANY, run: |rig| form(rig, |rig, header, _, _| rig.chain(&[Desc(header, 16, 0, 0)])) },
    Case { name: "blk/status-only", allowed: ERROR, run: |rig| form(rig, |rig, _, _, status| rig.chain(&[Desc(status, 1, WRITE, 0)])) },
    Case { name: "blk/status-of-no-bytes", allowed: ANY, run: |rig| form(rig, |rig, header, data, status| rig.chain(&[Desc(header, 16, NEXT, 1), Desc(data, 512, NEXT | WRITE, 2), Desc(status, 0, WRITE, 0)])) },
    Case { name: "blk/status-readable", allowed: ANY, run: |rig| form(rig, |rig, header, _, status| rig.chain(&[Desc(header, 16, NEXT, 1), Desc(status, 1, 0, 0)])) },
    Case { name: "blk/status-is-the-last-of-a-large-buffer", allowed: YES, run: |rig| form(rig, |rig, header, _, status| rig.chain(&[Desc(header, 16, NEXT, 1), Desc(status - 512, 513, WRITE, 0)])) },
    Case { name: "blk/status-behind-ram", allowed: super::NO, run: |rig| form(rig, |rig, header, data, _| { let end = rig.ram_end(); rig.chain(&[Desc(header, 16, NEXT, 1), Desc(data, 512, NEXT | WRITE, 2), Desc(end, 1, WRITE, 0)]) }) },
    Case { name: "blk/header-of-8-bytes", allowed: ERROR, run: |rig| form(rig, |rig, header, data, status| rig.chain(&[Desc(header, 8, NEXT, 1), Desc(data, 512, NEXT | WRITE, 2), Desc(status, 1, WRITE, 0)])) },
    Case { name: "blk/header-of-no-bytes", allowed: ERROR, run: |rig| form(rig, |rig, header, data, status| rig.chain(&[Desc(header, 0, NEXT, 1), Desc(data, 512, NEXT | WRITE, 2), Desc(status, 1, WRITE, 0)])) },
    Case { name: "blk/header-in-sixteen-pieces", allowed: YES, run: |rig| form(rig, |rig, header, data, status| {
        let mut chain = [Desc::default(); 18];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(header + i as u64, 1, NEXT, i as u16 + 1); }
        chain[16] = Desc(data, 512, NEXT | WRITE, 17);
        chain[17] = Desc(status, 1, WRITE, 0);
        rig.chain(&chain)
    }) },
    Case { name: "blk/header-and-data-in-one-piece", allowed: YES, run: |rig| {
        header(rig, OUT, 3);
        let (at, status) = (rig.data(HEADER), rig.expect_status(STATUS));
        rig.chain(&[Desc(at, 16 + 512, NEXT, 1), Desc(status, 1, WRITE, 0)])
    } },
    Case { name: "blk/data-in-odd-pieces", allowed: YES, run: |rig| form(rig, |rig, header, data, status| rig.chain(&[
        Desc(header, 16, NEXT, 1), Desc(data + 1, 1, NEXT | WRITE, 2), Desc(data + 3, 510, NEXT | WRITE, 3),
        Desc(data + 0x801, 1, NEXT | WRITE, 4), Desc(status, 1, WRITE, 0),
    ])) },
    Case { name: "blk/data-over-its-own-header", allowed: YES, run: |rig| form(rig, |rig, header, _, status| rig.chain(&[Desc(header, 16, NEXT, 1), Desc(header, 512, NEXT | WRITE, 2), Desc(status, 1, WRITE, 0)])) },
    Case { name: "blk/data-over-its-own-descriptors", allowed: ANY, run: |rig| form(rig, |rig, header, _, status| {
        let desc = rig.own().desc;
        rig.chain(&[Desc(header, 16, NEXT, 1), Desc(desc, 1024, NEXT | WRITE, 2), Desc(status, 1, WRITE, 0)])
    }) },
    Case { name: "blk/data-over-the-available-entries", allowed: ANY, run: |rig| form(rig, |rig, header, _, status| {
        let driver = rig.own().driver;
        rig.chain(&[Desc(header, 16, NEXT, 1), Desc(driver, 512, NEXT | WRITE, 2), Desc(status, 1, WRITE, 0)])
    }) },
    Case { name: "blk/last-data-buffer-is-behind-ram", allowed: super::NO, run: |rig| form(rig, |rig, header, data, status| {
        let end = rig.ram_end();
        rig.chain(&[Desc(header, 16, NEXT, 1), Desc(data, 512, NEXT | WRITE, 2), Desc(end, 512, NEXT | WRITE, 3), Desc(status, 1, WRITE, 0)])
    }) },
];

/// Discard and write-zeroes.
#[rustfmt::skip]
pub const SEGMENTS: &[Case] = &[
    Case { name: "discard/not-negotiated", allowed: ERROR, run: |rig| request(rig, DISCARD, 0, 16, 0) },
    Case { name: "discard/no-segment", allowed: ERROR, run: |rig| segments(rig, DISCARD, &[], 0) },
    Case { name: "discard/half-a-segment", allowed: ERROR, run: |rig| segments(rig, DISCARD, &[(0, 8, 0)], 8) },
    Case { name: "discard/one-and-a-half-segments", allowed: ERROR, run: |rig| segments(rig, DISCARD, &[(0, 8, 0), (8, 8, 0)], 24) },
    Case { name: "discard/more-segments-than-allowed", allowed: ERROR, run: |rig| segments(rig, DISCARD, &[(0, 8, 0); 64], 1024) },
    Case { name: "discard/behind-the-end", allowed: SEGMENT, run: |rig| { let end = capacity(rig); segments(rig, DISCARD, &[(end, 8, 0)], 16) } },
    Case { name: "discard/across-the-end", allowed: SEGMENT, run: |rig| { let end = capacity(rig); segments(rig, DISCARD, &[(end - 4, 8, 0)], 16) } },
    Case { name: "discard/sector-overflows", allowed: SEGMENT, run: |rig| segments(rig, DISCARD, &[(u64::MAX, 1, 0)], 16) },
    Case { name: "discard/sector-overflows-to-zero", allowed: SEGMENT, run: |rig| segments(rig, DISCARD, &[(1 << 55, 8, 0)], 16) },
    Case { name: "discard/more-sectors-than-allowed", allowed: SEGMENT, run: |rig| segments(rig, DISCARD, &[(0, u32::MAX, 0)], 16) },
    Case { name: "discard/with-the-unmap-flag", allowed: SEGMENT, run: |rig| segments(rig, DISCARD, &[(0, 8, 1)], 16) },
    Case { name: "discard/flags-nobody-knows", allowed: SEGMENT, run: |rig| segments(rig, DISCARD, &[(0, 8, 0xffff_fffe)], 16) },
    Case { name: "discard/no-sectors", allowed: ANY, run: |rig| segments(rig, DISCARD, &[(0, 0, 0)], 16) },
    Case { name: "zeroes/not-negotiated", allowed: ERROR, run: |rig| request(rig, WRITE_ZEROES, 0, 16, 0) },
    Case { name: "zeroes/no-segment", allowed: ERROR, run: |rig| segments(rig, WRITE_ZEROES, &[], 0) },
    Case { name: "zeroes/half-a-segment", allowed: ERROR, run: |rig| segments(rig, WRITE_ZEROES, &[(0, 8, 0)], 8) },
    Case { name: "zeroes/more-segments-than-allowed", allowed: ERROR, run: |rig| segments(rig, WRITE_ZEROES, &[(0, 8, 0); 64], 1024) },
    Case { name: "zeroes/behind-the-end", allowed: SEGMENT, run: |rig| { let end = capacity(rig); segments(rig, WRITE_ZEROES, &[(end, 8, 0)], 16) } },
    Case { name: "zeroes/sector-overflows", allowed: SEGMENT, run: |rig| segments(rig, WRITE_ZEROES, &[(u64::MAX / 512, 8, 0)], 16) },
    Case { name: "zeroes/more-sectors-than-allowed", allowed: SEGMENT, run: |rig| segments(rig, WRITE_ZEROES, &[(0, u32::MAX, 0)], 16) },
    Case { name: "zeroes/flags-nobody-knows", allowed: SEGMENT, run: |rig| segments(rig, WRITE_ZEROES, &[(0, 8, 0x8000_0000)], 16) },
    Case { name: "zeroes/no-sectors", allowed: ANY, run: |rig| segments(rig, WRITE_ZEROES, &[(0, 0, 0)], 16) },
];
