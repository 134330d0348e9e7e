//! Shapes of arguments and answers: owns what kinds of value there are, the check of a request against them, and typed access to
//! what was checked. `commands` gives each command its shape, `schema` describes it to clients.
//!
//! Clients disagree on spelling: a number may come as a string (`"lun":"1"`), a flag as `"on"`. What is unambiguous is taken.

use serde_json::{Map, Value};

use super::message::QmpError;

pub(super) type Arguments = Map<String, Value>;

/// What a value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A string; a number stands for its digits.
    Text,
    /// One of these strings.
    Word(&'static [&'static str]),
    /// A whole number from 0, also as a decimal or hexadecimal string.
    Int,
    /// A boolean, also as `on`, `off`, `yes` or `no`.
    Bool,
    /// `null`, and nothing else.
    Null,
    /// A list.
    List(&'static Kind),
    /// An object with these members.
    Object(&'static [Member]),
    /// A value of one of these kinds, which JSON tells apart.
    OneOf(&'static [Kind]),
    /// Anything.
    Any,
}

impl Kind {
    /// Whether values of this kind have the JSON type of `value`.
    fn takes_type_of(&self, value: &Value) -> bool {
        match self {
            Self::Text | Self::Word(_) => value.is_string(),
            Self::Int => value.is_number(),
            Self::Bool => value.is_boolean(),
            Self::Null => value.is_null(),
            Self::List(_) => value.is_array(),
            Self::Object(_) => value.is_object(),
            Self::OneOf(kinds) => kinds.iter().any(|kind| kind.takes_type_of(value)),
            Self::Any => true,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Text | Self::Word(_) => "a string",
            Self::Int => "a number",
            Self::Bool => "true or false",
            Self::Null => "null",
            Self::List(_) => "an array",
            Self::Object(_) => "an object",
            Self::OneOf(_) | Self::Any => "something else",
        }
    }
}

/// A member of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) required: bool,
}

pub(super) const fn must(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, required: true }
}

pub(super) const fn may(name: &'static str, kind: Kind) -> Member {
    Member { name, kind, required: false }
}

/// At most 64 characters of what a client wrote, none of them a control character: it goes back into the client's log.
pub(super) fn quote(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_debug).collect()
}

/// Checks the arguments of `command`.
pub(super) fn check(command: &str, members: &[Member], arguments: &Arguments) -> Result<(), QmpError> {
    check_object(command, "", members, arguments)
}

fn check_object(command: &str, path: &str, members: &[Member], object: &Arguments) -> Result<(), QmpError> {
    for (key, value) in object {
        let Some(member) = members.iter().find(|m| m.name == key) else {
            let known: Vec<&str> = members.iter().map(|m| m.name).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let key = quote(key);
            return Err(QmpError::generic(format!(
                "unknown argument '{path}{key}' of command {command} (known: {known})"
            )));
        };
        check_value(command, &format!("{path}{}", member.name), member.kind, value)?;
    }
    match members.iter().find(|m| m.required && !object.contains_key(m.name)) {
        None => Ok(()),
        Some(m) => {
            Err(QmpError::generic(format!("argument '{path}{}' of command {command} is missing", m.name)))
        }
    }
}

fn check_value(command: &str, name: &str, kind: Kind, value: &Value) -> Result<(), QmpError> {
    let wanted = match kind {
        Kind::Any => return Ok(()),
        Kind::Object(members) => match value {
            Value::Object(object) => return check_object(command, &format!("{name}."), members, object),
            _ => "an object".to_owned(),
        },
        Kind::List(kind) => match value {
            Value::Array(list) => return list.iter().try_for_each(|v| check_value(command, name, *kind, v)),
            _ => "an array".to_owned(),
        },
        Kind::Text if value.is_string() || value.is_u64() => return Ok(()),
        Kind::Text => "a string".to_owned(),
        Kind::Word(words) if value.as_str().is_some_and(|v| words.contains(&v)) => return Ok(()),
        Kind::Word(words) => format!("one of {}", words.join(", ")),
        Kind::Int if int(value).is_some() => return Ok(()),
        Kind::Int => "a whole number from 0".to_owned(),
        Kind::Bool if boolean(value).is_some() => return Ok(()),
        Kind::Bool => "true or false".to_owned(),
        Kind::Null if value.is_null() => return Ok(()),
        Kind::Null => "null".to_owned(),
        Kind::OneOf(kinds) => {
            let same = |kind: &&Kind| kind.takes_type_of(value);
            return match kinds.iter().find(same) {
                Some(kind) => check_value(command, name, *kind, value),
                None => {
                    let wanted: Vec<&str> = kinds.iter().map(Kind::word).collect();
                    let wanted = wanted.join(" or ");
                    Err(QmpError::generic(format!("argument '{name}' of command {command} must be {wanted}")))
                }
            };
        }
    };
    Err(QmpError::generic(format!("argument '{name}' of command {command} must be {wanted}")))
}

