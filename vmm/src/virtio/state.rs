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

use super::queue::{Layout, Position};
use super::{ActivateError, blk, console, net};

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
    /// It does not go on.
    #[error(transparent)]
    Activate(#[from] ActivateError),
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
    /// The device model.
    pub device: DeviceState,
}

/// The state of a device model besides its rings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// A disk, or an empty slot.
    Blk(blk::Saved),
    /// A NIC, or an empty slot.
    Net(net::Saved),
    /// A virtio-serial device.
    Console(console::Saved),
    /// A source of random bytes, which has no state.
    Rng,
}
