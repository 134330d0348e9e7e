//! Answers that are the same for every VM: owns their content.

use serde_json::{Value, json};

use super::message::package;
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
    json!([machine("none"), machine("microvm")])
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
