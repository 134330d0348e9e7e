//! The tree of objects that `qom-list` and `qom-get` show: owns its shape. Management tools look there for what a VM consists of.
//!
//! ```text
//! /                 machine objects
//! /machine          peripheral: devices by id    unattached: device[N], the vCPUs
//! /objects          I/O threads by id
//! ```

use serde_json::{Value, json};

use super::CommandError;
use crate::config::MachineKind;
use crate::machine::CpuInfo;

/// What there is.
pub(super) struct Objects {
    pub(super) machine: MachineKind,
    pub(super) cpus: Vec<CpuInfo>,
    /// With their drivers.
    pub(super) devices: Vec<(String, &'static str)>,
    /// With the host's threads.
    pub(super) iothreads: Vec<(String, i32)>,
}

const CONTAINER: &str = "container";
const CPU: &str = "host-x86_64-cpu";

/// One place in the tree.
struct Object {
    kind: String,
    properties: Vec<(&'static str, &'static str, Value)>,
    children: Vec<(String, String)>,
}

impl Object {
    fn new(kind: impl Into<String>) -> Self {
        Self { kind: kind.into(), properties: Vec::new(), children: Vec::new() }
    }

    fn with(mut self, children: impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>) -> Self {
        self.children = children.into_iter().map(|(name, kind)| (name.into(), kind.into())).collect();
        self
    }
}

impl Objects {
    fn find(&self, path: &str) -> Option<Object> {
        let mut parts = path.strip_prefix('/')?.split('/').filter(|part| !part.is_empty());
        // Ids hold slashes if they like; nothing lies below what has one.
        let below = |prefix: &str| path.strip_prefix(prefix);
        if let Some(id) = below("/machine/peripheral/") {
            return self
                .devices
                .iter()
                .find(|(known, _)| known == id)
                .map(|(_, driver)| Object::new(*driver));
        }
        if let Some(id) = below("/objects/") {
            let (_, thread) = self.iothreads.iter().find(|(known, _)| known == id)?;
            let properties = vec![("thread-id", "int", json!(thread))];
            return Some(Object { properties, ..Object::new("iothread") });
        }
        let machine = format!("{}-machine", self.machine);
        let found =
            match (parts.next(), parts.next(), parts.next(), parts.next()) {
                (None, ..) => {
                    Object::new(CONTAINER).with([("machine", machine.as_str()), ("objects", CONTAINER)])
                }
                (Some("objects"), None, ..) => Object::new(CONTAINER)
                    .with(self.iothreads.iter().map(|(id, _)| (id.as_str(), "iothread"))),
                (Some("machine"), None, ..) => {
                    Object::new(machine).with([("peripheral", CONTAINER), ("unattached", CONTAINER)])
                }
                (Some("machine"), Some("peripheral"), None, _) => Object::new(CONTAINER)
                    .with(self.devices.iter().map(|(id, driver)| (id.as_str(), *driver))),
                (Some("machine"), Some("unattached"), None, _) => {
                    Object::new(CONTAINER).with(self.cpus.iter().map(|cpu| (device(cpu), CPU)))
                }
                (Some("machine"), Some("unattached"), Some(name), None) => {
                    let cpu = self.cpus.iter().find(|cpu| device(cpu) == name)?;
                    let properties = vec![
                        ("socket-id", "int", json!(cpu.socket_id)),
                        ("die-id", "int", json!(cpu.die_id)),
                        ("core-id", "int", json!(cpu.core_id)),
                        ("thread-id", "int", json!(cpu.thread_id)),
                    ];
                    Object { properties, ..Object::new(CPU) }
                }
                _ => return None,
            };
        Some(found)
    }
}

fn device(cpu: &CpuInfo) -> String {
    format!("device[{}]", cpu.index)
}

fn no_such(path: &str) -> CommandError {
    CommandError::NotFound(format!("Device '{}' not found", path.escape_debug()))
}

/// `qom-list`.
pub(super) fn list(objects: &Objects, path: &str) -> Result<Value, CommandError> {
    let object = objects.find(path).ok_or_else(|| no_such(path))?;
    let own =
        [("type", "string")].into_iter().chain(object.properties.iter().map(|(n, kind, _)| (*n, *kind)));
    let own = own.map(|(name, kind)| json!({ "name": name, "type": kind }));
    let children = object.children.iter();
    let children = children.map(|(name, kind)| json!({ "name": name, "type": format!("child<{kind}>") }));
    Ok(own.chain(children).collect())
}

/// `qom-get`.
pub(super) fn get(objects: &Objects, path: &str, property: &str) -> Result<Value, CommandError> {
    let object = objects.find(path).ok_or_else(|| no_such(path))?;
    if property == "type" {
        return Ok(object.kind.into());
    }
    let known = object.properties.into_iter().find(|(name, _, _)| *name == property);
    known.map(|(_, _, value)| value).ok_or_else(|| {
        CommandError::Bad(format!("Property '{}.{}' not found", object.kind, property.escape_debug()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects() -> Objects {
        let cpu =
            |index| CpuInfo { index, socket_id: 0, die_id: 0, core_id: index, thread_id: 0, host_tid: 5 };
        Objects {
            machine: MachineKind::Microvm,
            cpus: vec![cpu(0), cpu(1)],
            devices: vec![("root/fs".into(), "virtio-blk-device"), ("rng".into(), "virtio-rng-device")],
            iothreads: vec![("io1".into(), 77)],
        }
    }

    /// Every path that the tree names leads somewhere, and to what the tree says it is.
    fn walk(objects: &Objects, path: &str, seen: &mut Vec<String>) {
        for entry in list(objects, path).unwrap().as_array().unwrap() {
            let (name, kind) = (entry["name"].as_str().unwrap(), entry["type"].as_str().unwrap());
            match kind.strip_prefix("child<").and_then(|k| k.strip_suffix('>')) {
                None => assert!(get(objects, path, name).is_ok(), "{path}.{name}"),
                Some(kind) => {
                    let child = format!("{}/{name}", path.trim_end_matches('/'));
                    assert_eq!(get(objects, &child, "type").unwrap(), kind, "{child}");
                    walk(objects, &child, seen);
                    seen.push(child);
                }
            }
        }
    }

    #[test]
    fn the_tree_is_whole() {
        let mut seen = Vec::new();
        walk(&objects(), "/", &mut seen);
        seen.sort();
        assert_eq!(
            seen,
            [
                "/machine",
                "/machine/peripheral",
                "/machine/peripheral/rng",
                "/machine/peripheral/root/fs",
                "/machine/unattached",
                "/machine/unattached/device[0]",
                "/machine/unattached/device[1]",
                "/objects",
                "/objects/io1",
            ]
        );
        assert_eq!(get(&objects(), "/machine/unattached/device[1]", "core-id").unwrap(), 1);
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        for path in [
            "",
            "machine",
            "/x",
            "/machine/peripheral/x",
            "/machine/unattached/device[2]",
            "/machine/unattached/device[0]/x",
        ] {
            assert!(matches!(list(&objects(), path), Err(CommandError::NotFound(_))), "{path}");
        }
        let error = get(&objects(), "/machine", "x").unwrap_err();
        assert_eq!(error.to_string(), "Property 'microvm-machine.x' not found");
    }
}
