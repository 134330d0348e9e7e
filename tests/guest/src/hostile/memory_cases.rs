//! Misuse of memory that devices bring: requests for blocks (virtio 1.2 §5.15.6), flushes (§5.19.6), and buffers in memory that is not there.

use super::rig::{Desc, NEXT, Rig, WRITE};
use super::{ANY, Case, ERROR, Outcome, YES};

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Where answers go.
const ANSWER: u64 = 0x3_f000;

fn field(rig: &Rig, offset: u64) -> u64 {
    u64::from(rig.window.config32(offset)) | u64::from(rig.window.config32(offset + 4)) << 32
}

/// Bytes of a block.
fn block(rig: &Rig) -> u64 {
    field(rig, 0)
}

/// Address of the first.
fn base(rig: &Rig) -> u64 {
    field(rig, 16)
}

/// How many there are.
fn count(rig: &Rig) -> u64 {
    field(rig, 24) / block(rig).max(1)
}

/// How many the guest is to have.
fn wanted(rig: &Rig) -> u16 {
    (field(rig, 48) / block(rig).max(1)) as u16
}

/// Of the plugged blocks.
fn plugged(rig: &Rig) -> u64 {
    field(rig, 40)
}

fn request(kind: u16, address: u64, blocks: u16) -> [u8; 24] {
    let mut bytes = [0xee; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// A request of these bytes. One that is refused changes nothing.
fn ask(rig: &mut Rig, bytes: &[u8]) -> Outcome {
    let before = plugged(rig);
    rig.fill(0, bytes);
    let (at, answer) = (rig.data(0), rig.expect_status(ANSWER));
    let outcome = rig.chain(&[Desc(at, bytes.len() as u32, NEXT, 1), Desc(answer, 10, WRITE, 0)]);
    if outcome != Outcome::Served && plugged(rig) != before {
        return Outcome::Wrong("refused-and-done");
    }
    outcome
}

/// The same for `blocks` blocks from number `first` on.
fn blocks(rig: &mut Rig, kind: u16, first: u64, blocks: u16) -> Outcome {
    let address = base(rig).wrapping_add(first.wrapping_mul(block(rig)));
    ask(rig, &request(kind, address, blocks))
}

/// Several, each on a device that was reset.
fn row(rig: &mut Rig, steps: &[(u16, u64, u16)]) -> Outcome {
    for (kind, first, number) in steps {
        match blocks(rig, *kind, *first, *number) {
            Outcome::Served => {}
            other => return other,
        }
        if !rig.reset() {
            return Outcome::Wrong("no-reset");
        }
    }
    Outcome::Served
}

/// Requests for blocks.
#[rustfmt::skip]
pub const BLOCKS: &[Case] = &[
    Case { name: "request/none-plugged", allowed: ERROR, run: |rig| blocks(rig, PLUG, 0, 0) },
    Case { name: "request/none-asked-about", allowed: ERROR, run: |rig| blocks(rig, STATE, 0, 0) },
    Case { name: "request/behind-the-end", allowed: ERROR, run: |rig| { let end = count(rig); blocks(rig, PLUG, end, 1) } },
    Case { name: "request/over-the-end", allowed: ERROR, run: |rig| { let end = count(rig); blocks(rig, PLUG, end - 1, 2) } },
    Case { name: "request/before-the-first", allowed: ERROR, run: |rig| blocks(rig, PLUG, u64::MAX, 1) },
    Case { name: "request/as-many-as-can-be-written", allowed: ERROR, run: |rig| blocks(rig, PLUG, 0, u16::MAX) },
    Case { name: "request/around-the-end-of-addresses", allowed: ERROR, run: |rig| ask(rig, &request(PLUG, u64::MAX - (2 << 20) + 1, 2)) },
    Case { name: "request/at-0", allowed: ERROR, run: |rig| ask(rig, &request(PLUG, 0, 1)) },
    Case { name: "request/at-its-own-ring", allowed: ERROR, run: |rig| { let at = rig.own().desc; ask(rig, &request(PLUG, at, 1)) } },
    Case { name: "request/at-its-own-registers", allowed: ERROR, run: |rig| { let at = rig.window.address; ask(rig, &request(UNPLUG, at, 1)) } },
    Case { name: "request/a-byte-beside", allowed: ERROR, run: |rig| { let at = base(rig) + 1; ask(rig, &request(PLUG, at, 1)) } },
    Case { name: "request/half-a-block-beside", allowed: ERROR, run: |rig| { let at = base(rig) + block(rig) / 2; ask(rig, &request(STATE, at, 1)) } },
    Case { name: "request/more-than-wanted", allowed: ERROR, run: |rig| { let more = wanted(rig) + 1; blocks(rig, PLUG, 0, more) } },
    Case { name: "request/what-it-does-not-have", allowed: ERROR, run: |rig| blocks(rig, UNPLUG, 0, 1) },
    Case { name: "request/twice", allowed: ERROR, run: |rig| {
        if row(rig, &[(PLUG, 1, 2)]) != Outcome::Served { return Outcome::Wrong("not-plugged"); }
        let again = blocks(rig, PLUG, 2, 2);
        if !rig.reset() { return Outcome::Wrong("no-reset"); }
        if row(rig, &[(UNPLUG_ALL, 0, 0)]) == Outcome::Served { again } else { Outcome::Wrong("not-unplugged") }
    } },
    Case { name: "request/of-no-kind", allowed: ERROR, run: |rig| blocks(rig, 4, 0, 1) },
    Case { name: "request/of-the-last-kind", allowed: ERROR, run: |rig| blocks(rig, u16::MAX, 0, 1) },
    Case { name: "request/a-byte", allowed: ERROR, run: |rig| ask(rig, &[0]) },
    Case { name: "request/cut-off", allowed: ERROR, run: |rig| { let at = base(rig); ask(rig, &request(PLUG, at, 1)[..17]) } },
    Case { name: "request/nothing-but-room", allowed: ERROR, run: |rig| { let at = rig.expect_status(ANSWER); rig.chain(&[Desc(at, 10, WRITE, 0)]) } },
    Case { name: "request/no-room", allowed: ANY, run: |rig| {
        let before = plugged(rig);
        let bytes = request(PLUG, base(rig), 1);
        rig.fill(0, &bytes);
        let at = rig.data(0);
        let outcome = rig.chain(&[Desc(at, 24, 0, 0)]);
        if plugged(rig) == before { outcome } else { Outcome::Wrong("done-untold") }
    } },
    Case { name: "request/a-byte-in-each-piece", allowed: YES, run: |rig| {
        let bytes = request(STATE, base(rig), 1);
        rig.fill(0, &bytes);
        let (at, answer) = (rig.data(0), rig.expect_status(ANSWER));
        let mut chain = [Desc::default(); 34];
        for (i, desc) in chain.iter_mut().enumerate() {
            let (next, i) = (if i < 33 { NEXT } else { 0 }, i as u64);
            *desc = if i < 24 { Desc(at + i, 1, next, i as u16 + 1) } else { Desc(answer + i - 24, 1, next | WRITE, i as u16 + 1) };
        }
        rig.chain(&chain)
    } },
    Case { name: "request/in-what-is-not-there", allowed: ANY, run: |rig| {
        let (at, answer) = (base(rig), rig.expect_status(ANSWER));
        rig.chain(&[Desc(at, 24, NEXT, 1), Desc(answer, 10, WRITE, 0)])
    } },
    Case { name: "request/answered-into-what-is-not-there", allowed: ANY, run: |rig| {
        let bytes = request(STATE, base(rig), 1);
        rig.fill(0, &bytes);
        let (at, gone) = (rig.data(0), base(rig));
        rig.chain(&[Desc(at, 24, NEXT, 1), Desc(gone, 10, WRITE, 0)])
    } },
    Case { name: "blocks/come-and-go", allowed: YES, run: |rig| {
        for _ in 0..10 {
            let outcome = row(rig, &[(PLUG, 0, 2), (STATE, 0, 1), (UNPLUG, 1, 1), (UNPLUG, 0, 1)]);
            if outcome != Outcome::Served { return outcome; }
        }
        Outcome::Served
    } },
    Case { name: "blocks/outlive-a-reset", allowed: YES, run: |rig| {
        let outcome = row(rig, &[(PLUG, 0, 2)]);
        if plugged(rig) != 2 * block(rig) { return Outcome::Wrong("gone"); }
        if row(rig, &[(UNPLUG_ALL, 0, 0)]) == Outcome::Served && plugged(rig) == 0 { outcome } else { Outcome::Wrong("not-unplugged") }
    } },
];

/// A request of these bytes to a file that is memory.
fn flush(rig: &mut Rig, bytes: &[u8]) -> Outcome {
    rig.fill(0, bytes);
    let (at, answer) = (rig.data(0), rig.expect_status(ANSWER));
    rig.chain(&[Desc(at, bytes.len() as u32, NEXT, 1), Desc(answer, 4, WRITE, 0)])
}

/// Flushes.
#[rustfmt::skip]
pub const FLUSHES: &[Case] = &[
    Case { name: "flush/of-no-kind", allowed: ERROR, run: |rig| flush(rig, &[1, 0, 0, 0]) },
    Case { name: "flush/of-the-last-kind", allowed: ERROR, run: |rig| flush(rig, &[0xff; 4]) },
    Case { name: "flush/a-byte", allowed: ERROR, run: |rig| flush(rig, &[0]) },
    Case { name: "flush/more-than-a-request", allowed: YES, run: |rig| flush(rig, &[0; 400]) },
    Case { name: "flush/nothing-but-room", allowed: ERROR, run: |rig| { let at = rig.expect_status(ANSWER); rig.chain(&[Desc(at, 4, WRITE, 0)]) } },
    Case { name: "flush/no-room", allowed: ANY, run: |rig| { rig.fill(0, &[0; 4]); let at = rig.data(0); rig.chain(&[Desc(at, 4, 0, 0)]) } },
    Case { name: "flush/answered-into-the-file", allowed: ANY, run: |rig| {
        rig.fill(0, &[0; 4]);
        let (at, file) = (rig.data(0), field(rig, 0));
        rig.chain(&[Desc(at, 4, NEXT, 1), Desc(file, 4, WRITE, 0)])
    } },
    Case { name: "flush/answered-behind-the-file", allowed: ANY, run: |rig| {
        rig.fill(0, &[0; 4]);
        let (at, end) = (rig.data(0), field(rig, 0) + field(rig, 8));
        rig.chain(&[Desc(at, 4, NEXT, 1), Desc(end - 2, 4, WRITE, 0)])
    } },
];
