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
        ("pcie-root-port", "pci-device"),
        ("q35-machine", "machine"),
        ("vhost-user-blk-device", "virtio-device"),
        ("vhost-user-fs-device", "virtio-device"),
        ("vhost-vsock-device", "virtio-device"),
        ("virtconsole", "device"),
        ("virtio-balloon-device", "virtio-device"),
        ("virtio-blk-device", "virtio-device"),
        ("virtio-mem-device", "virtio-device"),
        ("virtio-net-device", "virtio-device"),
        ("virtio-pmem-device", "virtio-device"),
        ("virtio-rng-device", "virtio-device"),
        ("virtio-serial-device", "virtio-device"),
        ("virtserialport", "device"),
    ];
    let pci = TYPES.iter().filter_map(|(name, _)| pci_twin(name)).map(|name| (name, "pci-device"));
    let all = TYPES.iter().map(|(name, parent)| ((*name).to_owned(), *parent)).chain(pci);
    all.map(|(name, parent)| json!({ "name": name, "parent": parent })).collect()
}

/// What a device that is no port of another one is called on a machine with PCI.
fn pci_twin(device: &str) -> Option<String> {
    device.strip_suffix("-device").map(|stem| format!("{stem}-pci"))
}

/// What a device can be told besides on a machine with PCI.
const OF_PCI: [(&str, &str); 4] =
    [("addr", "str"), ("bus", "str"), ("multifunction", "bool"), ("romfile", "str")];

/// What each `-device` can be told, in the order of `-help`: names and QOM's words for their types.
const PROPERTIES: &[(&str, &[(&str, &str)])] = &[
    (
        "pcie-root-port",
        &[
            ("addr", "str"),
            ("bus", "str"),
            ("chassis", "uint8"),
            ("multifunction", "bool"),
            ("port", "uint8"),
            ("romfile", "str"),
        ],
    ),
    (
        "vhost-user-blk-device",
        &[("bootindex", "int32"), ("chardev", "str"), ("num-queues", "uint16"), ("queue-size", "uint16")],
    ),
    ("vhost-user-fs-device", &[("chardev", "str"), ("tag", "str")]),
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
        "virtio-mem-device",
        &[
            ("block-size", "size"),
            ("memaddr", "uint64"),
            ("memdev", "link<memory-backend>"),
            ("node", "uint32"),
            ("requested-size", "size"),
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
    ("virtio-pmem-device", &[("memaddr", "uint64"), ("memdev", "link<memory-backend>")]),
    ("virtio-rng-device", &[("max-bytes", "uint64"), ("period", "uint32"), ("rng", "link<rng-backend>")]),
    ("virtio-serial-device", &[("max-ports", "uint32")]),
    ("virtserialport", &[("chardev", "str"), ("name", "str"), ("nr", "uint32")]),
];

/// `device-list-properties`.
pub(super) fn properties(device: &str) -> Result<Value, QmpError> {
    let show = |(name, kind): &(&str, &str)| json!({ "name": name, "type": kind });
    for (name, properties) in PROPERTIES {
        if *name == device {
            return Ok(properties.iter().map(show).collect());
        }
        if pci_twin(name).as_deref() == Some(device) {
            return Ok(OF_PCI.iter().chain(*properties).map(show).collect());
        }
    }
    Err(QmpError { class: Class::DeviceNotFound, desc: format!("Device '{}' not found", quote(device)) })
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
        let mut devices: Vec<String> = PROPERTIES.iter().map(|(name, _)| (*name).to_owned()).collect();
        devices.extend(PROPERTIES.iter().filter_map(|(name, _)| pci_twin(name)));
        for device in &devices {
            let has_bus = device.starts_with("pcie-") || device.ends_with("-pci");
            let required = match device.trim_end_matches("-pci").trim_end_matches("-device") {
                "virtio-blk" => ",drive=x",
                "virtio-net" => ",netdev=x",
                "virtio-rng" => ",rng=x",
                "virtio-mem" | "virtio-pmem" => ",memdev=x",
                "vhost-vsock" => ",guest-cid=3",
                "vhost-user-blk" => ",chardev=x",
                "vhost-user-fs" => ",chardev=x,tag=x",
                "virtconsole" | "virtserialport" => ",chardev=x",
                _ => "",
            };
            let line = ["-kernel", "/k", "-device", &format!("{device}{required},no-such-key=1")];
            let Err(CmdlineError::UnknownKey { known, .. }) = parse(line.map(Into::into)) else {
                panic!("{device}")
            };
            // Every device understands these, to refuse them where they do not belong.
            let pci: &[&str] = if has_bus { &[] } else { &["addr", "bus", "multifunction"] };
            let mut known: Vec<&str> = known.split(", ").collect();
            known.retain(|key| !["driver", "id"].contains(key) && !pci.contains(key));
            let listed = properties(device).unwrap();
            let mut names: Vec<&str> =
                listed.as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
            names.sort_unstable();
            assert_eq!(known, names, "{device}");
        }
        let listed = types();
        for device in devices {
            assert!(listed.as_array().unwrap().iter().any(|t| t["name"] == *device), "{device}");
        }
    }
}
