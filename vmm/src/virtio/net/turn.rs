//! One direction's turn on its thread: owns how long it may take and how it ends. `rx` and `tx` take turns, `serve` gives them.

use std::io;

/// Packets per wake-up and direction, so that one busy NIC does not starve the other devices on its thread.
pub(super) const BATCH: u32 = 256;
/// Packets between two looks whether the driver wants to know.
pub(super) const PUBLISH_EVERY: u32 = 32;

/// Why a batch ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Nothing to do until somebody tells us.
    Idle,
    /// There is more.
    Full,
    /// The tap is gone.
    TapGone,
}

/// Whether an error of a tap means that it will never work again: the interface was deleted (EBADFD), or the descriptor is not
/// what we believe.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF | libc::ENODEV | libc::ENXIO))
}
