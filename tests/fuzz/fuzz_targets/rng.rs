//! A session of the source of random numbers: any ring, with and without a limit.
#![no_main]

use std::sync::{Arc, LazyLock};

use fuzz::{Input, clear, memory, queue};
use libfuzzer_sys::fuzz_target;
use vmm::config::RngLimit;
use vmm::memory::GuestMemory;

static MEMORY: LazyLock<Arc<GuestMemory>> = LazyLock::new(memory);

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let first = input.number::<1>();
    let limit = (first & 1 != 0).then(|| RngLimit { max_bytes: input.number::<2>() + 1, period_ms: 1000 });
    let queue = queue(&MEMORY, &mut input);
    vmm::virtio::rng::fuzz::session(queue, limit, (first >> 1 & 7) as u8 + 1);
    clear(&MEMORY);
});
