//! How fast bytes may go: so many in each period, counted from the first byte of the period. Pure: the time comes from the caller.

use std::time::{Duration, Instant};

use crate::config::RngLimit;

/// The state of one limit.
pub(super) struct Limiter {
    max: u64,
    period: Duration,
    left: u64,
    /// When `left` is full again; `None` before the first byte.
    ends: Option<Instant>,
}

impl Limiter {
    pub(super) fn new(limit: RngLimit) -> Self {
        let RngLimit { max_bytes, period_ms } = limit;
        Self { max: max_bytes, period: Duration::from_millis(period_ms), left: max_bytes, ends: None }
    }

    /// How many of `wanted` bytes may go now; when none may, how long until some may.
    pub(super) fn allow(&mut self, now: Instant, wanted: usize) -> Result<usize, Duration> {
        let left_of_period = self.ends.and_then(|e| e.checked_duration_since(now)).filter(|d| !d.is_zero());
        match left_of_period {
            None => {
                // Without an end that can be named there would be no limit; there is one for the next centuries.
                self.ends = now.checked_add(self.period);
                self.left = self.max;
            }
            Some(wait) if self.left == 0 => return Err(wait),
            Some(_) => {}
        }
        Ok(usize::try_from(self.left).map_or(wanted, |left| left.min(wanted)))
    }

    /// `count` bytes, at most what was allowed, have gone.
    pub(super) fn spend(&mut self, count: usize) {
        self.left = self.left.saturating_sub(count as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_period_begins_with_its_first_byte() {
        let mut limiter = Limiter::new(RngLimit { max_bytes: 10, period_ms: 100 });
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(limiter.allow(at(0), 4), Ok(4));
        limiter.spend(4);
        assert_eq!(limiter.allow(at(50), 20), Ok(6));
        limiter.spend(6);
        assert_eq!(limiter.allow(at(60), 1), Err(Duration::from_millis(40)));
        assert_eq!(limiter.allow(at(500), 20), Ok(10));
        limiter.spend(10);
        assert_eq!(limiter.allow(at(599), 1), Err(Duration::from_millis(1)));
        assert_eq!(limiter.allow(at(600), 1), Ok(1));
    }

    proptest! {
        /// However it is asked, no stretch of one period sees more than twice the bytes of a period, and a wait always helps.
        #[test]
        fn never_more_than_allowed(
            max in 1u64..1000,
            period in 1u64..1000,
            asks in proptest::collection::vec((0u64..300, 1usize..2000), 1..100),
        ) {
            let mut limiter = Limiter::new(RngLimit { max_bytes: max, period_ms: period });
            let (start, mut now) = (Instant::now(), 0);
            let mut given: Vec<(u64, u64)> = vec![];
            for (pause, wanted) in asks {
                now += pause;
                match limiter.allow(start + Duration::from_millis(now), wanted) {
                    Ok(n) => {
                        prop_assert!(n > 0 && n <= wanted);
                        limiter.spend(n);
                        given.push((now, n as u64));
                    }
                    Err(wait) => {
                        prop_assert!(wait <= Duration::from_millis(period));
                        now += wait.as_millis() as u64;
                        let again = limiter.allow(start + Duration::from_millis(now), wanted);
                        prop_assert!(again.is_ok());
                    }
                }
            }
            for (from, _) in &given {
                let sum: u64 =
                    given.iter().filter(|(at, _)| at >= from && *at < from + period).map(|(_, n)| n).sum();
                prop_assert!(sum <= 2 * max);
            }
        }
    }
}
