//! The whole device, from registers to what becomes of the memory.

use std::sync::Mutex;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{DATA, HIGH_END, PLAIN, RAM, Rig, Ring};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const CHUNK: u64 = 8 * MIB;
const BASE: u64 = 4 << 30;
/// The last chunk is smaller.
const SIZE: u64 = 3 * CHUNK + BLOCK;
/// Where answers go.
const ANSWER: u64 = DATA + 4096;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);
const IS_PLUGGED: (u16, u16) = (0, 0);
const IS_UNPLUGGED: (u16, u16) = (0, 1);
const IS_MIXED: (u16, u16) = (0, 2);

/// What became of the memory, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Did {
    Expose(usize),
    Hide(usize),
    Discard(u64, u64),
}

#[derive(Default)]
struct Ledger {
    did: Mutex<Vec<Did>>,
    /// The chunk that cannot be had.
    fails_at: Option<usize>,
    /// Nothing goes back to the host.
    keeps: bool,
}

impl Store for Ledger {
    fn base(&self) -> u64 {
        BASE
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn chunk(&self) -> u64 {
        CHUNK
    }

    fn expose(&self, chunk: usize, exposed: bool) -> io::Result<()> {
        if exposed && self.fails_at == Some(chunk) || !exposed && self.keeps {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.did.lock().unwrap().push(if exposed { Did::Expose(chunk) } else { Did::Hide(chunk) });
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.keeps {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.did.lock().unwrap().push(Did::Discard(offset, len));
        Ok(())
    }
}

struct Bench {
    rig: Rig,
    ring: Ring,
    port: Arc<Port>,
    ledger: Arc<Ledger>,
}

fn bench_of(ledger: Ledger, features: u64, node: Option<u16>) -> Bench {
    let ledger = Arc::new(ledger);
    let device = Mem::new(MemOptions {
        store: Arc::clone(&ledger) as _,
        block_size: BLOCK,
        node,
        requested_size: 2 * CHUNK,
        worker: Worker::new("t"),
    });
    let port = device.port();
    let rig = Rig::new(device);
    let ring = rig.start(features, 1, 64).remove(0);
    Bench { rig, ring, port, ledger }
}

fn bench() -> Bench {
    bench_of(Ledger::default(), !0, None)
}

fn request(kind: u16, addr: u64, blocks: u16) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&addr.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

impl Bench {
    fn read64(&self, offset: u64) -> u64 {
        let word = |at: u64| u64::from(self.rig.get(0x100 + at));
        word(offset + 4) << 32 | word(offset)
    }

    /// Sends a request for the blocks from number `first` on; the answer's type and state.
    fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> (u16, u16) {
        self.send(&request(kind, BASE + first * BLOCK, blocks))
    }

    fn send(&mut self, bytes: &[u8]) -> (u16, u16) {
        self.rig.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.rig.memory.write_slice(&[0xee; 10], GuestAddress(ANSWER)).unwrap();
        let head = self.ring.add(&[(DATA, bytes.len() as u32, false), (ANSWER, 10, true)]);
        self.rig.kick(&self.ring);
        assert_eq!(self.rig.used(&mut self.ring), (u32::from(head), 10));
        let word = |at| self.rig.memory.read_obj::<u16>(GuestAddress(ANSWER + at)).unwrap();
        (word(0), word(8))
    }

    fn did(&self) -> Vec<Did> {
        std::mem::take(&mut *self.ledger.did.lock().unwrap())
    }
}

#[test]
fn the_configuration_says_where_and_how_much() {
    let b = bench_of(Ledger::default(), !0, Some(1));
    let fields: Vec<u64> = (0..7).map(|n| b.read64(8 * n)).collect();
    assert_eq!(fields, [BLOCK, 1, BASE, SIZE, SIZE, 0, 2 * CHUNK]);
    assert_eq!(b.rig.offered() & 3, 3);
    // Nothing in it is the driver's to write.
    b.rig.set(0x130, 77);
    assert_eq!(b.read64(48), 2 * CHUNK);
    assert_eq!(bench().rig.offered() & 3, 2);
}

#[test]
fn blocks_come_and_go_and_memory_with_their_chunks() {
    for features in [!0, PLAIN] {
        let mut b = bench_of(Ledger::default(), features, None);
        assert_eq!(b.ask(STATE, 0, 13), IS_UNPLUGGED);
        assert_eq!(b.ask(PLUG, 3, 2), ACK);
        assert_eq!(b.did(), [Did::Expose(0), Did::Expose(1)]);
        assert_eq!(
            (b.ask(STATE, 3, 2), b.ask(STATE, 2, 2), b.ask(STATE, 5, 8)),
            (IS_PLUGGED, IS_MIXED, IS_UNPLUGGED)
        );
        assert_eq!((b.read64(40), b.port.info().plugged_size), (2 * BLOCK, 2 * BLOCK));
        // A second block of a chunk that is there already.
        assert_eq!((b.ask(PLUG, 5, 1), b.did()), (ACK, vec![]));
        assert_eq!(b.ask(UNPLUG, 5, 1), ACK);
        assert_eq!(b.did(), [Did::Discard(5 * BLOCK, BLOCK)]);
        assert_eq!(b.ask(UNPLUG, 3, 2), ACK);
        // Out of reach first, and all of the chunk goes: the guest may have used blocks that it had not plugged.
        let gone = [Did::Hide(0), Did::Discard(0, CHUNK), Did::Hide(1), Did::Discard(CHUNK, CHUNK)];
        assert_eq!((b.did(), b.port.info().plugged_size), (gone.to_vec(), 0));
        // The last chunk is smaller than the others.
        assert_eq!((b.ask(PLUG, 12, 1), b.ask(UNPLUG_ALL, 0, 0)), (ACK, ACK));
        assert_eq!(b.did(), [Did::Expose(3), Did::Hide(3), Did::Discard(3 * CHUNK, BLOCK)]);
    }
}

#[test]
fn what_makes_no_sense_is_an_error_and_changes_nothing() {
    let mut b = bench();
    assert_eq!(b.ask(PLUG, 2, 2), ACK);
    b.did();
    for (kind, first, blocks) in [
        (PLUG, 0, 0),
        (PLUG, 1, 2),
        (PLUG, 2, 1),
        (PLUG, 12, 2),
        (PLUG, 13, 1),
        (PLUG, u64::MAX / BLOCK, u16::MAX),
        (UNPLUG, 2, 0),
        (UNPLUG, 2, 3),
        (UNPLUG, 5, 1),
        (UNPLUG, 0, u16::MAX),
        (STATE, 0, 0),
        (STATE, 0, 14),
        (4, 0, 1),
        (u16::MAX, 0, 1),
    ] {
        // Beyond the end of all addresses it wraps: below the first block.
        let addr = BASE.wrapping_add(first.wrapping_mul(BLOCK));
        assert_eq!(b.send(&request(kind, addr, blocks)), ERROR, "{kind} {first} {blocks}");
    }
    for addr in [BASE + 1, BASE + 4096, BASE - BLOCK, 0, u64::MAX] {
        assert_eq!(b.send(&request(PLUG, addr, 1)), ERROR, "{addr:#x}");
    }
    // Cut off.
    for length in [0, 1, 2, 8, 17] {
        assert_eq!(b.send(&request(PLUG, BASE, 1)[..length]), ERROR, "{length}");
    }
    assert_eq!((b.did(), b.port.info().plugged_size), (vec![], 2 * BLOCK));
}

#[test]
fn no_more_than_the_host_wants() {
    let mut b = bench();
    assert_eq!(b.ask(PLUG, 0, 9), NACK);
    assert_eq!((b.ask(PLUG, 0, 8), b.ask(PLUG, 8, 1)), (ACK, NACK));
    b.port.request(SIZE).unwrap();
    assert_eq!(b.ask(PLUG, 8, 5), ACK);
    // The host wants it back: nothing more comes, and what is there stays until the guest gives it.
    b.port.request(BLOCK).unwrap();
    assert_eq!((b.port.info().plugged_size, b.ask(UNPLUG, 1, 12), b.ask(PLUG, 1, 1)), (SIZE, ACK, NACK));
    assert_eq!(b.port.request(BLOCK + 1), Err(BadSize::Blocks { size: BLOCK + 1, block: BLOCK }));
    assert_eq!(b.port.request(SIZE + BLOCK), Err(BadSize::TooMuch { size: SIZE + BLOCK, most: SIZE }));
    assert_eq!(
        b.port.info(),
        Info { block_size: BLOCK, node: 0, plugged_size: BLOCK, requested_size: BLOCK, size: SIZE }
    );
}

#[test]
fn a_new_size_is_told_and_an_old_one_is_not() {
    let b = bench();
    let edges = b.rig.line.edges();
    b.port.request(SIZE).unwrap();
    assert_eq!((b.rig.line.edges(), b.read64(48)), (edges + 1, SIZE));
    b.port.request(SIZE).unwrap();
    assert_eq!(b.rig.line.edges(), edges + 1);
}

#[test]
fn what_cannot_be_had_is_given_back_whole() {
    let mut b = bench_of(Ledger { fails_at: Some(1), ..Ledger::default() }, !0, None);
    assert_eq!(b.ask(PLUG, 2, 4), BUSY);
    assert_eq!(b.did(), [Did::Expose(0), Did::Hide(0), Did::Discard(0, CHUNK)]);
    assert_eq!((b.port.info().plugged_size, b.ask(STATE, 0, 13)), (0, IS_UNPLUGGED));
    assert_eq!(b.ask(PLUG, 2, 2), ACK);
}

#[test]
fn a_host_that_takes_nothing_back_does_not_keep_the_guest_waiting() {
    let mut b = bench_of(Ledger { keeps: true, ..Ledger::default() }, !0, None);
    assert_eq!((b.ask(PLUG, 0, 4), b.ask(UNPLUG, 0, 4), b.ask(PLUG, 0, 4)), (ACK, ACK, ACK));
}

#[test]
fn blocks_outlive_a_reset_of_the_device_and_not_of_the_machine() {
    let mut b = bench();
    assert_eq!(b.ask(PLUG, 0, 5), ACK);
    b.rig.transport.reset();
    // Nobody hears of it; the next driver finds it.
    b.port.request(CHUNK).unwrap();
    b.ring = b.rig.start(!0, 1, 64).remove(0);
    assert_eq!((b.read64(40), b.read64(48), b.ask(STATE, 0, 5)), (5 * BLOCK, CHUNK, IS_PLUGGED));
    b.did();
    b.rig.transport.reset();
    b.port.unplug_all();
    let gone = [Did::Hide(0), Did::Discard(0, CHUNK), Did::Hide(1), Did::Discard(CHUNK, CHUNK)];
    assert_eq!(
        (b.did(), b.port.info().plugged_size, b.port.info().requested_size),
        (gone.to_vec(), 0, CHUNK)
    );
    b.ring = b.rig.start(!0, 1, 64).remove(0);
    assert_eq!((b.ask(STATE, 0, 13), b.ask(PLUG, 0, 4)), (IS_UNPLUGGED, ACK));
}

#[test]
fn odd_chains_come_back() {
    let mut b = bench();
    b.rig.memory.write_slice(&request(PLUG, BASE, 1), GuestAddress(DATA)).unwrap();
    for (parts, written) in [
        // No room for an answer: nothing is done.
        (vec![(DATA, 24, false)], 0),
        (vec![(DATA, 24, false), (ANSWER, 9, true)], 0),
        (vec![(ANSWER, 0, true)], 0),
        // An answer to nothing.
        (vec![(ANSWER, 10, true)], 10),
    ] {
        let head = b.ring.add(&parts);
        b.rig.kick(&b.ring);
        assert_eq!(b.rig.used(&mut b.ring), (u32::from(head), written), "{parts:?}");
        assert_eq!(b.port.info().plugged_size, 0);
    }
    // In pieces, and with more room than is needed.
    let pieces = [
        (DATA, 1, false),
        (DATA + 1, 16, false),
        (DATA + 17, 4000, false),
        (ANSWER, 3, true),
        (ANSWER + 3, 900, true),
    ];
    let head = b.ring.add(&pieces);
    b.rig.kick(&b.ring);
    assert_eq!(b.rig.used(&mut b.ring), (u32::from(head), 10));
    assert_eq!(b.port.info().plugged_size, BLOCK);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let mut b = bench();
    let all = 20;
    b.rig.memory.write_slice(&request(STATE, BASE, 1), GuestAddress(DATA)).unwrap();
    for _ in 0..all {
        b.ring.add(&[(DATA, 24, false), (ANSWER, 10, true)]);
    }
    b.rig.kick(&b.ring);
    for _ in 0..all {
        assert_eq!(b.rig.used(&mut b.ring).1, 10);
    }
}

#[test]
fn hostile_rings_need_a_reset_and_then_work_again() {
    type Wrong = fn(&mut Ring);
    let wrongs: [(&str, Wrong); 7] = [
        ("head out of range", |r| r.offer(64)),
        // One request has been before.
        ("index jumps", |r| r.set_avail_index(1 + 65)),
        ("not in RAM", |r| _ = r.add(&[(RAM, 24, false)])),
        ("over the end", |r| _ = r.add(&[(HIGH_END - 8, 16, true)])),
        ("4 GiB and more", |r| _ = r.add(&[(0, u32::MAX, false), (0, u32::MAX, false)])),
        ("order", |r| _ = r.add(&[(ANSWER, 10, true), (DATA, 24, false)])),
        ("a loop", |r| {
            r.put(r.desc, 0, DATA, 24, 1, 0);
            r.offer(0);
        }),
    ];
    for (what, wrong) in wrongs {
        let mut b = bench();
        assert_eq!(b.ask(PLUG, 0, 1), ACK, "{what}");
        wrong(&mut b.ring);
        b.rig.kick(&b.ring);
        b.rig.wait_needs_reset();
        b.ring = b.rig.start(!0, 1, 64).remove(0);
        assert_eq!((b.ask(STATE, 0, 1), b.ask(UNPLUG, 0, 1)), (IS_PLUGGED, ACK), "{what}");
    }
}

#[test]
fn its_queue_is_needed() {
    let b = bench();
    b.rig.start(!0, 0, 64);
    assert!(b.rig.needs_reset());
}
