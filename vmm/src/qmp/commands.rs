//! The table of QMP commands: owns which exist, and the shape of their arguments and answers. The same table carries requests out and
//! describes itself to clients (`schema`).
//!
//! Everything that concerns the VM becomes a [`Command`] for the control room; nothing here knows a device.

use serde_json::{Value, json};

use super::answers;
use super::arguments::Kind::{Any, Bool, Int, List, Object, Text, Word};
use super::arguments::{Arguments, Get, Kind, Member, check, may, must, quote};
use super::descriptors::{Descriptors, NoName};
use super::human::Step;
use super::message::{Class, QmpError, Request};
use super::spec::{Action, Outcome, Spec, command};
use super::{human, plug, schema};
use crate::control::Command;
use crate::process::trace;

macro_rules! control {
    ($name:literal, $command:ident, $returns:expr) => {
        Spec {
            name: $name,
            arguments: &[],
            returns: $returns,
            action: |_, _| Ok(Action::Control(Command::$command)),
        }
    };
}

macro_rules! answer {
    ($name:literal, $arguments:expr, $returns:expr, $value:expr) => {
        Spec {
            name: $name,
            arguments: $arguments,
            returns: $returns,
            action: |_, _| Ok(Action::Answer($value)),
        }
    };
}

const NOTHING: Kind = Object(&[]);
const NAMES: Kind = List(&Object(&[must("name", Text)]));
const CPU_PROPS: Kind = Object(&[
    must("core-id", Int),
    must("die-id", Int),
    must("die_id", Int),
    must("socket-id", Int),
    must("thread-id", Int),
]);
const CPUS: Kind = List(&Object(&[
    must("CPU", Int),
    must("arch", Text),
    must("current", Bool),
    must("halted", Bool),
    must("props", CPU_PROPS),
    must("qom_path", Text),
    must("thread_id", Int),
]));
const HOTPLUGGABLE_CPUS: Kind = List(&Object(&[
    must("props", CPU_PROPS),
    may("qom-path", Text),
    must("type", Text),
    must("vcpus-count", Int),
]));
const STATUS: Kind = Object(&[must("running", Bool), must("singlestep", Bool), must("status", Text)]);
const MACHINES: Kind = List(&Object(&[
    must("cpu-max", Int),
    must("deprecated", Bool),
    must("hotpluggable-cpus", Bool),
    must("name", Text),
    must("numa-mem-supported", Bool),
]));
const NODE: &[Member] = &[
    must("node-name", Text),
    must("drv", Text),
    must("file", Text),
    must("ro", Bool),
    must("encrypted", Bool),
    must("iops", Int),
    must("cache", Object(&[must("direct", Bool), must("no-flush", Bool), must("writeback", Bool)])),
    must("detect_zeroes", Text),
];
const BLOCK: Kind = List(&Object(&[
    must("device", Text),
    must("qdev", Text),
    must("type", Text),
    must("locked", Bool),
    must("removable", Bool),
    must("inserted", Object(NODE)),
]));
const BLOCKSTATS: Kind = List(&Object(&[
    must("device", Text),
    must("node-name", Text),
    must("qdev", Text),
    must(
        "stats",
        Object(&[
            must("rd_bytes", Int),
            must("wr_bytes", Int),
            must("rd_operations", Int),
            must("wr_operations", Int),
            must("flush_operations", Int),
        ]),
    ),
]));
const CHARDEVS: Kind =
    List(&Object(&[must("filename", Text), must("frontend-open", Bool), must("label", Text)]));
const IOTHREADS: Kind = List(&Object(&[
    must("id", Text),
    must("poll-grow", Int),
    must("poll-max-ns", Int),
    must("poll-shrink", Int),
    must("thread-id", Int),
]));
const VIOMEM: Kind = Object(&[
    must("block-size", Int),
    must("node", Int),
    must("plugged-size", Int),
    must("requested-size", Int),
    must("size", Int),
]);
const PROPERTIES: Kind = List(&Object(&[must("name", Text), must("type", Text)]));
const TRACE_EVENTS: Kind =
    List(&Object(&[must("name", Text), must("state", Word(&["disabled", "enabled"])), must("vcpu", Bool)]));
