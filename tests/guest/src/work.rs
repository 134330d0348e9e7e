//! Work to put on a host: spinning, touching memory, dirtying it at a rate, checksums.

use crate::boot::BootInfo;
use crate::{clock, console, cpu, memory, put, say};

/// Ends long work when Ctrl-C was typed; asks the port, which costs an exit, every 100 ms only.
pub struct Interruption {
    next: u64,
}

impl Interruption {
    /// From now.
    pub fn new() -> Self {
        Self { next: clock::deadline(100_000) }
    }

    /// Whether to stop.
    pub fn asked(&mut self, now: u64) -> bool {
        if now < self.next {
            return false;
        }
        self.next = clock::deadline(100_000);
        console::interrupted()
    }
}

/// Computes for `milliseconds`; returns the number of rounds done.
pub fn spin(milliseconds: u64) -> u64 {
    let (end, mut stop, mut rounds) =
        (clock::deadline(milliseconds.saturating_mul(1000)), Interruption::new(), 0);
    loop {
        for _ in 0..1000 {
            core::hint::black_box(rounds);
            rounds += 1;
        }
        let now = cpu::tsc();
        if now >= end || stop.asked(now) {
            return rounds;
        }
    }
}

/// Prints a dot each millisecond, for so many of them: whoever reads sees when the guest runs.
pub fn tick(milliseconds: u64) {
    let mut stop = Interruption::new();
    for _ in 0..milliseconds {
        put!(".");
        let next = clock::deadline(1000);
        while cpu::tsc() < next {
            core::hint::spin_loop();
        }
        if stop.asked(cpu::tsc()) {
            break;
        }
    }
    say!("");
}

/// Writes one word to each of `count` pages of the arena, or until Ctrl-C; returns how many it wrote.
pub fn touch(boot: &BootInfo, count: u64) -> u64 {
    let (mut stop, mut done) = (Interruption::new(), 0);
    for region in memory::arena(boot) {
        let mut page = region.start;
        while page < region.start + region.size && done < count {
            mark(page, done);
            done += 1;
            page += memory::PAGE;
            if stop.asked(cpu::tsc()) {
                return done;
            }
        }
    }
    done
}

fn mark(page: u64, value: u64) {
    // SAFETY: a page of the arena, RAM that nothing uses.
    unsafe { (page as *mut u64).write_volatile(value) };
}

/// Dirties `pages` pages again and again, `rate` pages a second (0: as fast as it goes), for `seconds` (0: until Ctrl-C).
/// Returns pages dirtied and microseconds taken.
pub fn dirty(boot: &BootInfo, pages: u64, rate: u64, seconds: u64) -> (u64, u64) {
    let (start, mut stop, mut done) = (cpu::tsc(), Interruption::new(), 0);
    let end = if seconds == 0 { u64::MAX } else { clock::deadline(seconds.saturating_mul(1_000_000)) };
    let pages = pages.min(memory::arena_size(boot) / memory::PAGE).max(1);
    loop {
        let now = cpu::tsc();
        if now >= end || stop.asked(now) {
            return (done, clock::to_microseconds(cpu::tsc() - start));
        }
        let due = match rate {
            0 => done + 64,
            rate => (u128::from(rate) * u128::from(clock::to_microseconds(now - start)) / 1_000_000) as u64,
        };
        if due <= done {
            // Sleep until a few pages are due, at least a millisecond: a slow rate leaves the processor idle.
            let pause = (8_000_000 / rate.max(1)).clamp(1000, 50_000);
            crate::irq::wait(pause, || (), || false);
            continue;
        }
        for _ in 0..(due - done).min(64) {
            if let Some(page) = memory::arena_page(boot, done % pages) {
                mark(page, done);
            }
            done += 1;
        }
    }
}

/// CRC-32 (IEEE 802.3), the one of zlib and gzip, so that a host can compare with `python3 -c 'import zlib…'` or `gzip -lv`.
pub struct Crc32 {
    table: [u32; 256],
    value: u32,
}

impl Crc32 {
    /// Of no bytes yet.
    pub fn new() -> Self {
        let mut table = [0; 256];
        for (i, entry) in table.iter_mut().enumerate() {
            *entry = (0..8).fold(i as u32, |c, _| if c & 1 != 0 { 0xedb8_8320 ^ c >> 1 } else { c >> 1 });
        }
        Self { table, value: !0 }
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.value = self.table[usize::from(self.value as u8 ^ byte)] ^ self.value >> 8;
        }
    }

    /// The checksum.
    pub fn finish(&self) -> u32 {
        !self.value
    }
}

/// Fills one sector with bytes that depend on the disk's sector number and `seed` alone (xorshift64*).
pub fn pattern(sector: &mut [u8], number: u64, seed: u64) {
    let mut state =
        (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xd1b5_4a32_d192_ed03) | 1;
    for word in sector.chunks_mut(8) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bytes = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}
