//! Requests, answers and events as JSON text. What is inside `arguments`, `return`, `error` and `id` is carried, never
//! taken apart: a proxy must not change a number it cannot represent or the order of a client's keys.

use std::fmt;
use std::sync::Arc;

use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::error::QmpError;

/// Something that happened in a VM.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QmpEvent {
    /// Its QMP name, such as `STOP`.
    pub name: Arc<str>,
    /// Its data; null when it has none.
    pub data: Arc<Value>,
    /// When, in microseconds since the epoch; 0 when the VMM did not say.
    pub usec: u64,
    /// The VMM's own line, to be passed on as it is.
    pub(crate) line: Arc<str>,
    /// Its number on its connection.
    pub(crate) number: u64,
}

/// A command of a client: well formed on the outside.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) execute: String,
    pub(crate) arguments: Option<Box<RawValue>>,
    /// The client's own; any JSON value. Absent and null are two things.
    pub(crate) id: Option<Box<RawValue>>,
}

/// A text that is no command, and the id under which to say so.
#[derive(Debug)]
pub(crate) struct Complaint {
    pub(crate) why: String,
    pub(crate) id: Option<Box<RawValue>>,
}

/// What the VMM made of a command.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// The value of `return`.
    Return(Box<RawValue>),
    /// The value of `error`.
    Error(Box<RawValue>),
}

/// Something the VMM sent.
#[derive(Debug)]
pub(crate) enum Incoming {
    Greeting,
    Event(QmpEvent),
    /// An answer, and our number of the command; `None`: the VMM gave none back.
    Answer(Option<u64>, Answer),
}

impl Request {
    /// Reads one frame. Everything that any QMP server would refuse without looking at the command is refused here,
    /// because a server that cannot read a request cannot give its id back either.
    pub(crate) fn parse(frame: &[u8]) -> Result<Request, Complaint> {
        let members: Members = serde_json::from_slice(frame)
            .map_err(|error| Complaint { why: format!("invalid request: {error}"), id: None })?;
        let (mut execute, mut arguments, mut id, mut unknown) = (None, None, None, None);
        for (name, value) in members.0 {
            match name.as_str() {
                "execute" => execute = Some(value),
                "arguments" => arguments = Some(value),
                "id" => id = Some(value),
                _ => unknown = unknown.or(Some(name)),
            }
        }
        // The same words as our VMM's.
        let complain = |why: &str, id| Err(Complaint { why: format!("invalid request: {why}"), id });
        if let Some(name) = unknown {
            let name: String = name.chars().take(64).flat_map(char::escape_debug).collect();
            let why = format!("unknown field `{name}`, expected one of `execute`, `arguments`, `id`");
            return complain(&why, id);
        }
        let Some(execute) = execute else { return complain("'execute' is missing", id) };
        let Ok(execute) = serde_json::from_str::<String>(execute.get()) else {
            return complain("'execute' must be a string", id);
        };
        if arguments.as_ref().is_some_and(|arguments| !arguments.get().starts_with('{')) {
            return complain("'arguments' must be an object", id);
        }
        Ok(Request { execute, arguments, id })
    }

    /// The request as one line under our own number.
    pub(crate) fn line(&self, number: u64) -> Vec<u8> {
        let name = Value::from(self.execute.as_str());
        let line = match &self.arguments {
            // Line breaks can only stand between tokens here: in a string they are escaped.
            Some(arguments) => {
                let arguments = arguments.get().replace(['\r', '\n'], " ");
                format!("{{\"execute\":{name},\"arguments\":{arguments},\"id\":{number}}}\r\n")
            }
            None => format!("{{\"execute\":{name},\"id\":{number}}}\r\n"),
        };
        line.into_bytes()
    }
}

impl Answer {
    /// `{}`.
    pub(crate) fn empty() -> Answer {
        Answer::Return(raw_object())
    }

