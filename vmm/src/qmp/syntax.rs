//! An incremental JSON syntax check (RFC 8259): owns the question whether bytes can still become an object, one byte at a time.
//!
//! A parser of whole texts cannot tell a request that is not all here yet from one that is broken. This one can: it refuses the
//! first byte after which no continuation is valid, in constant memory, so a broken request never swallows the ones after it.
//! Values are not its business; whoever gets a complete text parses it.

/// Objects and arrays inside each other, at most.
pub(super) const DEPTH_MAX: u32 = 64;

/// What a byte led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// More is needed.
    More,
    /// The object is complete.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    E,
    ESign,
    Exponent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// A value; `true` where an array may also end.
    Value(bool),
    /// A key; `true` where the object may also end.
    Key(bool),
    Colon,
    /// A comma, or the end of what is open.
    CommaOrEnd,
    /// Inside a string; `true` for a key.
    String(bool),
    /// After a backslash.
    Escape(bool),
    /// That many hexadecimal digits of `\u`.
    Hex(bool, u8),
    Number(Number),
    /// The rest of `true`, `false` or `null`.
    Word(&'static [u8]),
}

/// The state between two bytes of one object.
#[derive(Debug, Clone)]
pub(super) struct Syntax {
    expect: Expect,
    /// Bit n: level n is an object, not an array.
    objects: u64,
    depth: u32,
}

type Step = Result<Progress, &'static str>;

impl Syntax {
    /// After the opening brace of an object.
    pub(super) fn object() -> Self {
        Self { expect: Expect::Key(true), objects: 1, depth: 1 }
    }

    /// Takes the next byte; an error says what was expected.
    pub(super) fn feed(&mut self, byte: u8) -> Step {
        match self.expect {
            Expect::String(key) => match byte {
                b'"' => self.to(if key { Expect::Colon } else { Expect::CommaOrEnd }),
                b'\\' => self.to(Expect::Escape(key)),
                0..=0x1f => Err("expected the end of the string: control characters must be escaped"),
                _ => Ok(Progress::More),
            },
            Expect::Escape(key) => match byte {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => self.to(Expect::String(key)),
                b'u' => self.to(Expect::Hex(key, 4)),
                _ => Err("expected an escape sequence"),
            },
            Expect::Hex(key, left) => match (byte.is_ascii_hexdigit(), left) {
                (false, _) => Err("expected four hexadecimal digits after \\u"),
                (true, 1) => self.to(Expect::String(key)),
                (true, _) => self.to(Expect::Hex(key, left - 1)),
            },
            Expect::Word(rest) => match rest.split_first() {
                Some((first, rest)) if *first == byte => {
                    self.to(if rest.is_empty() { Expect::CommaOrEnd } else { Expect::Word(rest) })
                }
                _ => Err("expected true, false or null"),
            },
            Expect::Number(number) => self.number(number, byte),
            _ if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') => Ok(Progress::More),
            Expect::Value(may_end) => self.value(byte, may_end),
            Expect::Key(may_end) => match byte {
                b'"' => self.to(Expect::String(true)),
                b'}' if may_end => Ok(self.close()),
                _ => Err("expected a key in double quotes"),
            },
            Expect::Colon => match byte {
                b':' => self.to(Expect::Value(false)),
                _ => Err("expected ':'"),
            },
            Expect::CommaOrEnd => match (byte, self.in_object()) {
                (b',', true) => self.to(Expect::Key(false)),
                (b',', false) => self.to(Expect::Value(false)),
                (b'}', true) | (b']', false) => Ok(self.close()),
                (_, true) => Err("expected ',' or '}'"),
                (_, false) => Err("expected ',' or ']'"),
            },
        }
    }

    fn to(&mut self, expect: Expect) -> Step {
        self.expect = expect;
        Ok(Progress::More)
    }

    fn in_object(&self) -> bool {
        self.objects >> (self.depth - 1) & 1 == 1
    }

    fn open(&mut self, object: bool) -> Step {
        if self.depth >= DEPTH_MAX {
            return Err("objects and arrays are nested too deeply");
        }
        let bit = 1 << self.depth;
        self.objects = if object { self.objects | bit } else { self.objects & !bit };
        self.depth += 1;
        self.to(if object { Expect::Key(true) } else { Expect::Value(true) })
    }

    fn close(&mut self) -> Progress {
        self.depth -= 1;
        self.expect = Expect::CommaOrEnd;
        if self.depth == 0 { Progress::Done } else { Progress::More }
    }

