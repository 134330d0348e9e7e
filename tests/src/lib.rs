//! Flotilla's tests: owns the test hosts (emulated Debian machines with KVM inside), the guests that run on them and
//! what the scenarios in `tests/tests` share. No part of the product uses it.
//!
//! `cargo run -p tests --bin host -- --help` drives the same hosts by hand.

pub mod console;
pub mod fleet;
pub mod host;
pub mod hostile;
pub mod own_daemon;
pub mod plug;
pub mod qmp;
pub mod scenario;
