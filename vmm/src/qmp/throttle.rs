//! At most one event of a kind a second: owns when the next may go out. The newest value is never lost, only later.
//!
//! ```text
//! Idle ──offer──▶ Quiet until T ──offer──▶ Quiet, value waits ──T──▶ Quiet until T + 1 s
//!   ▲                  │ T
//!   └──────────────────┘
//! ```

use std::time::{Duration, Instant};

/// The time between two events.
const PERIOD: Duration = Duration::from_secs(1);

/// For one kind of event.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    last: Option<Instant>,
    waiting: Option<u64>,
}

/// What is to be done with a new value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Tell it.
    Now,
    /// It waits: come back after this long, and ask [`Throttle::due`].
    After(Duration),
    /// It has replaced one that waits already.
    Kept,
}

impl Throttle {
    pub(super) fn offer(&mut self, now: Instant, value: u64) -> Verdict {
        let next = self.last.map(|last| last + PERIOD).filter(|next| *next > now);
        match (next, self.waiting.is_some()) {
            (_, true) => {
                self.waiting = Some(value);
                Verdict::Kept
            }
            (Some(next), false) => {
                self.waiting = Some(value);
                Verdict::After(next - now)
            }
            (None, false) => {
                self.last = Some(now);
                Verdict::Now
            }
        }
    }

    /// The time has come: what waited.
    pub(super) fn due(&mut self, now: Instant) -> Option<u64> {
        let value = self.waiting.take()?;
        self.last = Some(now);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn events_keep_their_distance_and_the_last_value_comes(offers in proptest::collection::vec((0..3000u64, any::<u64>()), 1..50)) {
            let (mut throttle, start) = (Throttle::default(), Instant::now());
            let (mut now, mut timer, mut told): (_, Option<Instant>, Vec<(Instant, u64)>) = (start, None, vec![]);
            for (gap, value) in &offers {
                let then = now + Duration::from_millis(*gap);
                if let Some(at) = timer.filter(|at| *at <= then) {
                    told.extend(throttle.due(at).map(|v| (at, v)));
                    timer = None;
                }
                now = then;
                match throttle.offer(now, *value) {
                    Verdict::Now => told.push((now, *value)),
                    Verdict::After(wait) => prop_assert!(timer.replace(now + wait).is_none()),
                    Verdict::Kept => prop_assert!(timer.is_some()),
                }
            }
            if let Some(at) = timer {
                told.extend(throttle.due(at).map(|v| (at, v)));
            }
            prop_assert_eq!(told.last().map(|(_, v)| *v), offers.last().map(|(_, v)| *v));
            prop_assert!(told.windows(2).all(|w| w[1].0 - w[0].0 >= PERIOD));
        }
    }
}
