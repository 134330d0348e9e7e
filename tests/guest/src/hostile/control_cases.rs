//! Misuse of control queues: a NIC's commands (virtio 1.2 §5.1.6.5) and the messages about a serial device's ports (§5.3.6.2).

use super::rig::{Desc, NEXT, Rig, SIZE, WRITE};
use super::{ANY, Allowed, Case, ERROR, Outcome, YES};
use crate::virtio::reg;

/// GUEST_CSUM, CTRL_GUEST_OFFLOADS, GUEST_TSO4, GUEST_TSO6, CTRL_VQ, CTRL_RX, CTRL_RX_EXTRA, CTRL_MAC_ADDR.
pub const NET_FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 7 | 1 << 8 | 1 << 17 | 1 << 18 | 1 << 20 | 1 << 23;
/// The driver may or may not have what the command needs.
const EITHER: Allowed = &[Outcome::Served, Outcome::Refused];

const ACK: u64 = 0x3_f000;

/// A command of these bytes, the rest of its `length` as it lies there.
fn command(rig: &mut Rig, bytes: &[u8], length: u32) -> Outcome {
    rig.fill(0, bytes);
    let (at, ack) = (rig.data(0), rig.expect_status(ACK));
    rig.chain(&[Desc(at, length, NEXT, 1), Desc(ack, 1, WRITE, 0)])
}

/// A whole command.
fn whole(rig: &mut Rig, bytes: &[u8]) -> Outcome {
    command(rig, bytes, bytes.len() as u32)
}

/// The NIC's address after a command and a reset must be what it was; so must what the command says of it.
fn address(rig: &mut Rig, bytes: &[u8]) -> Outcome {
    let mac = |rig: &Rig| (rig.window.config32(0), rig.window.config32(4) & 0xffff);
    let before = mac(rig);
    let outcome = whole(rig, bytes);
    if outcome != Outcome::Served && mac(rig) != before {
        return Outcome::Wrong("refused-and-done");
    }
    rig.window.write(reg::STATUS, 0);
    if mac(rig) == before { outcome } else { Outcome::Wrong("outlives-a-reset") }
}

