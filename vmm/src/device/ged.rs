//! The register of a generic event device (ACPI 6.4 §5.6.9): what an interrupt was about. The guest's method reads which events there are,
//! which clears them, and tells the devices that they concern.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::BusDevice;
use crate::irq::Line;

/// Processors have come, or are to leave.
pub const EVENT_CPUS: u32 = 1 << 4;

/// The register and the interrupt.
pub struct EventRegister {
    events: AtomicU32,
    line: Arc<dyn Line>,
}

impl EventRegister {
    /// Bytes.
    pub const SIZE: u64 = 4;

    /// A register that interrupts by `line`.
    pub fn new(line: Arc<dyn Line>) -> Arc<Self> {
        Arc::new(Self { events: AtomicU32::new(0), line })
    }

    /// Tells the guest of these events.
    pub fn raise(&self, events: u32) {
        self.events.fetch_or(events, Ordering::AcqRel);
        self.line.trigger();
    }

    /// As at power-on.
    pub fn reset(&self) {
        self.events.store(0, Ordering::Release);
    }
}

impl BusDevice for EventRegister {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // The whole register or nothing: a part would take the rest with it.
        if let (0, Ok(word)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *word = self.events.swap(0, Ordering::AcqRel).to_le_bytes();
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Edges(AtomicU32);
    impl Line for Edges {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn events_stay_until_all_are_read() {
        let edges = Arc::new(Edges::default());
        let register = EventRegister::new(Arc::clone(&edges) as _);
        let read = |offset, len: usize| {
            let mut data = [0xaa; 8];
            register.read(offset, &mut data[..len]);
            data
        };
        register.raise(EVENT_CPUS);
        register.raise(2);
        for (offset, len) in [(0, 1), (0, 2), (1, 1), (1, 4), (0, 8), (4, 4)] {
            assert_eq!(read(offset, len)[..len], [0; 8][..len], "{offset}+{len}");
        }
        register.write(0, &[0xff; 4]);
        assert_eq!(read(0, 4)[..4], [0x12, 0, 0, 0]);
        assert_eq!(read(0, 4)[..4], [0; 4]);
        register.raise(1);
        register.reset();
        assert_eq!((read(0, 4)[..4].to_vec(), edges.0.load(Ordering::Relaxed)), (vec![0; 4], 3));
    }
}
