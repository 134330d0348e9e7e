//! Trace points: owns their names, which of them are on, and the switch.
//!
//! A point is a `tracing::trace!` whose target is one of the names here. While none is on, each costs one load of a number that never
//! changes; a client switches them while the VM runs (`trace-set-state`), and their lines go to the log whatever its level is.
//! Names are constants, so that a point with a name that is not in [`POINTS`] fails a test and not an investigation.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ProcessError;

/// Longest file of names that is read, in bytes.
const FILE_MAX: u64 = 64 << 10;

/// A guest reads or writes an address where nothing is.
pub const BUS_UNCLAIMED: &str = "bus_unclaimed";
/// What the guest has made of the balloon.
pub const BALLOON_ACTUAL: &str = "balloon_actual";
/// What the guest is asked to make of it.
pub const BALLOON_TARGET: &str = "balloon_target";
/// A client has come to a character device.
pub const CHARDEV_CONNECT: &str = "chardev_connect";
/// It has gone.
pub const CHARDEV_DISCONNECT: &str = "chardev_disconnect";
/// A back end or device is to come or go.
pub const HOTPLUG_REQUEST: &str = "hotplug_request";
/// The migration's state changes.
pub const MIGRATION_STATE: &str = "migration_state";
/// A client is told of something.
pub const QMP_EVENT: &str = "qmp_event";
/// A client gets its answer.
pub const QMP_REPLY: &str = "qmp_reply";
/// A client asks for something.
pub const QMP_REQUEST: &str = "qmp_request";
/// A driver writes the status of its device.
pub const VIRTIO_STATUS: &str = "virtio_status";
/// The VM's life goes on.
pub const VM_STATE: &str = "vm_state";

/// All points, by name.
pub const POINTS: [&str; 12] = [
    BALLOON_ACTUAL,
    BALLOON_TARGET,
    BUS_UNCLAIMED,
    CHARDEV_CONNECT,
    CHARDEV_DISCONNECT,
    HOTPLUG_REQUEST,
    MIGRATION_STATE,
    QMP_EVENT,
    QMP_REPLY,
    QMP_REQUEST,
    VIRTIO_STATUS,
    VM_STATE,
];

/// A bit for each point that is on.
static ON: AtomicU64 = AtomicU64::new(0);

/// Whether the point is on; `None` for a target that is no trace point.
pub(super) fn is_on(target: &str) -> Option<bool> {
    let at = POINTS.iter().position(|point| *point == target)?;
    Some(ON.load(Ordering::Relaxed) >> at & 1 == 1)
}

/// Whether any is.
pub(super) fn any() -> bool {
    ON.load(Ordering::Relaxed) != 0
}

/// The points whose names fit `pattern`, in which `*` stands for any text and `?` for one character, and whether each is on.
pub fn state(pattern: &str) -> Vec<(&'static str, bool)> {
    let fitting = POINTS.iter().filter(|name| fits(pattern.as_bytes(), name.as_bytes()));
    fitting.map(|name| (*name, is_on(name).unwrap_or(false))).collect()
}

/// Switches the points whose names fit `pattern`; returns how many do.
pub fn switch(pattern: &str, on: bool) -> usize {
    let bits = (0..).zip(POINTS).filter(|(_, name)| fits(pattern.as_bytes(), name.as_bytes()));
    let bits = bits.fold(0u64, |bits, (at, _)| bits | 1 << at);
    if on {
        ON.fetch_or(bits, Ordering::Relaxed);
    } else {
        ON.fetch_and(!bits, Ordering::Relaxed);
    }
    // The library remembers for each place whether anybody listens.
    tracing::callsite::rebuild_interest_cache();
    bits.count_ones() as usize
}

/// Switches on the points that a file names, one name or pattern on a line; empty lines and those that begin with `#` say nothing.
pub fn switch_on_those_in(path: &Path) -> Result<(), ProcessError> {
    let error = |source| ProcessError::TraceFile { path: path.to_owned(), source };
    let mut text = String::new();
    File::open(path).and_then(|file| file.take(FILE_MAX).read_to_string(&mut text)).map_err(error)?;
    for name in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if switch(name, true) == 0 {
            return Err(ProcessError::NoTracePoint {
                path: path.to_owned(),
                name: name.chars().take(64).flat_map(char::escape_debug).collect(),
            });
        }
    }
    Ok(())
}

/// Goes back to the last `*` when what follows does not fit: at most text times pattern steps.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match &mut star {
                Some((at, from)) => {
                    *from += 1;
                    (p, t) = (*at + 1, *from);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, text, want) in [
            ("qmp_reply", "qmp_reply", true),
            ("qmp_reply", "qmp_reply2", false),
            ("qmp_*", "qmp_reply", true),
            ("*", "", true),
            ("", "", true),
            ("", "x", false),
            ("*_re*y", "qmp_reply", true),
            ("*_r?p*", "qmp_reply", true),
            ("?", "", false),
            ("*a*a*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(fits(pattern.as_bytes(), text.as_bytes()), want, "{pattern} {text}");
        }
    }

    #[test]
    fn names_are_sorted_and_fit_the_switch() {
        assert!(POINTS.is_sorted_by(|a, b| a < b));
        assert!(POINTS.len() <= 64);
        assert_eq!(is_on("vmm::control"), None);
        assert!(state("no such point").is_empty());
        assert_eq!(state("chardev_*").len(), 2);
        assert_eq!(switch("no such point", true), 0);
    }

    #[test]
    fn a_file_names_points() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("points");
        std::fs::write(&path, "# these\n\n  migration_stat?\n").unwrap();
        switch_on_those_in(&path).unwrap();
        assert_eq!(state(MIGRATION_STATE), [(MIGRATION_STATE, true)]);
        switch(MIGRATION_STATE, false);
        std::fs::write(&path, "nope\n").unwrap();
        let error = switch_on_those_in(&path).unwrap_err().to_string();
        assert!(error.contains("there is no trace point \"nope\""), "{error}");
        assert!(switch_on_those_in(&dir.path().join("none")).is_err());
    }
}
