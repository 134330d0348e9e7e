//! What command lines say of a VM's sockets: the daemon's own source.

#[path = "../../../supervisor/src/launch/sockets.rs"]
mod sockets;

pub use sockets::CONSOLE_SOCKET;
pub use sockets::QMP_SOCKET;
