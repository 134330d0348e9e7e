//! Which BARs are mapped: a pure rule over what the functions want.
//!
//! A BAR is mapped if it lies wholly inside one of the machine's windows and overlaps none that was granted before it; the order is
//! that of the functions on the bus, and of BAR numbers within one. RAM, ECAM and the interrupt controllers lie outside the windows, so nothing can
//! come to lie over them. The rule knows no history: the same registers always give the same map.

/// A stretch of guest physical addresses that BARs may lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

impl Window {
    fn holds(&self, first: u64, last: u64) -> bool {
        let end = self.base.saturating_add(self.size);
        first >= self.base && last < end
    }
}

/// For each wish, a first address and a size, whether it is granted.
pub(super) fn grant(windows: &[Window], wishes: &[(u64, u64)]) -> Vec<bool> {
    let mut granted: Vec<(u64, u64)> = Vec::with_capacity(wishes.len());
    let verdict = |&(first, size): &(u64, u64)| {
        let Some(last) = size.checked_sub(1).and_then(|rest| first.checked_add(rest)) else { return false };
        let inside = windows.iter().any(|w| w.holds(first, last));
        let free = granted.iter().all(|(a, b)| last < *a || first > *b);
        if inside && free {
            granted.push((first, last));
        }
        inside && free
    };
    wishes.iter().map(verdict).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WINDOWS: [Window; 2] =
        [Window { base: 0xc000_0000, size: 0x3000_0000 }, Window { base: 1 << 32, size: 1 << 32 }];

    #[test]
    fn only_inside_and_never_over_another() {
        type Case<'a> = (&'a [(u64, u64)], &'a [bool]);
        let cases: [Case<'_>; 6] = [
            (&[(0xc000_0000, 0x1000), (0xc000_1000, 0x1000)], &[true, true]),
            (&[(0xc000_0000, 0x4000), (0xc000_1000, 0x1000)], &[true, false]),
            (&[(0xbfff_f000, 0x1000), (0xefff_f000, 0x1000), (0xf000_0000, 0x1000)], &[false, true, false]),
            // Over the end of a window, and over the end of all addresses.
            (&[(0xeff0_0000, 0x20_0000), (u64::MAX - 0xfff, 0x1000), (u64::MAX, 2)], &[false; 3]),
            (&[(0, 0x1000), (0xb000_0000, 0x1000), (0xfec0_0000, 0x1000)], &[false; 3]),
            // What is not granted is in nobody's way.
            (&[(0xc000_0000, 0), (0xbfff_0000, 0x2_0000), (0xc000_0000, 0x1000)], &[false, false, true]),
        ];
        for (wishes, expected) in cases {
            assert_eq!(grant(&WINDOWS, wishes), expected, "{wishes:x?}");
        }
    }

    proptest! {
        #[test]
        fn grants_are_disjoint_inside_and_nothing_is_refused_for_no_reason(
            wishes in prop::collection::vec((0xbff0_0000u64..0xf010_0000, 0u64..0x20_0000), 0..12)
        ) {
            let verdicts = grant(&WINDOWS, &wishes);
            let ranges: Vec<_> = wishes.iter().zip(&verdicts).filter(|(_, ok)| **ok).map(|(w, _)| *w).collect();
            for (i, (a, n)) in ranges.iter().enumerate() {
                prop_assert!(*a >= 0xc000_0000 && a + n <= 0xf000_0000 && *n > 0);
                for (b, m) in &ranges[..i] {
                    prop_assert!(a + n <= *b || b + m <= *a);
                }
            }
            for ((a, n), ok) in wishes.iter().zip(&verdicts) {
                let blocked = *n == 0
                    || *a < 0xc000_0000
                    || a + n > 0xf000_0000
                    || ranges.iter().any(|(b, m)| a < &(b + m) && *b < a + n);
                prop_assert!(*ok || blocked);
            }
        }
    }
}
