//! `human-monitor-command`: owns the lines that people type, what each means, and how its answer reads.
//!
//! A line becomes the QMP command of the same meaning, which `commands` carries out with that command's own checks; only the way in and
//! out is text. A line that is not carried out is an error with its reason, never a text that a program would have to look for the
//! word "error" in.

mod text;

use serde_json::json;

use super::arguments::{Arguments, quote};
use super::message::QmpError;
use super::plug;
use crate::config::cmdline;
use crate::control::Command;
use text::Render;

/// Longest line, in bytes.
const LINE_MAX: usize = 4096;

/// What a line comes to.
pub(super) enum Step {
    /// This answer.
    Say(String),
    /// This QMP command, its answer as text.
    Ask(&'static str, Arguments, Render),
    /// What QMP has no command for.
    Tell(Command, Render),
}

/// One kind of line: its first word, a short form of it, what follows, what it does.
struct Line {
    name: &'static str,
    short: &'static str,
    parameters: &'static str,
    help: &'static str,
    /// From the rest of the line.
    step: fn(&str) -> Result<Step, QmpError>,
}

const fn line(
    name: &'static str,
    short: &'static str,
    parameters: &'static str,
    help: &'static str,
    step: fn(&str) -> Result<Step, QmpError>,
) -> Line {
    Line { name, short, parameters, help, step }
}

/// All lines, by name.
const LINES: &[Line] = &[
    line("balloon", "", "MEBIBYTES", "the memory that the guest is to have", balloon),
    line("cont", "c", "", "let the vCPUs run", |rest| bare("cont", rest)),
    line("device_add", "", "DRIVER,id=ID[,KEY=VALUE...]", "plug a device", |rest| {
        Ok(Step::Ask("device_add", pairs(rest, "driver")?, text::nothing))
    }),
    line("device_del", "", "ID", "unplug a device", |rest| one("device_del", "id", rest)),
    line(
        "drive_add",
        "",
        "SLOT id=ID,file=PATH[,KEY=VALUE...]",
        "add a block node as -drive does",
        drive_add,
    ),
    line("drive_del", "", "ID", "remove a block node that no device uses", |rest| {
        one("blockdev-del", "node-name", rest)
    }),
    line("help", "?", "[COMMAND]", "show what can be typed", help),
    line("info", "", "[WHAT]", "show the state of something", info),
    line("migrate", "", "[-d] URI", "make a snapshot: file:/absolute/path", |rest| {
        one("migrate", "uri", rest.strip_prefix("-d ").unwrap_or(rest))
    }),
    line("migrate_cancel", "", "", "give a migration up", |rest| bare("migrate_cancel", rest)),
    line("netdev_add", "", "tap,id=ID,ifname=NAME[,KEY=VALUE...]", "add a network back end", |rest| {
        Ok(Step::Ask("netdev_add", pairs(rest, "type")?, text::nothing))
    }),
    line("netdev_del", "", "ID", "remove a network back end that no device uses", |rest| {
        one("netdev_del", "id", rest)
    }),
    line("quit", "q", "", "end the VM", |rest| bare("quit", rest)),
    line("stop", "s", "", "pause the vCPUs", |rest| bare("stop", rest)),
    line("system_powerdown", "", "", "press the power button", |rest| bare("system_powerdown", rest)),
    line("system_reset", "", "", "restart the guest", |rest| bare("system_reset", rest)),
    line(
        "trace-event",
        "",
        "NAME on|off",
        "switch the trace points of this name; * stands for any text",
        trace,
    ),
];

/// What `info` can show: the word, what it is, and where it comes from.
type Info = (&'static str, &'static str, fn() -> Step);

/// All of them, by word.
const INFOS: &[Info] = &[
    ("balloon", "memory that the guest has", || ask("query-balloon", text::balloon)),
    ("block", "disks", || ask("query-block", text::block)),
    ("blockstats", "transfers of disks", || ask("query-blockstats", text::blockstats)),
    ("chardev", "character devices", || ask("query-chardev", text::chardevs)),
    ("cpus", "vCPUs", || ask("query-cpus", text::cpus)),
    ("iothreads", "I/O threads", || ask("query-iothreads", text::iothreads)),
    ("kvm", "whether KVM runs the VM", || ask("query-kvm", text::kvm)),
    ("migrate", "state of the last migration", || ask("query-migrate", text::migrate)),
    ("name", "name of the VM", || ask("query-name", text::name)),
    ("network", "NICs and network back ends", || Step::Tell(Command::QueryNetwork, text::network)),
    ("qtree", "devices", || {
        let path = json!("/machine/peripheral");
        Step::Ask("qom-list", Arguments::from_iter([("path".to_owned(), path)]), text::qtree)
    }),
    // Images may hold some; nothing here makes or uses them.
    ("snapshots", "snapshots inside disk images", || {
        Step::Say("No available block device supports snapshots\r\n".to_owned())
    }),
    ("status", "whether the VM runs", || ask("query-status", text::status)),
    ("trace-events", "trace points", || {
        let name = json!("*");
        Step::Ask("trace-get-state", Arguments::from_iter([("name".to_owned(), name)]), text::trace_points)
    }),
    ("uuid", "identity of the VM", || ask("query-uuid", text::uuid)),
    ("version", "version of this program", || ask("query-version", text::version)),
];

/// What was typed, as a step.
///
/// # Errors
/// It is no line that is known, or what follows its first word does not fit.
pub(super) fn read(typed: &str) -> Result<Step, QmpError> {
    if typed.len() > LINE_MAX {
        return Err(QmpError::generic(format!("argument 'command-line' must have at most {LINE_MAX} bytes")));
    }
    let typed = typed.trim();
    let (word, rest) = typed.split_once(char::is_whitespace).unwrap_or((typed, ""));
    let Some(line) = find(word) else {
        return Err(match word {
            "" => QmpError::generic("argument 'command-line' is empty: try help"),
            word => QmpError::generic(format!("Unsupported command: {} (try help)", quote(word))),
        });
    };
    (line.step)(rest.trim())
}

fn find(word: &str) -> Option<&'static Line> {
    LINES.iter().find(|line| line.name == word || (line.short == word && !word.is_empty()))
}

