//! The right-hand side of an option: `word,key=value,flag`. Owns the splitting and the value types (booleans, sizes, numbers).
//!
//! Used by the other parts of the command-line parser only. A key is asked for by name; [`Props::finish`] refuses what nobody
//! asked for and lists what would have been understood, so that the list in the message is always the real one.

use std::path::PathBuf;

use super::CmdlineError;

/// Longest id and file name.
const NAME_MAX: usize = 255;

/// The parsed right-hand side of one option.
pub(super) struct Props {
    option: &'static str,
    /// The leading bare word, if the option takes one.
    word: Option<String>,
    items: Vec<(String, Option<String>)>,
    asked: Vec<&'static str>,
}

/// Splits at commas; two commas stand for one inside a value, so that any path can be written.
pub fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(last) = items.last_mut() {
            last.push(c);
        }
    }
    items
}

impl Props {
    /// Splits `text`. With `word_key`, a first item without `=` is the value of that key: `-smp 2` is `-smp cpus=2`.
    pub(super) fn parse(
        option: &'static str,
        text: &str,
        word_key: Option<&'static str>,
    ) -> Result<Self, CmdlineError> {
        let mut props = Self { option, word: None, items: Vec::new(), asked: Vec::new() };
        for (i, item) in split(text).into_iter().enumerate() {
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key.replace('_', "-"), Some(value.to_owned())),
                None => (item, None),
            };
            if i == 0 && word_key.is_some() && (value.is_none() || word_key == Some(key.as_str())) {
                let word = value.unwrap_or(key);
                if word.is_empty() {
                    return Err(props.bad(format!("a value is missing: '{text}'")));
                }
                props.word = Some(word);
                continue;
            }
            if key.is_empty() {
                return Err(
                    props.bad(format!("'{text}' has an empty item; write ',,' for a comma in a value"))
                );
            }
            if props.items.iter().any(|(k, _)| *k == key) || (props.word.is_some() && word_key == Some(&key))
            {
                return Err(props.bad(format!("'{key}' is given twice")));
            }
            props.items.push((key, value));
        }
        Ok(props)
    }

    /// An error that names this option.
    pub(super) fn bad(&self, message: impl Into<String>) -> CmdlineError {
        CmdlineError::BadValue { option: self.option, message: message.into() }
    }

    /// An error for what a later version will understand.
    pub(super) fn unsupported(&self, what: impl Into<String>) -> CmdlineError {
        CmdlineError::Unsupported { option: self.option, what: what.into() }
    }

    /// The leading word, or the value of `key`, for which it stands, from wherever it was written.
    pub(super) fn word(&mut self, key: &'static str) -> Result<Option<String>, CmdlineError> {
        match self.word.take() {
            Some(word) => Ok(Some(word)),
            None => self.text(key),
        }
    }

    fn take(&mut self, key: &'static str) -> Option<Option<String>> {
        self.asked.push(key);
        let at = self.items.iter().position(|(k, _)| k == key)?;
        Some(self.items.remove(at).1)
    }

    /// `key=text`, not empty.
    pub(super) fn text(&mut self, key: &'static str) -> Result<Option<String>, CmdlineError> {
        match self.take(key) {
            None => Ok(None),
            Some(Some(value)) if !value.is_empty() => Ok(Some(value)),
            Some(_) => Err(self.bad(format!("'{key}' needs a value: {key}=VALUE"))),
        }
    }

    /// `key=text` that must be there.
    pub(super) fn required(&mut self, key: &'static str) -> Result<String, CmdlineError> {
        let value = self.text(key)?;
        value.ok_or_else(|| self.bad(format!("'{key}' is missing: add {key}=VALUE")))
    }

    /// `id=`, 1 to 255 bytes.
    pub(super) fn id(&mut self) -> Result<Option<String>, CmdlineError> {
        let id = self.text("id")?;
        match id {
            Some(id) if id.len() > NAME_MAX => {
                Err(self.bad(format!("the id is longer than {NAME_MAX} bytes")))
            }
            id => Ok(id),
        }
    }

    /// `id=` that must be there.
    pub(super) fn required_id(&mut self) -> Result<String, CmdlineError> {
        let id = self.id()?;
        id.ok_or_else(|| self.bad("'id' is missing: add id=NAME"))
    }

    /// `key=PATH`.
    pub(super) fn path(&mut self, key: &'static str) -> Result<Option<PathBuf>, CmdlineError> {
        self.text(key)?.map(|p| path_value(self.option, &p)).transpose()
    }

    /// `key=on|off` and their spellings.
    pub(super) fn boolean(&mut self, key: &'static str) -> Result<Option<bool>, CmdlineError> {
        let Some(value) = self.text(key)? else { return Ok(None) };
        match boolean(&value) {
            Some(on) => Ok(Some(on)),
            None => Err(self.bad(format!("{key}={value}: write on or off"))),
        }
    }

    /// `key=N`: decimal, or hexadecimal with `0x`.
    pub(super) fn number(
        &mut self,
        key: &'static str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>, CmdlineError> {
        let Some(value) = self.text(key)? else { return Ok(None) };
        match number(&value) {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(self.bad(format!(
                "{key}={value}: write a whole number from {} to {}",
                range.start(),
                range.end()
            ))),
        }
    }

    /// A bare `flag`; `flag=on|off` too.
    pub(super) fn flag(&mut self, key: &'static str) -> Result<bool, CmdlineError> {
        match self.take(key) {
            None => Ok(false),
            Some(None) => Ok(true),
            Some(Some(value)) => {
                boolean(&value).ok_or_else(|| self.bad(format!("{key}={value}: write {key} or {key}=off")))
            }
        }
    }

    /// Takes `key` and refuses it when it is there: something a later version will understand.
    pub(super) fn refuse(&mut self, key: &'static str) -> Result<(), CmdlineError> {
        match self.take(key) {
            None => Ok(()),
            Some(_) => Err(self.unsupported(key)),
        }
    }

    /// Refuses keys that nobody asked for.
    pub(super) fn finish(mut self) -> Result<(), CmdlineError> {
        let Some((key, _)) = self.items.first() else { return Ok(()) };
        self.asked.sort_unstable();
        self.asked.dedup();
        Err(CmdlineError::UnknownKey { option: self.option, key: key.clone(), known: self.asked.join(", ") })
    }
}

