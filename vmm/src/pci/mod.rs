//! The PCI bus of the standard machine: owns configuration space, where BARs come to lie, MSI-X, INTx, and root ports with their slots.
//!
//! ```text
//! root     functions by bus, device and function; ECAM and CF8/CFC; puts BARs onto the machine's bus
//! port     pcie-root-port: a bridge with one slot          slot    the slot's registers (pure)
//! config   configuration space as bytes with write masks   bar     which BARs are mapped (pure)
//! msix     table, pending bits, masks                      intx    a function's share of an interrupt pin
//! platform host bridge and LPC
//! ```
//!
//! The machine builds functions and puts them on the [`Root`]; vCPU threads reach them through it. A function never calls the root.
//! Lock order: the root's state, then a function's own locks.

mod bar;
pub mod config;
mod intx;
mod msix;
mod platform;
mod port;
mod root;
mod slot;

use std::sync::Arc;

pub use bar::Window;
pub use intx::Intx;
pub use msix::{Msix, SavedVector, TABLE_SIZE};
pub use platform::{HostBridge, lpc};
pub use port::{PortEvents, PortOptions, RootPort, SavedPort};
pub use root::{Address, Root, RootError};
pub use slot::Pending;

use crate::bus::BusDevice;

/// One BAR that wants to be mapped now.
pub struct Mapping {
    /// Number of the BAR.
    pub bar: u8,
    /// Guest physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// What is behind it.
    pub device: Arc<dyn BusDevice>,
}

/// One function of a device, as the bus sees it. Called from vCPU threads and from the thread that owns the machine.
pub trait Function: Send + Sync {
    /// Reads configuration space. `offset` and `data` lie within its 4096 bytes; every byte must be written.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space. Returns whether what is mapped, or let through to another bus, may have changed.
    fn write_config(&self, offset: u16, data: &[u8]) -> bool;
    /// The BARs that want to be mapped now, in order of their number.
    fn mappings(&self) -> Vec<Mapping>;
    /// BAR `bar` is reachable at this address from now on, or nowhere.
    fn mapped(&self, bar: u8, base: Option<u64>);
    /// As at power-on.
    fn reset(&self);
}

/// The other ends of interrupts, for tests.
#[cfg(test)]
pub(crate) mod test_wires {
    pub(crate) use super::intx::tests::Wire;
    pub(crate) use super::msix::tests::Sent;
}
