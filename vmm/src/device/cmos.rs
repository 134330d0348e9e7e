//! The clock that this machine does not have: ports 0x70 and 0x71.
//!
//! A kernel with ACPI is told that there is none. One without probes for it, and where the data port reads ones it takes the
//! clock for one that is forever in the middle of an update, and waits for seconds. Reading zero says: no update under way, not
//! running in a usable mode; the driver gives up at once.

use crate::bus::BusDevice;

/// Both ports; nothing is stored.
pub struct NoClock;

impl NoClock {
    /// First of its I/O ports.
    pub const PORT: u64 = 0x70;
    /// I/O ports that it takes.
    pub const PORTS: u64 = 2;
}

impl BusDevice for NoClock {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {}
}
