//! The supervisor: one daemon that owns a host's fleet of VMs. Programs: `flotillad`, and `flotilla-exec`, which each VM's unit runs first.
//!
//! Rooms, ground floor last; a room imports only rooms below it:
//!
//! ```text
//! main.rs    flotillad: options, wiring, readiness, signals
//! metrics.rs Prometheus text for whoever asks, from memory
//! dbus/      thin handlers: authorise, ask the fleet, answer; signals and property changes
//! template/  templates, and the VMs that are cloned from them
//! fleet/     registry, one actor per VM, the pure state machine, jobs, adoption
//! launch/    how a VMM process comes to be: systemd units, or plain children
//! qmp/       client of each VMM, and its proxy for everybody else
//! store/     records on disk
//! shelf.rs   sockets that outlive the daemon
//! config.rs  what the administrator sets
//! ```
//!
//! Words that are written to disk are shared downwards: the states of `fleet::life` and `fleet::devices` (pure data) by `store` and `launch`.

pub mod config;
pub mod dbus;
pub mod fleet;
pub mod launch;
pub mod metrics;
pub mod qmp;
pub mod shelf;
pub mod store;
pub mod template;
