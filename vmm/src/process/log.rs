//! The log: owns its file, the form of its lines and its rotation.
//!
//! One line per message, in the form that tools which drive StratoVirt look for:
//! `2026-11-22T17:46:53.592660754: [pid][tid][file:line]:INFO: text` (UTC). A receiver of standard error that does not read
//! loses lines; it never stops the VM. This is a subscriber of its own because it must cost nothing at start-up.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::journal::Journal;
use super::{ProcessError, trace};
use crate::sandbox;

/// A file that reaches this size is put aside.
const FILE_MAX: u64 = 100 << 20;
/// Files that were put aside: `FILE.1` (the newest) to `FILE.7`.
const FILES_KEPT: u32 = 7;
const SECONDS_PER_DAY: u64 = 86400;

struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    day: u64,
}

enum Target {
    /// Counts the lines that were lost since the last one that went out.
    Stderr(u64),
    Journal(&'static Journal),
    File(LogFile),
}

struct Log {
    level: LevelFilter,
    target: Mutex<Target>,
}

/// Logs to `path`, or to standard error, or to the journal where the environment asks for that, from now on. The level comes from `FLOTILLA_LOG` or `STRATOVIRT_LOG_LEVEL`.
pub fn init(path: Option<&Path>) -> Result<(), ProcessError> {
    let asked = ["FLOTILLA_LOG", "STRATOVIRT_LOG_LEVEL"].iter().find_map(std::env::var_os);
    let parsed = asked.as_ref().map(|text| level(&text.to_string_lossy()));
    let target = match path {
        None => Journal::asked().map_or(Target::Stderr(0), Target::Journal),
        Some(path) => {
            let file = |source| ProcessError::Log { path: path.to_owned(), source };
            // Absolute, because rotation must find it whatever the working directory is by then.
            let absolute = std::path::absolute(path).map_err(file)?;
            Target::File(LogFile::open(absolute).map_err(file)?)
        }
    };
    let level = parsed.flatten().unwrap_or(LevelFilter::INFO);
    let log = Log { level, target: Mutex::new(target) };
    tracing::subscriber::set_global_default(log).map_err(|_| ProcessError::LogTwice)?;
    if level == LevelFilter::TRACE {
        trace::switch("*", true);
    }
    if parsed == Some(None) {
        tracing::warn!("unknown log level {asked:?}: use error, warn, info, debug or trace");
    }
    Ok(())
}

/// Says on standard error, or to the journal where the environment asks for that, why this VM cannot be.
pub fn complain(text: &str) {
    let said = Journal::asked().map(|journal| journal.send(Level::ERROR, &format!("flotilla-vmm: {text}")));
    if !matches!(said, Some(Ok(()))) {
        // Nobody to tell if standard error is gone.
        let _ = writeln!(io::stderr(), "flotilla-vmm: {text}");
    }
}

fn level(text: &str) -> Option<LevelFilter> {
    Some(match text.to_ascii_lowercase().as_str() {
        "error" => LevelFilter::ERROR,
        "warn" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => return None,
    })
}

impl LogFile {
    fn open(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o640).open(&path)?;
        // Before an older file is closed: its number may then belong to anything.
        sandbox::report_to(file.as_raw_fd());
        let meta = file.metadata()?;
        let modified = meta.modified().unwrap_or(UNIX_EPOCH).duration_since(UNIX_EPOCH).unwrap_or_default();
        let day = if meta.len() == 0 { today() } else { modified.as_secs() / SECONDS_PER_DAY };
        Ok(Self { path, file, size: meta.len(), day })
    }

    fn kept(&self, n: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{n}"));
        name.into()
    }

    /// Puts the file aside and starts a new one. A directory that does not allow it only means that the file goes on growing.
    fn rotate(&mut self) {
        for n in (1..FILES_KEPT).rev() {
            let _ = std::fs::rename(self.kept(n), self.kept(n + 1));
        }
        let rotated = std::fs::rename(&self.path, self.kept(1)).and_then(|()| Self::open(self.path.clone()));
        match rotated {
            Ok(new) => *self = new,
            // Not again with the next line.
            Err(_) => (self.size, self.day) = (0, today()),
        }
    }

