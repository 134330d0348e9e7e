//! Which blocks of a virtio-mem device are plugged. Pure: blocks are numbers, and what follows for memory is the caller's.
//!
//! ```text
//! block:  unplugged ──plug──▶ plugged ──unplug──▶ unplugged          chunk:  in use while a block in it is plugged
//! ```

use std::ops::Range;

use super::request::State;

/// The blocks of one device.
pub(super) struct Blocks {
    /// One bit for each, set while it is plugged.
    bits: Vec<u64>,
    count: usize,
    per_chunk: usize,
    /// Plugged ones by chunk.
    in_use: Vec<u32>,
    plugged: usize,
}

impl Blocks {
    /// `count` blocks, none of them plugged, `per_chunk` to a chunk.
    pub(super) fn new(count: usize, per_chunk: usize) -> Self {
        let per_chunk = per_chunk.max(1);
        let in_use = vec![0; count.div_ceil(per_chunk)];
        Self { bits: vec![0; count.div_ceil(64)], count, per_chunk, in_use, plugged: 0 }
    }

    /// `length` blocks from `first` on, at least one, if they are all there.
    pub(super) fn range(&self, first: u64, length: u16) -> Option<Range<usize>> {
        let first = usize::try_from(first).ok()?;
        let end = first.checked_add(usize::from(length))?;
        (length > 0 && end <= self.count).then_some(first..end)
    }

    /// All blocks.
    pub(super) fn all(&self) -> Range<usize> {
        0..self.count
    }

    /// How many are plugged.
    pub(super) fn plugged(&self) -> usize {
        self.plugged
    }

    /// Whether a block of this chunk is plugged.
    pub(super) fn is_in_use(&self, chunk: usize) -> bool {
        self.in_use.get(chunk).is_some_and(|plugged| *plugged > 0)
    }

    /// What the blocks of a range have in common.
    pub(super) fn state(&self, range: Range<usize>) -> State {
        let length = range.len();
        match range.filter(|block| self.is_plugged(*block)).count() {
            0 => State::Unplugged,
            plugged if plugged == length => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// The parts of a range by chunk, in order.
    pub(super) fn parts(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let per_chunk = self.per_chunk;
        let chunks =
            if range.is_empty() { 0..0 } else { range.start / per_chunk..(range.end - 1) / per_chunk + 1 };
        chunks.map(move |chunk| {
            let start = chunk * per_chunk;
            (chunk, start.max(range.start)..(start + per_chunk).min(range.end))
        })
    }

    /// Plugs those of a range that are not.
    pub(super) fn plug(&mut self, range: Range<usize>) {
        self.set(range, true);
    }

    /// Unplugs those of a range that are plugged.
    pub(super) fn unplug(&mut self, range: Range<usize>) {
        self.set(range, false);
    }

    fn is_plugged(&self, block: usize) -> bool {
        self.bits.get(block / 64).is_some_and(|word| word & 1 << (block % 64) != 0)
    }

    fn set(&mut self, range: Range<usize>, plug: bool) {
        for block in range.start..range.end.min(self.count) {
            if self.is_plugged(block) == plug {
                continue;
            }
            let (Some(word), Some(in_use)) =
                (self.bits.get_mut(block / 64), self.in_use.get_mut(block / self.per_chunk))
            else {
                continue;
            };
            *word ^= 1 << (block % 64);
            if plug {
                (*in_use, self.plugged) = (*in_use + 1, self.plugged + 1);
            } else {
                (*in_use, self.plugged) = (*in_use - 1, self.plugged - 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_that_are_there() {
        let blocks = Blocks::new(100, 64);
        for (first, length, want) in [
            (0, 1, Some(0..1)),
            (0, 100, Some(0..100)),
            (99, 1, Some(99..100)),
            (0, 0, None),
            (100, 1, None),
            (1, 100, None),
            (u64::MAX, 1, None),
            (u64::MAX - 1, u16::MAX, None),
        ] {
            assert_eq!(blocks.range(first, length), want, "{first} {length}");
        }
    }

    #[test]
    fn parts_lie_each_in_one_chunk() {
        let blocks = Blocks::new(100, 64);
        let parts = |range| blocks.parts(range).collect::<Vec<_>>();
        assert_eq!(parts(0..100), [(0, 0..64), (1, 64..100)]);
        assert_eq!(parts(63..65), [(0, 63..64), (1, 64..65)]);
        assert_eq!(parts(70..71), [(1, 70..71)]);
        assert_eq!(parts(64..64), []);
    }

    proptest! {
        #[test]
        fn as_a_set_of_numbers(
            count in 1..300usize,
            per_chunk in 1..70usize,
            steps in proptest::collection::vec((0..320u64, 0..320u16, any::<bool>()), 0..40),
        ) {
            let mut blocks = Blocks::new(count, per_chunk);
            let mut model = BTreeSet::new();
            for (first, length, plug) in steps {
                let Some(range) = blocks.range(first, length) else {
                    prop_assert!(length == 0 || first as usize + usize::from(length) > count);
                    continue;
                };
                let known = range.clone().filter(|block| model.contains(block)).count();
                let state = match known {
                    0 => State::Unplugged,
                    all if all == range.len() => State::Plugged,
                    _ => State::Mixed,
                };
                prop_assert_eq!(blocks.state(range.clone()), state);
                let joined: Vec<usize> = blocks.parts(range.clone()).flat_map(|(_, part)| part).collect();
                prop_assert_eq!(joined, range.clone().collect::<Vec<_>>());
                if plug {
                    blocks.plug(range.clone());
                    model.extend(range);
                } else {
                    blocks.unplug(range.clone());
                    model.retain(|block| !range.contains(block));
                }
                prop_assert_eq!(blocks.plugged(), model.len());
                for chunk in 0..count.div_ceil(per_chunk) + 1 {
                    let used = model.range(chunk * per_chunk..(chunk + 1) * per_chunk).next().is_some();
                    prop_assert_eq!(blocks.is_in_use(chunk), used);
                }
            }
        }
    }
}