    fn value(&mut self, byte: u8, may_end: bool) -> Step {
        match byte {
            b'"' => self.to(Expect::String(false)),
            b'{' => self.open(true),
            b'[' => self.open(false),
            b']' if may_end => Ok(self.close()),
            b't' => self.to(Expect::Word(b"rue")),
            b'f' => self.to(Expect::Word(b"alse")),
            b'n' => self.to(Expect::Word(b"ull")),
            b'-' => self.to(Expect::Number(Number::Minus)),
            b'0' => self.to(Expect::Number(Number::Zero)),
            b'1'..=b'9' => self.to(Expect::Number(Number::Integer)),
            _ => Err("expected a value"),
        }
    }

    fn number(&mut self, number: Number, byte: u8) -> Step {
        use Number::{E, ESign, Exponent, Fraction, Integer, Minus, Point, Zero};
        let next = match (number, byte) {
            (Minus, b'0') => Zero,
            (Minus, b'1'..=b'9') | (Integer, b'0'..=b'9') => Integer,
            (Zero | Integer, b'.') => Point,
            (Point | Fraction, b'0'..=b'9') => Fraction,
            (Zero | Integer | Fraction, b'e' | b'E') => E,
            (E, b'+' | b'-') => ESign,
            (E | ESign | Exponent, b'0'..=b'9') => Exponent,
            (Zero | Integer | Fraction | Exponent, _) => {
                // The number ended before this byte.
                self.expect = Expect::CommaOrEnd;
                return self.feed(byte);
            }
            (Minus | Point | E | ESign, _) => return Err("expected a digit"),
        };
        self.to(Expect::Number(next))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The length of the object at the start of `text`; `None` while it could go on; the offending position otherwise.
    fn check(text: &[u8]) -> Result<Option<usize>, usize> {
        let mut syntax = Syntax::object();
        for (i, byte) in text.iter().enumerate().skip(1) {
            match syntax.feed(*byte) {
                Ok(Progress::More) => {}
                Ok(Progress::Done) => return Ok(Some(i + 1)),
                Err(_) => return Err(i),
            }
        }
        Ok(None)
    }

    #[test]
    fn finds_the_first_byte_that_cannot_be() {
        for (text, want) in [
            (r#"{}"#, Ok(Some(2))),
            (r#"{"a":1}x"#, Ok(Some(7))),
            (r#"{"a":[{}, [], -0.5e+3, true, null, "\u00fF\n"]}"#, Ok(Some(47))),
            (r#"{"a"#, Ok(None)),
            (r#"{"a":tr"#, Ok(None)),
            (r#"{a"#, Err(1)),
            (r#"{"a" 1"#, Err(5)),
            (r#"{"a":1,}"#, Err(7)),
            (r#"{"a":[1,]"#, Err(8)),
            (r#"{"a":]"#, Err(5)),
            (r#"{"a":01"#, Err(6)),
            (r#"{"a":-}"#, Err(6)),
            (r#"{"a":1.}"#, Err(7)),
            (r#"{"a":1e}"#, Err(7)),
            (r#"{"a":trux"#, Err(8)),
            (r#"{"a":"\x"#, Err(7)),
            (r#"{"a":"\u00g"#, Err(10)),
            ("{\"a\n", Err(3)),
            (r#"{"a":1]"#, Err(6)),
            (r#"{"a":[1}"#, Err(7)),
        ] {
            assert_eq!(check(text.as_bytes()), want, "{text}");
        }
        let deep = format!(r#"{{"a":{}"#, "[".repeat(63));
        assert_eq!(check(deep.as_bytes()), Ok(None));
        assert_eq!(check(format!("{deep}[").as_bytes()), Err(deep.len()));
    }

    proptest! {
        /// Texts made of JSON's own pieces, where most are nearly right: both must say the same.
        #[test]
        fn agrees_with_a_parser_of_whole_texts(pieces in proptest::collection::vec(
            proptest::sample::select(vec!["{", "}", "[", "]", ":", ",", "\"a\"", "\"", "\\", "1", "0", "-", ".", "e", "true", "nul", "l", " ", "\n"]), 0..14)) {
            let text = format!("{{{}", pieces.concat());
            let whole = serde_json::from_str::<serde_json::Value>(&text);
            match check(text.as_bytes()) {
                Ok(Some(end)) => {
                    prop_assert!(serde_json::from_str::<serde_json::Value>(&text[..end]).is_ok(), "{text}");
                }
                Ok(None) => prop_assert!(whole.is_err_and(|e| e.is_eof()), "{text}"),
                Err(_) => prop_assert!(whole.is_err_and(|e| !e.is_eof()), "{text}"),
            }
        }
    }
}
