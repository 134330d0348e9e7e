//! The physical address map on x86_64: owns where RAM lies and what the hole below 4 GiB holds.
//!
//! ```text
//!          0           3 GiB                              4 GiB
//! microvm  | RAM       | hole: virtio-mmio, IOAPIC, LAPIC | RAM (the rest) |
//!
//!          0      2 GiB    0xb000_0000  0xc000_0000     0xf000_0000       4 GiB
//! q35      | RAM  | hole   | ECAM       | BARs          | IOAPIC, LAPIC   | RAM (the rest) | 64-bit BARs |
//! ```

/// RAM of a microvm ends here at the latest; the hole for devices follows.
pub const GAP_START: u64 = 0xc000_0000;
/// RAM of a q35 ends here at the latest.
pub const Q35_GAP_START: u64 = 0x8000_0000;
/// RAM that did not fit below the hole starts here.
pub const GAP_END: u64 = 0x1_0000_0000;
/// Everything from here up to 1 MiB is not RAM to the guest (EBDA, option ROM and BIOS area of a PC).
pub const EBDA_START: u64 = 0x9_fc00;
/// Memory that the guest's kernel may use without restriction starts here.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// One stretch of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First guest physical address.
    pub base: u64,
    /// Bytes, never 0.
    pub size: u64,
}

/// Where `size` bytes of RAM lie: below the hole, which starts at `gap`, and above it for what does not fit.
pub fn ram(size: u64, gap: u64) -> Vec<Range> {
    let low = size.min(gap);
    [Range { base: 0, size: low }, Range { base: GAP_END, size: size - low }]
        .into_iter()
        .filter(|r| r.size > 0)
        .collect()
}

/// Takes `size` bytes off the beginning of `free`; fewer if there are not as many.
pub fn take(free: &mut Vec<Range>, size: u64) -> Vec<Range> {
    let (mut taken, mut left) = (Vec::new(), size);
    free.retain_mut(|range| {
        let part = range.size.min(left);
        if part > 0 {
            taken.push(Range { base: range.base, size: part });
        }
        left -= part;
        *range = Range { base: range.base + part, size: range.size - part };
        range.size > 0
    });
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        let gib = 1 << 30;
        let low = |size| Range { base: 0, size };
        let high = |size| Range { base: GAP_END, size };
        for (size, expected) in [
            (128 << 20, vec![low(128 << 20)]),
            (3 * gib, vec![low(3 * gib)]),
            (3 * gib + 4096, vec![low(3 * gib), high(4096)]),
            (512 * gib, vec![low(3 * gib), high(509 * gib)]),
        ] {
            assert_eq!(ram(size, GAP_START), expected);
        }
        assert_eq!(ram(3 * gib, Q35_GAP_START), [low(2 * gib), high(gib)]);
    }

    #[test]
    fn parts_are_taken_in_order() {
        let gib = 1 << 30;
        let mut free = ram(4 * gib, Q35_GAP_START);
        assert_eq!(take(&mut free, gib), [Range { base: 0, size: gib }]);
        let over = [Range { base: gib, size: gib }, Range { base: GAP_END, size: gib }];
        assert_eq!(take(&mut free, 2 * gib), over);
        assert_eq!(take(&mut free, 0), []);
        assert_eq!(take(&mut free, 9 * gib), [Range { base: GAP_END + gib, size: gib }]);
        assert!(free.is_empty());
    }
}
