//! What the process behind a vhost-user socket says: any bytes, for a device that asks it for its features, its configuration and its
//! rings back.
#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let config = input.number::<1>() as usize * 2;
    vmm::vhost::user::fuzz::replies(input.0, config);
});
