//! Commands of the network device's control queue, with any set of features negotiated.
#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let features = input.number::<4>();
    vmm::virtio::net::fuzz::control(input.0, features);
    vmm::virtio::net::fuzz::control(input.0, u64::MAX);
});
