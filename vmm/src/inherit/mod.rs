//! Descriptors that the launcher opened for us: owns the table that maps a path or tap name to an inherited descriptor.
//!
//! A VM of the fleet runs as a user of its own who may open neither the admin's disk images nor make taps. The launcher opens them
//! and says in the environment variable `FLOTILLA_FDS` which descriptor stands for which name of the command line, so that
//! the same command line also works when an administrator copies it out of `ps` and runs it by hand.
//!
//! The variable holds JSON: `[{"fd":3,"path":"/srv/web.img"},{"fd":4,"tap":"fl-web-0"},{"fd":5,"path":"/dev/kvm"}]`.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fd::BorrowedFd;
use serde::Deserialize;

#[cfg(fuzzing)]
pub mod fuzz;

/// Name of the environment variable.
pub const FLOTILLA_FDS: &str = "FLOTILLA_FDS";

/// Why the environment variable was refused.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Not the JSON that the module comment shows.
    #[error("environment variable FLOTILLA_FDS: {0}")]
    Syntax(#[source] serde_json::Error),
    /// A number that is not an open descriptor above 2, or is named twice.
    #[error(
        "environment variable FLOTILLA_FDS: descriptor {0} is not open, is a standard stream, or is named twice"
    )]
    BadDescriptor(RawFd),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    fd: RawFd,
    path: Option<PathBuf>,
    tap: Option<String>,
}

struct Descriptor {
    fd: OwnedFd,
    path: Option<PathBuf>,
    tap: Option<String>,
}

/// The table. Each descriptor is handed out once: a second user of one path opens it by itself, or fails, as it would by hand.
#[derive(Default)]
pub struct Inherited {
    descriptors: Mutex<Vec<Descriptor>>,
}

impl Inherited {
    /// Reads `FLOTILLA_FDS`. Call once, before threads start; absent means an empty table.
    pub fn from_env() -> Result<Self, InheritError> {
        match std::env::var_os(FLOTILLA_FDS) {
            Some(text) => Self::parse(&text.to_string_lossy()),
            None => Ok(Self::default()),
        }
    }

    /// Reads the JSON that the module comment shows.
    pub(crate) fn parse(text: &str) -> Result<Self, InheritError> {
        let entries: Vec<Entry> = serde_json::from_str(text).map_err(InheritError::Syntax)?;
        let mut seen = std::collections::BTreeSet::new();
        let mut descriptors = Vec::with_capacity(entries.len());
        for Entry { fd, path, tap } in entries {
            if fd <= 2 || !seen.insert(fd) {
                return Err(InheritError::BadDescriptor(fd));
            }
            // SAFETY: only asks the kernel whether the number is open; fails with EBADF otherwise.
            let open =
                rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, rustix::io::FdFlags::CLOEXEC);
            open.map_err(|_| InheritError::BadDescriptor(fd))?;
            // SAFETY: the launcher passed this descriptor to us alone, it is open, and each number occurs once.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            descriptors.push(Descriptor { fd, path, tap });
        }
        Ok(Self { descriptors: Mutex::new(descriptors) })
    }

    /// A table of descriptors that stand for paths.
    pub(crate) fn of(files: Vec<(PathBuf, OwnedFd)>) -> Self {
        let descriptors = files.into_iter().map(|(path, fd)| Descriptor { fd, path: Some(path), tap: None });
        Self { descriptors: Mutex::new(descriptors.collect()) }
    }

    /// The descriptor that stands for `path`, if one was passed and not taken yet.
    pub fn take_path(&self, path: &Path) -> Option<OwnedFd> {
        self.take(|d| d.path.as_deref() == Some(path))
    }

    /// The descriptor that stands for the tap `name`, if one was passed and not taken yet.
    pub fn take_tap(&self, name: &str) -> Option<OwnedFd> {
        self.take(|d| d.tap.as_deref() == Some(name))
    }

    fn take(&self, wanted: impl Fn(&Descriptor) -> bool) -> Option<OwnedFd> {
        let mut descriptors = self.descriptors.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let at = descriptors.iter().position(wanted)?;
        Some(descriptors.swap_remove(at).fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn hands_out_each_descriptor_once() {
        let fd = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let table = Inherited::parse(&format!(r#"[{{"fd":{fd},"path":"/srv/a.img"}}]"#)).unwrap();
        assert!(table.take_tap("a").is_none());
        assert!(table.take_path(Path::new("/srv/a.img")).is_some());
        assert!(table.take_path(Path::new("/srv/a.img")).is_none());
    }

    #[test]
    fn refuses_what_is_not_open_or_malformed() {
        for text in
            ["", "{}", r#"[{"fd":0,"path":"/x"}]"#, r#"[{"fd":99999,"tap":"x"}]"#, r#"[{"fd":3,"x":1}]"#]
        {
            assert!(Inherited::parse(text).is_err(), "{text}");
        }
    }
}
