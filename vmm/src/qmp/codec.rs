//! From bytes to requests: owns the boundaries between requests in the stream of one client.
//!
//! A request is a JSON object. Newlines mean nothing: several requests may come in one read, one may come over many, with or
//! without a newline. Text that can never become an object is answered with one error, and the stream is taken up again
//!
//! - at that very byte, if it is an opening brace that begins a line (a new request after an unfinished one), else
//! - after the next newline, or at the end of the read if nothing more is waiting (clients that send no newlines).

use super::syntax::{DEPTH_MAX, Progress, Syntax};

/// Longest request in bytes. What is longer is counted through to its end and answered with one error.
pub(super) const REQUEST_MAX: usize = 1 << 20;

/// What the stream held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// The text of an object that obeys JSON's syntax.
    Request(Vec<u8>),
    /// Something that is none, and why.
    Bad(String),
}

/// The stream of one client.
#[derive(Debug, Default)]
pub(super) struct Codec {
    text: Vec<u8>,
    syntax: Option<Syntax>,
    too_long: bool,
    skipping: bool,
    /// Only blanks since the last newline.
    midline: bool,
}

impl Codec {
    /// Takes what a read gave; `more` when the read was cut short by its buffer.
    pub(super) fn push(&mut self, data: &[u8], more: bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        for &byte in data {
            let begins_line = !self.midline;
            self.midline = byte != b'\n' && (self.midline || !byte.is_ascii_whitespace());
            if self.skipping {
                self.skipping = byte != b'\n';
                continue;
            }
            match &mut self.syntax {
                None if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') => {}
                None if byte == b'{' => self.begin(),
                None => {
                    frames.push(Frame::Bad("expected a JSON object".to_owned()));
                    self.skipping = true;
                }
                Some(syntax) => {
                    let step = syntax.feed(byte);
                    if self.text.len() < REQUEST_MAX {
                        self.text.push(byte);
                    } else {
                        self.too_long = true;
                    }
                    match step {
                        Ok(Progress::More) => {}
                        Ok(Progress::Done) => frames.push(self.end()),
                        Err(why) => {
                            let at = self.text.len();
                            let hint = if why.contains("nested") {
                                format!(" (at most {DEPTH_MAX})")
                            } else {
                                String::new()
                            };
                            frames.push(Frame::Bad(format!("{why}{hint}, at byte {at} of the request")));
                            self.reset();
                            if byte == b'{' && begins_line {
                                self.begin();
                            } else {
                                self.skipping = byte != b'\n';
                            }
                        }
                    }
                }
            }
        }
        if !more {
            self.skipping = false;
        }
        frames
    }

    fn begin(&mut self) {
        self.text.push(b'{');
        self.syntax = Some(Syntax::object());
    }

    fn end(&mut self) -> Frame {
        let text = std::mem::take(&mut self.text);
        let too_long = self.too_long;
        self.reset();
        if too_long {
            Frame::Bad(format!("the request is longer than {REQUEST_MAX} bytes"))
        } else {
            Frame::Request(text)
        }
    }

