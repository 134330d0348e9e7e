//! What a request and an answer look like: owns the shape of QMP messages, their errors and their encoding.
//!
//! Every message goes out as one line of compact JSON that ends in CR LF; the order of the top-level keys is fixed because clients
//! compare text.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::control::Event;
use crate::process::trace;

/// QMP's error classes, as far as they are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    GenericError,
    CommandNotFound,
    DeviceNotFound,
    DeviceNotActive,
}

/// An error that a client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QmpError {
    pub(super) class: Class,
    pub(super) desc: String,
}

impl QmpError {
    pub(super) fn generic(desc: impl Into<String>) -> Self {
        Self { class: Class::GenericError, desc: desc.into() }
    }
}

/// A request whose shape is right.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    pub(super) command: String,
    pub(super) arguments: Map<String, Value>,
    pub(super) id: Option<Value>,
}

/// Duplicate keys are an error: two programs that read one request differently are a hole in the policy between them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    execute: Option<Value>,
    arguments: Option<Value>,
    /// `null` is an id like any other.
    #[serde(default, deserialize_with = "present")]
    id: Option<Value>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Reads a request. On failure also gives the id, where it can be known.
pub(super) fn parse(text: &[u8]) -> Result<Request, (Option<Value>, QmpError)> {
    let envelope: Envelope = serde_json::from_slice(text).map_err(|e| {
        let id = match serde_json::from_slice(text) {
            Ok(Value::Object(mut object)) => object.remove("id"),
            _ => None,
        };
        (id, QmpError::generic(format!("invalid request: {e}")))
    })?;
    let Envelope { execute, arguments, id } = envelope;
    let desc = match (execute, arguments) {
        (Some(Value::String(command)), None) => return Ok(Request { command, arguments: Map::new(), id }),
        (Some(Value::String(command)), Some(Value::Object(arguments))) => {
            return Ok(Request { command, arguments, id });
        }
        (Some(Value::String(_)), Some(_)) => "invalid request: 'arguments' must be an object",
        (Some(_), _) => "invalid request: 'execute' must be a string",
        (None, _) => "invalid request: 'execute' is missing",
    };
    Err((id, QmpError::generic(desc)))
}

/// Appends an answer to `out`.
pub(super) fn encode_reply(out: &mut String, reply: Result<&Value, &QmpError>, id: Option<&Value>) {
    tracing::trace!(target: trace::QMP_REPLY, "{reply:?}");
    match reply {
        Ok(value) => out.push_str(&format!("{{\"return\":{value}")),
        Err(QmpError { class, desc }) => {
            // A string in JSON, quotes included.
            let desc = Value::from(desc.as_str());
            out.push_str(&format!("{{\"error\":{{\"class\":\"{class:?}\",\"desc\":{desc}}}"));
        }
    }
    if let Some(id) = id {
        out.push_str(&format!(",\"id\":{id}"));
    }
    out.push_str("}\r\n");
}

/// Appends an event to `out`.
pub(super) fn encode_event(out: &mut String, event: &Event, now: SystemTime) {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    out.push_str(&format!(
        "{{\"event\":\"{}\",\"data\":{},\"timestamp\":{{\"seconds\":{},\"microseconds\":{}}}}}\r\n",
        event.name,
        event.data,
        now.as_secs(),
        now.subsec_micros()
    ));
}

/// The first line that a client sees.
pub(super) fn greeting() -> String {
    format!(
        "{{\"QMP\":{{\"version\":{{\"qemu\":{{\"micro\":1,\"minor\":0,\"major\":5}},\"package\":\"{}\"}},\"capabilities\":[]}}}}\r\n",
        package()
    )
}

/// Who speaks.
pub(super) fn package() -> &'static str {
    concat!("Flotilla-", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn malformed_requests_keep_their_id() {
        for (text, id, desc) in [
            (r#"{"id":7}"#, Some(json!(7)), "invalid request: 'execute' is missing"),
            (r#"{"execute":1,"id":null}"#, Some(json!(null)), "invalid request: 'execute' must be a string"),
            (
                r#"{"execute":"stop","arguments":[],"id":[1,{"a":"b"}]}"#,
                Some(json!([1, {"a": "b"}])),
                "invalid request: 'arguments' must be an object",
            ),
            (
                r#"{"execute":"stop","foo":1,"id":"x"}"#,
                Some(json!("x")),
                "invalid request: unknown field `foo`, expected one of `execute`, `arguments`, `id` at line 1 column 23",
            ),
            (
                r#"{"execute":"stop","execute":"cont"}"#,
                None,
                "invalid request: duplicate field `execute` at line 1 column 27",
            ),
        ] {
            assert_eq!(parse(text.as_bytes()), Err((id, QmpError::generic(desc))), "{text}");
        }
        let (id, error) = parse(b"{\"execute\":\"\xff\",\"id\":1}").unwrap_err();
        assert!(id.is_none() && error.desc.contains("invalid unicode"), "{error:?}");
    }

    #[test]
    fn messages_are_lines_in_a_fixed_order() {
        let mut out = String::new();
        encode_reply(&mut out, Ok(&json!({"b": 1, "a": 2})), Some(&json!("i")));
        encode_reply(&mut out, Err(&QmpError::generic("a \"b\"\n")), None);
        encode_event(
            &mut out,
            &Event { name: "STOP", data: json!({}) },
            UNIX_EPOCH + Duration::from_micros(1_583_908_726_162_739),
        );
        assert_eq!(
            out,
            "{\"return\":{\"a\":2,\"b\":1},\"id\":\"i\"}\r\n\
             {\"error\":{\"class\":\"GenericError\",\"desc\":\"a \\\"b\\\"\\n\"}}\r\n\
             {\"event\":\"STOP\",\"data\":{},\"timestamp\":{\"seconds\":1583908726,\"microseconds\":162739}}\r\n"
        );
        let greeting: Value = serde_json::from_str(&greeting()).unwrap();
        assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    }
}