/// Commands to a NIC.
#[rustfmt::skip]
pub const NET: &[Case] = &[
    Case { name: "command/no-bytes", allowed: ERROR, run: |rig| command(rig, &[], 0) },
    Case { name: "command/class-only", allowed: ERROR, run: |rig| whole(rig, &[0]) },
    Case { name: "command/without-its-data", allowed: ERROR, run: |rig| whole(rig, &[0, 0]) },
    Case { name: "command/with-too-much-data", allowed: ERROR, run: |rig| whole(rig, &[0, 0, 1, 1]) },
    Case { name: "command/neither-on-nor-off", allowed: ERROR, run: |rig| whole(rig, &[0, 0, 2]) },
    Case { name: "command/class-ff", allowed: ERROR, run: |rig| whole(rig, &[0xff, 0, 1]) },
    Case { name: "command/command-ff", allowed: ERROR, run: |rig| whole(rig, &[0, 0xff, 1]) },
    Case { name: "command/announce-not-offered", allowed: ERROR, run: |rig| whole(rig, &[3, 0]) },
    Case { name: "command/vlan-not-offered", allowed: ERROR, run: |rig| whole(rig, &[2, 0, 1, 0]) },
    Case { name: "command/pairs-0", allowed: ERROR, run: |rig| whole(rig, &[4, 0, 0, 0]) },
    Case { name: "command/pairs-ffff", allowed: ERROR, run: |rig| whole(rig, &[4, 0, 0xff, 0xff]) },
    Case { name: "command/rss-not-offered", allowed: ERROR, run: |rig| whole(rig, &[4, 1, 0, 0, 0, 0, 0, 0, 0xff, 0xff]) },
    Case { name: "command/address-of-five-bytes", allowed: ERROR, run: |rig| address(rig, &[1, 1, 2, 0, 0, 0, 9]) },
    Case { name: "command/address-of-seven-bytes", allowed: ERROR, run: |rig| address(rig, &[1, 1, 2, 0, 0, 0, 9, 9, 9]) },
    Case { name: "command/address-of-a-group", allowed: ERROR, run: |rig| address(rig, &[1, 1, 3, 0, 0, 0, 9, 9]) },
    Case { name: "command/address-zero", allowed: ERROR, run: |rig| address(rig, &[1, 1, 0, 0, 0, 0, 0, 0]) },
    Case { name: "command/address-changed", allowed: YES, run: |rig| address(rig, &[1, 1, 2, 0, 0, 0, 9, 9]) },
    Case { name: "command/table-of-four-thousand-million", allowed: ERROR, run: |rig| whole(rig, &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]) },
    Case { name: "command/table-overflows-as-bytes", allowed: ERROR, run: |rig| whole(rig, &[1, 0, 0xab, 0xaa, 0xaa, 0x2a, 0, 0, 0, 0]) },
    Case { name: "command/second-table-missing", allowed: ERROR, run: |rig| whole(rig, &[1, 0, 0, 0, 0, 0]) },
    Case { name: "command/second-table-too-long", allowed: ERROR, run: |rig| whole(rig, &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3]) },
    Case { name: "command/bytes-behind-the-tables", allowed: ERROR, run: |rig| whole(rig, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]) },
    Case { name: "command/offloads-not-negotiated", allowed: ERROR, run: |rig| whole(rig, &[5, 0, 0, 4, 0, 0, 0, 0, 0, 0]) },
    Case { name: "command/offloads-all-ones", allowed: ERROR, run: |rig| whole(rig, &[5, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) },
    Case { name: "command/offloads-of-seven-bytes", allowed: ERROR, run: |rig| whole(rig, &[5, 0, 2, 0, 0, 0, 0, 0, 0]) },
    Case { name: "command/offloads-off", allowed: EITHER, run: |rig| whole(rig, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]) },
    Case { name: "command/64-kib", allowed: ERROR, run: |rig| command(rig, &[1, 0], 64 << 10) },
    Case { name: "command/128-mib", allowed: ERROR, run: |rig| { let ack = rig.expect_status(ACK); rig.chain(&[Desc(64 << 20, 128 << 20, NEXT, 1), Desc(ack, 1, WRITE, 0)]) } },
    Case { name: "command/no-acknowledgement", allowed: ANY, run: |rig| { rig.fill(0, &[0, 0, 0]); let at = rig.data(0); rig.chain(&[Desc(at, 3, 0, 0)]) } },
    Case { name: "command/acknowledgement-only", allowed: ERROR, run: |rig| { let ack = rig.expect_status(ACK); rig.chain(&[Desc(ack, 1, WRITE, 0)]) } },
    Case { name: "command/acknowledgement-of-no-bytes", allowed: ANY, run: |rig| { rig.fill(0, &[0, 0, 0]); let (at, ack) = (rig.data(0), rig.expect_status(ACK)); rig.chain(&[Desc(at, 3, NEXT, 1), Desc(ack, 0, WRITE, 0)]) } },
    Case { name: "command/acknowledges-with-one-byte", allowed: YES, run: |rig| {
        rig.fill(0, &[0, 0, 0]);
        for at in 1..0x1000 { rig.fill(ACK + at, &[0x77]); }
        let (at, ack) = (rig.data(0), rig.expect_status(ACK));
        let outcome = rig.chain(&[Desc(at, 3, NEXT, 1), Desc(ack, 4096, WRITE, 0)]);
        if (1..0x1000).any(|at| rig.byte(ACK + at) != 0x77) { Outcome::Wrong("wrote-too-much") } else { outcome }
    } },
    Case { name: "command/a-byte-in-each-piece", allowed: YES, run: |rig| {
        rig.fill(0, &[1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0]);
        let (at, ack) = (rig.data(0), rig.expect_status(ACK));
        let mut chain = [Desc::default(); 17];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, NEXT, i as u16 + 1); }
        chain[16] = Desc(ack, 1, WRITE, 0);
        rig.chain(&chain)
    } },
    Case { name: "command/two-thousand-of-them", allowed: YES, run: |rig| {
        rig.start();
        for _ in 0..2000 {
            if rig.good() != Outcome::Served { return Outcome::Wrong("not-served"); }
        }
        Outcome::Served
    } },
];

/// A message of the driver about a port.
fn message(rig: &mut Rig, port: u32, event: u16, value: u16) -> Outcome {
    say(rig, port, event, value, 8)
}

fn say(rig: &mut Rig, port: u32, event: u16, value: u16, length: u32) -> Outcome {
    rig.fill(0, &port.to_le_bytes());
    rig.fill(4, &event.to_le_bytes());
    rig.fill(6, &value.to_le_bytes());
    let at = rig.data(0);
    rig.chain(&[Desc(at, length, 0, 0)])
}

/// Many messages, one behind the other.
fn storm(rig: &mut Rig, count: u16, message: fn(u16) -> [u16; 4]) -> Outcome {
    rig.start();
    for number in 0..count {
        for (i, word) in message(number).iter().enumerate() {
            rig.fill(2 * i as u64, &word.to_le_bytes());
        }
        let at = rig.data(0);
        rig.put(0, &[Desc(at, 8, 0, 0)]);
        rig.offer(0);
        rig.notify();
        if rig.settle(1) != Outcome::Served {
            return Outcome::Wrong("not-served");
        }
    }
    Outcome::Served
}

