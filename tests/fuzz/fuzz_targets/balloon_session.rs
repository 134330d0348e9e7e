//! A session of the balloon: any rings, any features of its own.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz::{Input, clear, memory, queues};
use libfuzzer_sys::fuzz_target;
use vmm::memory::GuestMemory;

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(memory);

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let features = input.number::<1>();
    let turns = input.bytes(8);
    let queues = queues(&MEMORY, &mut input, 5);
    vmm::virtio::balloon::fuzz::session(Arc::clone(&MEMORY), queues, features, turns);
    clear(&MEMORY);
});
