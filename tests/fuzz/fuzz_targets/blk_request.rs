//! Block requests: what is not refused lies within the disk, in whole sectors.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz::{Input, clear, memory, queue};
use libfuzzer_sys::fuzz_target;
use vmm::memory::GuestMemory;
use vmm::virtio::queue::Chain;

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(memory);

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let first = input.number::<1>();
    // From an empty slot to the largest disk that 64 bits can tell.
    let size = (first >> 1 & 0x3f)
        .checked_shl(0)
        .map_or(0, |bits| if bits == 0 { 0 } else { u64::MAX >> (63 - bits) & !511 });
    let mut queue = queue(&MEMORY, &mut input);
    loop {
        let mut chain = Chain::default();
        if !matches!(queue.pop(&mut chain), Ok(true)) {
            break;
        }
        let head = chain.head;
        if let Some((offset, len)) = vmm::virtio::blk::fuzz::parse(chain, size, first & 1 != 0) {
            assert!(u128::from(offset) + u128::from(len) <= u128::from(size), "{offset} + {len} of {size}");
            assert!(offset % 512 == 0 && len % 512 == 0, "{offset} + {len}");
        }
        queue.complete(head, 1);
        let _ = queue.publish();
    }
    drop(queue);
    clear(&MEMORY);
});
