//! Headers of packets from the guest: what the kernel gets to see asks only for what was negotiated, inside the packet.
#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// VIRTIO_NET_F_CSUM, HOST_TSO4, HOST_TSO6.
const CSUM: u64 = 1;
const TSO4: u64 = 1 << 11;
const TSO6: u64 = 1 << 12;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut header = [0; 12];
    let bytes = input.bytes(12);
    header[..bytes.len()].copy_from_slice(bytes);
    let (len, chosen) = (input.number::<3>(), input.number::<1>());
    let features =
        [CSUM, TSO4, TSO6].iter().enumerate().filter(|(i, _)| chosen >> i & 1 != 0).map(|(_, f)| f).sum();
    if !vmm::virtio::net::fuzz::header_is_fine(&header, len, features) {
        return;
    }
    let field = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    assert!(header[0] <= 1);
    assert!(header[0] == 0 || (features & CSUM != 0 && field(6) + field(8) + 2 <= len));
    match header[1] {
        0 => {}
        1 => assert!(features & TSO4 != 0 && field(4) > 0),
        4 => assert!(features & TSO6 != 0 && field(4) > 0),
        other => panic!("gso type {other}"),
    }
});
