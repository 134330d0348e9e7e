//! What the guest tells the balloon: page numbers in and out, with host pages of 4 KiB and 2 MiB, and statistics.
#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    vmm::virtio::balloon::fuzz::stats(data);
    let mut input = Input(data);
    let first = input.number::<1>();
    // Numbers near each other fill huge pages; few bytes each, so that inputs stay small.
    let mut rounds = Vec::new();
    while !input.is_empty() && rounds.len() < 32 {
        let round = input.number::<1>();
        let start = input.number::<3>() as u32;
        let numbers = match round >> 1 & 3 {
            0 => (0..600).map(|n| start.wrapping_add(n)).collect(),
            1 => (0..600).map(|n| start.wrapping_sub(n)).collect(),
            2 => vec![start; 5],
            _ => (0..round >> 3).map(|_| input.number::<4>() as u32).collect(),
        };
        rounds.push((round & 1 == 0, numbers));
    }
    let page_size = if first & 1 == 0 { 4096 } else { 2 << 20 };
    // Up to 4096 balloon pages, in whole pages of the host.
    vmm::virtio::balloon::fuzz::pages(page_size, 512 * (first >> 1 & 7), rounds);
});
