//! The owner of a VM's life: takes [`Command`]s, applies them to the machine, and decides who may do what when.
//!
//! Runs on the main loop's thread. QMP is above this room and turns text into commands; the machine is below it.

use serde_json::Value;

/// What a management client can ask of a VM. One meaning each, whoever asks.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// `query-status`.
    QueryStatus,
    /// `query-cpus`.
    QueryCpus,
    /// `query-hotpluggable-cpus`.
    QueryHotpluggableCpus,
    /// `query-name`.
    QueryName,
    /// `query-uuid`.
    QueryUuid,
    /// `stop`.
    Stop,
    /// `cont`.
    Cont,
    /// `quit`.
    Quit,
}

/// Something that happened to the VM, told to every QMP client.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// QMP name, such as `STOP`.
    pub name: &'static str,
    /// QMP data.
    pub data: Value,
}
