//! Listening sockets that outlive the daemon: owns its side of systemd's descriptor store (`FileDescriptorStoreMax=`, sd_notify(3)).
//! While the daemon is restarted systemd holds the sockets, so that clients queue in them instead of being refused.
//!
//! Used by main (what was kept comes at the start of the process) and by the QMP proxies.
//!
//! ```text
//!   put ──▶ stored ──daemon ends, comes back──▶ waiting ──take──▶ stored
//!              │                                   │
//!              └──────────── forget ───────────────┴──clear──▶ gone
//! ```
//!
//! A socket goes by the inode of its file: that says at the same time whether the file still leads to this socket. Names are short because
//! all of them come back in one environment variable, of which the kernel takes 128 KiB.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use sd_notify::NotifyState;
use tracing::{debug, warn};

/// See the module.
#[derive(Debug, Default)]
pub struct Shelf {
    /// There is a systemd to keep something.
    there: bool,
    /// What was kept over the restart and is not taken yet.
    waiting: Mutex<HashMap<String, OwnedFd>>,
}

fn name_of(inode: u64) -> String {
    format!("q{inode:x}")
}

impl Shelf {
    /// A shelf that keeps nothing: no systemd, or not its business.
    #[must_use]
    pub fn none() -> Shelf {
        Shelf::default()
    }

    /// What systemd kept for this process. Call it once, first of all: the descriptors are this process's from its start.
    #[must_use]
    pub fn of_this_process() -> Shelf {
        let mut waiting = HashMap::new();
        match sd_notify::listen_fds_with_names() {
            Ok(kept) => {
                for (number, name) in kept {
                    // SAFETY: systemd opened these numbers for this process (sd_listen_fds(3) checks its pid); nobody else has taken
                    // them, because this is called once and first.
                    waiting.insert(name, unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            Err(error) => debug!("no sockets were kept: {error}"),
        }
        Shelf { there: std::env::var_os("NOTIFY_SOCKET").is_some(), waiting: Mutex::new(waiting) }
    }

    /// The socket whose file has this inode, if it was kept. It stays stored.
    pub fn take(&self, inode: u64) -> Option<OwnedFd> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&name_of(inode))
    }

    /// Stores a socket; says whether it will outlive the daemon.
    pub fn put(&self, inode: u64, socket: BorrowedFd<'_>) -> bool {
        if !self.there {
            return false;
        }
        let name = name_of(inode);
        let stored =
            sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[socket]);
        stored.inspect_err(|error| warn!("a socket will not outlive the daemon: {error}")).is_ok()
    }

    /// Stores a socket no longer.
    pub fn forget(&self, inode: u64) {
        self.remove(&name_of(inode));
    }

    /// Forgets what nobody took: its VM is no more.
    pub fn clear(&self) {
        let rest = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for name in rest.keys() {
            self.remove(name);
        }
    }

    fn remove(&self, name: &str) {
        if self.there
            && let Err(error) = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
        {
            warn!("a stored socket stays behind: {error}");
        }
    }
}
