//! `query-qmp-schema`: owns the description of the wire in QEMU's shape, made from the table that carries the commands out.
//!
//! Types without a name of their own are numbered; equal shapes share one number.

use serde_json::{Value, json};

use super::arguments::{Kind, Member, must};
use super::spec::Spec;

/// An event.
pub(super) struct EventSpec {
    pub(super) name: &'static str,
    data: &'static [Member],
}

/// Events that this version can send, by name.
pub(super) const EVENTS: &[EventSpec] = &[
    EventSpec { name: "BALLOON_CHANGED", data: &[must("actual", Kind::Int)] },
    EventSpec { name: "CPU_RESIZE", data: &[] },
    EventSpec { name: "DEVICE_DELETED", data: &[must("device", Kind::Text), must("path", Kind::Text)] },
    EventSpec { name: "POWERDOWN", data: &[] },
    EventSpec { name: "RESET", data: &[must("guest", Kind::Bool)] },
    EventSpec { name: "RESUME", data: &[] },
    EventSpec { name: "SHUTDOWN", data: &[must("guest", Kind::Bool), must("reason", Kind::Text)] },
    EventSpec { name: "STOP", data: &[] },
];

#[derive(Default)]
struct Types {
    /// Objects, words and alternates so far; their place is their name.
    known: Vec<Kind>,
    described: Vec<Value>,
}

impl Types {
    /// The name of `kind`, described once.
    fn name(&mut self, kind: Kind) -> String {
        let name = match kind {
            Kind::Text => return "str".to_owned(),
            Kind::Int => return "int".to_owned(),
            Kind::Bool => return "bool".to_owned(),
            Kind::Null => return "null".to_owned(),
            Kind::Any => return "any".to_owned(),
            Kind::List(element) => {
                let element = self.name(*element);
                let name = format!("[{element}]");
                let info = json!({ "name": name, "meta-type": "array", "element-type": element });
                if !self.described.contains(&info) {
                    self.described.push(info);
                }
                return name;
            }
            Kind::Object(_) | Kind::Word(_) | Kind::OneOf(_) => {
                match self.known.iter().position(|k| *k == kind) {
                    Some(number) => return number.to_string(),
                    None => {
                        self.known.push(kind);
                        (self.known.len() - 1).to_string()
                    }
                }
            }
        };
        let info = match kind {
            Kind::Object(members) => {
                let members: Value = members
                    .iter()
                    .map(|m| {
                        let mut member = json!({ "name": m.name, "type": self.name(m.kind) });
                        if !m.required {
                            // "default": null says that the member is optional and has no default worth telling.
                            member["default"] = Value::Null;
                        }
                        member
                    })
                    .collect();
                json!({ "name": name, "meta-type": "object", "members": members })
            }
            Kind::Word(words) => {
                let members: Value = words.iter().map(|word| json!({ "name": word })).collect();
                json!({ "name": name, "meta-type": "enum", "members": members, "values": words })
            }
            Kind::OneOf(kinds) => {
                let members: Value = kinds.iter().map(|kind| json!({ "type": self.name(*kind) })).collect();
                json!({ "name": name, "meta-type": "alternate", "members": members })
            }
            _ => return name,
        };
        self.described.push(info);
        name
    }
}

/// All commands, events and types.
pub(super) fn schema(commands: &[Spec]) -> Value {
    let mut types = Types::default();
    let mut list = Vec::new();
    for spec in commands {
        let (argument, result) = (types.name(Kind::Object(spec.arguments)), types.name(spec.returns));
        list.push(json!({
            "name": spec.name, "meta-type": "command", "arg-type": argument, "ret-type": result, "allow-oob": false,
        }));
    }
    for event in EVENTS {
        let data = types.name(Kind::Object(event.data));
        list.push(json!({ "name": event.name, "meta-type": "event", "arg-type": data }));
    }
    list.append(&mut types.described);
    for (name, json_type) in
        [("str", "string"), ("int", "int"), ("bool", "boolean"), ("null", "null"), ("any", "value")]
    {
        list.push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }));
    }
    list.into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::commands::COMMANDS;
    use super::*;

    #[test]
    fn every_type_that_is_named_is_described_once() {
        let schema = schema(COMMANDS);
        let list = schema.as_array().unwrap();
        let names: Vec<&str> = list.iter().map(|info| info["name"].as_str().unwrap()).collect();
        let set: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(names.len(), set.len(), "{names:?}");
        for info in list {
            let mut used: Vec<&Value> =
                ["arg-type", "ret-type", "element-type"].iter().filter_map(|key| info.get(key)).collect();
            if info["meta-type"] == "object" || info["meta-type"] == "alternate" {
                used.extend(info["members"].as_array().unwrap().iter().map(|m| &m["type"]));
            }
            for name in used {
                assert!(set.contains(name.as_str().unwrap()), "{name} in {info}");
            }
        }
        let command = list.iter().find(|i| i["name"] == "device_del").unwrap();
        let argument = list.iter().find(|i| i["name"] == command["arg-type"]).unwrap();
        assert_eq!(argument["members"], json!([{"name": "id", "type": "str"}]));
        assert!(EVENTS.is_sorted_by(|a, b| a.name < b.name));
    }
}
