//! Answers that are the same for every VM: owns their content.

use serde_json::{Value, json};

use super::arguments::quote;
use super::message::{Class, QmpError, package};
use crate::config::MAX_CPUS;

/// A list of `{"name": …}`.
pub(super) fn names(names: impl IntoIterator<Item = &'static str>) -> Value {
    names.into_iter().map(|name| json!({ "name": name })).collect()
}

/// `query-machines`.
pub(super) fn machines() -> Value {
    let machine = |name| {
        json!({
            "cpu-max": MAX_CPUS, "deprecated": false, "hotpluggable-cpus": false, "name": name,
            "numa-mem-supported": false,
        })
    };
    json!([machine("none"), machine("microvm"), machine("q35")])
}

/// `query-version`.
pub(super) fn version() -> Value {
    json!({ "package": package(), "qemu": { "major": 5, "micro": 1, "minor": 0 } })
}

/// `qom-list-types`: what `-device` and `-object` know.
pub(super) fn types() -> Value {
    const TYPES: &[(&str, &str)] = &[
        ("host-x86_64-cpu", "cpu"),
        ("iothread", "object"),
        ("microvm-machine", "machine"),
        ("none-machine", "machine"),
        ("vhost-vsock-device", "virtio-device"),
        ("virtconsole", "device"),
        ("virtio-balloon-device", "virtio-device"),
        ("virtio-blk-device", "virtio-device"),
        ("virtio-net-device", "virtio-device"),
        ("virtio-rng-device", "virtio-device"),
        ("virtio-serial-device", "virtio-device"),
        ("virtserialport", "device"),
    ];
    TYPES.iter().map(|(name, parent)| json!({ "name": name, "parent": parent })).collect()
}

/// What each `-device` can be told, in the order of `-help`: names and QOM's words for their types.
const PROPERTIES: &[(&str, &[(&str, &str)])] = &[
    ("vhost-vsock-device", &[("guest-cid", "uint64"), ("vhostfd", "str")]),
    ("virtconsole", &[("chardev", "str"), ("nr", "uint32")]),
    (
        "virtio-balloon-device",
        &[
            ("auto-balloon", "bool"),
            ("deflate-on-oom", "bool"),
            ("free-page-reporting", "bool"),
            ("membuf-percent", "uint32"),
            ("monitor-interval", "uint32"),
        ],
    ),
    (
        "virtio-blk-device",
        &[
            ("bootindex", "int32"),
            ("drive", "str"),
            ("iothread", "link<iothread>"),
            ("num-queues", "uint16"),
            ("queue-size", "uint16"),
            ("serial", "str"),
        ],
    ),
    (
        "virtio-net-device",
        &[
            ("iothread", "link<iothread>"),
            ("mac", "str"),
            ("mq", "bool"),
            ("netdev", "str"),
            ("queue-size", "uint16"),
            ("rx-iothread", "link<iothread>"),
            ("tx-iothread", "link<iothread>"),
            ("vectors", "uint32"),
        ],
    ),
    ("virtio-rng-device", &[("max-bytes", "uint64"), ("period", "uint32"), ("rng", "link<rng-backend>")]),
    ("virtio-serial-device", &[("max-ports", "uint32")]),
    ("virtserialport", &[("chardev", "str"), ("name", "str"), ("nr", "uint32")]),
];

/// `device-list-properties`.
pub(super) fn properties(device: &str) -> Result<Value, QmpError> {
    let known = PROPERTIES.iter().find(|(name, _)| *name == device);
    let (_, properties) = known.ok_or_else(|| QmpError {
        class: Class::DeviceNotFound,
        desc: format!("Device '{}' not found", quote(device)),
    })?;
    Ok(properties.iter().map(|(name, kind)| json!({ "name": name, "type": kind })).collect())
}

/// `query-command-line-options`: what management tools look for there.
pub(super) fn command_line_options() -> Value {
    json!([{
        "option": "drive",
        "parameters": [
            { "name": "discard", "type": "string" },
            { "name": "detect-zeroes", "type": "string" },
        ],
    }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::cmdline::{CmdlineError, parse};

    /// The command line itself says what it knows when it is asked for what it does not.
    #[test]
    fn properties_are_those_of_the_command_line() {
        for (device, properties) in PROPERTIES {
            let required = match *device {
                "virtio-blk-device" => ",drive=x",
                "virtio-net-device" => ",netdev=x",
                "virtio-rng-device" => ",rng=x",
                "vhost-vsock-device" => ",guest-cid=3",
                "virtconsole" | "virtserialport" => ",chardev=x",
                _ => "",
            };
            let line = ["-kernel", "/k", "-device", &format!("{device}{required},no-such-key=1")];
            let Err(CmdlineError::UnknownKey { known, .. }) = parse(line.map(Into::into)) else {
                panic!("{device}")
            };
            let pci = ["addr", "bus", "driver", "id", "multifunction"];
            let known: Vec<&str> = known.split(", ").filter(|key| !pci.contains(key)).collect();
            let names: Vec<&str> = properties.iter().map(|(name, _)| *name).collect();
            assert_eq!(known, names, "{device}");
        }
        let listed = types();
        for (device, _) in PROPERTIES {
            assert!(listed.as_array().unwrap().iter().any(|t| t["name"] == *device), "{device}");
        }
    }
}