fn ask(command: &'static str, render: Render) -> Step {
    Step::Ask(command, Arguments::new(), render)
}

/// A line that is its word.
fn bare(command: &'static str, rest: &str) -> Result<Step, QmpError> {
    if rest.is_empty() {
        return Ok(ask(command, text::nothing));
    }
    Err(QmpError::generic(format!("{command}: unexpected '{}'", quote(rest))))
}

/// A line with one word after the first.
fn one(command: &'static str, member: &str, rest: &str) -> Result<Step, QmpError> {
    if rest.is_empty() || rest.contains(char::is_whitespace) {
        return Err(QmpError::generic(format!("{command}: write one {member} after it")));
    }
    Ok(Step::Ask(command, Arguments::from_iter([(member.to_owned(), json!(rest))]), text::nothing))
}

/// `WORD,KEY=VALUE,KEY`: the word is the value of `first`, and a key without a value is on.
fn pairs(rest: &str, first: &str) -> Result<Arguments, QmpError> {
    let mut arguments = Arguments::new();
    for (at, item) in cmdline::items(rest).into_iter().enumerate() {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, value),
            None if at == 0 => (first, item.as_str()),
            None => (item.as_str(), "on"),
        };
        if key.is_empty() || value.is_empty() {
            return Err(QmpError::generic(format!("'{}' is not KEY=VALUE", quote(&item))));
        }
        if arguments.insert(key.to_owned(), json!(value)).is_some() {
            return Err(QmpError::generic(format!("'{}' is given twice", quote(key))));
        }
    }
    Ok(arguments)
}

fn balloon(rest: &str) -> Result<Step, QmpError> {
    let bytes = rest.parse::<u64>().ok().and_then(|mib| mib.checked_mul(1 << 20));
    let bytes = bytes.ok_or_else(|| QmpError::generic("balloon: write a whole number of MiB after it"))?;
    Ok(Step::Ask("balloon", Arguments::from_iter([("value".to_owned(), json!(bytes))]), text::nothing))
}

