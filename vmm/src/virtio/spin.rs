//! How long a device looks at its ring before it sleeps: owns the guess when the driver's next request will come.
//!
//! To sleep and be woken costs tens of microseconds on either side. A driver that waits for each answer before it asks again comes
//! back sooner than that. Looking costs a host's processor, so it is done only while it pays:
//!
//! ```text
//!             woken sooner than MOST                 three looks in vain in a row
//!   asleep ───────────────────────────▶ looking ────────────────────────────────────▶ resting
//!     ▲                                  │    ▲                                          │
//!     └──── woken later than MOST: less ─┘    └── after 64 to 4096 sleeps, more each ────┘
//! ```
//!
//! A guest that asks rarely is never looked for. Where processors are short, the vCPU may be waiting for the very one that looks:
//! hence the rest. (To yield between looks is worse: on a busy host the thread gets its processor back tens of milliseconds later,
//! where one that sleeps is woken at once.)

use std::time::{Duration, Instant};

/// The longest look: what KVM by default spends on a halted vCPU for the same reason. On a host that is itself a VM, being woken costs
/// half of it.
const MOST: Duration = Duration::from_micros(200);
const LEAST: Duration = Duration::from_micros(5);
/// Looks between two looks at the clock.
const LOOKS: u32 = 32;
/// Looks in vain before a rest.
const IN_VAIN: u32 = 3;
/// Sleeps of a rest: the first one's, and the most.
const REST: u32 = 64;
const LONGEST_REST: u32 = 4096;

/// One ring's guess.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    window: Duration,
    /// When the device ran out of work, if it sleeps.
    idle_since: Option<Instant>,
    in_vain: u32,
    /// Sleeps left of this rest, and the length of the last one.
    rest: u32,
    last_rest: u32,
}

impl Spin {
    /// The device has been woken.
    pub(crate) fn woken(&mut self) {
        if let Some(since) = self.idle_since.take() {
            self.adapt(since.elapsed());
        }
    }

    fn adapt(&mut self, idle: Duration) {
        self.window = if idle < MOST { (idle * 2).clamp(LEAST, MOST) } else { self.window / 2 };
        if self.window < LEAST {
            self.window = Duration::ZERO;
        }
    }

    fn found(&mut self) {
        (self.in_vain, self.last_rest) = (0, 0);
    }

    fn missed(&mut self) {
        self.in_vain += 1;
        if self.in_vain >= IN_VAIN {
            self.last_rest = (self.last_rest * 2).clamp(REST, LONGEST_REST);
            (self.in_vain, self.rest) = (0, self.last_rest);
        }
    }

    /// Looks for work as long as it pays. True: `look` has found some. False: sleep, once the driver has been asked to notify.
    pub(crate) fn look(&mut self, mut look: impl FnMut() -> bool) -> bool {
        if self.rest > 0 {
            self.rest -= 1;
            return false;
        }
        let since = Instant::now();
        if !self.window.is_zero() {
            loop {
                for _ in 0..LOOKS {
                    if look() {
                        self.found();
                        return true;
                    }
                    std::hint::spin_loop();
                }
                if since.elapsed() >= self.window {
                    break;
                }
            }
            self.missed();
        }
        self.idle_since = Some(since);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window_after(start: Duration, idle: impl IntoIterator<Item = u64>) -> Duration {
        let mut spin = Spin { window: start, ..Spin::default() };
        idle.into_iter().for_each(|us| spin.adapt(Duration::from_micros(us)));
        spin.window
    }

    #[test]
    fn looks_as_long_as_requests_take_and_not_for_rare_ones() {
        assert_eq!(window_after(Duration::ZERO, [1]), LEAST);
        assert_eq!(window_after(Duration::ZERO, [30]), Duration::from_micros(60));
        assert_eq!(window_after(Duration::ZERO, [150]), MOST);
        assert_eq!(window_after(MOST, [1000; 6]), Duration::ZERO);
        assert_eq!(window_after(Duration::ZERO, [250; 100]), Duration::ZERO);
    }

    #[test]
    fn looks_only_when_it_has_learned_to() {
        let mut spin = Spin::default();
        let mut looks = 0;
        assert!(!spin.look(|| {
            looks += 1;
            true
        }));
        assert_eq!(looks, 0);
        spin.woken();
        spin.window = MOST;
        assert!(spin.look(|| {
            looks += 1;
            looks == 3
        }));
        assert!(spin.idle_since.is_none());
        assert!(!spin.look(|| false));
        assert!(spin.idle_since.is_some());
    }

    #[test]
    fn rests_longer_and_longer_when_it_looks_in_vain() {
        let mut spin = Spin { window: LEAST, ..Spin::default() };
        for rest in [64, 128, 256, 512, 1024, 2048, 4096, 4096] {
            for _ in 0..IN_VAIN {
                assert_eq!(spin.rest, 0);
                assert!(!spin.look(|| false));
            }
            for _ in 0..rest {
                assert!(!spin.look(|| panic!("it rests")));
            }
            assert_eq!((spin.rest, spin.last_rest), (0, rest));
        }
        assert!(spin.look(|| true));
        for _ in 0..IN_VAIN {
            assert!(!spin.look(|| false));
        }
        assert_eq!(spin.rest, REST, "one hit makes the next rest short again");
    }
}
