//! The framer against hand-picked streams, and against any stream in any pieces.

use proptest::prelude::*;
use serde_json::Value;

use super::codec::Framer;

/// All frames and flaws of a stream that arrives in these pieces.
fn cut(limit: usize, pieces: &[&[u8]]) -> Vec<Result<String, String>> {
    let mut framer = Framer::new(limit);
    let mut out = Vec::new();
    for (n, piece) in pieces.iter().enumerate() {
        framer.push(piece, n + 1 < pieces.len());
        while let Some(frame) = framer.next() {
            out.push(match frame {
                Ok(frame) => Ok(String::from_utf8_lossy(&frame).into_owned()),
                Err(flaw) => Err(flaw.0),
            });
        }
    }
    if let Some(flaw) = framer.end() {
        out.push(Err(flaw.0));
    }
    out
}

fn frames(stream: &str) -> Vec<String> {
    cut(1 << 20, &[stream.as_bytes()]).into_iter().map(Result::unwrap).collect()
}

#[test]
fn values_with_and_without_newlines() {
    for (stream, expected) in [
        ("", vec![]),
        (" \r\n\t ", vec![]),
        ("{}", vec!["{}"]),
        ("{}{}", vec!["{}", "{}"]),
        ("{}\n\r\n{} {\"a\":[]} ", vec!["{}", "{}", "{\"a\":[]}"]),
        ("{\"a\" : \"}\\\"{\"}\n", vec!["{\"a\" : \"}\\\"{\"}"]),
        (
            "{\n \"a\":\n [1,\n2.5e-3, null ,true,{}]}{\"b\":-1}",
            vec!["{\n \"a\":\n [1,\n2.5e-3, null ,true,{}]}", "{\"b\":-1}"],
        ),
        ("{\"ü\":\"\\u00fc\"}", vec!["{\"ü\":\"\\u00fc\"}"]),
    ] {
        assert_eq!(frames(stream), expected, "{stream:?}");
    }
}

#[test]
fn one_flaw_for_one_mistake_and_what_follows_is_understood() {
    for (stream, says) in [
        ("hello\n{}", "expected an object"),
        ("hello {\"execute\":\"quit\"}\n{}", "expected an object"),
        ("true\n{}", "expected an object"),
        ("[1]\n{}", "expected an object"),
        ("\"text\"\n{}", "expected an object"),
        ("}\n{}", "expected an object"),
        ("\u{feff}\n{}", "expected an object"),
        ("{\"a\":]}\n{}", "expected value"),
        ("{\"a\"]}\n{}", "expected `:`"),
        ("{\"a\":1]}\r\n{}", "expected `,` or `}`"),
        ("{\"a\":[1}\n{}", "expected `,` or `]`"),
        ("{,}\n{}", "key must be a string"),
        ("{\"a\":1,}\n{}", "key must be a string"),
        // What is nested in a broken command is no command.
        ("{\"a\" 1,\"b\":{\"execute\":\"quit\"}}\n{}", "expected `:`"),
        // A missing quote: noticed where it is, not at the end of the next command.
        ("{\"execute\":\"query-status\n{}", "control character"),
        ("{\"execute\":\"query-status}\n{}", "control character"),
        ("{\"execute\":\"stop\"\n{}", "expected `,` or `}`"),
    ] {
        let got = cut(1 << 20, &[stream.as_bytes()]);
        let flaw = got.first().unwrap().as_ref().unwrap_err();
        assert!(flaw.contains(says), "{stream:?}: {flaw}");
        assert_eq!(got.iter().filter(|part| part.is_err()).count(), 1, "{stream:?}: {got:?}");
        assert_eq!(got.last().unwrap().as_deref(), Ok("{}"), "{stream:?}: {got:?}");
    }
}

#[test]
fn a_stream_that_ends_too_soon() {
    let flaw = cut(100, &[b"{} {\"execute\":"]).pop().unwrap().unwrap_err();
    assert_eq!(flaw, "invalid JSON: EOF while parsing a value at line 1 column 11");
}

#[test]
fn without_newlines_a_read_is_the_measure() {
    let mut framer = Framer::new(1000);
    let mut read = |bytes: &[u8], more| {
        framer.push(bytes, more);
        std::iter::from_fn(|| framer.next()).map(|frame| frame.is_ok()).collect::<Vec<_>>()
    };
    assert_eq!(read(b"nonsense {}", true), [false]);
    assert!(read(b"{} still the same", true).is_empty());
    assert!(read(b" and its end {}", false).is_empty());
    assert_eq!(read(b"{}{}", false), [true, true]);
}