/// The slot is of no use to a drive without a device (`if=none`), which is the only kind there is.
fn drive_add(rest: &str) -> Result<Step, QmpError> {
    let (_, options) = rest.split_once(char::is_whitespace).ok_or_else(|| {
        QmpError::generic("drive_add: write a slot, such as 0, and then id=ID,file=PATH[,KEY=VALUE...]")
    })?;
    let drive = cmdline::drive(options.trim()).map_err(|e| QmpError::generic(e.to_string()))?;
    plug::check_name("id", &drive.id)?;
    Ok(Step::Tell(Command::BlockdevAdd { drive: Box::new(drive), node: None, files: Vec::new() }, text::ok))
}

fn trace(rest: &str) -> Result<Step, QmpError> {
    let enable = match rest.split_whitespace().collect::<Vec<_>>()[..] {
        [name, "on"] => Some((name, true)),
        [name, "off"] => Some((name, false)),
        _ => None,
    };
    let (name, enable) =
        enable.ok_or_else(|| QmpError::generic("trace-event: write a name and on or off after it"))?;
    let arguments = [("name".to_owned(), json!(name)), ("enable".to_owned(), json!(enable))];
    Ok(Step::Ask("trace-set-state", Arguments::from_iter(arguments), text::nothing))
}

fn help(rest: &str) -> Result<Step, QmpError> {
    if rest == "info" {
        return info("");
    }
    let chosen: Vec<&Line> = match rest {
        "" => LINES.iter().collect(),
        word => find(word).into_iter().collect(),
    };
    if chosen.is_empty() {
        return Err(QmpError::generic(format!("Unsupported command: {} (try help)", quote(rest))));
    }
    let shown = chosen.iter().map(|line| {
        let short = if line.short.is_empty() { String::new() } else { format!("|{}", line.short) };
        let blank = if line.parameters.is_empty() { "" } else { " " };
        format!("{}{short}{blank}{} -- {}\r\n", line.name, line.parameters, line.help)
    });
    Ok(Step::Say(shown.collect()))
}

fn info(rest: &str) -> Result<Step, QmpError> {
    if rest.is_empty() {
        let shown = INFOS.iter().map(|(word, help, _)| format!("info {word} -- {help}\r\n"));
        return Ok(Step::Say(shown.collect()));
    }
    match INFOS.iter().find(|(word, ..)| *word == rest) {
        Some((_, _, step)) => Ok(step()),
        None => Err(QmpError::generic(format!("Unsupported command: info {} (try info)", quote(rest)))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn lines_are_sorted_and_their_words_lead_to_one_of_them() {
        assert!(LINES.is_sorted_by(|a, b| a.name < b.name));
        assert!(INFOS.is_sorted_by(|a, b| a.0 < b.0));
        let mut words: Vec<&str> = LINES.iter().flat_map(|l| [l.name, l.short]).collect();
        words.retain(|word| !word.is_empty());
        let count = words.len();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), count);
    }

    #[test]
    fn what_stands_after_the_word_becomes_arguments() {
        let got = pairs("virtio-blk-mmio,id=a,addr=0x1,serial=x,,y,share-rw", "driver").unwrap();
        let want =
            json!({"driver": "virtio-blk-mmio", "id": "a", "addr": "0x1", "serial": "x,y", "share-rw": "on"});
        assert_eq!(Value::from(got), want);
        for (text, want) in [
            ("", "'' is not KEY=VALUE"),
            ("tap,,", "'tap,' is given"),
            ("tap,id=", "'id=' is not KEY=VALUE"),
            ("tap,id=a,id=b", "'id' is given twice"),
            ("type=tap,type=tap", "'type' is given twice"),
        ] {
            match pairs(text, "type") {
                Err(error) => assert_eq!(error.desc, want, "{text}"),
                Ok(arguments) => assert_eq!(arguments["type"], "tap,", "{text}"),
            }
        }
    }
}
