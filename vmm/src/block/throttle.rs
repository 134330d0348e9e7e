//! Limits on requests per second: owns the arithmetic of the token bucket. Pure; whoever uses it brings the clock and the timer.

use std::time::Duration;

/// Time whose worth of requests may come at once after a pause.
const BURST: Duration = Duration::from_millis(100);

/// A bucket that fills with `rate` requests a second, up to a tenth of that (but one at least).
///
/// Kept as one number, the moment at which all requests taken so far would have been paid for at the even rate: no count has to be
/// topped up, and nothing is lost to rounding between two looks.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// What one request costs.
    cost: Duration,
    burst: Duration,
    paid: Duration,
}

impl Throttle {
    /// `rate`: requests a second; 0 is no limit.
    pub(crate) fn new(rate: u64) -> Option<Self> {
        let cost = Duration::from_nanos(1_000_000_000u64.checked_div(rate)?.max(1));
        // The request that is taken at the limit itself belongs to the burst.
        Some(Self { cost, burst: BURST.saturating_sub(cost), paid: Duration::ZERO })
    }

    /// Whether a request may be taken at `now` (time since any fixed moment), or how long to wait for it.
    pub(crate) fn ready(&self, now: Duration) -> Result<(), Duration> {
        match self.paid.checked_sub(now + self.burst) {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => Ok(()),
        }
    }

    /// One request has been taken.
    pub(crate) fn spend(&mut self, now: Duration) {
        self.paid = self.paid.max(now) + self.cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take_all(throttle: &mut Throttle, now: Duration) -> u64 {
        let mut taken = 0;
        while throttle.ready(now).is_ok() {
            throttle.spend(now);
            taken += 1;
        }
        taken
    }

    #[test]
    fn bursts_then_the_even_rate() {
        assert!(Throttle::new(0).is_none());
        for (rate, burst) in [(1, 1), (10, 1), (1000, 100), (1_000_000, 100_000)] {
            let mut t = Throttle::new(rate).unwrap();
            let mut now = Duration::from_secs(1);
            assert_eq!(take_all(&mut t, now), burst, "{rate}");
            let wait = t.ready(now).unwrap_err();
            assert!(wait <= Duration::from_secs(1) / rate as u32);
            now += wait;
            assert_eq!(take_all(&mut t, now), 1, "{rate}");
            now += Duration::from_secs(100);
            assert_eq!(take_all(&mut t, now), burst, "{rate}: a pause is worth no more than a burst");
        }
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_a_burst(
            rate in 1u64..1_000_000,
            steps in prop::collection::vec(0u64..50_000_000, 1..50),
        ) {
            let mut t = Throttle::new(rate).unwrap();
            let (mut now, mut taken) = (Duration::ZERO, 0u128);
            for step in steps {
                now += Duration::from_nanos(step);
                taken += u128::from(take_all(&mut t, now));
                let most = now.as_nanos() * u128::from(rate) / 1_000_000_000 + u128::from(rate / 10) + 2;
                prop_assert!(taken <= most + most / 1000, "{taken} of {most}");
            }
        }
    }
}
