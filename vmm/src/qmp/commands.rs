//! The table of QMP commands: owns which exist, which arguments each takes, and the answers that need no VM.
//!
//! Everything that concerns the VM becomes a [`Command`] for the control room; nothing here knows a device.

use serde_json::{Map, Value, json};

use super::message::{Class, QmpError, Request, package};
use crate::config::MAX_CPUS;
use crate::control::Command;

/// Events that this version can send.
const EVENTS: [&str; 3] = ["RESUME", "SHUTDOWN", "STOP"];

type Arguments = Map<String, Value>;

/// Who answers a command.
pub(super) enum Action {
    /// The owner of the VM's life.
    Control(Command),
    /// Nobody needs to be asked.
    Answer(Value),
}

struct Spec {
    name: &'static str,
    /// Names of the arguments.
    arguments: &'static [&'static str],
    action: fn(&Arguments) -> Result<Action, QmpError>,
}

macro_rules! control {
    ($name:literal, $command:ident) => {
        Spec { name: $name, arguments: &[], action: |_| Ok(Action::Control(Command::$command)) }
    };
}

const fn answer(name: &'static str, action: fn(&Arguments) -> Result<Action, QmpError>) -> Spec {
    Spec { name, arguments: &[], action }
}

const COMMANDS: &[Spec] = &[
    control!("cont", Cont),
    Spec { name: "qmp_capabilities", arguments: &["enable"], action: capabilities },
    answer("query-commands", |_| Ok(Action::Answer(names(COMMANDS.iter().map(|spec| spec.name))))),
    control!("query-cpus", QueryCpus),
    answer("query-events", |_| Ok(Action::Answer(names(EVENTS)))),
    control!("query-hotpluggable-cpus", QueryHotpluggableCpus),
    answer("query-kvm", |_| Ok(Action::Answer(json!({ "enabled": true, "present": true })))),
    answer("query-machines", |_| {
        let machine = |name| {
            json!({
                "cpu-max": MAX_CPUS, "deprecated": false, "hotpluggable-cpus": false, "name": name,
                "numa-mem-supported": false,
            })
        };
        Ok(Action::Answer(json!([machine("none"), machine("microvm")])))
    }),
    control!("query-name", QueryName),
    control!("query-status", QueryStatus),
    answer("query-target", |_| Ok(Action::Answer(json!({ "arch": std::env::consts::ARCH })))),
    control!("query-uuid", QueryUuid),
    answer("query-version", |_| {
        Ok(Action::Answer(json!({ "package": package(), "qemu": { "major": 5, "micro": 1, "minor": 0 } })))
    }),
    control!("quit", Quit),
    control!("stop", Stop),
];

fn names(names: impl IntoIterator<Item = &'static str>) -> Value {
    names.into_iter().map(|name| json!({ "name": name })).collect()
}

/// No capability is offered, so none can be enabled; a client need not negotiate at all.
fn capabilities(arguments: &Arguments) -> Result<Action, QmpError> {
    match arguments.get("enable") {
        None => {}
        Some(Value::Array(list)) if list.is_empty() => {}
        Some(Value::Array(list)) => {
            let first = list.first().unwrap_or(&Value::Null);
            return Err(QmpError::generic(format!("capability {first} is not available")));
        }
        Some(_) => return Err(QmpError::generic("argument 'enable' must be an array")),
    }
    Ok(Action::Answer(json!({})))
}

/// Finds the command of a request and checks its arguments.
pub(super) fn resolve(request: &Request) -> Result<Action, QmpError> {
    let Request { command, arguments, .. } = request;
    let Some(spec) = COMMANDS.iter().find(|spec| spec.name == command) else {
        // Control characters and endless names do not go back into a client's log as they came.
        let name: String = command.chars().take(64).flat_map(char::escape_debug).collect();
        return Err(QmpError {
            class: Class::CommandNotFound,
            desc: format!("The command {name} has not been found"),
        });
    };
    if let Some(key) = arguments.keys().find(|key| !spec.arguments.contains(&key.as_str())) {
        let known = if spec.arguments.is_empty() { "none".to_owned() } else { spec.arguments.join(", ") };
        let key: String = key.chars().take(64).flat_map(char::escape_debug).collect();
        return Err(QmpError::generic(format!(
            "unknown argument '{key}' of command {command} (known: {known})"
        )));
    }
    (spec.action)(arguments)
}