fn int(value: &Value) -> Option<u64> {
    let text = match value {
        Value::Number(n) => return n.as_u64(),
        Value::String(text) => text,
        _ => return None,
    };
    match text.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok(),
        None if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(b) => Some(*b),
        Value::String(text) => match text.as_str() {
            "on" | "yes" | "true" => Some(true),
            "off" | "no" | "false" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// Typed access; absent, and of another kind than was checked, are both `None`.
pub(super) trait Get {
    /// A [`Kind::Text`] or [`Kind::Word`].
    fn text(&self, name: &str) -> Option<String>;
    /// A [`Kind::Int`].
    fn int(&self, name: &str) -> Option<u64>;
    /// A [`Kind::Bool`].
    fn boolean(&self, name: &str) -> Option<bool>;
    /// A [`Kind::Object`].
    fn object(&self, name: &str) -> Option<&Arguments>;
}

impl Get for Arguments {
    fn text(&self, name: &str) -> Option<String> {
        match self.get(name)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        }
    }
    fn int(&self, name: &str) -> Option<u64> {
        int(self.get(name)?)
    }
    fn boolean(&self, name: &str) -> Option<bool> {
        boolean(self.get(name)?)
    }
    fn object(&self, name: &str) -> Option<&Arguments> {
        self.get(name)?.as_object()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MEMBERS: &[Member] = &[
        must("id", Kind::Text),
        may("n", Kind::Int),
        may("flag", Kind::Bool),
        may("mode", Kind::Word(&["a", "b"])),
        may("file", Kind::Object(&[must("name", Kind::Text)])),
        may("list", Kind::List(&Kind::Int)),
        may("none", Kind::Null),
        may("one", Kind::OneOf(&[Kind::Null, Kind::Text, Kind::Object(&[must("x", Kind::Int)])])),
    ];

    #[test]
    fn what_is_unambiguous_is_taken() {
        let arguments = json!({"id": 7, "n": "0x10", "flag": "on", "mode": "a", "file": {"name": "x"},
                               "list": [1, "2"], "none": null, "one": {"x": 1}});
        let arguments = arguments.as_object().unwrap();
        check("c", MEMBERS, arguments).unwrap();
        assert_eq!(arguments.text("id").as_deref(), Some("7"));
        assert_eq!((arguments.int("n"), arguments.boolean("flag")), (Some(16), Some(true)));
        assert_eq!(arguments.object("file").and_then(|f| f.text("name")).as_deref(), Some("x"));
        assert_eq!(arguments.text("missing"), None);
    }

    #[test]
    fn what_is_not_is_refused_by_name() {
        for (arguments, want) in [
            (json!({}), "argument 'id' of command c is missing"),
            (
                json!({"id": "x", "y": 1}),
                "unknown argument 'y' of command c (known: id, n, flag, mode, file, list, none, one)",
            ),
            (json!({"id": null}), "argument 'id' of command c must be a string"),
            (json!({"id": "x", "n": -1}), "argument 'n' of command c must be a whole number from 0"),
            (json!({"id": "x", "n": 1.5}), "argument 'n' of command c must be a whole number from 0"),
            (json!({"id": "x", "n": "+1"}), "argument 'n' of command c must be a whole number from 0"),
            (json!({"id": "x", "n": ""}), "argument 'n' of command c must be a whole number from 0"),
            (json!({"id": "x", "flag": 1}), "argument 'flag' of command c must be true or false"),
            (json!({"id": "x", "mode": "c"}), "argument 'mode' of command c must be one of a, b"),
            (json!({"id": "x", "file": {}}), "argument 'file.name' of command c is missing"),
            (
                json!({"id": "x", "file": {"name": "x", "a\nb": 1}}),
                "unknown argument 'file.a\\nb' of command c (known: name)",
            ),
            (json!({"id": "x", "file": []}), "argument 'file' of command c must be an object"),
            (
                json!({"id": "x", "list": [true]}),
                "argument 'list' of command c must be a whole number from 0",
            ),
            (json!({"id": "x", "none": 0}), "argument 'none' of command c must be null"),
            (
                json!({"id": "x", "one": 0}),
                "argument 'one' of command c must be null or a string or an object",
            ),
            (json!({"id": "x", "one": {}}), "argument 'one.x' of command c is missing"),
        ] {
            let error = check("c", MEMBERS, arguments.as_object().unwrap()).unwrap_err();
            assert_eq!(error.desc, want);
        }
    }
}