#[test]
fn too_long_is_one_flaw_and_is_not_kept() {
    let mut framer = Framer::new(64);
    framer.push(b"{\"a\":\"", false);
    for _ in 0..1000 {
        framer.push(&[b'x'; 100], false);
        assert_eq!(framer.next(), None);
        assert!(framer.held() <= 64 + 100);
    }
    framer.push(b"\",\"b\":{}} {\"c\":1}", false);
    assert!(framer.next().unwrap().unwrap_err().0.contains("longer than 64 bytes"));
    assert_eq!(framer.next(), Some(Ok(b"{\"c\":1}".to_vec())));
    assert_eq!(framer.next(), None);
    // At the limit, and one over.
    let fits = format!("{{\"a\":\"{}\"}}", "x".repeat(64 - 8));
    assert_eq!(cut(64, &[fits.as_bytes()]), [Ok(fits.clone())]);
    assert!(cut(63, &[fits.as_bytes()])[0].is_err());
}

#[test]
fn too_deep_is_a_flaw() {
    let deep = |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
    assert_eq!(frames(&deep(127)), [deep(127)]);
    let got = cut(1 << 20, &[format!("{}\n{{}}", deep(128)).as_bytes()]);
    assert!(got[0].as_ref().unwrap_err().contains("deeper than 127"), "{got:?}");
    assert_eq!(got.last().unwrap().as_deref(), Ok("{}"));
    // Enough to overflow any stack that would recurse.
    assert!(cut(1 << 20, &["{\"a\":".repeat(100_000).as_bytes()]).iter().any(Result::is_err));
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[{}\\[\\]\",:\\\\]{0,8}".prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(6, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(any::<String>(), inner, 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    });
    value.prop_map(|value| if value.is_object() { value } else { serde_json::json!({ "a": value }) })
}

/// Cuts bytes at arbitrary places.
fn pieces<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
    places.extend([0, stream.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect()
}

proptest! {
    /// Any values, compact or spread over lines, glued or apart, in any pieces, come out as they went in.
    #[test]
    fn every_value_comes_out_whole(
        values in prop::collection::vec((json(), any::<bool>(), "[ \r\n\t]{0,3}"), 0..8),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut stream = String::new();
        for (value, pretty, gap) in &values {
            stream += &if *pretty { serde_json::to_string_pretty(value).unwrap() } else { value.to_string() };
            stream += gap;
        }
        let got: Vec<Value> = cut(1 << 20, &pieces(stream.as_bytes(), &cuts))
            .into_iter()
            .map(|frame| serde_json::from_str(&frame.unwrap()).unwrap())
            .collect();
        let expected: Vec<Value> = values.into_iter().map(|(value, ..)| value).collect();
        // Floats may lose their last digit in text; the text is what counts.
        prop_assert_eq!(
            got.iter().map(Value::to_string).collect::<Vec<_>>(),
            expected.iter().map(|value| serde_json::from_str::<Value>(&value.to_string()).unwrap().to_string()).collect::<Vec<_>>()
        );
    }

    /// Garbage never panics, never grows without bound, and means the same in any pieces.
    #[test]
    fn garbage_means_the_same_in_any_pieces(
        stream in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..300),
            "[{}\\[\\]\",:\\\\ \na1-]{0,300}".prop_map(String::into_bytes),
        ],
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        limit in 1usize..200,
    ) {
        let whole = cut(limit, &[&stream]);
        prop_assert_eq!(&whole, &cut(limit, &pieces(&stream, &cuts)));
        prop_assert!(whole.len() <= stream.len() + 1);
        for frame in whole.into_iter().flatten() {
            prop_assert!(frame.len() <= limit);
        }
    }

    /// Whatever is wrong on one line, a command on the next is heard, unless the line is the beginning of a longer value.
    #[test]
    fn a_broken_line_does_not_take_the_next_with_it(line in "[{}\\[\\]\",:\\\\ a1-]{0,40}") {
        let mut framer = Framer::new(1 << 20);
        framer.push(line.as_bytes(), true);
        while framer.next().is_some() {}
        framer.push(b"\n", true);
        while framer.next().is_some() {}
        let unfinished = framer.held() > 0;
        framer.push(b"{\"execute\":\"x\"}\n", true);
        let mut last = None;
        while let Some(frame) = framer.next() {
            last = Some(frame);
        }
        if !unfinished {
            prop_assert_eq!(last, Some(Ok(b"{\"execute\":\"x\"}".to_vec())));
        }
    }
}
