//! `auto-balloon=on`: how much the balloon holds follows what the guest says it could spare. Pure.
//!
//! Each `monitor-interval` the guest is asked for its statistics. What it could spare with an empty balloon is what it has available now and
//! what it has given already, together the *pool*: a number that does not change because the balloon moves, so nothing swings. The guest
//! keeps `membuf-percent` of the pool as its buffer, the host has the rest:
//!
//! ```text
//!   RAM at boot  |  in use  |  buffer: membuf-percent of the pool  |  balloon  |
//!                            ◀─────────────── pool ──────────────────────────▶
//! ```
//!
//! The guest gives little by little, because the numbers may be of a moment, and gets back at once what it lacks. A guest that tells lies
//! gets a balloon between nothing and what it has said it has available: nobody else's memory depends on it. What a client asks for with
//! `balloon` is the most that the guest gets: the automatic moves below that.

use super::PAGE;

/// A kernel needs some memory at hand for moments that statistics do not show.
const LEAST_BUFFER: u64 = 64 << 20;
/// The part of its RAM that a guest gives in one interval at most.
const STEP: u64 = 8;
/// Changes below this part of RAM are not worth the trouble.
const SLACK: u64 = 64;

/// What is known of a guest's memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// RAM at boot.
    pub(super) memory: u64,
    /// In the balloon.
    pub(super) given: u64,
    /// What the guest could use without swapping, as it says.
    pub(super) available: u64,
}

/// How many bytes the balloon should hold, whole pages, for a guest that keeps `percent` of what it could spare.
pub(super) fn target(view: View, percent: u8) -> u64 {
    let View { memory, given, available } = view;
    let given = given.min(memory);
    let pool = given + available.min(memory - given);
    let share = u64::try_from(u128::from(pool) * u128::from(percent.min(100)) / 100).unwrap_or(pool);
    let buffer = share.max(LEAST_BUFFER).min(pool);
    let wanted = pool - buffer;
    let wanted = if wanted.abs_diff(given) < memory / SLACK { given } else { wanted };
    let wanted = wanted.min(given.saturating_add(memory / STEP));
    wanted - wanted % PAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_balloon_follows_what_can_be_spared() {
        for (given, available, percent, want) in [
            // Little by little: an eighth of RAM in each interval.
            (0, 800, 50, 128),
            (128, 672, 50, 256),
            (256, 544, 50, 384),
            // Half of 800 MiB.
            (384, 416, 50, 400),
            (400, 400, 50, 400),
            // A little more in use is nothing; much more is given back at once.
            (400, 390, 50, 400),
            (400, 100, 50, 250),
            (400, 0, 50, 200),
            (200, 0, 50, 100),
            (100, 0, 50, 36),
            // What is left is the least buffer.
            (60, 0, 50, 0),
            (0, 64, 20, 0),
            (0, 200, 20, 128),
            (120, 80, 20, 136),
            // A larger buffer.
            (0, 800, 80, 128),
            (128, 672, 80, 160),
            // More than there is.
            (0, 5000, 50, 128),
            (5000, 5000, 50, 512),
        ] {
            let view = View { memory: 1024 * MIB, given: given * MIB, available: available * MIB };
            assert_eq!(target(view, percent) / MIB, want, "{given} {available} {percent}");
        }
        let all = View { memory: u64::MAX, given: u64::MAX, available: u64::MAX };
        assert!(target(all, 20) <= u64::MAX - LEAST_BUFFER);
    }

    proptest! {
        /// Whatever a guest says, it keeps the buffer of what it says, and a balloon that has come to rest stays there.
        #[test]
        fn a_guest_keeps_its_buffer(memory in 0u64..1 << 40, given: u64, available: u64, percent in 20u8..=80) {
            let (given, most) = (given % (memory + 1) / PAGE * PAGE, memory);
            let mut view = View { memory, given, available: available % (memory + 1) };
            let first = target(view, percent);
            prop_assert!(first <= most && first.is_multiple_of(PAGE));
            prop_assert!(first <= given || first - given <= memory / STEP);
            prop_assert!(first <= given || given + view.available.min(memory - given) - first >= LEAST_BUFFER);
            let pool = view.given + view.available.min(memory - view.given);
            for _ in 0..2 * STEP {
                view.given = target(view, percent);
                view.available = pool.saturating_sub(view.given);
            }
            prop_assert_eq!(target(view, percent), view.given);
        }
    }
}
