//! Messages of any content: carried unchanged, never a panic.

use proptest::prelude::*;
use serde_json::Value;

use super::message::{Answer, Incoming, Request};

/// Any JSON value as somebody may have written it, numbers of any size included.
fn text() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|value| value.to_string()),
        "-?(0|[1-9][0-9]{0,40})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?",
        any::<String>().prop_map(|value| Value::from(value).to_string()),
    ];
    leaf.prop_recursive(4, 20, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|values| format!("[{}]", values.join(" , "))),
            prop::collection::vec(("[a-z]{1,3}", inner), 0..4).prop_map(|members| {
                let members: Vec<String> =
                    members.iter().map(|(key, value)| format!("\"{key}\" :{value}")).collect();
                format!("{{{}}}", members.join(","))
            }),
        ]
    })
}

proptest! {
    #[test]
    fn a_request_keeps_its_arguments_and_its_id(
        name in any::<String>(),
        arguments in prop::option::of(text()),
        id in prop::option::of(text()),
        number in any::<u64>(),
    ) {
        let arguments = arguments.map(|value| format!("{{\"value\":{value}}}"));
        let member = |name: &str, value: &Option<String>| {
            value.as_ref().map(|value| format!("\"{name}\":{value},")).unwrap_or_default()
        };
        let frame = format!("{{{}{}\"execute\":{}}}", member("id", &id), member("arguments", &arguments), Value::from(name.as_str()));
        let request = Request::parse(frame.as_bytes()).unwrap();
        prop_assert_eq!(&request.execute, &name);
        prop_assert_eq!(request.id.as_ref().map(|id| id.get()), id.as_deref());
        // What goes to the VMM is the same command under our number, on one line.
        let line = String::from_utf8(request.line(number)).unwrap();
        prop_assert!(line.trim_end().bytes().all(|byte| byte != b'\n' && byte != b'\r'));
        let sent = Request::parse(line.trim_end().as_bytes()).unwrap();
        prop_assert_eq!(sent.execute, name);
        prop_assert_eq!(sent.arguments.as_ref().map(|value| value.get()), arguments.as_deref());
        prop_assert_eq!(sent.id.map(|id| id.get().to_owned()), Some(number.to_string()));
        // And what comes back is the VMM's answer under the client's.
        let answer = Answer::empty().line(request.id.as_deref());
        let expected = id.map(|id| format!("{{\"return\":{{}},\"id\":{id}}}\r\n"));
        prop_assert_eq!(answer, expected.unwrap_or_else(|| "{\"return\":{}}\r\n".to_owned()));
    }

    #[test]
    fn an_answer_is_carried_as_it_is(body in text(), number in any::<u64>(), refused in any::<bool>()) {
        let key = if refused { "error" } else { "return" };
        let frame = format!("{{\"{key}\":{body},\"id\":{number}}}");
        let Ok(Incoming::Answer(got, answer)) = Incoming::parse(frame.as_bytes()) else {
            return Err(TestCaseError::fail(frame));
        };
        prop_assert_eq!(got, Some(number));
        prop_assert_eq!(answer.line(None), format!("{{\"{key}\":{body}}}\r\n"));
    }

    #[test]
    fn nothing_panics(frame in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..100),
        text().prop_map(String::into_bytes),
        prop::collection::vec(("(execute|arguments|id|return|error|event|data|timestamp|QMP|x)", text()), 0..6).prop_map(|members| {
            let members: Vec<String> = members.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
            format!("{{{}}}", members.join(",")).into_bytes()
        }),
    ]) {
        let _ = Request::parse(&frame);
        if let Ok(Incoming::Answer(_, answer)) = Incoming::parse(&frame) {
            let _ = answer.into_value();
        }
    }
}

#[test]
fn times_of_events() {
    for (timestamp, usec) in [
        ("{\"seconds\":3,\"microseconds\":7}", 3_000_007),
        ("{\"seconds\":-1,\"microseconds\":-1}", 0),
        ("{\"seconds\":9223372036854775807,\"microseconds\":1}", 0),
    ] {
        let frame = format!("{{\"event\":\"X\",\"timestamp\":{timestamp}}}");
        let Ok(Incoming::Event(event)) = Incoming::parse(frame.as_bytes()) else { panic!("{frame}") };
        assert_eq!(event.usec, usec, "{timestamp}");
    }
}