    fn reset(&mut self) {
        // Not `clear`: a client that sent one large request does not keep its memory.
        self.text = Vec::new();
        self.syntax = None;
        self.too_long = false;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn texts(frames: Vec<Frame>) -> Vec<String> {
        let text = |f| match f {
            Frame::Request(text) => String::from_utf8(text).unwrap(),
            Frame::Bad(why) => format!("bad: {why}"),
        };
        frames.into_iter().map(text).collect()
    }

    #[test]
    fn resumes_after_what_is_broken() {
        for (reads, want) in [
            (vec!["{\"a\":1}{\"b\":2}\n {\"c\":3}"], vec!["{\"a\":1}", "{\"b\":2}", "{\"c\":3}"]),
            (vec!["{\"a\"", ":", "1", "}"], vec!["{\"a\":1}"]),
            (vec!["\r\n\n  \t"], vec![]),
            (vec!["hello {\"a\":1}\n{\"b\":2}"], vec!["bad: expected a JSON object", "{\"b\":2}"]),
            (vec!["hello", "{\"b\":2}"], vec!["bad: expected a JSON object", "{\"b\":2}"]),
            (vec!["[1]\n42\n"], vec!["bad: expected a JSON object"; 2]),
            (vec!["{\"a\":\n", "{\"b\":2}"], vec![]),
            (vec!["{\"a\"\n", "{\"b\":2}"], vec!["bad: expected ':', at byte 6 of the request", "{\"b\":2}"]),
            (
                vec!["{\"a\n{\"b\":2}"],
                vec![
                    "bad: expected the end of the string: control characters must be escaped, at byte 4 of the request",
                    "{\"b\":2}",
                ],
            ),
            (
                vec!["{a}{\"b\":2}", "{\"c\":3}"],
                vec!["bad: expected a key in double quotes, at byte 2 of the request", "{\"c\":3}"],
            ),
        ] {
            let mut codec = Codec::default();
            let got: Vec<String> =
                reads.iter().flat_map(|r| texts(codec.push(r.as_bytes(), false))).collect();
            assert_eq!(got, want, "{reads:?}");
        }
    }

    #[test]
    fn a_read_that_was_cut_short_does_not_end_the_skipping() {
        let mut codec = Codec::default();
        assert_eq!(codec.push(b"junk", true).len(), 1);
        assert_eq!(codec.push(b"{\"a\":1}", true), []);
        assert_eq!(codec.push(b"\n{\"a\":1}", false).len(), 1);
    }

    #[test]
    fn a_request_too_long_gives_one_error_at_its_end() {
        let mut codec = Codec::default();
        assert_eq!(codec.push(b"{\"a\":\"", true), []);
        for _ in 0..600 {
            assert_eq!(codec.push(&[b'x'; 4096], true), []);
        }
        assert!(codec.text.len() <= REQUEST_MAX);
        assert_eq!(
            texts(codec.push(b"\"}{\"b\":1}", false)),
            ["bad: the request is longer than 1048576 bytes", "{\"b\":1}"]
        );
    }

    fn any_object() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<f64>().prop_filter("JSON has no such number", |f| f.is_finite()).prop_map(Into::into),
            "\\PC{0,8}".prop_map(Into::into),
        ];
        let value = leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                proptest::collection::btree_map("\\PC{0,6}", inner, 0..4)
                    .prop_map(|m| serde_json::Value::Object(m.into_iter().collect())),
            ]
        });
        (proptest::collection::btree_map("[a-z]{1,6}", value, 0..4), any::<bool>()).prop_map(|(m, pretty)| {
            let value = serde_json::Value::Object(m.into_iter().collect());
            if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() }
        })
    }

    proptest! {
        #[test]
        fn requests_come_out_whole_however_they_are_cut(
            objects in proptest::collection::vec((any_object(), proptest::sample::select(vec!["", "\n", "\r\n", "  "])), 1..6),
            cuts in proptest::collection::vec(1usize..40, 1..60),
        ) {
            let stream: String = objects.iter().map(|(o, gap)| format!("{o}{gap}")).collect();
            let (mut codec, mut rest, mut got) = (Codec::default(), stream.as_bytes(), vec![]);
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                got.extend(texts(codec.push(head, false)));
                rest = tail;
            }
            let want: Vec<String> = objects.into_iter().map(|(o, _)| o).collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn after_any_garbage_a_newline_and_a_request_work(
            garbage in proptest::collection::vec(any::<u8>(), 0..200), cut in 1usize..50,
        ) {
            let mut codec = Codec::default();
            for part in garbage.chunks(cut) {
                codec.push(part, false);
            }
            // An unfinished request may still be waiting: two lines at most bring the stream back.
            let mut got = codec.push(b"\n}\n", false);
            got = [got, codec.push(b"{\"execute\":\"stop\"}\n", false)].concat();
            got.extend(codec.push(b"{\"execute\":\"stop\"}\n", false));
            got.extend(codec.push(b"{\"execute\":\"stop\"}\n", false));
            prop_assert!(
                got.contains(&Frame::Request(b"{\"execute\":\"stop\"}".to_vec())),
                "{got:?}"
            );
        }
    }
}
