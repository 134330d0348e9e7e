//! The registers of a hardware-reduced ACPI platform, in four consecutive I/O ports.
//!
//! ```text
//! +0 sleep control (ACPI 6.4 §4.8.3.7): SLP_TYP in bits 2-4, SLP_EN in bit 5
//! +1 sleep status: reads 0, the machine has never slept
//! +2 reset (ACPI 6.4 §4.8.3.6)
//! +3 claim: the number of a virtio-mmio device whose _STA has run
//! ```

use super::{OnPower, PowerRequest};
use crate::bus::BusDevice;

/// `SLP_TYP` of soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Resets the machine when written to the reset register.
pub const RESET_VALUE: u8 = 1;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
const CLAIM: u64 = 3;
const SLP_EN: u8 = 1 << 5;

/// Told, from a vCPU's thread, which device the guest has found through ACPI. Any value may come.
pub type OnClaim = Box<dyn Fn(u8) + Send + Sync>;

/// The four registers.
pub struct AcpiRegisters {
    on_power: OnPower,
    on_claim: OnClaim,
}

impl AcpiRegisters {
    /// I/O ports that they take.
    pub const PORTS: u64 = 4;
    /// Offset of the sleep control register.
    pub const SLEEP_CONTROL: u16 = SLEEP_CONTROL as u16;
    /// Offset of the sleep status register.
    pub const SLEEP_STATUS: u16 = 1;
    /// Offset of the reset register.
    pub const RESET: u16 = RESET as u16;
    /// Offset of the claim register.
    pub const CLAIM: u16 = CLAIM as u16;

    /// Registers that report to these two.
    pub fn new(on_power: OnPower, on_claim: OnClaim) -> Self {
        Self { on_power, on_claim }
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // All are byte registers; a wider access is no way to reach them.
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if value & SLP_EN != 0 && (value >> 2) & 7 == SLEEP_TYPE_S5 => {
                (self.on_power)(PowerRequest::Off);
            }
            RESET if value == RESET_VALUE => (self.on_power)(PowerRequest::Reset),
            CLAIM => (self.on_claim)(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn acts_on_the_documented_values_only() {
        let power = Arc::new(Mutex::new(vec![]));
        let claims = Arc::new(Mutex::new(vec![]));
        let (p, c) = (Arc::clone(&power), Arc::clone(&claims));
        let device = AcpiRegisters::new(
            Arc::new(move |r| p.lock().unwrap().push(r)),
            Box::new(move |n| c.lock().unwrap().push(n)),
        );
        for offset in 0..4 {
            for value in 0..=u8::MAX {
                device.write(offset, &[value]);
                device.write(offset, &[value, value]);
            }
            device.write(offset, &[]);
        }
        // SLP_TYP 5 with SLP_EN, whatever the four bits around them say.
        let mut expected = vec![PowerRequest::Off; 16];
        expected.push(PowerRequest::Reset);
        assert_eq!(*power.lock().unwrap(), expected);
        assert_eq!(*claims.lock().unwrap(), (0..=u8::MAX).collect::<Vec<_>>());
        let mut data = [0xaa; 8];
        device.read(1, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
