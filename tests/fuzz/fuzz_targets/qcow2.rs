//! qcow2 images: whatever their bytes are, they are refused or their requests succeed or fail.
#![no_main]

use libfuzzer_sys::fuzz_target;

/// Bytes of requests in front of the image.
const REQUESTS: usize = 48;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let Some((requests, image)) = rest.split_at_checked(REQUESTS) else { return };
    let _ = vmm::block::fuzz::qcow2(image, first & 1 != 0, requests);
});
