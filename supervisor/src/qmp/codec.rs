//! Where one JSON value ends and the next begins, in a stream that comes in pieces. Bounded; byte by byte; no look back.
//!
//! A client may send several commands in one write, one command in many writes, with or without a newline between, so
//! only the text itself says where a command ends. The scanner follows JSON's grammar (RFC 8259) closely enough to see
//! that a text is broken as soon as it is, and leaves numbers, literals and escapes to the parser:
//!
//! ```text
//!            '{'                      last bracket closed
//!   idle ───────────▶ in an object ──────────────────────▶ idle, one frame out
//!    │  ▲                  │
//!    │  │                  ▼ a byte that cannot be there (one flaw out)
//!    │  └──────────── skipping
//!    └─── other byte ──▲
//! ```
//!
//! Skipping ends with the line, or with the read when nothing more waits to be read (some clients send no newlines); it
//! does not even begin when the byte was an opening brace at the beginning of a line: that is a new command after an
//! unfinished one. What is nested in a broken command is never taken for a command.

use serde::de::IgnoredAny;

/// Deepest nesting; the JSON parser has the same limit.
const MAX_DEPTH: u32 = 127;

/// Cuts a byte stream into JSON values.
#[derive(Debug)]
pub(crate) struct Framer {
    limit: usize,
    buffer: Vec<u8>,
    /// Where the unfinished frame begins in `buffer`; what is before is done with.
    start: usize,
    /// Up to where `buffer` was scanned.
    at: usize,
    state: State,
    /// Something other than blanks since the last newline.
    midline: bool,
    /// More was waiting when `buffer` was filled.
    more: bool,
}

/// Why something is no frame. The text goes to whoever sent it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Flaw(pub(crate) String);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Skipping,
    Value(Nest),
}

/// The scanner inside a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Nest {
    depth: u32,
    /// One bit per level, the innermost lowest: is it an object?
    objects: u128,
    expect: Expect,
    token: Token,
    /// Over the limit: followed to its end, no longer kept.
    dropped: bool,
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
}

/// What the scanner is in the middle of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    None,
    /// A string; `true` after a backslash.
    Text(bool),
    /// A number or one of `true`, `false`, `null`.
    Scalar,
}

/// What one byte did.
enum Step {
    More,
    Done,
    Broken,
}

impl Framer {
    /// A framer for frames of up to `limit` bytes.
    pub(crate) fn new(limit: usize) -> Framer {
        Framer { limit, buffer: Vec::new(), start: 0, at: 0, state: State::Idle, midline: false, more: false }
    }

    /// Adds what was read; `more`: the read filled its buffer. Everything before must have been taken out.
    pub(crate) fn push(&mut self, bytes: &[u8], more: bool) {
        self.more = more;
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.at -= self.start;
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The stream has ended inside a value: what the parser says about the piece that is there.
    pub(crate) fn end(&mut self) -> Option<Flaw> {
        let State::Value(nest) = self.state else { return None };
        let flaw = self.flaw(nest.dropped);
        self.state = State::Idle;
        Some(flaw)
    }

    /// The next frame, or the next flaw; `None`: more bytes are needed.
    pub(crate) fn next(&mut self) -> Option<Result<Vec<u8>, Flaw>> {
        while let Some(byte) = self.buffer.get(self.at).copied() {
            let begins_line = !self.midline;
            self.midline = byte != b'\n' && (self.midline || !byte.is_ascii_whitespace());
            self.at += 1;
            match self.state {
                State::Skipping => {
                    if byte == b'\n' {
                        self.state = State::Idle;
                    }
                    self.start = self.at;
                }
                State::Idle => match byte {
                    b'{' => self.state = State::Value(Nest::object()),
                    b' ' | b'\t' | b'\r' | b'\n' => self.start = self.at,
                    _ => return Some(Err(self.broken(byte, false, false))),
                },
                State::Value(mut nest) => {
                    let step = nest.step(byte);
                    self.state = State::Value(nest);
                    match step {
                        Step::More if nest.dropped => self.start = self.at,
                        Step::More if self.at - self.start > self.limit => {
                            self.state = State::Value(Nest { dropped: true, ..nest });
                            self.start = self.at;
                        }
                        Step::More => {}
                        Step::Done if nest.dropped || self.at - self.start > self.limit => {
                            let flaw = self.flaw(true);
                            self.state = State::Idle;
                            return Some(Err(flaw));
                        }
                        Step::Done => {
                            let frame = self.buffer[self.start..self.at].to_vec();
                            self.start = self.at;
                            self.state = State::Idle;
                            return Some(Ok(frame));
                        }
                        Step::Broken => return Some(Err(self.broken(byte, begins_line, nest.dropped))),
                    }
                }
            }
        }
        if self.state == State::Skipping && !self.more {
            self.state = State::Idle;
        }
        None
    }

    /// Bytes kept for a frame that is not complete.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// The byte just scanned cannot be there.
    fn broken(&mut self, byte: u8, begins_line: bool, dropped: bool) -> Flaw {
        let flaw = self.flaw(dropped);
        self.state = match byte {
            b'\n' => State::Idle,
            b'{' if begins_line => {
                self.start = self.at - 1;
                State::Value(Nest::object())
            }
            _ => State::Skipping,
        };
        flaw
    }

    /// Words for what was scanned last, which is then done with.
    fn flaw(&mut self, dropped: bool) -> Flaw {
        let text = if dropped {
            format!("the message is longer than {} bytes", self.limit)
        } else {
            match (serde_json::from_slice::<IgnoredAny>(&self.buffer[self.start..self.at]), self.state) {
                // The parser has no objection but that it ends: then it was the scanner's own limit.
                (Err(error), State::Value(nest)) if error.is_eof() && nest.depth == MAX_DEPTH => {
                    format!("the message is nested deeper than {MAX_DEPTH} levels")
                }
                (Err(error), State::Value(_)) => format!("invalid JSON: {error}"),
                _ => "invalid JSON: expected an object".to_owned(),
            }
        };
        self.start = self.at;
        Flaw(text)
    }
}

impl Nest {
    /// Just inside the outermost brace.
    fn object() -> Nest {
        Nest { depth: 1, objects: 1, expect: Expect::KeyOrEnd, token: Token::None, dropped: false }
    }

