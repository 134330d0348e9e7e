//! Devices of the host that are handed to a guest whole: owns VFIO's files, what a guest sees of such a device, and which memory it may reach.
//!
//! ```text
//! function  a device on the guest's bus                                  view     what of configuration space is the device's (pure)
//! area      what of its BARs the guest reaches by itself                 vectors  MSI and MSI-X        pin  INTx
//! host      container, groups, the device's own registers; DMA           ioctl    the kernel's interface
//! ```
//!
//! ```text
//! on the host ── open: group into the container, memory mapped ──▶ reset ── driver of the guest ──▶ in use
//!      ▲                                                                                             │
//!      └──────────── shut_down: interrupts off, BARs unmapped, reset, files closed ◀─────────────────┘
//! ```
//!
//! A device reaches guest memory by the guest's own addresses, through the host's IOMMU, and nothing else: no BAR, no flash. All of guest memory is
//! mapped, and so kept in place: while there is a device no page of it can be given back, and a balloon frees nothing.

mod area;
mod function;
mod host;
mod ioctl;
mod pin;
mod vectors;
mod view;

pub use function::{HostFunction, Wires};
pub use host::{Container, VfioError, allow_pinning};
