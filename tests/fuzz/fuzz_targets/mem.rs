//! Requests of a virtio-mem driver: alone, in a row; and a session on any ring.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz::{Input, clear, memory, queue};
use libfuzzer_sys::fuzz_target;
use vmm::memory::GuestMemory;
use vmm::virtio::mem::fuzz::{BASE, BLOCK};

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(memory);

/// From four bytes: type, first block, blocks. Most lie where blocks are.
fn request(input: &mut Input<'_>) -> [u8; 24] {
    let (kind, first, blocks) = (input.number::<1>(), input.number::<1>(), input.number::<2>());
    // The top bit of the type moves the address off the blocks' boundaries.
    let addr = BASE + first * BLOCK - (kind >> 7);
    let mut bytes = [0; 24];
    bytes[0] = kind as u8 & 7;
    bytes[8..16].copy_from_slice(&addr.to_le_bytes());
    bytes[16..18].copy_from_slice(&(blocks as u16).to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (first, requested) = (input.number::<1>(), input.number::<1>());
    if first & 1 != 0 {
        let queue = queue(&MEMORY, &mut input);
        vmm::virtio::mem::fuzz::session(queue, requested, (first >> 1 & 7) as u8 + 1);
        clear(&MEMORY);
        return;
    }
    let mut requests = Vec::new();
    while !input.is_empty() {
        requests.push(request(&mut input));
    }
    let raw = data.chunks(24);
    let all = requests.iter().map(<[u8; 24]>::as_slice).chain(raw);
    vmm::virtio::mem::fuzz::requests(requested, usize::from(first as u8 >> 4), all);
});
