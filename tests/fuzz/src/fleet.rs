//! What a definition may be, and the command line that it becomes: the daemon's own sources.

#[path = "../../../supervisor/src/fleet/command.rs"]
pub mod command;
#[path = "../../../supervisor/src/fleet/error.rs"]
mod error;
#[path = "../../../supervisor/src/fleet/spec.rs"]
pub mod spec;

pub use error::FleetError;
