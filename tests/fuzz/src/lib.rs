//! What the fuzz targets share: guest memory that the fuzzer writes, and a cursor over its bytes.
//!
//! A target is a program in `fuzz_targets`; its seeds are in `corpus/NAME`. `tests/fuzz/run` builds and runs them on the stable
//! toolchain. Targets reach what their room keeps to itself through modules called `fuzz`, which only exist when `cfg(fuzzing)` is set.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm::memory::GuestMemory;
use vmm::virtio::queue::{Layout, Queue};

/// RAM: 1 MiB at 0 and 64 KiB at 4 MiB, with nothing in between.
pub const RAM: u64 = 1 << 20;
/// The second piece.
pub const HIGH: u64 = 4 << 20;
/// Its bytes.
pub const HIGH_SIZE: u64 = 64 << 10;
/// Where a target's queue has its three areas.
pub const DESC: u64 = 0x1000;
/// As above.
pub const AVAIL: u64 = 0x2000;
/// As above.
pub const USED: u64 = 0x3000;
/// Where buffers and indirect tables are.
pub const DATA: u64 = 0x4000;

/// VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// As above.
pub const EVENT_IDX: u64 = 1 << 29;
/// As above.
pub const VERSION_1: u64 = 1 << 32;

/// Guest memory, all zero.
pub fn memory() -> Arc<GuestMemory> {
    let ranges = [(GuestAddress(0), RAM as usize), (GuestAddress(HIGH), HIGH_SIZE as usize)];
    Arc::new(GuestMemory::from_ranges(&ranges).expect("64 KiB and 1 MiB of memory"))
}

/// The fuzzer's bytes, used up from the front; zeroes once they are gone.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Up to `n` bytes.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        now
    }

    /// A little-endian number of `N` bytes.
    pub fn number<const N: usize>(&mut self) -> u64 {
        let mut number = [0; 8];
        let bytes = self.bytes(N);
        number[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(number)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// As [`queue`], `count` of them: they lie in the same place, each with indices of its own.
pub fn queues(memory: &Arc<GuestMemory>, input: &mut Input<'_>, count: usize) -> Vec<Queue> {
    let (layout, features) = fill(memory, input);
    let one = |_| Queue::new(memory, layout, 1024, features).expect("a good layout");
    (0..count).map(one).collect()
}

/// A queue whose memory holds `input`: size and features from its first byte, then 12 bytes for each descriptor (address as 24
/// bits, so that most are near RAM; length 24 bits; flags; next), then the available ring, then data.
pub fn queue(memory: &Arc<GuestMemory>, input: &mut Input<'_>) -> Queue {
    let (layout, features) = fill(memory, input);
    Queue::new(memory, layout, 1024, features).expect("a good layout")
}

fn fill(memory: &GuestMemory, input: &mut Input<'_>) -> (Layout, u64) {
    let first = input.number::<1>();
    let size = 1u16 << (first & 7);
    let mut features = VERSION_1;
    features |= if first & 8 != 0 { INDIRECT_DESC } else { 0 };
    features |= if first & 16 != 0 { EVENT_IDX } else { 0 };
    // A small one needs few bytes; a full table comes from the length of the input.
    for i in 0..u64::from(size) {
        descriptor(memory, DESC + 16 * i, input);
    }
    let write = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).expect("inside RAM");
    write(AVAIL, input.bytes(6 + 2 * usize::from(size)));
    // Tables for indirect descriptors, in the form that the device reads.
    for i in 0..8 {
        descriptor(memory, DATA + 16 * i, input);
    }
    write(DATA + 128, input.bytes(4096));
    (Layout { size, desc: DESC, driver: AVAIL, device: USED }, features)
}

fn descriptor(memory: &GuestMemory, at: u64, input: &mut Input<'_>) {
    let (address, length) = (input.number::<3>(), input.number::<3>() as u32);
    let (flags, next) = (input.number::<1>(), input.number::<1>());
    // The two top bits of the flags move address or length to where only large numbers are.
    let address = if flags & 0x80 != 0 { address << 40 | 0xffff } else { address };
    let length = if flags & 0x40 != 0 { length << 8 | 0xff } else { length };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&(flags as u16 & 0x3f).to_le_bytes());
    bytes[14..].copy_from_slice(&(next as u16).to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(at)).expect("inside RAM");
}

/// Puts back what [`queue`] wrote.
pub fn clear(memory: &GuestMemory) {
    memory.write_slice(&[0; 0x6000], GuestAddress(0)).expect("inside RAM");
}

// The daemon's rules for definitions from their own sources, not through its crates: D-Bus and the async runtime, which these know nothing
// of, would take longer to build than all targets together. They call this crate by the name that they know.
extern crate self as dbus_api;

pub mod fleet;
pub mod launch;
#[path = "../../../dbus-api/src/spec.rs"]
pub mod spec;
