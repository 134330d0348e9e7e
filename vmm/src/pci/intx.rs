//! A function's interrupt pin (PCI Local Bus 3.0 §2.2.6): asserted while the function has a reason, unless the driver uses MSI-X or has switched the
//! pin off.

use std::sync::{Arc, Mutex, PoisonError};

use crate::irq::Level;

struct Pin {
    wanted: bool,
    allowed: bool,
}

/// The pin.
pub struct Intx {
    line: Arc<dyn Level>,
    pin: Mutex<Pin>,
}

impl Intx {
    /// A pin that pulls `line`.
    pub fn new(line: Arc<dyn Level>) -> Self {
        Self { line, pin: Mutex::new(Pin { wanted: false, allowed: true }) }
    }

    fn change(&self, change: impl FnOnce(&mut Pin)) {
        let mut pin = self.pin.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut pin);
        self.line.set(pin.wanted && pin.allowed);
    }

    /// The function has a reason to interrupt, or has none any more.
    pub fn want(&self, wanted: bool) {
        self.change(|pin| pin.wanted = wanted);
    }

    /// Looks again whether there is a reason. It is looked for under the pin's lock: of two threads the one that comes last sees what
    /// the other did.
    pub fn settle(&self, reason: impl FnOnce() -> bool) {
        self.change(|pin| pin.wanted = reason());
    }

    /// The driver lets the pin work, or not.
    pub fn allow(&self, allowed: bool) {
        self.change(|pin| pin.allowed = allowed);
    }

    /// Whether the function has a reason, whatever the driver says: the interrupt status bit.
    pub fn wanted(&self) -> bool {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner).wanted
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Remembers its level.
    #[derive(Default)]
    pub(crate) struct Wire(pub(crate) AtomicBool);

    impl Level for Wire {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_pin_follows_both() {
        let wire = Arc::new(Wire::default());
        let intx = Intx::new(Arc::clone(&wire) as _);
        let up = || wire.0.load(Ordering::Relaxed);
        intx.want(true);
        assert!(up());
        intx.allow(false);
        assert!(!up() && intx.wanted());
        intx.allow(true);
        assert!(up());
        intx.want(false);
        assert!(!up());
    }
}
