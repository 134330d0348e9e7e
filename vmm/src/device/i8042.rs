//! The keyboard controller's one use in a machine without a keyboard: its reset line (`reboot=k`).

use super::{OnPower, PowerRequest};
use crate::bus::BusDevice;

/// "Pulse output line 0": resets the processor.
const PULSE_RESET: u8 = 0xfe;
/// All ones, as for any port without a device, but for bit 1 (input buffer full). A keyboard driver sees a full output buffer
/// that never empties and gives up at once; a kernel that wants to reset waits for bit 1 to clear and finds it clear.
const STATUS: u8 = 0xfd;

/// Port 0x64: command and status.
pub struct I8042Reset {
    on_power: OnPower,
}

impl I8042Reset {
    /// Its I/O port.
    pub const PORT: u64 = 0x64;

    /// A controller that reports resets to `on_power`.
    pub fn new(on_power: OnPower) -> Self {
        Self { on_power }
    }
}

impl BusDevice for I8042Reset {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(STATUS);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            (self.on_power)(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn resets_on_one_command_only() {
        let resets = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&resets);
        let device = I8042Reset::new(Arc::new(move |request| {
            assert_eq!(request, PowerRequest::Reset);
            count.fetch_add(1, Ordering::Relaxed);
        }));
        for value in 0..=u8::MAX {
            device.write(0, &[value]);
        }
        device.write(0, &[PULSE_RESET, 0]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
        let mut status = [0];
        device.read(0, &mut status);
        assert_eq!(status[0] & 2, 0);
    }
}
