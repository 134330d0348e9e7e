//! Interrupt routing: owns the in-kernel interrupt controllers, the GSI table, and the lines that devices pull.

/// An edge-triggered interrupt line into the guest.
pub trait Line: Send + Sync {
    /// Raises one edge. Callable from any thread; errors are logged once, not returned: no device could act on them.
    fn trigger(&self);
}
