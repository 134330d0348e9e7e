//! Messages of a driver about the ports of a serial device.
#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut messages = Vec::new();
    while !input.is_empty() && messages.len() < 64 {
        let how = input.number::<1>();
        // Most have the length that they should have.
        let length = if how & 0xe0 == 0xe0 { (how & 0xf) as usize } else { 8 };
        messages.push((input.bytes(length), (how >> 1 & 3) as u8, how & 1 != 0));
    }
    vmm::virtio::console::fuzz::control(messages);
});