    fn write(&mut self, line: &str) {
        if self.size >= FILE_MAX || self.day != today() {
            self.rotate();
        }
        // A full disk is no reason to stop a VM.
        let _ = self.file.write_all(line.as_bytes());
        self.size += line.len() as u64;
    }
}

fn now() -> (u64, u32) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_secs(), now.subsec_nanos())
}

fn today() -> u64 {
    now().0 / SECONDS_PER_DAY
}

/// Year, month and day of a day counted from 1970-01-01 (the Gregorian calendar repeats every 146097 days; counting years from
/// March puts the leap day at their end).
fn date(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year + u64::from(month <= 2), month, of_year - (153 * from_march + 2) / 5 + 1)
}

impl Target {
    fn write(&mut self, level: Level, line: &str) {
        match self {
            Self::File(file) => file.write(line),
            // Nothing is to be done about a message that is lost.
            Self::Journal(journal) => drop(journal.send(level, line.trim_end())),
            Self::Stderr(lost) => {
                let stderr = io::stderr();
                let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
                if !poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0) {
                    *lost += 1;
                    return;
                }
                let mut stderr = stderr.lock();
                if std::mem::take(lost) > 0 {
                    let _ = stderr.write_all(b"(log lines were lost: nobody read them)\n");
                }
                let _ = stderr.write_all(line.as_bytes());
            }
        }
    }
}

/// Collects the message and any fields of an event.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        trace::is_on(metadata.target()).unwrap_or(*metadata.level() <= self.level)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if trace::any() { LevelFilter::TRACE } else { self.level })
    }

    // Spans are not in use here: one VM per process needs no context.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let (seconds, nanos) = now();
        let (year, month, day) = date(seconds / SECONDS_PER_DAY);
        let of_day = seconds % SECONDS_PER_DAY;
        let metadata = event.metadata();
        let point = trace::is_on(metadata.target()).map_or("", |_| metadata.target());
        let blank = if point.is_empty() { "" } else { " " };
        let line = format!(
            "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{nanos:09}: [{}][{}][{}:{}]:{}: {point}{blank}{}{}\n",
            of_day / 3600,
            of_day / 60 % 60,
            of_day % 60,
            rustix::process::getpid().as_raw_nonzero(),
            rustix::thread::gettid().as_raw_nonzero(),
            metadata.file().unwrap_or("?"),
            metadata.line().unwrap_or(0),
            metadata.level(),
            // One message is one line, whatever it quotes.
            text.message.replace(['\n', '\r'], " "),
            text.fields
        );
        self.target.lock().unwrap_or_else(PoisonError::into_inner).write(*metadata.level(), &line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (day, want) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (20_779, (2026, 11, 22)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(day), want, "{day}");
        }
    }

    #[test]
    fn a_full_file_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogFile::open(path.clone()).unwrap();
        for n in 0..9 {
            log.size = FILE_MAX;
            log.write(&format!("{n}\n"));
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "8\n");
        assert_eq!(std::fs::read_to_string(dir.path().join("log.1")).unwrap(), "7\n");
        assert_eq!(std::fs::read_to_string(dir.path().join("log.7")).unwrap(), "1\n");
        assert!(!dir.path().join("log.8").exists());
    }

    #[test]
    fn lines_have_the_form_that_tools_look_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let target = Mutex::new(Target::File(LogFile::open(path.clone()).unwrap()));
        let log = Log { level: LevelFilter::INFO, target };
        tracing::subscriber::with_default(log, || {
            tracing::info!(answer = 42, "two\nlines");
            tracing::debug!("not this");
            let point = || tracing::trace!(target: trace::QMP_REPLY, "done");
            point();
            assert_eq!(trace::switch(trace::QMP_REPLY, true), 1);
            point();
            assert_eq!(trace::state(trace::QMP_REPLY), [(trace::QMP_REPLY, true)]);
            trace::switch(trace::QMP_REPLY, false);
            point();
        });
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].ends_with("]:INFO: two lines answer=42"), "{text}");
        assert!(lines[1].ends_with("]:TRACE: qmp_reply done"), "{text}");
    }
}
