//! Which pages in the balloon can go to the host: owns the memory of what is in it, where that is needed.
//!
//! The balloon counts in 4 KiB. Where the host's pages are of that size each goes at once and nothing has to be remembered. A huge
//! page goes when all its parts are in the balloon.

use crate::memory::discard::Discarder;

use super::PAGE;

/// Pages of one kind of RAM.
pub(super) struct Pages {
    /// Balloon pages in one page of the host.
    parts: u64,
    /// One bit for each balloon page, by number, where `parts` is more than 1; grows to the highest page that is RAM.
    inside: Vec<u64>,
}

impl Pages {
    pub(super) fn new(page_size: u64) -> Self {
        Self { parts: (page_size / PAGE).max(1), inside: Vec::new() }
    }

    /// Sorts `numbers`, in any order and with any repetition, and calls `give` with (first byte, bytes) of what can go to the host now.
    /// `is_ram` says whether a page of that number exists.
    pub(super) fn enter(
        &mut self,
        numbers: &mut Vec<u32>,
        is_ram: impl Fn(u64) -> bool,
        mut give: impl FnMut(u64, u64),
    ) {
        numbers.sort_unstable();
        numbers.dedup();
        let mut run: Option<(u64, u64)> = None;
        for number in numbers.iter().map(|n| u64::from(*n)).filter(|n| is_ram(*n)) {
            let Some((first, count)) = self.enter_one(number) else { continue };
            run = match run {
                Some((start, len)) if start + len == first => Some((start, len + count)),
                Some((start, len)) => {
                    give(start * PAGE, len * PAGE);
                    Some((first, count))
                }
                None => Some((first, count)),
            };
        }
        if let Some((start, len)) = run {
            give(start * PAGE, len * PAGE);
        }
    }

    /// The pages (first, count) that can go because this one has come.
    fn enter_one(&mut self, number: u64) -> Option<(u64, u64)> {
        if self.parts == 1 {
            return Some((number, 1));
        }
        let (word, bit) = place(number)?;
        if self.inside.len() <= word {
            self.inside.resize(word + 1, 0);
        }
        let bits = self.inside.get_mut(word)?;
        if *bits & bit != 0 {
            return None;
        }
        *bits |= bit;
        let first = number - number % self.parts;
        let whole = (first..first + self.parts).all(|n| self.contains(n));
        whole.then_some((first, self.parts))
    }

    fn contains(&self, number: u64) -> bool {
        place(number).and_then(|(word, bit)| Some(self.inside.get(word)? & bit != 0)).unwrap_or(false)
    }

    /// The guest has taken these back.
    pub(super) fn leave(&mut self, numbers: &[u32]) {
        for number in numbers {
            if let Some((word, bit)) = place(u64::from(*number))
                && let Some(bits) = self.inside.get_mut(word)
            {
                *bits &= !bit;
            }
        }
    }
}

fn place(number: u64) -> Option<(usize, u64)> {
    Some((usize::try_from(number / 64).ok()?, 1 << (number % 64)))
}

/// For `discarder`'s RAM.
impl From<&Discarder> for Pages {
    fn from(discarder: &Discarder) -> Self {
        Self::new(discarder.page_size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn enter(pages: &mut Pages, numbers: &[u32]) -> Vec<(u64, u64)> {
        let mut given = vec![];
        pages.enter(&mut numbers.to_vec(), |n| n < 4096, |at, len| given.push((at / PAGE, len / PAGE)));
        given
    }

    #[test]
    fn ordinary_pages_go_at_once_in_runs() {
        let mut pages = Pages::new(4096);
        assert_eq!(enter(&mut pages, &[7, 5, 6, 5, 9, 4096, u32::MAX]), [(5, 3), (9, 1)]);
        assert_eq!(enter(&mut pages, &[]), []);
        assert!(pages.inside.is_empty());
    }

    #[test]
    fn a_huge_page_goes_when_its_last_part_comes() {
        let mut pages = Pages::new(2 << 20);
        let all: Vec<u32> = (512..1024).collect();
        assert_eq!(enter(&mut pages, &all[1..]), []);
        pages.leave(&[600, u32::MAX]);
        assert_eq!(enter(&mut pages, &[512]), []);
        assert_eq!(enter(&mut pages, &[600]), [(512, 512)]);
        // It is gone already.
        assert_eq!(enter(&mut pages, &[600]), []);
        let both: Vec<u32> = (1024..2048).collect();
        assert_eq!(enter(&mut pages, &both), [(1024, 1024)]);
    }

    proptest! {
        /// What goes to the host is in the balloon, and every huge page that is wholly in it has gone once.
        #[test]
        fn only_what_is_inside_goes(
            steps in proptest::collection::vec((any::<bool>(), proptest::collection::vec(0u32..64, 0..40)), 0..30)
        ) {
            let mut pages = Pages::new(4 * PAGE);
            let mut inside = BTreeSet::new();
            for (comes, numbers) in steps {
                if comes {
                    let before = inside.clone();
                    inside.extend(numbers.iter().copied());
                    let mut gone = BTreeSet::new();
                    for (first, count) in enter(&mut pages, &numbers) {
                        gone.extend(first as u32..(first + count) as u32);
                    }
                    for huge in 0..16 {
                        let parts: BTreeSet<u32> = (4 * huge..4 * huge + 4).collect();
                        let now = parts.is_subset(&inside) && !parts.is_subset(&before);
                        prop_assert_eq!(parts.is_subset(&gone), now);
                        prop_assert!(now || parts.is_disjoint(&gone));
                    }
                } else {
                    for number in &numbers {
                        inside.remove(number);
                    }
                    pages.leave(&numbers);
                }
            }
        }
    }
}
