//! A session of the serial device: any rings, and a host whose client comes, goes, sends and reads as it likes.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz::{Input, clear, memory, queues};
use libfuzzer_sys::fuzz_target;
use vmm::memory::GuestMemory;

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(memory);

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let multiport = input.number::<1>() & 1 != 0;
    let events = input.bytes(24);
    let queues = queues(&MEMORY, &mut input, if multiport { 6 } else { 2 });
    vmm::virtio::console::fuzz::session(queues, multiport, events);
    clear(&MEMORY);
});
