//! Printing: text to the standard output that survives a closed pipe, tables, and colours on a terminal only. Owns no data.

use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};

use crate::failure::{Exit, Failure};

/// Writes text to the standard output. A reader that has gone (`flotilla list | head -1`) is no error.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// The cursor stands behind text that a guest has printed without a line end.
static MID_LINE: AtomicBool = AtomicBool::new(false);

/// Writes bytes to the standard output at once.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    if let Some(last) = bytes.last() {
        MID_LINE.store(*last != b'\n', Ordering::Relaxed);
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Failed, format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Pretty JSON and a line end.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(Exit::Failed, format!("JSON: {error}")))?;
    print(&format!("{text}\n"))
}

/// A note for the person at the terminal: what the command does. It goes beside the data, to the standard error.
pub(crate) fn note(text: &str) {
    let start = if MID_LINE.swap(false, Ordering::Relaxed) { "\n" } else { "" };
    // Nothing can be done about a standard error that is closed.
    let _ = writeln!(std::io::stderr(), "{start}{text}");
}

/// Colours are for a terminal whose user has not said no (<https://no-color.org>).
pub(crate) fn coloured() -> bool {
    std::io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|value| value != "dumb")
}

/// Rows under a header, aligned, without lines; never wrapped, so that each row is one line for `grep`.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<Cell>>, coloured: bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if coloured {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    table.set_header(header.iter().map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// A state word in its colour.
pub(crate) fn state(word: &str) -> Cell {
    let cell = Cell::new(word);
    match word {
        "running" => cell.fg(Color::Green),
        "paused" | "starting" | "stopping" => cell.fg(Color::Yellow),
        "failed" | "quarantined" => cell.fg(Color::Red),
        _ => cell,
    }
}

/// Text from elsewhere made safe for a terminal: control characters become `?`.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_end_without_blanks() {
        let rows = vec![
            vec![Cell::new("web"), state("running"), Cell::new("1")],
            vec![Cell::new("a-long-name"), state("paused"), Cell::new("")],
        ];
        let text = table(&["NAME", "STATE", "PID"], rows, false);
        assert_eq!(text, "NAME         STATE    PID\nweb          running  1\na-long-name  paused\n");
    }

    #[test]
    fn a_terminal_gets_colour() {
        let text = table(&["STATE"], vec![vec![state("running")]], true);
        assert!(text.contains('\u{1b}'), "{text:?}");
        assert_eq!(plain("a\u{1b}[31mb"), "a?[31mb");
    }
}