const TRACE_POINTS: Kind = List(&Object(&[must("name", Text), must("state", Bool)]));
const VERSION: Kind = Object(&[
    must("package", Text),
    must("qemu", Object(&[must("major", Int), must("micro", Int), must("minor", Int)])),
]);

/// Commands that take arguments they do not know, without effect: clients have come to rely on it.
const TOLERANT: [&str; 3] = ["balloon", "migrate", "query-balloon"];

/// All commands, by name.
pub(super) const COMMANDS: &[Spec] = &[
    command("balloon", &[must("value", Int)], NOTHING, |a, _| {
        Ok(Action::Control(Command::Balloon(a.int("value").unwrap_or(u64::MAX))))
    }),
    command("blockdev-add", plug::BLOCKDEV, NOTHING, |a, d| plug::blockdev(a, d).map(Action::Control)),
    command("blockdev-del", plug::NODE_NAME, NOTHING, |a, _| {
        Ok(Action::Control(Command::BlockdevDel(plug::name(a, "node-name")?)))
    }),
    command("chardev-add", plug::CHARDEV, NOTHING, |a, _| plug::chardev(a).map(Action::Control)),
    command("chardev-remove", plug::ID, NOTHING, |a, _| {
        Ok(Action::Control(Command::ChardevRemove(plug::name(a, "id")?)))
    }),
    control!("cont", Cont, NOTHING),
    command("device-list-properties", &[must("typename", Text)], PROPERTIES, |a, _| {
        answers::properties(&a.text("typename").unwrap_or_default()).map(Action::Answer)
    }),
    command("device_add", plug::DEVICE, NOTHING, |a, _| plug::device(a).map(Action::Control)),
    command("device_del", plug::ID, NOTHING, |a, _| {
        Ok(Action::Control(Command::DeviceDel(plug::name(a, "id")?)))
    }),
    command("get-viomem", plug::ID, VIOMEM, |a, _| {
        Ok(Action::Control(Command::GetViomem(plug::name(a, "id")?)))
    }),
    command("getfd", &[must("fdname", Text)], NOTHING, getfd),
    command("human-monitor-command", &[must("command-line", Text), may("cpu-index", Int)], Text, line),
    command(
        "migrate",
        &[must("uri", Text), may("blk", Any), may("inc", Any), may("detach", Any)],
        NOTHING,
        |a, d| plug::migrate(a, d).map(Action::Control),
    ),
    answer!("migrate_cancel", &[], NOTHING, json!({})),
    command("netdev_add", plug::NETDEV, NOTHING, |a, d| plug::netdev(a, d).map(Action::Control)),
    command("netdev_del", plug::ID, NOTHING, |a, _| {
        Ok(Action::Control(Command::NetdevDel(plug::name(a, "id")?)))
    }),
    command("netdev_replace", plug::REPLACEMENT, NOTHING, |a, _| plug::replacement(a).map(Action::Control)),
    command("netlink_set", &[must("id", Text), must("up", Bool)], NOTHING, |a, _| {
        let (id, up) = (plug::name(a, "id")?, a.boolean("up").unwrap_or(false));
        Ok(Action::Control(Command::NetlinkSet { id, up }))
    }),
    command("qmp_capabilities", &[may("enable", Any)], NOTHING, capabilities),
    command("qom-get", &[must("path", Text), must("property", Text)], Any, |a, _| {
        let (path, property) = (a.text("path").unwrap_or_default(), a.text("property").unwrap_or_default());
        Ok(Action::Control(Command::QomGet { path, property }))
    }),
    command("qom-list", &[must("path", Text)], PROPERTIES, |a, _| {
        Ok(Action::Control(Command::QomList(a.text("path").unwrap_or_default())))
    }),
    answer!(
        "qom-list-types",
        &[may("implements", Text), may("abstract", Bool)],
        List(&Object(&[must("name", Text), may("parent", Text)])),
        answers::types()
    ),
    control!("query-balloon", QueryBalloon, Object(&[must("actual", Int)])),
    control!("query-block", QueryBlock, BLOCK),
    answer!("query-block-jobs", &[], List(&Any), json!([])),
    control!("query-blockstats", QueryBlockstats, BLOCKSTATS),
    control!("query-chardev", QueryChardev, CHARDEVS),
    answer!(
        "query-command-line-options",
        &[may("option", Text)],
        List(&Object(&[must("option", Text), must("parameters", List(&Any))])),
        answers::command_line_options()
    ),
    answer!("query-commands", &[], NAMES, answers::names(COMMANDS.iter().map(|spec| spec.name))),
    control!("query-cpus", QueryCpus, CPUS),
    command("query-display-image", &[], NOTHING, |_, _| {
        Err(QmpError::generic("query-display-image is not supported: a VM has no display"))
    }),
    answer!("query-events", &[], NAMES, answers::names(schema::EVENTS.iter().map(|event| event.name))),
    answer!("query-gic-capabilities", &[], List(&Any), json!([])),
    control!("query-hotpluggable-cpus", QueryHotpluggableCpus, HOTPLUGGABLE_CPUS),
    control!("query-iothreads", QueryIothreads, IOTHREADS),
    answer!(
        "query-kvm",
        &[],
        Object(&[must("enabled", Bool), must("present", Bool)]),
        json!({ "enabled": true, "present": true })
    ),
    answer!("query-machines", &[], MACHINES, answers::machines()),
    control!("query-mem", QueryMem, NOTHING),
    command("query-mem-gpa", &[must("gpa", Text)], Text, |a, _| {
        let text = a.text("gpa").unwrap_or_default();
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        let address = u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
        let bad = || QmpError::generic("argument 'gpa' must be an address in hexadecimal digits");
        Ok(Action::Control(Command::QueryMemGpa(address.ok_or_else(bad)?)))
    }),
    control!("query-migrate", QueryMigrate, Object(&[must("status", Text)])),
    answer!("query-migrate-capabilities", &[], List(&Any), json!([])),
    control!("query-name", QueryName, Object(&[may("name", Text)])),
    control!("query-named-block-nodes", QueryNamedBlockNodes, List(&Object(NODE))),
    answer!("query-qmp-schema", &[], List(&Any), schema::schema(COMMANDS)),
    answer!("query-sev-capabilities", &[], Any, json!({})),
    control!("query-status", QueryStatus, STATUS),
    answer!("query-target", &[], Object(&[must("arch", Text)]), json!({ "arch": std::env::consts::ARCH })),
    answer!("query-tpm-models", &[], List(&Text), json!([])),
    answer!("query-tpm-types", &[], List(&Text), json!([])),
    control!("query-uuid", QueryUuid, Object(&[must("UUID", Text)])),
    answer!("query-version", &[], VERSION, answers::version()),
    command("query-vnc", &[], NOTHING, |_, _| {
        Err(QmpError::generic("The service of VNC is not supported: a VM has no display"))
    }),
    control!("quit", Quit, NOTHING),
    command("set-viomem", &[must("id", Text), must("requested-size", Int)], NOTHING, |a, _| {
        let (id, size) = (plug::name(a, "id")?, a.int("requested-size").unwrap_or(u64::MAX));
        Ok(Action::Control(Command::SetViomem { id, size }))
    }),
    control!("stop", Stop, NOTHING),
    control!("system_powerdown", SystemPowerdown, NOTHING),
    control!("system_reset", SystemReset, NOTHING),
    command("trace-event-get-state", &[must("name", Text), may("vcpu", Int)], TRACE_EVENTS, |a, _| {
        let state = |on| if on { "enabled" } else { "disabled" };
        let points = points(a)?.into_iter();
        Ok(Action::Answer(
            points.map(|(name, on)| json!({ "name": name, "state": state(on), "vcpu": false })).collect(),
        ))
    }),
    command(
        "trace-event-set-state",
        &[must("name", Text), must("enable", Bool), may("ignore-unavailable", Bool), may("vcpu", Int)],
        NOTHING,
        switch,
    ),
    command("trace-get-state", &[must("name", Text)], TRACE_POINTS, |a, _| {
        let points = points(a)?.into_iter();
        Ok(Action::Answer(points.map(|(name, on)| json!({ "name": name, "state": on })).collect()))
    }),
    command("trace-set-state", &[must("name", Text), must("enable", Bool)], NOTHING, switch),
];