    /// An error that we give ourselves.
    pub(crate) fn error(class: &str, desc: &str) -> Answer {
        #[derive(Serialize)]
        struct Body<'a> {
            class: &'a str,
            desc: &'a str,
        }
        match serde_json::value::to_raw_value(&Body { class, desc }) {
            Ok(body) => Answer::Error(body),
            Err(_) => Answer::Error(raw_object()),
        }
    }

    /// The answer as a client sees it: `return` or `error`, then its id.
    pub(crate) fn line(&self, id: Option<&RawValue>) -> String {
        let (key, body) = match self {
            Answer::Return(body) => ("return", body.get()),
            Answer::Error(body) => ("error", body.get()),
        };
        match id {
            Some(id) => format!("{{\"{key}\":{body},\"id\":{}}}\r\n", id.get()),
            None => format!("{{\"{key}\":{body}}}\r\n"),
        }
    }

    /// The value, or the VMM's refusal.
    pub(crate) fn into_value(self) -> Result<Value, QmpError> {
        let parse = |body: &RawValue| {
            serde_json::from_str(body.get()).map_err(|error| QmpError::Refused {
                class: "GenericError".to_owned(),
                desc: format!("the VMM's answer cannot be read: {error}"),
            })
        };
        match self {
            Answer::Return(body) => parse(&body),
            Answer::Error(body) => {
                let body = parse(&body)?;
                let member =
                    |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
                Err(QmpError::Refused { class: member("class"), desc: member("desc") })
            }
        }
    }
}

fn raw_object() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

impl Incoming {
    /// Reads one frame of the VMM. Members we do not know are no error: a newer VMM may have more to say.
    pub(crate) fn parse(frame: &[u8]) -> Result<Incoming, String> {
        let text = std::str::from_utf8(frame).map_err(|error| error.to_string())?;
        let raw: Raw<'_> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let number = raw.id.and_then(|id| id.get().parse().ok());
        if let Some(name) = raw.event {
            let data = match raw.data {
                Some(data) => serde_json::from_str(data.get()).map_err(|error| error.to_string())?,
                None => Value::Null,
            };
            let usec = raw.timestamp.map_or(0, Timestamp::usec);
            let line = format!("{}\r\n", text.replace(['\r', '\n'], " "));
            return Ok(Incoming::Event(QmpEvent {
                name: name.into(),
                data: Arc::new(data),
                usec,
                line: line.into(),
                number: 0,
            }));
        }
        match (raw.result, raw.error, raw.greeting) {
            (Some(body), None, _) => Ok(Incoming::Answer(number, Answer::Return(body.to_owned()))),
            (None, Some(body), _) => Ok(Incoming::Answer(number, Answer::Error(body.to_owned()))),
            (None, None, Some(_)) => Ok(Incoming::Greeting),
            _ => Err("neither greeting, event nor answer".to_owned()),
        }
    }
}

/// The members of an object in their order; a name that comes twice is an error, because two readers could disagree on
/// which one counts.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Members, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a QMP command: an object with `execute`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                // More members than any command has: stop before a flood of names costs time squared.
                const MOST: usize = 16;
                let mut members: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if members.iter().any(|(known, _)| *known == name) {
                        return Err(A::Error::custom(format_args!("duplicate field `{name}`")));
                    }
                    if members.len() == MOST {
                        map.next_value::<IgnoredAny>()?;
                        return Err(A::Error::custom("too many fields"));
                    }
                    members.push((name, map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[derive(Deserialize)]
struct Raw<'a> {
    #[serde(borrow, default, rename = "QMP", deserialize_with = "present")]
    greeting: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "return", deserialize_with = "present")]
    result: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    error: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
    #[serde(default)]
    event: Option<String>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    #[serde(default)]
    timestamp: Option<Timestamp>,
}

/// serde makes null an absent `Option`; `"return":null` is an answer.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// QEMU uses -1 for "unknown", hence signed.
#[derive(Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    fn usec(self) -> u64 {
        let usec = self.seconds.checked_mul(1_000_000).and_then(|usec| usec.checked_add(self.microseconds));
        usec.and_then(|usec| u64::try_from(usec).ok()).unwrap_or(0)
    }
}