/// `true on yes unmap` and `false off no ignore`.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "on" | "yes" | "unmap" => Some(true),
        "false" | "off" | "no" | "ignore" => Some(false),
        _ => None,
    }
}

/// Decimal, or hexadecimal with `0x`. No sign, no blanks.
pub(in crate::config) fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(hex) => (hex, 16),
        None => (text, 10),
    };
    // `from_str_radix` would take a leading plus.
    if digits.starts_with('+') { None } else { u64::from_str_radix(digits, radix).ok() }
}

/// A size in bytes: a whole number with `K`, `M` or `G`; bare numbers are MiB. `None` when it is no such thing or does not fit.
pub(super) fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 20),
    };
    if digits.starts_with('+') {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A path whose file name the kernel can hold.
pub(super) fn path_value(option: &'static str, text: &str) -> Result<PathBuf, CmdlineError> {
    let bad = |message: &str| CmdlineError::BadValue { option, message: message.to_owned() };
    if text.is_empty() {
        return Err(bad("the path is empty"));
    }
    let path = PathBuf::from(text);
    if path.file_name().is_some_and(|name| name.len() > NAME_MAX) {
        return Err(bad(&format!("the file name is longer than {NAME_MAX} bytes: {text}")));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_one_suffix_and_no_fraction() {
        for (text, want) in [
            ("256", Some(256 << 20)),
            ("256M", Some(256 << 20)),
            ("256m", Some(256 << 20)),
            ("1G", Some(1 << 30)),
            ("1g", Some(1 << 30)),
            ("262144K", Some(256 << 20)),
            ("0", Some(0)),
            ("", None),
            ("M", None),
            ("1.5G", None),
            ("1T", None),
            ("-1", None),
            ("+1", None),
            ("0x10", None),
            ("1 G", None),
            ("99999999999999999999", None),
            ("99999999999999G", None),
            ("1é", None),
        ] {
            assert_eq!(size(text), want, "{text}");
        }
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        for (text, want) in [
            ("7", Some(7)),
            ("0x1f", Some(31)),
            ("", None),
            ("0x", None),
            ("+7", None),
            ("-1", None),
            ("f", None),
        ] {
            assert_eq!(number(text), want, "{text}");
        }
    }

    #[test]
    fn splits_words_keys_and_flags() {
        let mut props =
            Props::parse("-chardev", "socket,path=/a,,b=c,server,no_wait=on", Some("kind")).unwrap();
        assert_eq!(props.word("kind").unwrap().as_deref(), Some("socket"));
        assert_eq!(props.text("path").unwrap().as_deref(), Some("/a,b=c"));
        assert!(props.flag("server").unwrap());
        assert_eq!(props.boolean("no-wait").unwrap(), Some(true));
        props.finish().unwrap();
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        for text in ["", "a,,", ",a", "a,", "a,b=1,b=2", "a,b_c=1,b-c=2"] {
            let outcome = Props::parse("-x", text, Some("kind"));
            // Two commas are one comma in the word: the only text here that splits.
            assert_eq!(outcome.is_ok(), text == "a,,", "{text}");
        }
        let mut props = Props::parse("-x", "a,b=1", Some("kind")).unwrap();
        assert_eq!(props.text("c").unwrap(), None);
        assert_eq!(props.finish().unwrap_err().to_string(), "-x: unknown key 'b' (known: c)");
    }
}
