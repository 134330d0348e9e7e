//! What a saved virtio device is: owns the form in which transports and device models are written down, and why one cannot be.
//!
//! ```text
//!               suspend                          save
//!   running ──────────────▶ suspended ─────────────────────────▶ TransportState
//!      ▲                        │   ▲                                  │
//!      └──────── resume ────────┘   └───────────── restore ────────────┘  (into a new transport, whose driver has done nothing)
//! ```
//!
//! A suspended device has nothing in flight and touches neither rings nor buffers. It goes on by being activated again, with queues that
//! stand where they stood: in this process or in another.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ActivateError;
use super::blk::saved::Saved as SavedBlk;
use super::console::saved::Saved as SavedConsole;
use super::net::saved::Saved as SavedNet;
use super::queue::{Layout, Position};
use crate::pci::SavedVector;

/// How long a device may take to finish what is in flight.
pub(crate) const SUSPEND_DEADLINE: Duration = Duration::from_secs(10);

/// Why a device cannot be saved, or not be given what was saved.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Its state is not all in this process.
    #[error("{0} cannot be part of a snapshot")]
    Excluded(&'static str),
    /// The host does not finish what was asked of it.
    #[error("what is in flight does not finish within {seconds} seconds; try again", seconds = SUSPEND_DEADLINE.as_secs())]
    Busy,
    /// The device is not the one that was saved.
    #[error("{field} differs: {saved} in the snapshot, {here} in this VM")]
    Mismatch {
        /// What differs.
        field: &'static str,
        /// As it was.
        saved: String,
        /// As it is.
        here: String,
    },
    /// Bytes that no device has written.
    #[error("the saved {0} makes no sense")]
    Malformed(&'static str),
    /// A copy of its image made now would not be whole.
    #[error("cannot write the tables of its image: {0}")]
    Image(#[source] std::io::Error),
    /// It does not go on.
    #[error(transparent)]
    Activate(#[from] ActivateError),
    /// The guest has let it go, and it has not ended yet.
    #[error("is being unplugged; try again once it has gone")]
    Leaving,
}

/// A transport as a snapshot sees it.
pub trait Suspend: Send + Sync {
    /// Stops the device where it stands; the driver must not run. After an error it goes on.
    fn suspend(&self) -> Result<(), StateError>;
    /// The VM is paused: as [`suspend`](Self::suspend) for a device that another process serves. What serves the others is here, and may
    /// finish what it is at.
    fn hold(&self) -> Result<(), StateError>;
    /// The state of a transport that was suspended.
    fn save(&self) -> Result<TransportState, StateError>;
    /// Gives a new transport, whose device has not been driven, what was saved. The device stands still until [`resume`](Self::resume).
    fn restore(&self, state: &TransportState) -> Result<(), StateError>;
    /// Lets a suspended device go on, with the queues where they stood. Interrupts may come from now on.
    fn resume(&self) -> Result<(), StateError>;
}

/// Refuses a difference in one field.
pub(crate) fn same<T: PartialEq + fmt::Debug>(
    field: &'static str,
    saved: &T,
    here: &T,
) -> Result<(), StateError> {
    if saved == here {
        return Ok(());
    }
    Err(StateError::Mismatch { field, saved: format!("{saved:?}"), here: format!("{here:?}") })
}

/// One queue of a transport.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// As the driver has set it up.
    pub layout: Layout,
    /// The driver has enabled it.
    pub ready: bool,
    /// Where a running device stands.
    pub position: Position,
}

/// The registers of a transport, with its device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransportState {
    /// virtio 1.2 §5.
    pub device_type: u32,
    /// Without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
    /// Registers, by their names in virtio 1.2 §4.2.2.
    pub device_features_sel: u32,
    /// As above.
    pub driver_features_sel: u32,
    /// As above.
    pub driver_features: u64,
    /// As above.
    pub queue_sel: u32,
    /// As above.
    pub interrupt_status: u32,
    /// As above.
    pub config_generation: u32,
    /// A kernel has found the device in ACPI.
    pub claimed: bool,
    /// By number.
    pub queues: Vec<QueueState>,
    /// What a transport on PCI has besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciState>,
    /// The device model.
    pub device: DeviceState,
}

/// A function on PCI.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PciState {
    /// Configuration space.
    pub config: Vec<u8>,
    /// The table of MSI-X.
    pub msix: Vec<SavedVector>,
    /// Vector of the configuration.
    pub config_vector: u16,
    /// Vectors of the queues, by number.
    pub queue_vectors: Vec<u16>,
}

/// The state of a device model besides its rings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// A disk, or an empty slot.
    Blk(SavedBlk),
    /// A NIC, or an empty slot.
    Net(SavedNet),
    /// A virtio-serial device.
    Console(SavedConsole),
    /// A source of random bytes, which has no state.
    Rng,
}

impl DeviceState {
    /// Before it is given to another VM, which `here` is a device of: what tells VMs apart becomes that one's. Its guest is told when it goes on.
    pub(crate) fn take_identity(&mut self, here: &Self) {
        match (self, here) {
            (Self::Blk(saved), Self::Blk(here)) => saved.take_identity(here),
            (Self::Net(saved), Self::Net(here)) => saved.take_identity(here),
            // Others have none; what does not fit is refused when it is restored.
            _ => {}
        }
    }
}
