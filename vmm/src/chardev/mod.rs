//! Character devices: owns the host ends (standard streams, pty, file, socket) of serial lines and of QMP over `-mon`.
//!
//! A front end (the guest's serial port, later a virtio console) attaches to a [`CharBackend`]; bytes from the host reach it through
//! [`FrontEnd`], on the main loop's thread; bytes from the guest go out through [`CharBackend::write`], from any thread.

use std::sync::Arc;

/// The guest's side of a character device.
pub trait FrontEnd: Send + Sync {
    /// How many bytes [`FrontEnd::receive`] will take now.
    fn can_receive(&self) -> usize;
    /// Bytes from the host; never more than [`FrontEnd::can_receive`] said.
    fn receive(&self, data: &[u8]);
}

/// The host's side of a character device.
pub trait CharBackend: Send + Sync {
    /// Bytes from the guest. Never blocks: what the host does not take is kept up to a limit, then dropped, oldest first.
    fn write(&self, data: &[u8]);
    /// Connects the guest's side; at most one.
    fn attach(&self, front_end: Arc<dyn FrontEnd>);
    /// The front end, full before, has room again.
    fn front_end_ready(&self);
}
