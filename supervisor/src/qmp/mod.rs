//! QMP, both ways: a client of each VM's VMM, and a proxy that shares that one connection among many clients.
//!
//! A VMM takes one QMP client at a time, and that is the supervisor: [`Monitor`] is the connection, with a deadline on
//! everything. [`Proxy`] is the VM's socket for everybody else; it lives as long as the VM's definition and is given the
//! monitor of each run.
//!
//! ```text
//!   client ── session ─┐
//!   client ── session ─┼─ Proxy (greeting, who may connect) ─── Monitor ─── VMM
//!   D-Bus  ── session ─┘                     fleet (actor) ────────┘
//! ```
//!
//! Rooms, each importing only those below it:
//!
//! ```text
//! proxy.rs     the socket of one VM: clients come, the monitor changes
//! session.rs   one client: its greeting, its commands in turn, its events
//! taps.rs      taps that a client asks for by name
//! rights.rs    who a client is, what it may send, who is told of it
//! monitor.rs   one task that owns the connection to the VMM; answers are matched by number
//! wire.rs      bytes and descriptors in and out of a unix socket
//! message.rs   requests, answers, events as JSON, without touching what is inside them
//! codec.rs     where one JSON value ends and the next begins
//! error.rs     what can go wrong
//! ```
//!
//! The VMM is not trusted more than a client: a guest may have taken it over. What it sends is bounded, and nothing in it
//! can stop this daemon or another VM.

mod codec;
mod error;
#[cfg(test)]
pub(crate) mod fake;
mod message;
mod monitor;
mod proxy;
mod rights;
mod session;
mod taps;
mod wire;

pub use error::QmpError;
pub use message::QmpEvent;
pub use monitor::Monitor;
pub use proxy::{Caller, Proxy};
pub use rights::{Client, Mode, Stage, Told, Tracked, Watch};
pub use session::MAX_CLIENTS;
pub use taps::{TapNews, TapStep, Taps};

#[cfg(test)]
mod codec_tests;
#[cfg(test)]
mod message_tests;
#[cfg(test)]
mod monitor_tests;
#[cfg(test)]
mod proxy_tests;
#[cfg(test)]
mod stress_tests;
