//! Rings and chains: whatever the driver wrote, each buffer is in guest RAM, readable ones come before writable ones, and work is bounded.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz::{Input, clear, memory, queue};
use libfuzzer_sys::fuzz_target;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm::memory::GuestMemory;
use vmm::virtio::queue::{Chain, MAX_BUFFERS};

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(memory);

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut queue = queue(&MEMORY, &mut input);
    let pieces = [(0, fuzz::RAM), (fuzz::HIGH, fuzz::HIGH_SIZE)].map(|(at, len)| {
        let host = MEMORY.get_host_address(GuestAddress(at)).expect("RAM") as usize;
        host..host + len as usize
    });
    let mut chain = Chain::default();
    let mut taken = 0;
    while let Ok(true) = queue.pop(&mut chain) {
        taken += 1;
        assert!(taken <= u32::from(queue.size()), "more requests than the ring holds");
        let (readable, writable) = (chain.readable.parts(), chain.writable.parts());
        assert!(readable.len() + writable.len() <= MAX_BUFFERS);
        for part in readable.iter().chain(writable) {
            let (start, end) = (part.iov_base as usize, part.iov_base as usize + part.iov_len);
            assert!(pieces.iter().any(|p| p.start <= start && end <= p.end), "a buffer outside RAM");
        }
        let mut header = [0; 16];
        chain.readable.take(&mut header);
        let written = chain.writable.fill(&header);
        if let Some(last) = chain.writable.split_last_byte() {
            last.write(1);
        }
        queue.complete(chain.head, written as u32);
        let _ = queue.publish();
    }
    let _ = queue.enable_notify();
    drop(queue);
    clear(&MEMORY);
});
