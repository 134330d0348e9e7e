//! For the fuzz targets only: the check of packet headers, and commands of the control queue.

use super::control::{self, Command};

/// Whether the kernel may see this header with a packet of `len` bytes, `features` negotiated.
pub fn header_is_fine(header: &[u8; 12], len: u64, features: u64) -> bool {
    super::tx::header_is_fine(header, len, features)
}

/// Reads a command of the control queue; what it would change must have been negotiated.
pub fn control(bytes: &[u8], features: u64) {
    match control::parse(bytes, features) {
        Some(Command::Offloads(wanted)) => assert_eq!(wanted & !features, 0),
        Some(Command::Pairs(pairs)) => assert_ne!(pairs, 0),
        Some(Command::Mac(mac)) => assert_eq!(mac[0] & 1, 0),
        Some(Command::Granted) | None => {}
    }
}