    fn open(&mut self, object: bool) {
        self.depth += 1;
        self.objects = self.objects << 1 | u128::from(object);
        self.expect = if object { Expect::KeyOrEnd } else { Expect::ValueOrEnd };
    }

    fn step(&mut self, byte: u8) -> Step {
        match self.token {
            Token::Text(escaped) => return self.in_text(byte, escaped),
            Token::Scalar if byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.') => {
                return Step::More;
            }
            Token::Scalar | Token::None => self.token = Token::None,
        }
        let object = self.objects & 1 == 1;
        match (self.expect, byte) {
            (_, b' ' | b'\t' | b'\r' | b'\n') => Step::More,
            (Expect::KeyOrEnd, b'}') | (Expect::ValueOrEnd, b']') => self.close(),
            (Expect::CommaOrEnd, b'}') if object => self.close(),
            (Expect::CommaOrEnd, b']') if !object => self.close(),
            (Expect::CommaOrEnd, b',') => self.go(if object { Expect::Key } else { Expect::Value }),
            (Expect::Colon, b':') => self.go(Expect::Value),
            (Expect::Key | Expect::KeyOrEnd, b'"') => self.text(Expect::Colon),
            (Expect::Value | Expect::ValueOrEnd, b'"') => self.text(Expect::CommaOrEnd),
            (Expect::Value | Expect::ValueOrEnd, b'{' | b'[') if self.depth < MAX_DEPTH => {
                self.open(byte == b'{');
                Step::More
            }
            (Expect::Value | Expect::ValueOrEnd, b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => {
                self.token = Token::Scalar;
                self.go(Expect::CommaOrEnd)
            }
            _ => Step::Broken,
        }
    }

    fn in_text(&mut self, byte: u8, escaped: bool) -> Step {
        match byte {
            // RFC 8259 section 7: control characters must be escaped. It is also how a missing quote is noticed.
            0..=0x1f => return Step::Broken,
            _ if escaped => self.token = Token::Text(false),
            b'\\' => self.token = Token::Text(true),
            b'"' => self.token = Token::None,
            _ => {}
        }
        Step::More
    }

    fn text(&mut self, then: Expect) -> Step {
        self.token = Token::Text(false);
        self.go(then)
    }

    fn go(&mut self, expect: Expect) -> Step {
        self.expect = expect;
        Step::More
    }

    fn close(&mut self) -> Step {
        self.depth -= 1;
        self.objects >>= 1;
        self.expect = Expect::CommaOrEnd;
        if self.depth == 0 { Step::Done } else { Step::More }
    }
}
