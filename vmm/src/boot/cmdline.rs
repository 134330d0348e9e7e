//! The kernel command line: what the user wrote, then what the machine adds.

/// Why a command line cannot be passed to the kernel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Longer than the kernel takes.
    #[error(
        "the kernel command line is {len} bytes long ({user} given, the rest announces devices), but this kernel takes {limit} at most: shorten it"
    )]
    TooLong {
        /// Length of the whole line.
        len: usize,
        /// Length of the user's part.
        user: usize,
        /// Limit, the final NUL not counted.
        limit: usize,
    },
    /// A kernel would see the end of the line there.
    #[error("the kernel command line has a NUL byte in it")]
    Nul,
}

/// Joins the user's line with the machine's words; the result ends with NUL.
///
/// The words go before a free-standing `--`: what follows it is for init, not for the kernel.
pub(super) fn build(user: &str, words: &[String], limit: usize) -> Result<Vec<u8>, CmdlineError> {
    if user.contains('\0') {
        return Err(CmdlineError::Nul);
    }
    let (kernel, init) = user.split_at(end_of_kernel_part(user));
    let mut line = kernel.trim_end().to_owned();
    for word in words {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !init.is_empty() {
        line.push(' ');
        line.push_str(init);
    }
    if line.len() > limit {
        return Err(CmdlineError::TooLong { len: line.len(), user: user.len(), limit });
    }
    let mut line = line.into_bytes();
    line.push(0);
    Ok(line)
}

/// Offset of a free-standing `--` outside of double quotes, or the line's length.
fn end_of_kernel_part(line: &str) -> usize {
    let (mut quoted, mut word) = (false, 0);
    for (at, c) in line.char_indices().chain([(line.len(), ' ')]) {
        if c == '"' {
            quoted = !quoted;
        } else if c.is_ascii_whitespace() && (!quoted || at == line.len()) {
            if line.get(word..at) == Some("--") {
                return word;
            }
            word = at + 1;
        }
    }
    line.len()
}

/// Tells a kernel built with `CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES` about a device.
pub(super) fn virtio_mmio(slot: &super::MmioSlot) -> String {
    format!("virtio_mmio.device={}@{:#010x}:{}", slot.size, slot.cmdline_base, slot.irq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(user: &str, words: &[&str]) -> String {
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        let mut line = build(user, &words, 2047).unwrap();
        assert_eq!(line.pop(), Some(0));
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn words_go_after_the_users_part_but_before_inits() {
        for (user, expected) in [
            ("", "a b"),
            ("quiet", "quiet a b"),
            ("quiet -- single", "quiet a b -- single"),
            ("-- single", "a b -- single"),
            ("quiet --", "quiet a b --"),
            ("x=\"1 -- 2\" y", "x=\"1 -- 2\" y a b"),
            ("x=--y --z", "x=--y --z a b"),
        ] {
            assert_eq!(text(user, &["a", "b"]), expected);
        }
        assert_eq!(text("quiet  ", &[]), "quiet");
    }

    #[test]
    fn the_kernels_limit_counts() {
        assert_eq!(build("12345", &[], 5).unwrap().len(), 6);
        assert_eq!(
            build("12345", &["6".into()], 6),
            Err(CmdlineError::TooLong { len: 7, user: 5, limit: 6 })
        );
        assert_eq!(build("a\0b", &[], 100), Err(CmdlineError::Nul));
    }

    #[test]
    fn announces_a_device_as_the_kernel_parses_it() {
        let slot = super::super::MmioSlot { cmdline_base: 0xf010_0200, acpi_base: 0, size: 512, irq: 6 };
        assert_eq!(virtio_mmio(&slot), "virtio_mmio.device=512@0xf0100200:6");
    }

    proptest! {
        #[test]
        fn never_loses_a_word(user in "[ a-c\"-]{0,30}") {
            let line = text(&user, &["WORD"]);
            prop_assert!(line.contains("WORD"));
            let letters = |s: &str| s.chars().filter(char::is_ascii_lowercase).collect::<String>();
            prop_assert_eq!(letters(&line), letters(&user));
        }
    }
}