/// Messages of the driver. Nothing they say is an error of the ring; the device takes them and goes on.
#[rustfmt::skip]
pub const SERIAL: &[Case] = &[
    Case { name: "message/no-bytes", allowed: YES, run: |rig| say(rig, 0, 3, 1, 0) },
    Case { name: "message/seven-bytes", allowed: YES, run: |rig| say(rig, 0, 3, 1, 7) },
    Case { name: "message/nine-bytes", allowed: YES, run: |rig| say(rig, 0, 3, 1, 9) },
    Case { name: "message/half-a-mib", allowed: YES, run: |rig| say(rig, 0, 3, 1, 512 << 10) },
    Case { name: "message/128-mib", allowed: YES, run: |rig| rig.chain(&[Desc(64 << 20, 128 << 20, 0, 0)]) },
    Case { name: "message/writable", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 8, WRITE, 0)]) } },
    Case { name: "message/a-byte-in-each-piece", allowed: YES, run: |rig| {
        rig.fill(0, &[0, 0, 0, 0, 3, 0, 1, 0]);
        let at = rig.data(0);
        let mut chain = [Desc::default(); 8];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, if i < 7 { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "message/ready-of-a-port-that-is-not-there", allowed: YES, run: |rig| message(rig, 7, 3, 1) },
    Case { name: "message/ready-of-port-256", allowed: YES, run: |rig| message(rig, 256, 3, 1) },
    Case { name: "message/open-of-port-ffffffff", allowed: YES, run: |rig| message(rig, u32::MAX, 6, 1) },
    Case { name: "message/device-ready-of-port-ffffffff", allowed: YES, run: |rig| message(rig, u32::MAX, 0, 1) },
    Case { name: "message/device-not-ready", allowed: YES, run: |rig| message(rig, 0, 0, 0) },
    Case { name: "message/port-not-ready", allowed: YES, run: |rig| message(rig, 0, 3, 0) },
    Case { name: "message/add-by-the-driver", allowed: YES, run: |rig| message(rig, 1, 1, 1) },
    Case { name: "message/remove-by-the-driver", allowed: YES, run: |rig| message(rig, 0, 2, 1) },
    Case { name: "message/console-by-the-driver", allowed: YES, run: |rig| message(rig, 1, 4, 1) },
    Case { name: "message/resize-by-the-driver", allowed: YES, run: |rig| message(rig, 0, 5, 0xffff) },
    Case { name: "message/name-by-the-driver", allowed: YES, run: |rig| say(rig, 1, 7, 1, 4096) },
    Case { name: "message/event-ffff", allowed: YES, run: |rig| message(rig, 0, 0xffff, 0xffff) },
    Case { name: "message/open-before-ready", allowed: YES, run: |rig| message(rig, 1, 6, 1) },
    Case { name: "message/open-is-ffff", allowed: YES, run: |rig| message(rig, 0, 6, 0xffff) },
    // The answers have nowhere to go: no buffer waits for them, and they must not pile up.
    Case { name: "message/device-ready-storm-without-listening", allowed: YES, run: |rig| storm(rig, 3000, |_| [0, 0, 0, 1]) },
    Case { name: "message/port-ready-storm-without-listening", allowed: YES, run: |rig| storm(rig, 3000, |n| [n % 2, 0, 3, n % 3]) },
    Case { name: "message/open-and-shut", allowed: YES, run: |rig| storm(rig, 3000, |n| [n / 2 % 2, 0, 6, n % 2]) },
    Case { name: "message/nonsense-storm", allowed: YES, run: |rig| storm(rig, 3000, |n| [n, n, n, n]) },
    Case { name: "message/the-whole-ring-at-once", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { rig.put_good(head); rig.offer(head); })
    } },
];

/// Buffers for the device's messages.
#[rustfmt::skip]
pub const SERIAL_ANSWERS: &[Case] = &[
    Case { name: "answer/into-one-byte", allowed: YES, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 1, WRITE, 0)]) } },
    Case { name: "answer/into-seven-bytes", allowed: YES, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 7, WRITE, 0)]) } },
    Case { name: "answer/into-no-bytes", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 0, WRITE, 0)]) } },
    Case { name: "answer/into-a-readable-buffer", allowed: ANY, run: |rig| { let at = rig.data(0); rig.chain(&[Desc(at, 64, 0, 0)]) } },
    Case { name: "answer/into-eight-pieces", allowed: YES, run: |rig| {
        let at = rig.data(0);
        let mut chain = [Desc::default(); 8];
        for (i, desc) in chain.iter_mut().enumerate() { *desc = Desc(at + i as u64, 1, WRITE | if i < 7 { NEXT } else { 0 }, i as u16 + 1); }
        rig.chain(&chain)
    } },
    Case { name: "answer/no-more-than-a-message", allowed: YES, run: |rig| {
        for at in 0..0x1000 { rig.fill(at, &[0x77]); }
        let at = rig.data(0);
        let outcome = rig.chain(&[Desc(at, 0x1000, WRITE, 0)]);
        if (0x200..0x1000).any(|at| rig.byte(at) != 0x77) { Outcome::Wrong("wrote-too-much") } else { outcome }
    } },
    Case { name: "answer/into-128-mib", allowed: YES, run: |rig| rig.chain(&[Desc(64 << 20, 128 << 20, WRITE, 0)]) },
    Case { name: "answer/a-ring-of-single-bytes", allowed: YES, run: |rig| {
        let features = rig.features();
        rig.ring(features, SIZE, |rig| for head in 0..SIZE { let at = rig.data(u64::from(head)); rig.put(head, &[Desc(at, 1, WRITE, 0)]); rig.offer(head); })
    } },
];