/// The trace points that a request names: at least one, unless it names a pattern.
fn points(arguments: &Arguments) -> Result<Vec<(&'static str, bool)>, QmpError> {
    let name = arguments.text("name").unwrap_or_default();
    let points = trace::state(&name);
    if points.is_empty() && !name.contains(['*', '?']) {
        return Err(QmpError::generic(format!("trace event '{}' not found", quote(&name))));
    }
    Ok(points)
}

fn switch(arguments: &Arguments, _: &Descriptors) -> Outcome {
    points(arguments)?;
    trace::switch(&arguments.text("name").unwrap_or_default(), arguments.boolean("enable").unwrap_or(false));
    Ok(Action::Answer(json!({})))
}

/// No capability is offered, so none can be enabled; a client need not negotiate at all.
fn capabilities(arguments: &Arguments, _: &Descriptors) -> Outcome {
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

fn getfd(arguments: &Arguments, descriptors: &Descriptors) -> Outcome {
    let name = plug::name(arguments, "fdname")?;
    if name.contains(':') {
        return Err(QmpError::generic(
            "argument 'fdname' must not hold a colon: lists of descriptors are separated by it",
        ));
    }
    match descriptors.name(name) {
        Ok(()) => Ok(Action::Answer(json!({}))),
        Err(NoName::NothingReceived) => Err(QmpError::generic(
            "Invalid SCM message: no file descriptor came with this command over a unix socket",
        )),
        Err(NoName::TooMany) => Err(QmpError::generic("too many named file descriptors")),
    }
}

/// `human-monitor-command`.
fn line(arguments: &Arguments, descriptors: &Descriptors) -> Outcome {
    match human::read(&arguments.text("command-line").unwrap_or_default())? {
        Step::Say(text) => Ok(Action::Answer(text.into())),
        Step::Tell(command, render) => Ok(Action::Text(command, render)),
        Step::Ask(command, arguments, render) => match resolve_named(command, &arguments, descriptors)? {
            Action::Control(command) => Ok(Action::Text(command, render)),
            Action::Answer(value) => Ok(Action::Answer(render(&value).into())),
            // None of the lines' commands is a line.
            text @ Action::Text(..) => Ok(text),
        },
    }
}

/// Finds the command of a request and checks its arguments.
pub(super) fn resolve(request: &Request, descriptors: &Descriptors) -> Outcome {
    resolve_named(&request.command, &request.arguments, descriptors)
}

/// The same, for a command by name.
fn resolve_named(command: &str, arguments: &Arguments, descriptors: &Descriptors) -> Outcome {
    let Some(spec) = COMMANDS.iter().find(|spec| spec.name == command) else {
        // Control characters and endless names do not go back into a client's log as they came.
        let desc = format!("The command {} has not been found", quote(command));
        return Err(QmpError { class: Class::CommandNotFound, desc });
    };
    if TOLERANT.contains(&spec.name) {
        let known = |(key, _): &(&String, &Value)| spec.arguments.iter().any(|m| m.name == key.as_str());
        let known: Arguments =
            arguments.iter().filter(known).map(|(key, value)| (key.clone(), value.clone())).collect();
        check(command, spec.arguments, &known)?;
        return (spec.action)(&known, descriptors);
    }
    check(command, spec.arguments, arguments)?;
    (spec.action)(arguments, descriptors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_has_no_doubles() {
        let names: Vec<_> = COMMANDS.iter().map(|spec| spec.name).collect();
        assert!(names.is_sorted_by(|a, b| a < b), "{names:?}");
    }
}
