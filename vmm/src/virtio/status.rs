//! The device status field (virtio 1.2 §2.1): owns every decision about it, for all transports. Pure: `(state, write) -> effect`.
//!
//! ```text
//!            ACKNOWLEDGE      DRIVER      FEATURES_OK (if the set is fine)     DRIVER_OK
//!   reset ───────────────▶ ─────────▶ ─────────────────────────────────▶ ───────────────▶ running
//!     ▲                        │ features may be written │ queues may be set up │ both frozen │
//!     └─────────────────────── write 0, from anywhere ───────────────────────────────────────┘
//! ```
//!
//! FAILED is the driver's own: once it is set, nothing but a reset goes on. DEVICE_NEEDS_RESET is the device's own: the driver
//! can neither set nor clear it, except by a reset.

/// The driver has found the device.
pub const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive it.
pub const DRIVER: u8 = 2;
/// The driver is set up; the device may run.
pub const DRIVER_OK: u8 = 4;
/// The driver and the device agree on features.
pub const FEATURES_OK: u8 = 8;
/// The device has met something that it cannot recover from.
pub const DEVICE_NEEDS_RESET: u8 = 64;
/// The driver has given up.
pub const FAILED: u8 = 128;

const OF_DRIVER: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// What the transport has to do after a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Stop the device and put every register back.
    Reset,
    /// Build the queues and start the device.
    Activate,
}

/// The field itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status(u8);

impl Status {
    /// A field that was saved; `None` if no driver can have got there.
    pub fn from_saved(bits: u8) -> Option<Self> {
        let status = Self(bits);
        let steps = [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)];
        let ordered = steps.iter().all(|(bit, needs)| !status.has(*bit) || status.has(*needs));
        (bits & !(OF_DRIVER | DEVICE_NEEDS_RESET) == 0 && ordered).then_some(status)
    }

    /// As the driver reads it.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether every bit of `bits` is set.
    pub fn has(self, bits: u8) -> bool {
        self.0 & bits == bits
    }

    /// Whether the driver may choose features now (§3.1.1 step 4).
    pub fn features_open(self) -> bool {
        self.has(DRIVER) && self.0 & (FEATURES_OK | DRIVER_OK | FAILED) == 0
    }

    /// Whether the driver may set up queues now (§3.1.1 step 7).
    pub fn queues_open(self) -> bool {
        self.has(FEATURES_OK) && self.0 & (DRIVER_OK | FAILED) == 0
    }

    /// The driver writes `value`; `features_fine` says whether the features it chose are a subset of those offered, with
    /// VIRTIO_F_VERSION_1. Returns the new state and what to do. A write that makes no sense changes nothing.
    pub fn write(self, value: u8, features_fine: bool) -> (Self, Effect) {
        if value == 0 {
            return (Self(0), Effect::Reset);
        }
        let (old, new) = (self.0 & OF_DRIVER, value & OF_DRIVER);
        // §2.1.1: the driver must not clear a bit. One that does is confused; do not follow it half way.
        if old & !new != 0 || self.has(FAILED) {
            return (self, Effect::None);
        }
        let mut bits = self.0;
        if new & FAILED != 0 {
            return (Self(bits | FAILED), Effect::None);
        }
        // Each step is granted only on top of the one before it.
        for (bit, needs) in
            [(ACKNOWLEDGE, 0), (DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
        {
            let granted = bits & needs == needs && (bit != FEATURES_OK || features_fine || bits & bit != 0);
            if new & bit != 0 && granted {
                bits |= bit;
            }
        }
        let started = bits & !self.0 & DRIVER_OK != 0;
        (Self(bits), if started { Effect::Activate } else { Effect::None })
    }

    /// The device cannot go on. Returns true if the driver has to be interrupted (§2.1.2: only once DRIVER_OK is set).
    pub fn needs_reset(&mut self) -> bool {
        self.0 |= DEVICE_NEEDS_RESET;
        self.has(DRIVER_OK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_driver_by_the_book_gets_there_and_back() {
        let mut status = Status::default();
        let steps = [
            (1, 1, Effect::None),
            (3, 3, Effect::None),
            (0xb, 0xb, Effect::None),
            (0xf, 0xf, Effect::Activate),
            (0xf, 0xf, Effect::None),
            (0, 0, Effect::Reset),
        ];
        for (write, read, effect) in steps {
            let (next, got) = status.write(write, true);
            assert_eq!((next.bits(), got), (read, effect), "write {write:#x}");
            status = next;
        }
    }

    #[test]
    fn steps_out_of_order_are_not_granted() {
        // (state, write, features fine, state after)
        let cases = [
            (0, DRIVER, true, 0),
            (0, DRIVER_OK, true, 0),
            (3, 3 | DRIVER_OK, true, 3),
            (3, 3 | FEATURES_OK, false, 3),
            (3, 3 | FEATURES_OK | DRIVER_OK, false, 3),
            (0xb, 3, true, 0xb),
            (0xf, 0xb, true, 0xf),
            (0xb, 0xf | DEVICE_NEEDS_RESET, false, 0xf),
            (3, 3 | DEVICE_NEEDS_RESET | 0x30, true, 3),
            (3, 3 | FAILED, true, 3 | FAILED),
            (3 | FAILED, 0xb | FAILED, true, 3 | FAILED),
            (0xf | DEVICE_NEEDS_RESET, 0xf, true, 0xf | DEVICE_NEEDS_RESET),
        ];
        for (state, write, fine, after) in cases {
            assert_eq!(Status(state).write(write, fine).0.bits(), after, "{state:#x} <- {write:#x}");
        }
    }

    #[test]
    fn only_what_a_driver_can_reach_is_restored() {
        for bits in 0..=u8::MAX {
            let fine = matches!(bits & 0xf, 0 | 1 | 3 | 0xb | 0xf) && bits & 0x30 == 0;
            assert_eq!(Status::from_saved(bits).is_some(), fine, "{bits:#x}");
        }
    }

    proptest! {
        /// Whatever is written: bits are only granted in order, never vanish but by reset, and the device starts once per reset.
        #[test]
        fn any_sequence_keeps_the_rules(writes in prop::collection::vec((any::<u8>(), any::<bool>(), any::<bool>()), 0..64)) {
            let mut status = Status::default();
            let mut running = false;
            for (value, fine, broken) in writes {
                let (next, effect) = status.write(value, fine);
                match effect {
                    Effect::Reset => {
                        prop_assert_eq!(next.bits(), 0);
                        running = false;
                    }
                    Effect::Activate => {
                        prop_assert!(!running);
                        running = true;
                    }
                    Effect::None => prop_assert_eq!(next.bits() & status.bits(), status.bits()),
                }
                prop_assert_eq!(next.has(DRIVER_OK), running);
                prop_assert!(!next.has(DRIVER_OK) || next.has(FEATURES_OK | DRIVER | ACKNOWLEDGE));
                prop_assert!(!(next.features_open() && next.queues_open()));
                prop_assert!(!running || (!next.features_open() && !next.queues_open()));
                status = next;
                if broken {
                    prop_assert_eq!(status.needs_reset(), running);
                }
            }
        }
    }
}
